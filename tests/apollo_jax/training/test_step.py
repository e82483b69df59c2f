# SPDX-License-Identifier: Apache-2.0
"""The train step on the debug model over eight devices: what moves, what may not, any batch."""

import jax
import numpy as np
import pytest

from apollo_jax import sharding
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import losses, state, step
from apollo_jax.training.rows import place
from data_pipeline.batch import Batch, empty_batch

B, L, C = 8, 32, 1  # of random_batch


CONNECTOR_ONLY = {"optimizer.learning_rates.llm": "0", "optimizer.warmup_ratio": "0"}


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def program(experiment, mesh):
    """The alignment stage: the connector trains."""
    return step.build(experiment(CONNECTOR_ONLY), mesh)


@pytest.fixture(scope="module")
def weights(experiment, program, mesh):
    e = experiment(CONNECTOR_ONLY)
    shapes = {**program.abstract.params, **program.abstract.frozen}
    with jax.set_mesh(mesh):
        return jax.device_get(state.random_weights(e.model, e.train, shapes, e.seed))


@pytest.fixture
def start(program, weights, mesh):
    """start(): a fresh state (a step uses up the one it is given)."""
    shapes = {**program.abstract.params, **program.abstract.frozen}

    def start() -> state.TrainState:
        with jax.set_mesh(mesh):
            placed = {n: jax.device_put(w, shapes[n].sharding) for n, w in weights.items()}
            return state.create(placed, program.abstract, program.tx)

    return start


@pytest.fixture
def run(program, mesh, start):
    """run(batches) -> state and metrics after them."""

    def run(batches: list[Batch]):
        now = start()
        with jax.set_mesh(mesh):
            for batch in batches:
                now, metrics = program.train_step(now, place(batch, mesh))
        groups = np.asarray(metrics.pop("by_group"))
        assert groups[:, 1].sum() == metrics["target_tokens"]
        return now, {name: float(value) for name, value in metrics.items()}

    return run


def test_only_what_trains_moves_and_has_moments(run, weights, random_batch):
    after, metrics = run([random_batch(seed) for seed in range(3)])
    assert int(after.step) == 3
    assert {state.component_of(n) for n in after.params} == {"connector"}
    assert all(not np.array_equal(v, weights[n]) for n, v in after.params.items())
    assert all(np.array_equal(v, weights[n]) for n, v in after.frozen.items())
    assert set(after.params) | set(after.frozen) == set(weights)
    paths = jax.tree_util.tree_flatten_with_path(after.opt_state)[0]
    moments = {key.key for path, _ in paths for key in path if hasattr(key, "key")}
    assert moments == set(after.params)
    assert metrics["learning_rate/connector"] > 0
    assert "learning_rate/llm" not in metrics


def test_clipping_sees_only_what_trains(run, weights, random_batch):
    """Adam's first moment after one step is (1 - b1) times the clipped gradient."""
    after, metrics = run([random_batch()])
    moved = {name: np.asarray(value) - weights[name] for name, value in after.params.items()}
    for what, arrays in (("update_norm", moved), ("param_norm", after.params)):
        norm = np.sqrt(sum(float(np.sum(np.square(a))) for a in arrays.values()))
        assert metrics[what] == metrics[f"{what}/connector"] == pytest.approx(norm, rel=1e-4)
    assert not any("llm" in name or "vision" in name for name in metrics)
    assert metrics["grad_norm"] == metrics["grad_norm/connector"] > 0
    (mu,) = (s.mu for s in after.opt_state if hasattr(s, "mu"))
    norm = np.sqrt(sum(float(np.sum(np.square(m))) for m in mu.values()))
    assert norm == pytest.approx(0.1 * min(1.0, metrics["grad_norm"]), rel=1e-4)


def test_frozen_arrays_are_not_used_up(program, mesh, start, random_batch):
    """They may be shared, so a step neither donates nor rewrites them."""
    before = start()
    with jax.set_mesh(mesh):
        after, _ = program.train_step(before, place(random_batch(), mesh))
    assert all(after.frozen[name] is value for name, value in before.frozen.items())
    assert all(value.is_deleted() for value in before.params.values())


def test_the_same_batches_give_the_same_bits(run, random_batch):
    (first, _), (second, _) = (run([random_batch(1), random_batch(2)]) for _ in range(2))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))


def test_text_alone_and_padding_alone(run, weights, random_batch):
    text = random_batch()
    text.visual_index[:], text.clip_mask[:], text.clip_segment_ids[:] = -1, False, 0
    text.frames[:], text.frame_geometry[:] = 0, 0
    after, metrics = run([text, empty_batch(B, L, C, 4, 32)])
    assert metrics["loss"] == metrics["grad_norm"] == metrics["target_tokens"] == 0.0
    assert all(np.isfinite(v).all() for v in after.params.values())
    assert all(np.array_equal(v, weights[n]) for n, v in after.params.items())


def test_a_run_without_clip_slots(program, mesh, start, random_batch):
    with jax.set_mesh(mesh):
        sums = program.eval_step(start(), place(random_batch(clips=0), mesh))
    assert float(sums.weight) == B * L / 2
    assert float(losses.mean(sums)[0]) == pytest.approx(np.log(512), rel=0.2)


def test_the_loss_is_that_of_one_device(experiment, program, mesh, start, weights, random_batch):
    """Rows with few and with many targets: the mean is over the targets of all devices."""
    batch = random_batch()
    batch.loss_weights[:] = np.arange(L) < np.arange(B)[:, None] * 4
    with jax.set_mesh(mesh):
        many = losses.mean(program.eval_step(start(), place(batch, mesh)))
    alone = sharding.make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])
    single = step.build(experiment(CONNECTOR_ONLY), alone)
    with jax.set_mesh(alone):
        params, frozen = jax.device_put(state.split(weights, ("connector",)))
        now = state.TrainState(0, params, frozen, ())
        one = losses.mean(single.eval_step(now, place(batch, alone)))
    np.testing.assert_allclose(many, one, rtol=2e-5)


def test_keeps_every_dtype(experiment, mesh, random_batch):
    """bfloat16 arithmetic and frozen weights, float32 parameters and moments."""
    mixed = {"train.dtype": "bfloat16", "train.frozen_dtype": "bfloat16", "train.loss_chunk": "16"}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch())
    with jax.set_mesh(mesh):
        program = step.build(experiment(mixed | {"data.length": "32"}), mesh)
        after, metrics = jax.eval_shape(program.train_step, program.abstract, shapes)
    assert {str(v.dtype) for v in after.params.values()} == {"float32"}
    assert {str(v.dtype) for v in after.frozen.values()} == {"bfloat16"}
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, program.abstract, after)
    assert jax.tree.all(same)
    assert {str(v.dtype) for v in metrics.values()} == {"float32"}


def test_gradients_are_filtered_as_the_config_says(experiment, mesh, random_batch):
    """No slope reaches two: nothing is left of the gradient, while the loss is what it was."""
    filtered = {"train.loss_cut": "vocabulary", "train.loss_skip_below": "2"}
    program = step.build(experiment(CONNECTOR_ONLY | filtered), mesh)
    shapes = {**program.abstract.params, **program.abstract.frozen}
    with jax.set_mesh(mesh):
        e = experiment(CONNECTOR_ONLY)
        weights = state.random_weights(e.model, e.train, shapes, e.seed)
        now = state.create(weights, program.abstract, program.tx)
        _, metrics = program.train_step(now, place(random_batch(), mesh))
    assert metrics["grad_norm"] == 0.0
    assert metrics["loss"] > 1.0
