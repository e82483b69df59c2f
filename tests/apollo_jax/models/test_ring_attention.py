# SPDX-License-Identifier: Apache-2.0
"""Attention over positions that are cut over devices equals that of one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from apollo_jax import sharding
from apollo_jax.models.attention import Causal, attention
from apollo_jax.models.ring_attention import ring_attention, zigzag

B, L, N, K, H = 4, 64, 8, 2, 16


def operands(length=L, kv_heads=K):
    rng = np.random.default_rng(0)
    shapes = (B, length, N, H), *2 * [(B, length, kv_heads, H)]
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (B, length)), axis=1), jnp.int32)
    return q, k, v, segments


def test_every_device_gets_an_early_and_a_late_piece():
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, context=4))):
        order = np.asarray(zigzag(jnp.arange(16)[None]))[0]
    assert order.reshape(4, 2, 2).tolist() == [
        [[0, 1], [14, 15]],
        [[2, 3], [12, 13]],
        [[4, 5], [10, 11]],
        [[6, 7], [8, 9]],
    ]


def check(function, mesh_config, length=L, kv_heads=K, ring=True):
    """Values and gradients of function(q, k, v, segments) on the mesh against one device's."""
    q, k, v, segments = operands(length, kv_heads)
    expected, backward = jax.vjp(lambda q, k, v: attention(q, k, v, Causal(segments)), q, k, v)
    grad = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
    mesh = sharding.make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        order = np.asarray(zigzag(jnp.arange(length)[None]))[0] if ring else np.arange(length)
        place = NamedSharding(mesh, sharding.spec("batch", "length"))
        arrays = jax.device_put([x[:, order] for x in (q, k, v, segments, grad)], place)

        @jax.jit
        def both(q, k, v, segments, grad):
            out, vjp = jax.vjp(lambda *x: function(*x, segments), q, k, v)
            return out, vjp(grad)

        out, grads = both(*arrays)
    np.testing.assert_allclose(out, expected[:, order], atol=1e-5)
    for got, wanted in zip(grads, backward(grad), strict=True):
        np.testing.assert_allclose(got, wanted[:, order], atol=1e-5)


MESHES = [
    dict(data=1, context=8),
    dict(data=2, fsdp=2, context=2),
    dict(data=1, context=4, tensor=2),
    dict(data=1, context=2, tensor=4),  # more than the key heads
]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_ring_equals_one_device(axes):
    def function(q, k, v, segments):
        return attention(q, k, v, Causal(segments, zigzag=True), axes=("batch", "heads"))

    check(function, sharding.MeshConfig(**axes))


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_ulysses_equals_one_device(axes):
    def function(q, k, v, segments):
        return attention(q, k, v, Causal(segments), axes=("batch", "heads"))

    check(function, sharding.MeshConfig(**axes), ring=False)


def test_the_ring_of_kernels_equals_one_device():
    """The TPU's kernel, interpreted, block by block."""

    def function(q, k, v, segments):
        return ring_attention(q, k, v, segments, axes=("batch", "heads"), interpret=True)

    check(function, sharding.MeshConfig(data=2, context=2, tensor=2), length=512)


@pytest.mark.parametrize("kernel", [True, False], ids=["kernels", "XLA"])
def test_the_ring_keeps_the_dtype_of_its_operands(kernel):
    """Traced under strict promotion: what the turns add up is float32, by name."""

    def both(q, k, v, segments):
        ring = partial(ring_attention, segment_ids=segments, axes=("batch", "heads"))
        out, vjp = jax.vjp(partial(ring, interpret=kernel), q, k, v)
        return out, *vjp(out)

    *arrays, segments = operands(length=1024)
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=2, context=4))):
        found = jax.eval_shape(both, *(x.astype(jnp.bfloat16) for x in arrays), segments)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}


def test_what_does_not_divide_is_named():
    q, k, v, segments = operands()
    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig(data=1, context=8))):
        with pytest.raises(ValueError, match="multiple of 16"):
            zigzag(segments[:, :24])
        with pytest.raises(ValueError, match="multiple of 2048 positions"):
            ring_attention(q, k, v, segments, axes=("batch", "heads"), interpret=True)
        with pytest.raises(ValueError, match="6 query heads over 8 devices"):
            attention(q[:, :, :6], k, v, Causal(segments), axes=("batch", "heads"))
