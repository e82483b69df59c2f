# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax train`: from an Experiment to a folder with its checkpoints. See `loop`."""

import argparse
import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from apollo_jax import sharding
from apollo_jax.checkpoints import local_tier, manager
from apollo_jax.config import Experiment, load
from apollo_jax.config_values import parse_overrides
from apollo_jax.training import agreement, checks, processes, stages
from apollo_jax.training.agreement import Feed
from apollo_jax.training.answers import open_answers
from apollo_jax.training.boards import evaluated, find_wandb, open_boards
from apollo_jax.training.goodput import Goodput
from apollo_jax.training.guard import Guard
from apollo_jax.training.held_out import check_held_out, evaluate
from apollo_jax.training.loading import open_loader, records_of, resume
from apollo_jax.training.meeting import meet
from apollo_jax.training.metrics import MetricLog
from apollo_jax.training.noise_scale import NoiseScale
from apollo_jax.training.optimizer import Batches, rates_by_batch
from apollo_jax.training.profiling import Tracer, listen
from apollo_jax.training.ramp import left_out
from apollo_jax.training.rows import agree, place, share
from apollo_jax.training.shared_folder import refuse_apart
from apollo_jax.training.state import Arrays, TrainState, create
from apollo_jax.training.step import Metrics, Program, build
from apollo_jax.training.stop_signal import StopSignal
from apollo_jax.training.throughput import Throughput, peak_seconds
from apollo_jax.training.weights import initial_weights, located
from data_pipeline.batch import Batch
from data_pipeline.load_stats import LoadStats, together
from data_pipeline.loader import Loader

console = Console()


def main(argv: list[str]) -> None:
    """Train as a config file says; the same command continues an interrupted run."""
    parser = argparse.ArgumentParser(
        "apollo-jax train",
        description=main.__doc__,
        epilog="Any field of the config can be set: --config.train.num_steps=100",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]")
    parser.add_argument("--workdir", required=True, type=Path)
    processes.add_flag(parser)
    args, rest = parser.parse_known_args(argv)
    listen()
    experiment = load(args.config, parse_overrides(rest))
    if args.distributed:
        processes.join(args.distributed, experiment)
    with processes.parting():
        train(experiment, args.workdir)


def train(experiment: Experiment, workdir: Path) -> bool:
    """Train to the end or to a stop signal; True if all steps are done.

    Raises ValueError or FileNotFoundError, before `workdir` is touched, for a config, data or
    starting weights that do not fit.
    """
    goodput = Goodput()
    find_wandb(experiment.train.wandb)  # or say so now
    table = experiment.model.llm.vocab_size
    tokenizer = checks.tokenizer_of(experiment, table, "model.llm.vocab_size")
    begun = checks.continues(experiment, workdir)
    experiment = located(experiment, workdir, begun)
    mesh = sharding.make_mesh(experiment.mesh)
    checks.layout(experiment, mesh.shape)
    ramp = experiment.train.ramp
    loader = open_loader(experiment.data, experiment.train.num_steps, mesh, ramp)
    seconds = experiment.train.join_seconds
    processes.same("data", loader.get_state()["data"], seconds)
    check_held_out(experiment, mesh)
    refuse_apart(workdir, seconds)
    processes.same("begun", {f"whether {workdir} holds the run": begun}, seconds)
    console.quiet = jax.process_index() != 0
    needs = peak_seconds(experiment)
    with contextlib.closing(loader), jax.set_mesh(mesh):
        program = build(experiment, mesh)
        checks.memory(experiment, program.abstract, mesh.shape)
        shapes = {**program.abstract.params, **program.abstract.frozen}
        console.print(stages.start_up_table(shapes, experiment.optimizer.learning_rates))
        batches = Batches(experiment.data.batch_size, ramp)
        late = left_out(experiment.train.batch_ramp, experiment.train.num_steps)
        for line in (*late, *rates_by_batch(experiment.optimizer, batches)):
            console.print(line, soft_wrap=True, highlight=False)
        with goodput.during("checkpoint" if begun else "start"):
            first = partial(initial_weights, experiment, shapes)
            tier = local_tier.open_tier(experiment.train, workdir, mesh, program.abstract, begun)
            held = workdir if begun else None
            step, state, saved = start(experiment, held, program, first, tier)
        if saved is not None:
            resume(loader, saved, ramp, step)
        meet()  # all have seen what the folder held
        manager.write_run(workdir, experiment, tokenizer)
        judged = None if saved is None else saved.get("guard")
        guard = Guard(experiment.train, workdir, records_of(loader, ramp), judged)
        noise = NoiseScale(None if saved is None else saved.get("noise"))
        run = Run(experiment, workdir, mesh, program, loader, guard, goodput, noise, tier, needs)
        return loop(run, step, state)


class Run(NamedTuple):
    """What stays the same from step to step."""

    experiment: Experiment
    workdir: Path
    mesh: Mesh
    program: Program
    loader: Loader
    guard: Guard
    goodput: Goodput
    noise: NoiseScale
    tier: local_tier.LocalTier | None
    needs: float = 0.0  # seconds of a microbatch at the devices' peak, see throughput.py


def loop(run: Run, start: int, state: TrainState) -> bool:
    """Save (with the iterator) -> evaluate -> update -> the previous update's metrics.

    A run that ended between the two evaluates when it is continued.
    """
    train, every = run.experiment.train, run.experiment.evaluation.every
    done = stopped = False
    feed = Feed(run.loader, share(run.mesh))
    owed = bool(start and every) and agreement.first(not evaluated(run.workdir, start))
    with contextlib.ExitStack() as stack:
        boards = open_boards(run.experiment, run.workdir, start)
        log = MetricLog(
            run.workdir,
            start=start,
            num_steps=train.num_steps,
            every=train.log_every,
            sources=list(run.experiment.data.sources),
            max_bad_share=run.experiment.data.max_bad_share,
            guard=run.guard,
            goodput=run.goodput,
            noise=run.noise,
            boards=boards,
            throughput=Throughput(run.goodput, start, feed.mine.count, train.ramp, run.needs),
        )
        answers = open_answers(run.experiment, run.workdir, run.mesh, start - owed)
        checkpoints = manager.Checkpoints(run.workdir, keep=train.keep)
        tier = run.tier
        for resource in (log, checkpoints, tier):
            if resource is not None:
                stack.enter_context(contextlib.closing(resource))
        stack.push(processes.leave)
        stop = stack.enter_context(StopSignal(console))
        tracer = stack.enter_context(Tracer(run.workdir, train.profile, console))
        during = run.goodput.during
        stack.enter_context(during("compile"))
        _compile_ahead(run, start)
        stack.enter_context(during("step"))
        # A run that came from the local tier, or may want to go back, begins with a checkpoint.
        latest = checkpoints.latest()
        begins = start > latest or (train.on_nonfinite == "rewind" and not latest)
        begins = agreement.first(begins)
        for step in range(start, train.num_steps + 1):
            done, stopped = step == train.num_steps, stop.requested(step)
            due = every and (done or (step % every == 0 and not stopped))
            evaluates = due and (step > start or owed)
            saves = done or stopped or step % train.checkpoint_every == 0
            saves = begins if step == start else saves
            between = step > start and step % train.local_every == 0
            to = checkpoints if saves else tier if between else None
            if evaluates or to is not None:
                log.agree()
                state = _judged(run, step, state, log, checkpoints)
            if to is not None:
                agree(feed.mine, feed.digest)
                with during("checkpoint"):
                    judged = {"guard": run.guard.state(), "noise": run.noise.state()}
                    to.save(step, state, run.loader.get_state() | judged)
            if evaluates:
                with during("evaluation"):
                    found = evaluate(run.experiment, run.mesh, run.program.eval_step, state)
                    if answers is not None:
                        answers.write(step, state, boards)
                    boards.write(step, found)
            checkpoints.check()
            if tier is not None:
                tier.check()
            if done or stopped:
                break
            with during("compile" if step == start else "step"), tracer.step(step + 1, state):
                state, metrics, stats, waited = _update(run, step, state, feed)
            log.push(step + 1, metrics, stats, waited, feed.error)
            state = _judged(run, step + 1, state, log, checkpoints)
        with during("checkpoint"):
            checkpoints.close()
            if done and tier is not None:
                tier.forget()
        for line in (log.summary(), run.goodput.line()):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    what = "trained" if done else "stopped on a signal, saved; the same command continues"
    console.print(f"{run.workdir}: {what}, {step} of {train.num_steps} steps")
    return done


def _update(
    run: Run, step: int, state: TrainState, feed: Feed
) -> tuple[TrainState, Metrics, LoadStats, float]:
    """(next state, metrics, what its microbatches held, seconds that the loop waited for them)."""
    train, program, parts, waited = run.experiment.train, run.program, [], 0.0

    def load() -> Batch:
        nonlocal waited
        began = time.perf_counter()
        with run.goodput.during("data"):
            rows, stats = next(feed)
        waited += time.perf_counter() - began
        parts.append(stats)
        return place(rows, run.mesh)

    accumulated = sums = None
    for _ in range(train.ramp.at(step) - 1):
        accumulated = program.add(state, load(), accumulated)
        jax.block_until_ready(sums)  # the devices hold two batches at most
        sums = accumulated.sums
    batch = load()
    limits = run.guard.limits(step + 1) if train.on_nonfinite == "skip" else None
    state, metrics = program.train_step(state, batch, limits, accumulated)
    jax.block_until_ready(sums)
    return state, metrics, together(parts), waited


def _compile_ahead(run: Run, start: int) -> None:
    """All programs of a ramp: what a later one has no memory for is said before the first update.

    A run without a ramp compiles with its first update.
    """
    ramp, program = run.experiment.train.ramp, run.program
    counts = {ramp.at(start)} | {count for first, count in ramp.pieces if first > start}
    if len(counts) > 1:
        batch = place(run.loader.empty(), run.mesh)
        program.lower_add(batch).compile()
        for accumulated in {count > 1 for count in counts}:
            program.lower(batch, accumulated).compile()


def _judged(
    run: Run, step: int, state: TrainState, log: MetricLog, checkpoints: manager.Checkpoints
) -> TrainState:
    """The state to go on with after `step`: the last checkpoint's, if the guard wants to go back.

    Steps in between were taken from it: their batches are stepped over, and what was found out
    about them since is not judged again.
    """
    if not run.guard.rewind:
        return state
    like = state.step.sharding
    with run.goodput.during("checkpoint"):
        checkpoints.wait()
        jax.tree.map(lambda array: array.delete(), state)  # there is no memory for two
        found = checkpoints.restore(run.program.abstract)
    assert found is not None, "a run that may rewind begins with a checkpoint"
    log.judged, run.guard.rewind = step, False
    console.print(f"parameters and moments of step {found[0]}, going on after step {step}")
    return found[1]._replace(step=jax.device_put(np.int32(step), like))


def start(
    experiment: Any,
    begun: Path | None,
    program: Program,
    first: Callable[[], tuple[Arrays, str]],
    tier: local_tier.LocalTier | None = None,
) -> tuple[int, TrainState, dict[str, Any] | None]:
    """(step, state, data iterator's state) of the latest checkpoint in `begun`, or at first.

    One that `tier` has goes before older ones.
    `first` gives the weights then, and says where they are from.
    """
    if begun is not None:
        found, where, local = None, "", 0 if tier is None else tier.latest()
        with contextlib.closing(manager.Checkpoints(begun)) as checkpoints:
            if local <= checkpoints.latest():
                try:
                    found = checkpoints.restore(program.abstract)
                except ValueError as error:
                    if not local:
                        raise
                    console.print(str(error), style="yellow", soft_wrap=True, markup=False)
            if tier is not None and local > (0 if found is None else found[0]):
                found = None  # there is no memory for two
                found, where = tier.restore(), f" (from {tier.folder})"
                checkpoints.set_aside(local)
            elif found is None and agreement.first(checkpoints.any_torn()):
                raise ValueError(
                    f"{begun} has no checkpoint, only damaged ones in {begun / manager.TORN}: "
                    "bring one back that is whole, or begin again in another --workdir"
                )
        if found is not None:
            console.print(f"continuing {begun} after step {found[0]}{where}", soft_wrap=True)
            return found
    weights, origin = first()
    console.print(f"starting {experiment.name} with weights: {origin}", soft_wrap=True)
    return 0, create(weights, program.abstract, program.tx), None
