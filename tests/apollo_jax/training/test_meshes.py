# SPDX-License-Identifier: Apache-2.0
"""Loss and gradients of the whole model on every mesh of eight devices are those of one device."""

import dataclasses
import functools
import itertools
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from apollo_jax import sharding
from apollo_jax.config import TrainConfig
from apollo_jax.models import apollo
from apollo_jax.sharding import MESH_AXES, MeshConfig
from apollo_jax.training import losses, state, step
from apollo_jax.training.rows import place
from data_pipeline.batch import Batch, empty_batch

B, L, C, Q = 8, 64, 2, 8
TRAIN = TrainConfig(num_steps=1, dtype="float32", frozen_dtype="float32", remat="full")
QUICKLY = {"xla_backend_optimization_level": 0}  # layouts are the matter here
TOLERANCE = 1e-5  # relative to the largest entry of an array


def small() -> apollo.Config:
    """One layer of everything; eight heads, so that they divide over any tensor axis."""
    debug = apollo.Config.debug(vocab_size=256)
    names = ("num_hidden_layers", "depth")

    def shallow(tower):
        (name,) = (n for n in names if hasattr(tower, n))
        return dataclasses.replace(tower, **{name: 2})  # the last layer is not built

    return dataclasses.replace(
        debug,
        towers={name: shallow(tower) for name, tower in debug.towers.items()},
        connector=dataclasses.replace(debug.connector, resampler_depth=1),
        llm=dataclasses.replace(debug.llm, num_hidden_layers=1, num_attention_heads=8),
    )


def batch() -> Batch:
    """Packed rows: two segments, clips in both, padding at the end, few and many targets."""
    rng = np.random.default_rng(0)
    b = empty_batch(B, L, C, 4, 32)
    b.tokens[:], b.targets[:] = rng.integers(0, 256, (2, B, L))
    b.positions[:] = np.r_[np.arange(30), np.arange(L - 30)]
    b.segment_ids[:] = np.r_[np.full(30, 1), np.full(L - 34, 2), np.zeros(4)]
    b.loss_weights[:] = rng.random((B, L)) < np.linspace(0.1, 1, B)[:, None]
    b.loss_weights[b.segment_ids == 0] = 0
    b.visual_index[:, 2 : 2 + Q], b.visual_index[:, 40 : 40 + Q] = np.arange(2 * Q).reshape(2, Q)
    b.frames[:] = rng.integers(0, 255, b.frames.shape)
    b.frame_geometry[:], b.clip_mask[:], b.clip_segment_ids[:] = [0, 0, 32, 32], True, [1, 2]
    return b


@functools.cache
def on(axes: MeshConfig, devices: int = 8) -> tuple[float, dict[str, np.ndarray]]:
    """(loss, gradients by name) on a mesh."""
    mesh = sharding.make_mesh(axes, jax.devices()[:devices])
    graphdef, shapes = state.abstract_model(small(), TRAIN, apollo.COMPONENTS, mesh)
    with jax.set_mesh(mesh):
        weights = {n: jax.device_put(w, shapes[n].sharding) for n, w in random_weights().items()}

        @partial(jax.jit, compiler_options=QUICKLY)
        def both(weights, batch):
            def loss(weights):
                model = state.merge(graphdef, weights)
                return losses.mean(step.batch_sums(model, batch, TRAIN, axes.attention))[0]

            return jax.value_and_grad(loss)(weights)

        loss, grads = both(weights, place(batch(), mesh))
        return float(loss), jax.device_get(grads)


@functools.cache
def random_weights() -> dict[str, np.ndarray]:
    model = apollo.Apollo(small(), rngs=nnx.Rngs(0))
    return {name: np.asarray(w[...]) for name, w in state.flatten(nnx.state(model)).items()}


def meshes():
    """Eight devices over every combination of axes, with each kind of attention."""
    for sizes in ((8,), (2, 4), (2, 2, 2)):
        for axes in itertools.combinations(MESH_AXES, len(sizes)):
            shape = dict(data=1) | dict(zip(axes, sizes, strict=True))
            for attention in ("ring", "ulysses")[: 1 + ("context" in axes)]:
                yield dataclasses.replace(MeshConfig(attention=attention), **shape)


def name(axes: MeshConfig) -> str:
    used = {a: n for a, n in dataclasses.asdict(axes).items() if n != 1}
    return "-".join(map(str, (f"{a}{n}" if a != "attention" else n for a, n in used.items())))


@pytest.mark.parametrize("axes", list(meshes()), ids=name)
def test_loss_and_gradients_are_those_of_one_device(axes):
    loss, grads = on(axes)
    expected, expected_grads = on(MeshConfig(), devices=1)
    assert loss == pytest.approx(expected, rel=TOLERANCE)
    for name, wanted in expected_grads.items():
        scale = max(np.abs(wanted).max(), 1e-3)  # keys' biases have no gradient, but rounding
        np.testing.assert_allclose(grads[name], wanted, atol=TOLERANCE * scale, err_msg=name)
