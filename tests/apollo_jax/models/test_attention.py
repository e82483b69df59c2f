# SPDX-License-Identifier: Apache-2.0
"""Attention on XLA against its definition, and the TPU kernel against XLA (interpreted)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from apollo_jax import sharding
from apollo_jax.models import attention as module
from apollo_jax.models.attention import Causal, attention, fused_attention, xla_attention
from apollo_jax.models.layers import REMAT_POLICIES
from apollo_jax.models.splash_attention import splash_attention


def test_attention_with_grouped_heads_equals_repeated_heads():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 5, 6, 8))
    k, v = (jax.random.normal(key, (2, 7, 2, 8)) for key in keys[1:])
    mask = jnp.arange(7)[None, None] <= jnp.arange(5)[None, :, None] + 2
    grouped = xla_attention(q, k, v, mask)
    scores = jnp.einsum("blnh,bsnh->bnls", q, jnp.repeat(k, 3, axis=2)) / np.sqrt(8)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    expected = jnp.einsum("bnls,bsnh->blnh", weights, jnp.repeat(v, 3, axis=2))
    np.testing.assert_allclose(grouped, expected, atol=1e-6)


def test_attention_of_a_query_without_keys_is_finite():
    q = jnp.ones((1, 1, 1, 4))
    k = v = jnp.arange(8.0).reshape(1, 2, 1, 4)
    out = xla_attention(q, k, v, jnp.zeros((1, 1, 2), bool))
    np.testing.assert_allclose(out[0, 0, 0], v[0].mean(axis=(0, 1)))


def operands(length, keys, heads, kv_heads, head_dim, batch=2):
    rng = np.random.default_rng(0)
    shapes = (batch, length, heads, head_dim), *2 * [(batch, keys, kv_heads, head_dim)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def segments(length, batch=2):
    return jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (batch, length)), axis=1))


@pytest.mark.parametrize(
    ("length", "keys", "heads", "kv_heads", "head_dim", "mask"),
    [
        (300, 300, 4, 2, 24, Causal(segments(300))),  # the decoder's pattern
        (256, 256, 2, 1, 128, Causal()),
        (260, 260, 2, 2, 72, None),  # SigLIP's head dim
        (257, 300, 1, 1, 88, None),  # InternVideo2's, and other keys than queries
        (256, 256, 1, 1, 96, None),
    ],
)
def test_splash_equals_xla(length, keys, heads, kv_heads, head_dim, mask):
    q, k, v = operands(length, keys, heads, kv_heads, head_dim)
    causal = mask is not None
    ids = mask.segment_ids if causal else None

    def fast(q, k, v):
        axes = ("batch", "heads")
        return splash_attention(q, k, v, ids, causal=causal, axes=axes, interpret=True)

    @jax.jit
    def both(q, k, v):
        out, backward = jax.vjp(fast, q, k, v)
        expected, expected_backward = jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)
        return (out, *backward(out)), (expected, *expected_backward(out))

    for got, wanted in zip(*both(q, k, v), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize(
    "mask",
    [None, Causal(), Causal(segments(20)), segments(20)[:, None, :] > 0],
    ids=["whole", "causal", "segments", "dense"],
)
def test_what_gpus_are_asked_for_is_the_same_attention(mask):
    """By XLA here; on a GPU cuDNN gets these arguments."""
    q, k, v = operands(20, 20, 4, 2, 24)
    out = fused_attention(q, k, v, mask, implementation="xla")
    np.testing.assert_allclose(out, attention(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "fused"),
    [(jnp.bfloat16, 24, True), (jnp.float32, 24, False), (jnp.bfloat16, 20, False)],
)
def test_gpus_run_cudnns_kernel_where_it_takes_the_operands(monkeypatch, dtype, head_dim, fused):
    asked = []

    def instead(*args, implementation):
        asked.append(implementation)
        with jax.numpy_dtype_promotion("standard"):  # jax's own way on XLA wants it for bfloat16
            return fused_attention(*args, implementation="xla")

    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(module, "fused_attention", instead)
    q, k, v = (x.astype(dtype) for x in operands(20, 20, 4, 2, head_dim))
    out = attention(q, k, v, Causal(segments(20)))
    assert asked == (["cudnn"] if fused else [])
    expected = xla_attention(q, k, v, Causal(segments(20)).dense(20))
    np.testing.assert_allclose(out.astype("float32"), expected.astype("float32"), atol=0.02)


@pytest.mark.parametrize("way", ["fused", "xla"])
def test_what_attention_gives_is_kept_by_the_policies_that_name_it(way, capsys):
    """Of any back end: without the name it would be computed again backwards."""
    q, k, v = operands(8, 8, 2, 2, 8)

    def run(q, k, v):
        if way == "xla":
            return jnp.sum(xla_attention(q, k, v) ** 2)
        return jnp.sum(fused_attention(q, k, v, implementation="xla") ** 2)

    policy = REMAT_POLICIES["save_attention"]
    print_saved_residuals(jax.checkpoint(run, policy=policy), q, k, v)
    assert "named 'attention'" in capsys.readouterr().out


@pytest.mark.parametrize("kv_heads", [2, 1])  # 1 does not divide over the tensor axis
def test_each_device_runs_its_rows_and_heads(kv_heads):
    q, k, v = operands(256, 256, 4, kv_heads, 16, batch=4)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))

    def fast(q, k, v):
        axes = ("batch", "heads")
        return splash_attention(q, k, v, None, causal=True, axes=axes, interpret=True)

    with jax.set_mesh(mesh):
        out = jax.jit(fast)(q, k, v)
        assert out.sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_allclose(out, attention(q, k, v, Causal()), atol=2e-5)


def test_rows_that_do_not_divide_over_the_mesh():
    q, k, v = operands(256, 256, 1, 1, 16, batch=3)

    def fast(q, k, v):
        axes = ("clips", None)
        return splash_attention(q, k, v, None, causal=False, axes=axes, interpret=True)

    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig())):
        out = jax.jit(fast)(q, k, v)
    np.testing.assert_allclose(out, attention(q, k, v), atol=2e-5)
