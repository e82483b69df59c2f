# SPDX-License-Identifier: Apache-2.0
"""Weighted cross-entropy against its definition; chunks change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_jax.training import losses

B, L, D, V = 2, 12, 5, 7


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(B, L, D)), rng.normal(size=(V, D))
    targets, weights = rng.integers(0, V, (B, L)), rng.integers(0, 2, (B, L)) * 0.5
    f32 = jnp.float32
    return (
        jnp.asarray(hidden, f32), jnp.asarray(table, f32),
        jnp.asarray(targets, jnp.int32), jnp.asarray(weights, f32),
    )  # fmt: skip


def sums(inputs, chunk=0) -> losses.Sums:
    hidden, table, targets, weights = inputs
    return losses.cross_entropy(hidden, lambda h: h @ table.T, targets, weights, chunk)


def test_is_the_weighted_mean_negative_log_likelihood(inputs):
    hidden, table, targets, weights = map(np.asarray, inputs)
    logits = hidden @ table.T
    likelihood = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(likelihood, targets[..., None], -1)[..., 0]
    loss, accuracy = losses.mean(sums(inputs))
    np.testing.assert_allclose(loss, -(np.log(picked) * weights).sum() / weights.sum(), rtol=1e-5)
    hits = (logits.argmax(-1) == targets) * weights
    np.testing.assert_allclose(accuracy, hits.sum() / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 12])
def test_chunks_change_neither_loss_nor_gradient(inputs, chunk):
    def loss(hidden, chunk):
        return losses.mean(sums((hidden, *inputs[1:]), chunk))[0]

    (whole, grad), (chunked, chunked_grad) = (
        jax.value_and_grad(loss)(inputs[0], c) for c in (0, chunk)
    )
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)
    np.testing.assert_allclose(chunked_grad, grad, rtol=1e-5, atol=1e-7)


def test_a_batch_without_targets_has_loss_zero(inputs):
    loss, accuracy = losses.mean(sums((*inputs[:3], jnp.zeros((B, L)))))
    assert loss == accuracy == 0.0
