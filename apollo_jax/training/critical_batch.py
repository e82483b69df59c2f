# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax critical-batch`: how large a batch may be from a checkpoint on, found by branching.

Forks of the run go on from its checkpoint (weights, moments, data) with other numbers of
microbatches to an update, over the same rows, at the rate that the run had there times a rule. The
critical batch is the largest such that no fork from the best one up to it loses more than a
tolerance against the best (branched training: Merrill et al. 2025, arXiv 2505.23971).
"""

import argparse
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from apollo_jax.checkpoints import manager, run
from apollo_jax.config import Experiment
from apollo_jax.config_values import from_dict, override, parse_overrides, to_config
from apollo_jax.training.optimizer import Batches, make_schedules
from apollo_jax.training.train import train
from data_pipeline.tokenizer import Tokenizer

RESULTS = "critical_batch.json"
TAIL = 4  # the loss is that of the last 1/TAIL of the window
console = Console()


class Fork(NamedTuple):
    """A run from the checkpoint on."""

    microbatches: int
    experiment: Experiment
    folder: Path


def main(argv: list[str]) -> None:
    """Fork a run at a checkpoint with several batches; say which is the largest that costs nothing.

    The same command continues: forks that are done are not repeated.
    """
    parser = argparse.ArgumentParser(
        "apollo-jax critical-batch",
        description=main.__doc__,
        epilog="Fields of the run's config can be set, its paths say: --config.data.tokenizer=PATH",
    )
    parser.add_argument("--workdir", required=True, type=Path, help="the run to fork")
    parser.add_argument("--output", required=True, type=Path, help="forks and results go there")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the latest)")
    parser.add_argument("--batches", default="1,2,4,8", help="microbatches to an update")
    parser.add_argument("--tokens", required=True, type=int, help="positions that each fork sees")
    parser.add_argument("--rule", choices=("none", "linear", "sqrt"), default="sqrt")
    parser.add_argument("--tolerance", type=float, default=0.01, help="nats above the best loss")
    args, rest = parser.parse_known_args(argv)
    config = to_config(run.read_experiment(args.workdir))
    for name, text in parse_overrides(rest).items():
        override(config, name, text)
    experiment = from_dict(Experiment, config.to_dict())
    batches = sorted({int(b) for b in args.batches.split(",") if b.strip().isdigit() and int(b)})
    if len(batches) < 2:
        raise ValueError(
            f"--batches {args.batches}: at least two numbers of microbatches, as 1,2,4"
        )
    step = args.step or int(run.latest_weights(args.workdir).parent.name)
    checkpoint = args.workdir / run.CHECKPOINTS / f"{step:08d}"
    if not checkpoint.is_dir():
        known = sorted(int(p.name) for p in checkpoint.parent.iterdir() if p.name.isdigit())
        there = ", ".join(map(str, known))
        raise ValueError(f"--step {step}: {args.workdir} has checkpoints of {there}")
    forks = [
        Fork(b, forked(experiment, step, b, batches, args.tokens, args.rule), args.output / f"x{b}")
        for b in batches
    ]
    said = {"run": str(args.workdir.absolute()), "step": step, "tokens": args.tokens}
    results = Results(args.output / RESULTS, said | {"rule": args.rule})
    for fork in forks:
        if str(fork.microbatches) not in results.forks:
            results.add(fork, run_fork(fork, checkpoint, args.workdir / run.TOKENIZER))
    ramp = before(experiment, step)
    found = summary([results.forks[str(b)] for b in batches], args.tolerance, ramp, step)
    results.write(found)
    report(results.forks, found)


def before(experiment: Experiment, step: int) -> tuple[tuple[int, int], ...]:
    """The pieces of the run's ramp up to `step`."""
    return tuple(piece for piece in experiment.train.ramp.pieces if piece[0] < step)


def forked(
    e: Experiment, step: int, microbatches: int, batches: list[int], tokens: int, rule: str
) -> Experiment:
    """The experiment of a fork. ValueError for a window that is too small, or a rate of 0."""
    rows, ramp = e.data.batch_size, e.train.ramp
    unit = math.lcm(*batches)
    window = tokens // (rows * e.data.length) // unit * unit  # microbatches, for all forks alike
    if window < TAIL * max(batches):
        least = -(-TAIL * max(batches) // unit) * unit * rows * e.data.length
        raise ValueError(
            f"--tokens {tokens} are {window} microbatches of {rows} x {e.data.length} for each "
            f"fork; {TAIL} updates of the largest batch need {least}"
        )
    schedules = make_schedules(e.optimizer, e.train.num_steps, Batches(rows, ramp))
    now = {name: float(rate(jnp.int32(step))) for name, rate in schedules.items()}
    if not all(rate > 0 for rate in now.values()):
        raise ValueError(f"at step {step} a rate is 0 ({now}): fork an earlier checkpoint, --step")
    optimizer = replace(
        e.optimizer,
        learning_rates=replace(e.optimizer.learning_rates, **now),
        schedule="constant",
        warmup_ratio=0.0,
        rate_rule=rule,
        base_batch=0 if rule == "none" else rows * ramp.at(step),  # what it would have gone on with
    )
    loop = replace(
        e.train,
        num_steps=step + window // microbatches,
        accumulate=1,
        batch_ramp=(*before(e, step), (step, microbatches)),
        noise_scale=False,
        noise_scale_norms=False,
        log_every=1,
        checkpoint_every=max(1, window // microbatches // 4),
        keep=1,
    )
    evaluation = replace(e.evaluation, every=0)
    name = f"{e.name}-x{microbatches}"
    return replace(e, name=name, optimizer=optimizer, train=loop, evaluation=evaluation)


def run_fork(fork: Fork, checkpoint: Path, tokenizer: Path) -> float:
    """Train it to its end, or go on with it; its loss over the last part of the window."""
    if not run.is_run(fork.folder):
        shutil.rmtree(fork.folder, ignore_errors=True)
        into = fork.folder / run.CHECKPOINTS / checkpoint.name
        shutil.copytree(checkpoint, into, copy_function=_linked)
        manager.write_run(fork.folder, fork.experiment, Tokenizer.from_path(tokenizer))
    if not train(fork.experiment, fork.folder):
        raise ValueError(f"{fork.folder} was stopped; the same command goes on with it")
    lines = [json.loads(s) for s in (fork.folder / "metrics.jsonl").read_text().splitlines()]
    first = int(checkpoint.name)
    updates = fork.experiment.train.num_steps - first
    tail = [line for line in lines if line["step"] > first + updates - updates // TAIL]
    shutil.rmtree(fork.folder / run.CHECKPOINTS)  # what it is for is known
    weight = sum(line["target_tokens"] for line in tail)
    return sum(line["loss"] * line["target_tokens"] for line in tail) / weight


def _linked(source: str, target: str) -> None:
    """Checkpoints are never written to again, so their files may be shared."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class Results:
    """The file of results; what it holds already is not done again."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings, self.forks = path, settings, {}
        if path.exists():
            held = json.loads(path.read_text())
            wrong = [f"{k} {held.get(k)}, now {v}" for k, v in settings.items() if held.get(k) != v]
            if wrong:
                raise ValueError(f"{path} is of {'; '.join(wrong)}: take another --output")
            self.forks = held["forks"]

    def add(self, fork: Fork, loss: float) -> None:
        """Take a fork's loss."""
        rows, first = fork.experiment.data.batch_size * fork.microbatches, self.settings["step"]
        updates = fork.experiment.train.num_steps - first
        found = dict(microbatches=fork.microbatches, rows=rows, updates=updates, loss=loss)
        self.forks[str(fork.microbatches)] = found
        self.write({})

    def write(self, found: dict[str, Any]) -> None:
        """All of it, at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(
            json.dumps({**self.settings, "forks": self.forks, **found}, indent=1) + "\n"
        )
        os.replace(temporary, self.path)


def summary(
    forks: list[dict[str, Any]], tolerance: float, ramp: tuple[tuple[int, int], ...], step: int
) -> dict[str, Any]:
    """The critical batch among forks from small to large, and the ramp that goes on with it.

    The best loss is that of any fork; a fork too small to reach it is no reason to stop.
    """
    best = min(fork["loss"] for fork in forks)
    where = next(i for i, fork in enumerate(forks) if fork["loss"] == best)
    critical = forks[where]
    for fork in forks[where:]:
        if fork["loss"] > best + tolerance:
            break
        critical = fork
    pieces = [*ramp, (step, critical["microbatches"])]
    return {
        "tolerance": tolerance,
        "critical_rows": critical["rows"],
        "critical_microbatches": critical["microbatches"],
        "at_least": critical is forks[-1],  # no fork was too large
        "batch_ramp": ",".join(f"{first}:{count}" for first, count in pieces),
    }


def report(forks: dict[str, dict[str, Any]], found: dict[str, Any]) -> None:
    """The table, and what to do with it."""
    table = Table("microbatches", "rows", "updates", "loss", "above the best")
    best = min(fork["loss"] for fork in forks.values())
    for fork in sorted(forks.values(), key=lambda fork: fork["rows"]):
        cells = (str(fork[name]) for name in ("microbatches", "rows", "updates"))
        table.add_row(*cells, f"{fork['loss']:.4f}", f"{fork['loss'] - best:.4f}")
    console.print(table)
    more = " or more: no fork was too large" if found["at_least"] else ""
    console.print(
        f"critical batch: {found['critical_rows']} rows{more}; go on with "
        f"--config.train.batch_ramp={found['batch_ramp']}",
        soft_wrap=True,
        highlight=False,
    )
