# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_jax.inference.sampling import nucleus, sample

f32 = np.float32


def naive_nucleus(logits: np.ndarray, top_p: float) -> set[int]:
    """Likeliest first, until their mass reaches top_p."""
    probability = np.exp(logits) / np.exp(logits).sum()
    kept, mass = set(), 0.0
    for token in np.argsort(-probability):
        kept.add(int(token))
        mass += probability[token]
        if mass >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_nucleus_is_the_smallest_set_of_that_mass(top_p):
    logits = np.random.default_rng(0).normal(0, 2, (5, 40)).astype(f32)
    kept = np.isfinite(nucleus(jnp.asarray(logits), jnp.float32(top_p)))
    for row in range(len(logits)):
        assert set(np.flatnonzero(kept[row])) == naive_nucleus(logits[row], top_p)


def test_top_p_one_keeps_even_the_least_likely():
    logits = jnp.asarray([[0.0, -80.0, 3.0, -200.0]])
    assert jnp.array_equal(nucleus(logits, jnp.float32(1)), logits)


def test_temperature_zero_is_greedy():
    logits = jnp.asarray([[0.0, 2.0, 1.0], [5.0, 4.0, 3.0]])
    ids = sample(jax.random.key(0), logits, jnp.float32(0), jnp.float32(0.5))
    assert ids.tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_frequencies_follow_the_tempered_distribution(temperature):
    logits = jnp.asarray([1.0, 0.0, -1.0, 2.0])
    rows = jnp.broadcast_to(logits, (20_000, 4))
    ids = sample(jax.random.key(1), rows, jnp.float32(temperature), jnp.float32(1))
    share = np.bincount(ids, minlength=4) / len(ids)
    np.testing.assert_allclose(share, jax.nn.softmax(logits / temperature), atol=0.015)


def test_nothing_outside_the_nucleus_is_drawn():
    rows = jnp.broadcast_to(jnp.asarray([3.0, 2.9, 0.0, -1.0]), (2000, 4))
    ids = sample(jax.random.key(2), rows, jnp.float32(1), jnp.float32(0.6))
    assert set(np.unique(ids)) == {0, 1}
