# SPDX-License-Identifier: Apache-2.0
"""What a step keeps where, on eight devices."""

import contextlib

import jax
import numpy as np
import pytest

from apollo_jax import sharding
from apollo_jax.checkpoints import manager
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import state, step
from apollo_jax.training.rows import place
from data_pipeline.batch import Batch, empty_batch

B, L = 8, 32
RATES = "optimizer.learning_rates."


def random_batch(seed: int) -> Batch:
    """Text alone, targets on the second half of every row."""
    rng = np.random.default_rng(seed)
    b = empty_batch(B, L, 0, 4, 32)
    b.tokens[:], b.targets[:] = rng.integers(0, 512, (2, B, L))
    b.loss_weights[:, L // 2 :] = 1.0
    b.positions[:], b.segment_ids[:] = np.arange(L), 1
    return b


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(data=2, fsdp=4))


@pytest.fixture(scope="module")
def trained(experiment, mesh):
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
                now, _ = program.train_step(now, place(random_batch(seed), mesh))
        return program, now

    return trained


def test_moments_in_host_memory_change_no_bit(trained, mesh, tmp_path):
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
        after, _ = program.train_step(restored, place(random_batch(2), mesh))
    assert int(after.step) == 3


def saved_and_restored(now: state.TrainState, abstract: state.TrainState, folder):
    with contextlib.closing(manager.Checkpoints(folder)) as checkpoints:
        checkpoints.save(2, now, {})
    with contextlib.closing(manager.Checkpoints(folder)) as checkpoints:
        found = checkpoints.restore(abstract)
    assert found is not None
    return found[1]
