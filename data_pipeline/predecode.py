# SPDX-License-Identifier: Apache-2.0
"""Videos and images -> frame shards, once, before training (`apollo-jax predecode`).

The media are cut into shards beforehand (plan.jsonl in the output). Every shard is made whole or
not at all, by this process, by one of many independent tasks (--task) or by a Beam pipeline
(--runner), with the same result; whoever finds all of them made completes the set. Killed at any
moment, the same command continues. What cannot be used goes to quarantine.jsonl with the reason.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from data_pipeline.frame_shard_writer import write_manifest, write_quarantine
from data_pipeline.media_files import find_media
from data_pipeline.predecode_plan import (
    DEFAULTS,
    PLAN,
    Plan,
    PredecodeConfig,
    begin_plan,
    open_plan,
)
from data_pipeline.predecode_progress import PredecodeReport, ProgressDisplay, report
from data_pipeline.predecode_shards import make_shards

RUNNERS = ("direct", "dataflow", "flink", "spark")

# What schedulers call a task's number, from 0, and how many tasks there are.
_TASK_VARIABLES = {
    "SLURM_ARRAY_TASK_ID": "SLURM_ARRAY_TASK_COUNT",
    "JOB_COMPLETION_INDEX": "JOB_COMPLETIONS",  # Kubernetes, whose jobs set the second themselves
    "BATCH_TASK_INDEX": "BATCH_TASK_COUNT",
    "CLOUD_RUN_TASK_INDEX": "CLOUD_RUN_TASK_COUNT",
    "AWS_BATCH_JOB_ARRAY_INDEX": "AWS_BATCH_JOB_ARRAY_SIZE",
}


def predecode(
    source: str | Path | Iterable[str | Path] | None,
    output: str | Path,
    config: PredecodeConfig = DEFAULTS,
    *,
    root: str | Path | None = None,
    progress: bool = True,
    task: tuple[int, int] = (0, 1),
    runner: str | None = None,
    runner_options: Sequence[str] = (),
) -> PredecodeReport:
    """Stores every medium of `source` (see `find_media`) as frame shards in `output`.

    `source` None continues what was planned there. `task` (i, n) makes every n-th shard from the
    i-th. `runner` makes them with Beam (predecode_beam.py). ValueError if `output` was begun with
    other settings or another input, or if too few media could be stored.
    """
    start = time.monotonic()
    plan = plan_job(source, output, config, root=root)
    config = _with_plan(config, plan)
    whole = all(plan.sidecar(shard) for shard in range(len(plan)))
    if whole and "manifest.json" in plan.names():
        return report(plan.name, _sidecars(plan), start)
    mine = range(task[0], len(plan), task[1])
    if runner:
        from data_pipeline.predecode_beam import run_beam

        run_beam(plan, config, runner, runner_options)
    else:
        _make_here(plan, mine, config, progress)
    if unfinished := plan.unfinished():
        own = (sidecar for k in mine if (sidecar := plan.sidecar(k)))
        return report(plan.name, own, start, len(unfinished))
    merge(plan, config)
    return report(plan.name, _sidecars(plan), start)


def plan_job(
    source: str | Path | Iterable[str | Path] | None,
    output: str | Path,
    config: PredecodeConfig = DEFAULTS,
    *,
    root: str | Path | None = None,
) -> Plan:
    """The plan of `output`, made from `source` if there is none; None takes the one there."""
    if source is not None:
        return begin_plan(output, config, find_media(source, root))
    return open_plan(output)


def merge(plan: Plan, config: PredecodeConfig) -> dict[str, Any]:
    """Index, quarantine and manifest of a plan whose shards are all made; returns the manifest.

    May be done again, by several at a time: the result is the same. ValueError if more than
    `config.max_rejected` of the media were rejected.
    """
    try:
        write_quarantine(plan.output, _sidecars(plan))
        _check_rejected(plan, config)
        made_with: dict[str, list[str]] = {}  # machines may differ
        for sidecar in _sidecars(plan):
            for name, version in sidecar["made_with"].items():
                known = made_with.setdefault(name, [])
                known += [] if version in known else [version]
        facts = {"job": plan.job, "plan_sha256": plan.digest, "made_with": made_with}
        return write_manifest(plan.output, config.spec, _sidecars(plan), facts)
    finally:
        plan.publish_set()


def _check_rejected(plan: Plan, config: PredecodeConfig) -> None:
    summary = report(plan.name, _sidecars(plan), time.monotonic())
    rejected, total = sum(summary.quarantined.values()), plan.job["media"]
    if summary.stored and rejected > config.max_rejected * total:
        raise ValueError(
            f"{rejected} of {total} media were rejected, more than the share of "
            f"{config.max_rejected:g} that is tolerated: {summary.quarantined}, see "
            f"{plan.name}/quarantine.jsonl; run again with a larger --max-rejected to accept"
        )


def _make_here(plan: Plan, shards: Sequence[int], config: PredecodeConfig, progress: bool) -> None:
    made = [sidecar for k in shards if (sidecar := plan.sidecar(k))]
    bad = sum(len(sidecar["rejected"]) for sidecar in made)
    done = bad + sum(len(sidecar["media"]) for sidecar in made)
    total = sum(len(plan.media(k)) for k in shards)
    with ProgressDisplay(progress, total, done, bad) as display:
        make_shards(plan, shards, config, display)


def _sidecars(plan: Plan) -> Iterator[dict[str, Any]]:
    for shard in range(len(plan)):
        sidecar = plan.sidecar(shard)
        if sidecar is None:
            raise ValueError(f"{plan.name}: shard {shard} is missing or cut off; run again")
        yield sidecar


def _with_plan(config: PredecodeConfig, plan: Plan) -> PredecodeConfig:
    known = {f.name for f in fields(PredecodeConfig)}
    return replace(config, **{k: v for k, v in plan.job.items() if k in known})


def task_of(text: str) -> tuple[int, int]:
    """'3/8' -> (3, 8), counted from 0; 'auto' asks the scheduler's environment. ValueError."""
    if text == "auto":
        text = _task_of_scheduler()
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"task {text} is not I/N with I from 0 to N - 1, such as 0/8")
    return int(number), int(count)


def _task_of_scheduler() -> str:
    for name, count in _TASK_VARIABLES.items():
        if name in os.environ and count in os.environ:
            number = int(os.environ[name])
            if name.startswith("SLURM"):  # whose numbers may begin and step as one likes
                number -= int(os.environ.get("SLURM_ARRAY_TASK_MIN", 0))
                number //= int(os.environ.get("SLURM_ARRAY_TASK_STEP", 1))
            return f"{number}/{os.environ[count]}"
    known = ", ".join(f"{name} with {count}" for name, count in _TASK_VARIABLES.items())
    raise ValueError(f"--task auto finds none of these in the environment: {known}; say --task I/N")


def main(argv: Sequence[str] | None = None) -> None:
    """`apollo-jax predecode`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    args = vars(parser().parse_args(arguments[:split]))
    known = {f.name for f in fields(PredecodeConfig)}
    given = {k: args.pop(k) for k in list(args) if k in known}
    source, output, root = args["input"], args["output"], args["root"]
    config = PredecodeConfig(**given)
    if source is None:
        config = _with_plan(DEFAULTS, open_plan(output))
        changed = [k for k in given if k in config.planned and given[k] != config.planned[k]]
        if changed:
            raise ValueError(f"{output} is planned with another {', '.join(changed)}")
        config = replace(config, **given)
    if args["plan_only"]:
        plan = plan_job(source, output, config, root=root)
        print(f"{plan.name}/{PLAN}: {plan.job['media']} media in {len(plan)} shards")
        return
    options = arguments[split + 1 :]
    if options and not args["runner"]:
        raise ValueError(
            f"what follows -- is for a Beam runner, and there is no --runner: {options}"
        )
    done = predecode(
        source,
        output,
        config,
        root=root,
        task=task_of(args["task"]),
        runner=args["runner"],
        runner_options=options,
    )
    print(done.text())


def parser() -> argparse.ArgumentParser:
    """Of the command's own arguments."""
    own = argparse.ArgumentParser(
        "apollo-jax predecode",
        description=__doc__,
        epilog="What follows -- is for the Beam runner, such as -- --project=P --region=R.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = own.add_argument

    def setting(name: str, kind: type, text: str) -> None:
        flag = "--" + name.replace("_", "-")
        add(flag, type=kind, help=f"{text} (default {getattr(DEFAULTS, name)})")

    add(
        "--input",
        default=None,
        help="folder, pattern, JSONL, CSV or parquet manifest, or WebDataset tars; paths or URLs. "
        "May be left out to continue",
    )
    add("--output", required=True, help="folder or URL for the frame shards, the same for all")
    add("--root", default=None, help="ids are relative to this folder (default: the input's)")
    setting("fps", float, "stored frames per second")
    setting("size", int, "longest side in pixels")
    setting("quality", int, "of the JPEGs")
    add("--subsampling", help=f"420, 422 or 444 (default {DEFAULTS.subsampling})")
    setting("max_hours", float, "longer videos are quarantined")
    setting("max_pixels", int, "media of larger frames are quarantined")
    setting("shard_bytes", int, "bytes of source files per shard")
    setting("shards", int, "cut into so many shards instead")
    setting("workers", int, "decoding processes, 0: one per CPU")
    setting("stall_seconds", float, "a file without progress for so long is quarantined")
    setting("file_seconds", float, "and one that takes so long in all")
    setting("file_memory", int, "and one that takes so many bytes of memory")
    setting("max_rejected", float, "share of unusable media beyond which the job fails")
    add("--task", default="0/1", help="I/N: make shards I, I+N, ...; auto: as the scheduler says")
    add("--plan-only", action="store_true", default=False, help="stop after planning")
    add("--runner", default=None, choices=RUNNERS, help="make the shards with Apache Beam")
    return own


if __name__ == "__main__":
    main()
