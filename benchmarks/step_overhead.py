# SPDX-License-Identifier: Apache-2.0
"""What a train step costs in Python beside its arithmetic; the aim is 0.2 ms.

    python benchmarks/step_overhead.py [--rounds 200] [--json F]

Layers are stacked, so the debug model has as many arrays as the released ones (give or take a
projector layer) and the same dispatch. Measured is the CPU time of the calling thread until a call
returns, with nothing under way on the device; medians of rounds in which these take turns:

    step        `train_step` of a stage, as the loop calls it
    jax         a jitted function that only takes in and gives out as many arrays, after a step:
                what jax needs for them while the caches are full of the step's data
    jax, warm   the same called again at once
    batch       placing a batch on the device
    nnx         nnx.jit of an empty step over the same model as a module, for comparison

The overhead of our own is step - jax.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from apollo_jax import sharding
from apollo_jax.config import Experiment, LearningRates, OptimizerConfig, TrainConfig
from apollo_jax.models import apollo
from apollo_jax.training.rows import place
from apollo_jax.training.state import create, random_weights
from apollo_jax.training.step import build
from data_pipeline.batch import empty_batch
from data_pipeline.loader import DataConfig, SourceConfig

STAGES = {
    "align": LearningRates(connector=1e-3),
    "vision": LearningRates(vision_tower=1e-3, connector=1e-3),
    "sft": LearningRates(connector=1e-3, llm=1e-3),
    "all": LearningRates(1e-3, 1e-3, 1e-3),
}
COLUMNS = ("step", "jax", "jax, warm", "batch", "nnx")


def experiment(rates: LearningRates) -> Experiment:
    """The debug model on rows of 16 tokens and one clip."""
    model = apollo.Config.debug()
    data = DataConfig(
        sources={"none": SourceConfig("none")},
        frames=(),
        tokenizer="none",
        batch_size=1,
        length=16,
        clips=1,
        frame_size=model.frame_size,
        tokens_per_clip=model.connector.num_output_tokens,
    )
    train = TrainConfig(num_steps=1000, dtype="float32", frozen_dtype="float32")
    return Experiment("overhead", model, data, train, OptimizerConfig(rates))


def measure(rates: LearningRates, rounds: int) -> tuple[int, dict[str, float]]:
    """(number of arrays in the state, median milliseconds by column)."""
    e = experiment(rates)
    mesh = sharding.make_mesh(e.mesh, jax.devices()[:1])
    rows = empty_batch(1, 16, 1, 4, e.model.frame_size)
    with jax.set_mesh(mesh):
        program = build(e, mesh)
        shapes = {**program.abstract.params, **program.abstract.frozen}
        weights = random_weights(e.model, e.train, shapes, seed=0)
        state = create(weights, program.abstract, program.tx)
        arrays = len(jax.tree.leaves(state))
        batch = place(rows, mesh)

        def step() -> Any:
            nonlocal state
            state, metrics = program.train_step(state, batch)
            return state, metrics

        alone = pass_through(arrays)
        calls = (step, alone, alone, lambda: place(rows, mesh), empty_nnx_step())
        return arrays, dict(zip(COLUMNS, medians(calls, rounds), strict=True))


def pass_through(arrays: int) -> Callable[[], Any]:
    """A call of a jitted function that takes in and gives out `arrays` small arrays."""
    add = jax.jit(lambda xs: [x + 1.0 for x in xs], donate_argnums=0)
    state = [jnp.zeros((8, 8)) for _ in range(arrays)]

    def call() -> Any:
        nonlocal state
        state = add(state)
        return state

    return call


def empty_nnx_step() -> Callable[[], Any]:
    """A call of nnx.jit over the whole model as a module."""
    model = apollo.Apollo(apollo.Config.debug(), rngs=nnx.Rngs(0))
    step = nnx.jit(lambda model, x: x + 1.0)  # noqa: TID251  to measure it
    x = jnp.zeros(())
    return lambda: step(model, x)


def medians(calls: tuple[Callable[[], Any], ...], rounds: int) -> list[float]:
    """Milliseconds of this thread in each call, the calls taking turns."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, taken, strict=True):
            began = time.thread_time()
            result = call()
            times.append((time.thread_time() - began) * 1e3)
            jax.block_until_ready(result)
    return [statistics.median(times[rounds // 10 :]) for times in taken]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Python overhead of a train step, milliseconds")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"{'stage':<8}{'arrays':>8}{'ours':>12}" + "".join(f"{c:>12}" for c in COLUMNS))
    result = {}
    for stage, rates in STAGES.items():
        arrays, found = measure(rates, args.rounds)
        found = {"ours": found["step"] - found["jax"], **found}
        print(f"{stage:<8}{arrays:>8}" + "".join(f"{ms:>12.3f}" for ms in found.values()))
        result[stage] = {"arrays": arrays, "milliseconds": found}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
