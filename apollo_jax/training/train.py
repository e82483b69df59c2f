# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax train`: from an Experiment to a folder with its checkpoints. See `_loop`."""

import argparse
import contextlib
import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from apollo_jax import sharding
from apollo_jax.checkpoints import manager
from apollo_jax.config import Experiment, load, parse_overrides
from apollo_jax.training import agreement, checks, losses, stages
from apollo_jax.training.agreement import Feed
from apollo_jax.training.metrics import MetricLog
from apollo_jax.training.rows import agree, place, share
from apollo_jax.training.state import TrainState, create
from apollo_jax.training.step import Program, build
from apollo_jax.training.weights import initial_weights
from data_pipeline.loader import DataConfig, Loader

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
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        default=os.environ.get("APOLLO_DISTRIBUTED"),
        metavar="HOST:PORT,COUNT,INDEX",
        help="this is one of many processes; found out by itself on TPU pods, GKE and SLURM",
    )
    args, rest = parser.parse_known_args(argv)
    experiment = load(args.config, parse_overrides(rest))
    if args.distributed:
        _join(args.distributed)
    train(experiment, args.workdir)


def _join(how: str) -> None:
    if how == "auto":
        return jax.distributed.initialize()
    try:
        address, count, index = how.split(",")
        jax.distributed.initialize(address, int(count), int(index))
    except ValueError:
        raise ValueError(f"--distributed {how}: must be HOST:PORT,COUNT,INDEX or auto") from None


def train(experiment: Experiment, workdir: Path) -> bool:
    """Train to the end or to a stop signal; True if all steps are done.

    Raises ValueError or FileNotFoundError, before `workdir` is touched, for a config, data or
    starting weights that do not fit.
    """
    tokenizer = checks.tokenizer_of(experiment)
    begun = checks.continues(experiment, workdir)
    mesh = sharding.make_mesh(experiment.mesh)
    checks.layout(experiment, mesh.shape)
    loader = _open_loader(experiment.data, experiment.train.num_steps, mesh)
    console.quiet = jax.process_index() != 0
    with contextlib.closing(loader), jax.set_mesh(mesh):
        program = build(experiment, mesh)
        checks.memory(experiment, program.abstract, mesh.shape)
        shapes = {**program.abstract.params, **program.abstract.frozen}
        console.print(stages.start_up_table(shapes, experiment.optimizer.learning_rates))
        step, state, data = _start(experiment, workdir if begun else None, program)
        if data is not None:
            loader.set_state(data)
        multihost_utils.sync_global_devices("all have seen what the folder held")
        manager.write_run(workdir, experiment, tokenizer)
        run = Run(experiment, workdir, mesh, program, loader)
        return _loop(run, step, state)


class Run(NamedTuple):
    """What stays the same from step to step."""

    experiment: Experiment
    workdir: Path
    mesh: Mesh
    program: Program
    loader: Loader


def _loop(run: Run, start: int, state: TrainState) -> bool:
    """Evaluate -> save (with the iterator) -> next batch -> step -> the previous step's metrics."""
    train, every = run.experiment.train, run.experiment.evaluation.every
    done = stopped = False
    feed = Feed(run.loader, share(run.mesh))
    with contextlib.ExitStack() as stack:
        log = MetricLog(
            run.workdir,
            start=start,
            num_steps=train.num_steps,
            every=train.log_every,
            sources=list(run.experiment.data.sources),
            max_bad_share=run.experiment.data.max_bad_share,
        )
        checkpoints = manager.Checkpoints(run.workdir, keep=train.keep)
        for resource in (log, checkpoints):
            stack.enter_context(contextlib.closing(resource))
        stop = stack.enter_context(StopSignal())
        for step in range(start, train.num_steps + 1):
            done, stopped = step == train.num_steps, stop.requested(step)
            if every and step > start and (done or step % every == 0):
                log.agree()
                log.write(step, _evaluate(run, state))
            if step > start and (done or stopped or step % train.checkpoint_every == 0):
                log.agree()
                agree(feed.mine, feed.digest)
                checkpoints.save(step, state, run.loader.get_state())
            if done or stopped:
                break
            began = time.perf_counter()
            rows, stats = next(feed)
            waited = time.perf_counter() - began
            state, metrics = run.program.train_step(state, place(rows, run.mesh))
            log.push(step + 1, metrics, stats, waited, feed.error)
        console.print(log.summary(), soft_wrap=True, markup=False, highlight=False)
    what = "trained" if done else "stopped on a signal, saved; the same command continues"
    console.print(f"{run.workdir}: {what}, {step} of {train.num_steps} steps")
    return done


def _start(
    experiment: Experiment, begun: Path | None, program: Program
) -> tuple[int, TrainState, dict[str, Any] | None]:
    """(step, state, data iterator's state) of the latest checkpoint in `begun`, or at first."""
    if begun is not None:
        with contextlib.closing(manager.Checkpoints(begun)) as checkpoints:
            found = checkpoints.restore(program.abstract)
        if found is not None:
            console.print(f"continuing {begun} after step {found[0]}")
            return found
    shapes = {**program.abstract.params, **program.abstract.frozen}
    weights, origin = initial_weights(experiment, shapes)
    console.print(f"starting {experiment.name} with weights: {origin}")
    return 0, create(weights, program.abstract, program.tx), None


def _evaluate(run: Run, state: TrainState) -> dict[str, float]:
    """Loss and accuracy over the first batches of the held-out sources."""
    evaluation = run.experiment.evaluation
    data = dataclasses.replace(run.experiment.data, sources=evaluation.sources)
    total = None
    with contextlib.closing(_open_loader(data, evaluation.batches, run.mesh)) as loader:
        feed, counts, latest = Feed(loader, share(run.mesh)), np.zeros(2, np.int32), ""
        for _ in range(evaluation.batches):
            rows, stats = next(feed)
            counts += (len(stats.bad), stats.samples + len(stats.bad))
            latest = ": ".join(stats.bad[-1]) if stats.bad else latest
            sums = run.program.eval_step(state, place(rows, run.mesh))
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        agreement.stop_if_any(feed.error)
        bad, seen = np.asarray(agreement.total(counts)).tolist()
        agreement.stop_if_too_many(bad, seen, data.max_bad_share, latest)
    assert total is not None
    loss, accuracy = losses.mean(total)
    return {"eval/loss": float(loss), "eval/accuracy": float(accuracy)}


def _open_loader(data: DataConfig, num_steps: int, mesh: Mesh) -> Loader:
    """This process's loader; ValueError in all processes if one of them cannot open its data."""
    mine = share(mesh)
    loader, error = None, ""
    try:
        loader = Loader(
            data, num_steps=num_steps, process_index=mine.index, process_count=mine.count
        )
    except (ValueError, OSError) as failure:
        if jax.process_count() == 1:
            raise
        error = str(failure) or repr(failure)
    agreement.stop_if_any(error)
    assert loader is not None
    return loader


class StopSignal:
    """SIGTERM or Ctrl-C ask the loop to stop after this step; a second one ends it at once."""

    def __init__(self):
        self.received = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        # Many processes must stop after the same step: there jax's own service listens.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = True
        console.print(f"\n{signal.Signals(number).name}: saving after this step, then stopping")
        self._restore()

    def requested(self, step: int) -> bool:
        """Whether to stop before `step`; the same answer in all processes."""
        if jax.process_count() == 1:
            return self.received
        return multihost_utils.reached_preemption_sync_point(step)

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exc: object) -> None:
        self._restore()
