# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax critical-batch`: how large a batch may be from a checkpoint on, found by branching.

Forks of the run go on from its checkpoint (weights, moments, data) with other numbers of
microbatches to an update, over the same rows, at the rate that the run had there times a rule. The
critical batch is the largest such that no fork from the best one up to it loses more than a
tolerance against the best (branched training: Merrill et al. 2025, arXiv 2505.23971). Beside it
stands that of a curve through the losses, see critical_batch_fit.py.

Of several processes all read, decide and train alike; process 0 alone writes, links and deletes.
"""

import argparse
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apollo_jax.checkpoints import manager, run
from apollo_jax.config import Experiment, OptimizerConfig
from apollo_jax.config_values import from_dict, override, parse_overrides, to_config
from apollo_jax.training import processes
from apollo_jax.training.boards import METRICS
from apollo_jax.training.critical_batch_results import RESULTS, TAIL, Results, report, summary
from apollo_jax.training.guard import Diverged
from apollo_jax.training.meeting import meet
from apollo_jax.training.optimizer import Batches, make_schedules
from apollo_jax.training.profiling import listen
from apollo_jax.training.train import train
from data_pipeline.tokenizer import Tokenizer


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
    parser.add_argument(
        "--rule",
        choices=("none", "linear", "sqrt"),
        help="of the forks' rates (default: the run's rate_rule, or sqrt where it has none)",
    )
    parser.add_argument("--tolerance", type=float, default=0.01, help="nats above the best loss")
    processes.add_flag(parser)
    args, rest = parser.parse_known_args(argv)
    listen()
    overrides = parse_overrides(rest)
    config = to_config(run.read_experiment(args.workdir))
    for name, text in overrides.items():
        override(config, name, text)
    experiment = from_dict(Experiment, config.to_dict())
    if args.distributed:
        processes.join(args.distributed, experiment)
    with processes.parting(Diverged):
        study(experiment, args, overrides)


def study(experiment: Experiment, args: argparse.Namespace, overrides: dict[str, str]) -> None:
    """Train the forks that are not done, judge and report.

    Args:
      experiment: of the run, with the fields that `overrides` sets.
      args: of the command.
    """
    batches, rule = numbers(args.batches), rule_of(experiment, args.rule)
    if not 0 <= args.tolerance < math.inf:
        raise ValueError(f"--tolerance {args.tolerance}: nats above the best loss, 0 or more")
    step = args.step
    if step is None:
        step = int(run.latest_weights(args.workdir).parent.name)
    checkpoint = args.workdir / run.CHECKPOINTS / f"{step:08d}"
    if not checkpoint.is_dir():
        known = sorted(int(p.name) for p in checkpoint.parent.iterdir() if p.name.isdigit())
        there = ", ".join(map(str, known))
        raise ValueError(f"--step {step}: {args.workdir} has checkpoints of {there}")
    window = window_of(experiment, batches, args.tokens)
    forks = [
        Fork(b, forked(experiment, step, b, window, rule), args.output / f"x{b}") for b in batches
    ]
    said = {"run": str(args.workdir.absolute()), "step": step, "tokens": args.tokens}
    said |= {"window": window, "rule": rule, "overrides": overrides}
    results = Results(args.output / RESULTS, said)
    flags = {"batches": batches, "tolerance": args.tolerance, "output": str(args.output.absolute())}
    done = {"forks that are done": list(results.forks)}
    processes.same("study", said | flags | done, experiment.train.join_seconds)
    for fork in forks:
        if str(fork.microbatches) not in results.forks:
            tail = run_fork(fork, checkpoint, args.workdir / run.TOKENIZER)
            results.add(fork.microbatches, experiment.data.batch_size, tail, math.lcm(*batches))
    ends = [results.forks[str(b)] for b in batches]
    found = summary(ends, args.tolerance)
    reached, end = run.progress(args.workdir)[1], experiment.train.num_steps
    since = reached if reached < end else step  # it may be further by now
    rates = forks[0].experiment.optimizer
    following = continuation(experiment, rates, since, found["critical_microbatches"])
    results.write(found | {"continue_with": following})
    where = ""
    if since == end:
        where = f"the run has done its {end} updates, and with a larger train.num_steps may "
    elif reached >= end:
        where = (
            f"the run has done its {end} updates; a copy of {args.workdir} without the checkpoints "
            f"after {step} may "
        )
    if jax.process_index() == 0:
        report(ends, found, following, where)


def numbers(text: str) -> list[int]:
    """`--batches`, from small to large. ValueError for what is no number of microbatches."""
    items = [item.strip() for item in text.split(",")]
    wrong = [item for item in items if not (item.isdecimal() and int(item))]
    if wrong:
        raise ValueError(f"--batches {text}: {wrong[0]!r} is no number of microbatches, from 1 on")
    found = sorted(set(map(int, items)))
    if len(found) < 2:
        raise ValueError(f"--batches {text}: at least two numbers of microbatches, as 1,2,4")
    return found


def rule_of(experiment: Experiment, asked: str | None) -> str:
    """The rule of the forks' rates. ValueError where the run, which keeps its own, has another."""
    own = experiment.optimizer.rate_rule
    if own == "none":
        return asked or "sqrt"
    if asked not in (None, own):
        raise ValueError(
            f"--rule {asked}: the run goes on by its own config.optimizer.rate_rule, {own}, at "
            "other rates than such forks have; leave --rule out"
        )
    return own


def before(experiment: Experiment, step: int) -> tuple[tuple[int, int], ...]:
    """The pieces of the run's ramp up to `step`."""
    return tuple(piece for piece in experiment.train.ramp.pieces if piece[0] < step)


def window_of(e: Experiment, batches: list[int], tokens: int) -> int:
    """Microbatches that each fork sees; their last 1/TAIL are whole updates of every fork.

    ValueError for too few tokens.
    """
    common = math.lcm(*batches)
    positions, unit = e.data.batch_size * e.data.length, TAIL * common
    window = tokens // positions // unit * unit
    if window < 1:
        raise ValueError(
            f"--tokens {tokens} are too few: in microbatches of {e.data.batch_size} x "
            f"{e.data.length}, {TAIL} updates of {common} microbatches, of which all batches are "
            f"parts, need {unit * positions}"
        )
    return window


def forked(e: Experiment, step: int, microbatches: int, window: int, rule: str) -> Experiment:
    """The experiment of a fork. ValueError for a rate of 0."""
    rows, ramp = e.data.batch_size, e.train.ramp
    schedules = make_schedules(e.optimizer, e.train.num_steps, Batches(rows, ramp))
    now = {name: float(rate(jnp.int32(step))) for name, rate in schedules.items()}
    if not all(rate > 0 for rate in now.values()):
        raise ValueError(f"at step {step} a rate is 0 ({now}): fork another checkpoint, --step")
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
        profile="",
        wandb="",
    )
    evaluation = replace(e.evaluation, every=0, samples=0)
    name = f"{e.name}-x{microbatches}"
    return replace(e, name=name, optimizer=optimizer, train=loop, evaluation=evaluation)


def run_fork(fork: Fork, checkpoint: Path, tokenizer: Path) -> np.ndarray:
    """Train it to its end, or go on with it.

    Loss and targets f[updates, 2] of the last part of the window; loss NaN where it diverged.
    """
    writes = jax.process_index() == 0
    if writes and not run.is_run(fork.folder):
        shutil.rmtree(fork.folder, ignore_errors=True)
        into = fork.folder / run.CHECKPOINTS / checkpoint.name
        shutil.copytree(checkpoint, into, copy_function=_linked)
        manager.write_run(fork.folder, fork.experiment, Tokenizer.from_path(tokenizer))
    meet()  # the fork is there
    if not run.is_run(fork.folder):
        raise FileNotFoundError(
            f"{fork.folder} is not what process 0 has put there: --output must be on a file system "
            "that all processes share"
        )
    end = fork.experiment.train.num_steps
    last = (end - int(checkpoint.name)) // TAIL
    try:
        done, tail = train(fork.experiment, fork.folder), None
    except Diverged:
        done, tail = True, np.full((last, 2), np.nan)
    if not done:
        raise ValueError(f"{fork.folder} was stopped; the same command goes on with it")
    processes.heeded.clear()
    meet()  # the fork is closed
    if tail is None:
        lines = map(json.loads, (fork.folder / METRICS).read_text().splitlines())
        kept = [(x["loss"], x["target_tokens"]) for x in lines if x["step"] > end - last]
        tail = np.array(kept, float)  # a loss of null becomes NaN
    if writes:
        shutil.rmtree(fork.folder / run.CHECKPOINTS)  # what it is for is known
    return tail


def _linked(source: str, target: str) -> None:
    """Checkpoints are never written to again, so their files may be shared."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def continuation(
    e: Experiment, forks: OptimizerConfig, step: int, microbatches: int
) -> dict[str, str]:
    """Fields with which the run goes on from `step` with other batches, to as many samples in all.

    The schedule stays the same function of samples, and rates follow the rule of the forks. Where
    no samples are left, how many steps there are to be is not said.
    """
    ramp = e.train.ramp
    pieces = (*before(e, step), (step, microbatches))
    left = ramp.before(e.train.num_steps) - ramp.before(step)
    fields = {"train.batch_ramp": ",".join(f"{first}:{count}" for first, count in pieces)}
    if left > 0:
        fields["train.num_steps"] = str(step + math.ceil(left / microbatches))
    if e.train.accumulate > 1:  # the ramp says it now
        fields["train.accumulate"] = "1"
    if len(ramp.pieces) == 1:  # so far updates and samples are the same schedule
        fields["optimizer.schedule_by"] = "samples"
    if e.optimizer.rate_rule == "none" != forks.rate_rule:
        fields["optimizer.rate_rule"] = forks.rate_rule
        fields["optimizer.base_batch"] = str(forks.base_batch)
    return fields
