# SPDX-License-Identifier: Apache-2.0
"""The cut cross-entropy against optax on all logits: values, gradients, and on every mesh."""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from apollo_jax import sharding
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import losses, shared_table

B, L, D, V = 8, 12, 16, 384  # three blocks of the smallest size
CUTS = ("positions", "vocabulary")


def inputs(seed=0, dtype=jnp.float32, table_dtype=jnp.float32, vocabulary=V):
    rng = np.random.default_rng(seed)
    hidden, table = rng.normal(size=(B, L, D)), rng.normal(size=(vocabulary, D))
    targets, weights = rng.integers(0, vocabulary, (B, L)), rng.integers(0, 3, (B, L)) * 0.5
    return (
        jnp.asarray(hidden, dtype), jnp.asarray(table, table_dtype),
        jnp.asarray(targets, jnp.int32), jnp.asarray(weights, jnp.float32),
    )  # fmt: skip


def naive(hidden, table, targets, weights) -> losses.Sums:
    """The definition, with all logits at once."""
    table = table.astype(hidden.dtype)
    logits = jnp.einsum("bld,vd->blv", hidden, table, preferred_element_type=jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return losses.Sums(jnp.sum(nll * weights), jnp.sum(hits * weights), jnp.sum(weights))


def gradients(function, arrays, **how):
    """(sums, (gradient of hidden, gradient of the table)) of the mean loss."""

    def loss(hidden, table, *rest):
        sums = function(hidden, table, *rest, **how)
        return losses.mean(sums)[0], sums

    (_, sums), found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arrays)
    return sums, found


def close(found, expected, tolerance=1e-5):
    """Sums relative; gradients relative to the largest."""
    np.testing.assert_allclose(found[0][:3], expected[0][:3], rtol=tolerance)
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize(("cut", "chunk"), [*product(CUTS, [0, 1, 7, 32, 96, 1000])])
def test_equals_the_loss_of_all_logits(cut, chunk):
    """Chunks of which the last is not full, one chunk, one position."""
    expected = gradients(naive, inputs())
    close(gradients(losses.cross_entropy, inputs(), chunk=chunk, cut=cut), expected)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("vocabulary", [7, 128, 300])  # below a block, a block, two and a part
def test_any_vocabulary(cut, vocabulary):
    arrays = inputs(vocabulary=vocabulary)
    close(gradients(losses.cross_entropy, arrays, chunk=40, cut=cut), gradients(naive, arrays))


@pytest.mark.parametrize("cut", CUTS)
def test_by_group(cut):
    """The weight of a position goes to its group alone; of a group without any, nothing."""
    arrays = inputs()
    groups = np.random.default_rng(1).integers(0, 3, (B, L)).astype(np.int32)
    how = dict(chunk=7, cut=cut, num_groups=4)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))):
        found = gradients(losses.cross_entropy, arrays, groups=groups, **how)[0].by_group
    hidden, table, targets, weights = map(np.asarray, arrays)
    nll = optax.softmax_cross_entropy_with_integer_labels(hidden @ table.T, targets)
    for group in range(4):
        mine = weights * (groups == group)
        np.testing.assert_allclose(found[group], [np.sum(nll * mine), np.sum(mine)], rtol=1e-5)
    assert not found[3].any()


@pytest.mark.parametrize("cut", CUTS)
def test_bfloat16_products(cut):
    """Slopes are rounded to bfloat16 before the products, so gradients are that exact."""
    for table_dtype in (jnp.float32, jnp.bfloat16):
        arrays = inputs(dtype=jnp.bfloat16, table_dtype=table_dtype)
        exact = gradients(naive, [x.astype(jnp.float32) if x.ndim > 2 else x for x in arrays])
        sums, found = gradients(losses.cross_entropy, arrays, chunk=32, cut=cut)
        np.testing.assert_allclose(sums[:3], gradients(naive, arrays)[0][:3], rtol=1e-5)
        assert [x.dtype for x in found] == [jnp.bfloat16, table_dtype]
        for a, b in zip(found, exact[1], strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            assert np.abs(a - b).max() <= 2**-7 * np.abs(b).max()


@pytest.mark.parametrize("cut", CUTS)
def test_a_tied_table_gets_both_gradients(cut):
    hidden, table, targets, weights = inputs()
    tokens = jnp.roll(targets, 1, axis=1)

    def tied(function, **how):
        def loss(table):
            return function(hidden + table[tokens], table, targets, weights, **how).loss

        return jax.grad(loss)(table)

    found, expected = tied(losses.cross_entropy, chunk=20, cut=cut), tied(naive)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", CUTS)
def test_a_frozen_table_costs_no_product(cut):
    """Counted in the program: the products' multiplications over T x D x V."""
    hidden, table, targets, weights = inputs()

    def count(argnums):
        def loss(hidden, table):
            return losses.cross_entropy(hidden, table, targets, weights, cut=cut).loss

        cost: Any = jax.jit(jax.grad(loss, argnums)).lower(hidden, table).compile().cost_analysis()
        return round(cost["flops"] / (2 * hidden.size * V))

    assert count(0) == count((0, 1)) - 1
    expected = jax.grad(lambda h: naive(h, *inputs()[1:]).loss)(hidden)
    found = jax.grad(lambda h: losses.cross_entropy(h, *inputs()[1:], cut=cut).loss)(hidden)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", CUTS)
def test_a_batch_without_targets_has_loss_zero(cut):
    arrays = (*inputs()[:3], jnp.zeros((B, L)))
    sums, found = gradients(losses.cross_entropy, arrays, chunk=16, cut=cut)
    assert losses.mean(sums) == (0.0, 0.0)
    assert not any(np.any(g) for g in found)


@pytest.mark.parametrize("cut", CUTS)
def test_large_logits_stay_finite(cut):
    hidden, table, targets, weights = inputs()
    arrays = (hidden * 1e4, table, targets, weights)
    close(gradients(losses.cross_entropy, arrays, chunk=16, cut=cut), gradients(naive, arrays))


MESHES = [
    MeshConfig(data=8),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=1, tensor=8),
    MeshConfig(data=1, context=4, tensor=2),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, fsdp=2, context=2, tensor=2),
]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("config", MESHES, ids=str)
def test_meshes_equal_one_device(config, cut):
    """Few and many targets per row; chunks of 5 divide no device's positions."""
    hidden, table, targets, weights = inputs(vocabulary=1024)
    weights = jnp.where(np.arange(L) < np.arange(B)[:, None] * 2, weights, 0.0)
    arrays = (hidden, table, targets, weights)
    expected = gradients(naive, arrays)
    mesh = sharding.make_mesh(config)
    with jax.set_mesh(mesh):
        by_position = NamedSharding(mesh, sharding.spec("batch", "length"))
        rows = NamedSharding(mesh, sharding.spec("vocab", "embed"))
        places = (by_position, rows, by_position, by_position)
        found = gradients(losses.cross_entropy, jax.device_put(arrays, places), chunk=5, cut=cut)
        assert found[1][1].sharding.is_equivalent_to(rows, 2)
    close(found, expected)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(("devices", "vocabulary"), [(1, 1024), (2, 1024), (4, 300), (8, 7)])
@pytest.mark.parametrize("config", [m for m in MESHES if m.fsdp == 8], ids=str)
def test_groups_of_any_size_share_the_table(config, devices, vocabulary, trained, monkeypatch):
    """Rows that the group divides and does not; devices that hold padding alone."""
    bytes_of_all = vocabulary * D * (6 if trained else 2)
    monkeypatch.setattr(shared_table, "_HELD_BYTES", -(-bytes_of_all // devices))
    sizes = []
    made = shared_table.group
    monkeypatch.setattr(shared_table, "group", lambda *a: sizes.append(made(*a)) or sizes[-1])
    hidden, table, targets, weights = inputs(vocabulary=vocabulary)
    expected = gradients(naive, (hidden, table, targets, weights))
    with jax.set_mesh(sharding.make_mesh(config)):
        if trained:
            close(
                gradients(losses.cross_entropy, (hidden, table, targets, weights), chunk=5),
                expected,
            )
        else:

            def loss(hidden):
                return losses.mean(losses.cross_entropy(hidden, table, targets, weights, chunk=5))[
                    0
                ]

            np.testing.assert_allclose(
                jax.jit(jax.grad(loss))(hidden), expected[1][0], rtol=1e-5, atol=1e-6
            )
    assert {group.size for group in sizes} == {devices}


@pytest.mark.parametrize("cut", CUTS)
def test_rows_that_the_mesh_does_not_divide(cut):
    """Three rows on eight devices: each computes all of them."""
    arrays = [x if x.shape[0] == V else x[:3] for x in inputs()]
    expected = gradients(naive, arrays)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(data=1, fsdp=8))):
        close(gradients(losses.cross_entropy, arrays, cut=cut), expected)


def test_skipped_blocks_are_those_of_small_slopes():
    """Two of three blocks have no likely token and no target."""
    hidden, table, targets, weights = inputs()
    size = V // 3
    hidden = hidden.at[..., 0].set(1.0)
    table = table.at[:, 0].set(0.0).at[size:].set(0.0).at[size:, 0].set(-10.0)
    arrays = (hidden, table, targets % size, weights)
    exact = gradients(naive, arrays)
    how = dict(chunk=1, cut="vocabulary")
    skipped = gradients(losses.cross_entropy, arrays, skip_below=1e-3, **how)
    close(skipped, exact, 1e-3)
    unlikely = exact[1][1][size:]
    assert np.any(unlikely), "the exact gradient of the skipped blocks is small, not zero"
    assert not np.any(skipped[1][1][size:])
    none = gradients(losses.cross_entropy, arrays, skip_below=2.0, **how)
    assert not any(np.any(g) for g in none[1])


def test_skipping_needs_blocks():
    with pytest.raises(ValueError, match="needs cut='vocabulary'"):
        losses.cross_entropy(*inputs(), skip_below=1e-3)
