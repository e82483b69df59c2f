# SPDX-License-Identifier: Apache-2.0
"""An update from several microbatches is that from their rows in one batch: on a model of a line.

test_accumulate_runs.py has whole runs.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_jax import sharding
from apollo_jax.config import LearningRates, OptimizerConfig, TrainConfig
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import losses, state, step
from apollo_jax.training.optimizer import make_optimizer, make_schedules

ROWS, LENGTH, TOLERANCE = 24, 32, 1e-6
RATES = LearningRates(connector=1e-2, llm=1e-3)
# Adam's first step is the sign of the gradient: a large eps keeps it as smooth as the gradient is.
SMOOTH = dict(eps=0.1, warmup_ratio=0.0, clip_norm=0.05)
MESHES = {"alone": (MeshConfig(), 1), "cut": (MeshConfig(data=2, fsdp=4), 8)}


class Line(nnx.Module):
    """Weight and offset, each of a component that trains, and a frozen factor."""

    def __init__(self):
        self.llm = nnx.Param(jnp.linspace(0.5, 1.0, 8))
        self.connector = nnx.Param(jnp.zeros(8))
        self.vision_tower = nnx.Param(jnp.full(8, 2.0))


def sums(model: Line, batch: dict[str, Any]) -> losses.Sums:
    """Weighted squared distance of x from the line."""
    slope, offset, factor = (
        p[...].astype(jnp.float32) for p in (model.llm, model.connector, model.vision_tower)
    )
    guess = factor * batch["x"][..., None] * slope + offset
    weight = batch["weights"]
    loss = jnp.sum(weight * jnp.mean(jnp.square(guess - 1.0), axis=-1))
    return losses.Sums(loss, jnp.sum(jnp.where(batch["x"] > 0, weight, 0.0)), jnp.sum(weight))


def rows() -> dict[str, np.ndarray]:
    """The further down, the fewer targets: the means of the microbatches differ in weight."""
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH)).astype(np.float32)
    x *= np.linspace(0.2, 2.0, ROWS, dtype=np.float32)[:, None]
    weights = np.arange(LENGTH) < LENGTH - np.arange(ROWS)[:, None]
    return {"x": x, "weights": weights.astype(np.float32)}


def updated(
    microbatches: int,
    mesh: str = "alone",
    dtype: str = "float32",
    noise: bool = False,
    **fields: Any,
):
    """(first state, state and metrics after one update from all rows, what was accumulated)."""
    axes, devices = MESHES[mesh]
    on = sharding.make_mesh(axes, jax.devices()[:devices])
    config = OptimizerConfig(RATES, **{**SMOOTH, **fields})
    graphdef, whole = nnx.split(Line())
    cut = NamedSharding(on, P("fsdp"))
    shapes = {
        name: jax.ShapeDtypeStruct(
            leaf.shape, jnp.float32 if name == "vision_tower" else dtype, sharding=cut
        )
        for name, leaf in state.flatten(whole).items()
    }
    weights = {
        name: jax.device_put(leaf[...].astype(shapes[name].dtype), cut)
        for name, leaf in state.flatten(whole).items()
    }
    schedules = make_schedules(config, 10)
    tx = make_optimizer(config, schedules)
    abstract = state.abstract_state(shapes, ("connector", "llm"), tx, on)
    loss: Any = sums
    train = TrainConfig(10, noise_scale=noise)
    program = step.make_program(train, graphdef, tx, schedules, loss, abstract)
    place = NamedSharding(on, P(("data", "fsdp")))
    with jax.set_mesh(on):
        now = state.create(weights, abstract, tx)
        before = jax.device_get(now)
        parts = {name: np.split(x, microbatches) for name, x in rows().items()}
        batches = [
            {n: jax.device_put(x[i], place) for n, x in parts.items()} for i in range(microbatches)
        ]
        accumulated = None
        for batch in batches[:-1]:
            accumulated = program.add(now, batch, accumulated)
        now, metrics = program.train_step(now, batches[-1], None, accumulated)
    return before, *jax.device_get((now, metrics)), accumulated


def check(found: Any, expected: Any) -> None:
    """Equal but for the order of sums."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * np.abs(b).max())


@pytest.mark.parametrize("mesh", MESHES)
def test_three_microbatches_are_one_batch(mesh):
    before, expected, told, _ = updated(1)
    _, found, said, _ = updated(3, mesh)
    assert said["target_tokens"] == sum(range(9, 33))
    assert set(said) == set(told)
    check(said, told)
    assert told["grad_norm"] > 0.05  # it is clipped
    check((found.params, found.opt_state), (expected.params, expected.opt_state))
    for name, param in expected.params.items():
        assert np.abs(param - before.params[name]).min() > 100 * TOLERANCE
    assert np.array_equal(found.frozen["vision_tower"], before.frozen["vision_tower"])
    assert int(found.step) == 1


def test_it_lies_as_the_parameters_do_in_float32():
    _, now, _, accumulated = updated(3, "cut", "bfloat16")
    assert accumulated is not None
    assert set(accumulated.grads) == {"connector", "llm"}
    for grad in accumulated.grads.values():
        assert grad.dtype == jnp.float32
        assert grad.sharding.shard_shape(grad.shape) == (2,)  # of 8, cut over fsdp
    assert {str(p.dtype) for p in now.params.values()} == {"bfloat16"}


def test_schedule_free_takes_every_microbatch_at_one_point():
    free: dict[str, Any] = dict(name="schedule_free", schedule="constant")
    _, expected, told, _ = updated(1, **free)
    _, found, said, _ = updated(3, **free)
    check(said, told)
    check((found.params, found.opt_state), (expected.params, expected.opt_state))


@pytest.mark.parametrize("mesh", MESHES)
def test_noise_is_the_weighted_variance_of_the_microbatches(mesh):
    """Against its definition, (sum of w_i |g_i - G|^2) / (n - 1), from each one's own gradient."""
    before, now, said, _ = updated(3, mesh, noise=True)
    _, plain, told, _ = updated(3, mesh)
    assert {n: v for n, v in said.items() if not n.startswith("noise")} == told
    check((now.params, now.opt_state), (plain.params, plain.opt_state))
    graphdef = nnx.split(Line())[0]
    parts = {name: np.split(x, 3) for name, x in rows().items()}

    def loss(params, i: int):
        model = state.merge(graphdef, params, before.frozen)
        return losses.mean(sums(model, {name: x[i] for name, x in parts.items()}))[0]

    grads = [jax.device_get(jax.grad(loss)(before.params, i)) for i in range(3)]
    weights = [part.sum() for part in parts["weights"]]
    assert len(set(weights)) == 3
    for names, suffix in ((("connector",), "/connector"), (("connector", "llm"), "")):
        each = [np.concatenate([g[name] for name in names]) for g in grads]
        mean = np.average(each, axis=0, weights=weights)
        spread = sum(w * np.sum((g - mean) ** 2) for w, g in zip(weights, each, strict=True)) / 2
        signal = np.sum(mean**2) - spread / sum(weights)
        np.testing.assert_allclose(said[f"noise/variance{suffix}"], spread, rtol=1e-4)
        np.testing.assert_allclose(said[f"noise/signal{suffix}"], signal, rtol=1e-4)
