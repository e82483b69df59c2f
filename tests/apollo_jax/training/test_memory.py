# SPDX-License-Identifier: Apache-2.0
"""What a step keeps where, and what it exchanges for parts that do not train; eight devices."""

import contextlib

import jax
import numpy as np
import pytest

from apollo_jax import sharding
from apollo_jax.checkpoints import manager
from apollo_jax.planning import hlo
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import state, step
from apollo_jax.training.rows import place

RATES = "optimizer.learning_rates."


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(data=2, fsdp=4))


@pytest.fixture(scope="module")
def trained(experiment, mesh, random_batch):
    """trained(offload) -> (program, state after two steps of the decoder alone on text)."""

    def trained(offload: bool):
        overrides = {RATES + "connector": "0", "train.offload_optimizer": str(offload)}
        e = experiment(overrides | {"optimizer.warmup_ratio": "0"})
        with jax.set_mesh(mesh):
            program = step.build(e, mesh)
            shapes = {**program.abstract.params, **program.abstract.frozen}
            weights = state.random_weights(e.model, e.train, shapes, e.seed)
            now = state.create(weights, program.abstract, program.tx)
            for seed in range(2):
                now, _ = program.train_step(now, place(random_batch(seed, clips=0), mesh))
        return program, now

    return trained


def test_moments_in_host_memory_change_no_bit(trained, mesh, tmp_path, random_batch):
    (_, here), (program, away) = trained(False), trained(True)
    kinds = {(m.ndim > 0, m.sharding.memory_kind) for m in jax.tree.leaves(away.opt_state)}
    assert kinds == {(True, state.HOST), (False, state.DEVICE)}  # counts stay where they are read
    assert {p.sharding.memory_kind for p in away.params.values()} == {state.DEVICE}
    assert jax.tree.all(jax.tree.map(np.array_equal, here, away))
    restored = saved_and_restored(away, program.abstract, tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, away, restored))
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, program.abstract, restored)
    assert jax.tree.all(same)
    with jax.set_mesh(mesh):  # and it goes on from there
        after, _ = program.train_step(restored, place(random_batch(2, clips=0), mesh))
    assert int(after.step) == 3


def saved_and_restored(now: state.TrainState, abstract: state.TrainState, folder):
    with contextlib.closing(manager.Checkpoints(folder)) as checkpoints:
        checkpoints.save(2, now, {})
    with contextlib.closing(manager.Checkpoints(folder)) as checkpoints:
        found = checkpoints.restore(abstract)
    assert found is not None
    return found[1]


# What gradients are summed with. Parameters are gathered by other means, whether they train or not.
SUMS = ("all-reduce", "reduce-scatter")
STAGES = {
    "align": {"connector": "1e-3", "llm": "0"},
    "vision": {"vision_tower": "1e-3", "connector": "1e-3", "llm": "0"},
}


def summed(experiment, stage: str, random_batch) -> tuple[float, dict[str, int]]:
    """(bytes that a device sends to sum over devices, bytes of each component's gradient)."""
    e = experiment({RATES + name: rate for name, rate in STAGES[stage].items()})
    mesh = sharding.make_mesh(MeshConfig())  # data alone: nothing but gradients is summed
    with jax.set_mesh(mesh):
        program = step.build(e, mesh)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch())
        text = program.lower(shapes).compile().as_text()
    assert text is not None
    totals = hlo.totals(text, dict(mesh.shape))
    sizes: dict[str, int] = {}
    for name, shape in (program.abstract.params | program.abstract.frozen).items():
        component = state.component_of(name)
        sizes[component] = sizes.get(component, 0) + 4 * shape.size
    return sum(c.bytes for c in totals.collectives if c.kind in SUMS), sizes


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parts_exchange_no_gradients(experiment, random_batch, stage):
    """A ring sums n bytes over eight devices by sending 2 * 7/8 * n; beside them only scalars."""
    sent, sizes = summed(experiment, stage, random_batch)
    moving = sum(sizes[name] for name, rate in STAGES[stage].items() if rate != "0")
    assert sent == pytest.approx(2 * 7 / 8 * moving, rel=0.01)
    assert moving < 0.9 * sum(sizes.values())  # so that what is frozen would show
