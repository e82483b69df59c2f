# SPDX-License-Identifier: Apache-2.0
"""The two verbs for stacked layers."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apollo_jax.config import Remat
from apollo_jax.models import layers
from apollo_jax.models.attention import attention
from apollo_jax.planning import flops


class Layer(nnx.Module):
    """x + W x, returning the layer's own output beside it."""

    def __init__(self, rngs: nnx.Rngs):
        kw = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
        self.linear = layers.linear(4, 4, ("embed", "mlp"), bias=False, **kw)

    def __call__(self, x, scale=None):
        y = self.linear(x)
        return x + (y if scale is None else y * scale), y


def test_fold_runs_stacked_layers_in_order():
    stacked = layers.stack(Layer, 3, nnx.Rngs(0))
    kernels = stacked.linear.kernel[...]
    assert kernels.shape == (3, 4, 4)
    assert len({k.tobytes() for k in np.asarray(kernels)}) == 3  # each layer its own draw
    x = expected = jax.random.normal(jax.random.key(1), (2, 4))
    scales = jnp.array([1.0, 2.0, 3.0])
    for kernel, scale in zip(kernels, scales, strict=True):
        expected = expected + expected @ kernel * scale
    for remat, unroll in (("none", 1), ("none", 3), ("full", 1)):
        out, ys = layers.fold(stacked, x, per_layer=(scales,), remat=remat, unroll=unroll)
        error = np.abs(out - expected).max()  # entries are sums in which much cancels
        assert error <= 1e-6 * np.abs(expected).max()
        assert ys.shape == (3, 2, 4)


def test_stacked_parameters_name_their_axes():
    stacked = layers.stack(Layer, 3, nnx.Rngs(0))
    assert stacked.linear.kernel.get_metadata()["out_sharding"] == ("layers", "embed", "mlp")


def test_rms_norm_computes_in_float32():
    norm = layers.RMSNorm(4, 1e-6, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.full((1, 4), 300.0, jnp.bfloat16)  # 300**2 is exact in float32 only
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(norm(x).astype(jnp.float32), 1.0)


class Attending(nnx.Module):
    """Two products, of which attention's operands are one, and attention."""

    def __init__(self, rngs: nnx.Rngs):
        kw = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
        self.into = layers.linear(8, 24, ("embed", "heads"), bias=False, **kw)
        self.out = layers.linear(8, 8, ("heads", "embed"), bias=False, **kw)

    def __call__(self, x):
        q, k, v = (a[:, :, None] for a in jnp.split(self.into(x), 3, axis=-1))
        return x + jnp.tanh(self.out(attention(q, k, v)[:, :, 0])), None


@pytest.mark.parametrize("depth", [3, 6])  # without a loop, with one
def test_every_policy_has_the_same_gradient(depth):
    graphdef, state = nnx.split(layers.stack(Attending, depth, nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 4, 8))

    def gradients(remat):
        def loss(state, x):
            return jnp.sum(layers.fold(nnx.merge(graphdef, state), x, remat=remat)[0] ** 2)

        return jax.grad(loss, argnums=(0, 1))(state, x)

    found = jax.jit(lambda: {remat: gradients(remat) for remat in layers.REMAT_POLICIES})()
    for remat in layers.REMAT_POLICIES:
        for a, b in zip(*map(jax.tree.leaves, (found[remat], found["none"])), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def traced(remat: str):
    """(function, arguments): the gradient through twelve layers on one row of 64."""
    graphdef, state = nnx.split(layers.stack(Attending, 12, nnx.Rngs(0)))

    def loss(state, x):
        return jnp.sum(layers.fold(nnx.merge(graphdef, state), x, remat=remat)[0] ** 2)

    return jax.grad(loss), (state, jnp.ones((1, 64, 8)))


def test_policies_compute_again_what_they_do_not_keep():
    """Products of [64, 8] with [8, 8] are 1, attention's two are 16 such."""
    unit = 2 * 64 * 8 * 8 * 12
    counted = {r: flops.count(traced(r)[0], *traced(r)[1]) / unit for r in layers.REMAT_POLICIES}
    forward = 3 + 1 + 2 * 8
    extra = {r: n - counted["none"] for r, n in counted.items()}
    assert counted["none"] == 3 * forward
    assert extra["full"] == extra["offload"] == forward
    assert extra["nested"] == 2 * forward
    assert extra["save_attention"] == forward - 8  # what attends, once the weights are there
    assert extra["save_qkv"] == forward - 8 - 3
    assert extra["dots"] == forward - 8 - 3 - 1
    assert list(extra.values()) == sorted(extra.values())


def test_offload_keeps_the_inputs_in_host_memory():
    text = {r: str(jax.make_jaxpr(traced(r)[0])(*traced(r)[1])) for r in ("full", "offload")}
    assert "host" in text["offload"]
    assert "host" not in text["full"]


def test_the_config_knows_the_policies():
    assert set(get_args(Remat)) == set(layers.REMAT_POLICIES)
    with pytest.raises(ValueError, match=r"unknown remat 'some'; known: none, dots, .*nested"):
        layers.fold(layers.stack(Layer, 3, nnx.Rngs(0)), jnp.ones((2, 4)), remat="some")
