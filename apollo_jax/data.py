# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax data {check,show,tfds}`: the data of an experiment, before a chip is paid for."""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from apollo_jax.config import Experiment, load, unset_paths
from apollo_jax.config_values import parse_overrides
from data_pipeline import data_show
from data_pipeline.data_check import WORDS, DataReport, bars, check
from data_pipeline.loader import DataConfig

# A log has no width of its own, and numbers that are cut would say nothing.
console = Console(highlight=False, soft_wrap=True, width=max(110, Console().width))

_LINE_SECONDS = 10.0  # between lines of progress in a log


def main(argv: list[str]) -> None:
    """Check or look at the data of an experiment, or make a TensorFlow Dataset of data."""
    parser = argparse.ArgumentParser("apollo-jax data", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check_parser = commands.add_parser(
        "check",
        help="measure every record: what is missing, wrong, trimmed; the mixture and its packing",
        description="Exits with 1 if training would stop at this data.",
    )
    check_parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    show_parser = commands.add_parser("show", help="one sample as it reaches the model")
    show_parser.add_argument("--source", help="name in config.data.sources (default: the first)")
    show_parser.add_argument("--index", type=int, default=0, help="of the record in its source")
    show_parser.add_argument(
        "--output", type=Path, default=Path("sample.png"), help="picture of its frames"
    )
    tfds_parser = commands.add_parser(
        "tfds", help="conversations and their frame shards as a TensorFlow Dataset"
    )
    tfds_parser.add_argument(
        "--input", required=True, help="folder with SPLIT.jsonl files and frames/, their shards"
    )
    tfds_parser.add_argument("--output", required=True, help="TFDS data_dir to build it in")
    tfds_parser.add_argument(
        "--frames", action="store_true", help="frames too, not only the names of media"
    )
    for command in (check_parser, show_parser):
        command.add_argument("--config", required=True, metavar="FILE[:ARG]")
        command.epilog = "Any field of the config can be set: --config.data.length=4096"
    args, rest = parser.parse_known_args(argv)
    if args.command == "tfds":
        if rest:
            parser.error(f"unknown arguments: {' '.join(rest)}")
        return build_tfds(args.input, args.output, args.frames)
    experiment = load(args.config, parse_overrides(rest))
    unset = [f"--config.{n}=PATH" for n in unset_paths(experiment) if n.startswith("data.")]
    if unset:
        raise ValueError(f"the config leaves paths to you; add {' '.join(unset)}")
    if args.command == "show":
        show(experiment.data, args.source, args.index, args.output)
    else:
        sys.exit(check_all(experiment, args.json))


def check_all(experiment: Experiment, json_path: Path | None = None) -> int:
    """Reports on the training data and the held-out sources; 1 if they would stop a run."""
    reports = {"training": _check(experiment.data, experiment.train.num_steps)}
    if experiment.evaluation.sources:
        held_out = replace(experiment.data, sources=experiment.evaluation.sources)
        reports["held out"] = _check(held_out, experiment.evaluation.batches)
    for title, report in reports.items():
        _print(title, report)
    if json_path:
        text = json.dumps({title: report.as_json() for title, report in reports.items()}, indent=1)
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(text + "\n")
        console.print(f"written to {json_path}", markup=False)
    failures = [line for report in reports.values() for line in report.failures]
    for line in failures:
        console.print(f"[red]fails[/red]: {escape(line)}")
    if not failures:
        console.print("the data will do")
    return int(bool(failures))


def _check(config: DataConfig, num_steps: int) -> DataReport:
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    log = not terminal.is_terminal
    with Progress(*columns, console=terminal, transient=True, disable=log) as progress:
        tasks, printed = {}, time.monotonic()

        def tick(source: str, done: int, records: int) -> None:
            nonlocal printed
            if source not in tasks:
                tasks[source] = progress.add_task(source, total=records)
            progress.update(tasks[source], completed=done)
            if log and time.monotonic() - printed > _LINE_SECONDS:
                printed = time.monotonic()
                print(f"{source}: {done:,} of {records:,} records", file=sys.stderr, flush=True)

        return check(config, num_steps, processes=os.cpu_count() or 1, progress=tick)


def _print(title: str, report: DataReport) -> None:
    console.print(_mixture(title, report))
    for name, source in report.sources.items():
        for outcome, examples in source.examples.items():
            count = source.outcomes[outcome]
            share = count / source.records
            console.print(
                f"{name}: {count:,} of {source.records:,} records ({share:.2%}) {WORDS[outcome]}"
            )
            for example in examples:
                console.print(f"  {example}", markup=False)
    unkept = [name for name, source in report.sources.items() if not (source.kept or source.fault)]
    if unkept:
        console.print(
            f"not kept for the loader: the sizes of {', '.join(unkept)}; config.data.sizes names a "
            "folder for them"
        )
    if not report.samples_per_row:
        return
    drawn = sum(source.drawn for source in report.sources.values())
    console.print(
        f"packing: {report.samples_per_row:.1f} samples to a row fill {report.fill_tokens:.1%} of "
        f"its tokens and {report.fill_clips:.1%} of its clip slots; the run has {report.rows:,} "
        f"rows and about {drawn:,.0f} samples"
    )
    for what in ("tokens", "clips"):
        console.print(f"{what} of a sample")
        console.print("\n".join(bars(getattr(report, f"{what}_histogram"))))


def _mixture(title: str, report: DataReport) -> Table:
    table = Table(
        title=f"{title} (drawn: samples in the run)", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("source")
    for column in ("weight", "records", "dropped", "trimmed", "tokens", "clips", "hours"):
        table.add_column(column, justify="right")
    for column in ("drawn", "epochs"):
        table.add_column(column, justify="right")
    for name, source in report.sources.items():
        table.add_row(
            name,
            f"{source.weight:g}",
            f"{source.records:,}",
            f"{source.dropped:,}",
            f"{source.outcomes.get('trimmed', 0):,}",
            f"{source.tokens:,}",
            f"{source.clips:,}",
            f"{source.hours:,.2f}",
            f"{source.drawn:,.0f}",
            f"{source.epochs:.3g}",
        )
    return table


def show(config: DataConfig, source: str | None, index: int, output: Path) -> None:
    """Prints one sample's text and times, and writes its frames as a picture."""
    shown = data_show.show(config, source, index, output)
    console.print(shown, markup=False)


def build_tfds(source: str, output: str, frames: bool) -> None:
    """Builds the dataset and says by which path configs name it."""
    from data_pipeline import tfds_video_conversations  # TFDS takes most of a second to import

    folder = tfds_video_conversations.build(source, output, frames=frames)
    console.print(f"built {folder}; sources name it tfds:{folder}@SPLIT", markup=False)
