# SPDX-License-Identifier: Apache-2.0
"""The piecewise gradient of the embedding's rows is that of plain indexing, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from apollo_jax import sharding
from apollo_jax.models import lookup
from apollo_jax.sharding import MeshConfig

B, L, V, D = 8, 24, 48, 32
MESHES = {
    "none": None,
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=1, tensor=8),
    "context": MeshConfig(data=1, fsdp=2, context=4),
    "data-fsdp-tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp-context-tensor": MeshConfig(data=1, fsdp=2, context=2, tensor=2),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """20 do not divide any device's share of the tokens, whatever the mesh."""
    monkeypatch.setattr(lookup, "PIECE", 20)


def inputs(rows: int = B) -> tuple[Array, Array, Array]:
    """Table, tokens with many duplicates, and the cotangent."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.geometric(0.1, (rows, L)) - 1, V - 1).astype(np.int32)
    tokens[:, -1] = V - 1
    table, back = rng.normal(size=(V, D)), rng.normal(size=(rows, L, D))
    return jnp.asarray(table, jnp.float32), jnp.asarray(tokens), jnp.asarray(back, jnp.float32)


def expected(tokens, back):
    grads = np.zeros((V, D))
    np.add.at(grads, np.ravel(tokens), np.asarray(back, np.float64).reshape(-1, D))
    return grads


def gradient(tokens, table, back, dtype=jnp.float32):
    def loss(table):
        return jnp.sum(lookup.lookup(table, tokens, dtype).astype(jnp.float32) * back)

    return jax.grad(loss)(table)


@pytest.mark.parametrize("rows", [B, 3])
@pytest.mark.parametrize("name", MESHES)
def test_the_gradient_is_that_of_indexing(name, rows):
    """Three rows do not divide over a mesh, and are on every device of it."""
    table, tokens, back = inputs(rows)
    if MESHES[name] is None:
        found = jax.jit(gradient)(tokens, table, back)
    else:
        mesh = sharding.make_mesh(MESHES[name])
        with jax.set_mesh(mesh):
            cut = jax.NamedSharding(mesh, sharding.spec("vocab", "embed"))
            found = jax.jit(gradient, out_shardings=cut)(tokens, jax.device_put(table, cut), back)
    np.testing.assert_allclose(found, expected(tokens, back), atol=1e-5)


@pytest.mark.parametrize("tokens", [20, 21, 39, 40, 41])
def test_every_token_counts_once(tokens):
    table, ids, back = inputs()
    ids, back = ids.reshape(1, -1)[:, :tokens], back.reshape(1, -1, D)[:, :tokens]
    found = jax.jit(gradient)(ids, table, back)
    np.testing.assert_allclose(found, expected(ids, back), atol=1e-5)


def test_bfloat16_is_summed_in_float32():
    table, tokens, back = inputs()
    back = back.astype(jnp.bfloat16).astype(jnp.float32)
    found = jax.jit(gradient, static_argnums=3)(jnp.zeros_like(tokens), table, back, jnp.bfloat16)
    exact = back.sum(axis=(0, 1))
    np.testing.assert_allclose(found[0], exact, rtol=2**-8, atol=1e-4)
    assert not np.any(found[1:])


def test_rematerialised_and_tied():
    """As in a decoder whose head is its embedding."""
    table, tokens, back = inputs()

    def loss(rows, table):
        x = jax.checkpoint(lambda t: jnp.tanh(rows(t)))(table)
        return jnp.sum(jnp.einsum("bld,vd->blv", x, table) ** 2 * back[..., :1])

    def grad(rows):
        return jax.jit(jax.grad(lambda t: loss(rows, t)))(table)

    found = grad(lambda t: lookup.lookup(t, tokens, jnp.float32))
    np.testing.assert_allclose(found, grad(lambda t: t[tokens]), rtol=1e-4, atol=1e-2)


def test_a_frozen_table_has_no_gradient():
    table, tokens, back = inputs()

    def loss(scale):
        return jnp.sum(lookup.lookup(table, tokens, jnp.float32) * back * scale)

    assert "scatter" not in str(jax.make_jaxpr(jax.grad(loss))(1.0))
    assert "scatter" in str(jax.make_jaxpr(gradient)(tokens, table, back))
