# SPDX-License-Identifier: Apache-2.0
"""The noise scale of a problem whose answer is known, and its running means."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_jax.training.noise_scale import NoiseScale, Spread, estimates, spread_of

# Loss of one unit: half the squared distance of the parameters (at 0) to a point drawn from
# N(mu, sd^2), so that its gradient has the mean -mu and the covariance sd^2.
MU = {"llm/a": np.array([0.5, 0.0, 0.0, 0.0]), "connector/b": np.array([0.4, -0.6, 0.0])}
SD = {"llm/a": np.array([1.0, 2.0, 0.5, 0.0]), "connector/b": np.array([1.0, 1.0, 3.0])}
WEIGHTS = np.array([4, 1, 16, 0, 9])  # units in each microbatch; one of them is empty


def known(parts: tuple[str, ...]) -> tuple[float, float]:
    """(tr S, |mu|^2) of some parameters."""
    return (
        sum(float(np.sum(SD[name] ** 2)) for name in parts),
        sum(float(np.sum(MU[name] ** 2)) for name in parts),
    )


TRUTH = {"": known(("llm/a", "connector/b")), "/llm": known(("llm/a",))}
TRUTH["/connector"] = known(("connector/b",))


@pytest.fixture(scope="module")
def updates() -> list[dict[str, float]]:
    """Estimates of 4000 updates."""
    rng = np.random.default_rng(0)

    def sums(name: str) -> np.ndarray:  # of gradients in each microbatch
        mean, noise = WEIGHTS[:, None] * -MU[name], np.sqrt(WEIGHTS)[:, None] * SD[name]
        return mean + noise * rng.standard_normal((4000, *noise.shape))

    @jax.jit
    @jax.vmap
    def one(grads):
        parts = [
            spread_of({n: g[i] for n, g in grads.items()}, jnp.float32(w))
            for i, w in enumerate(WEIGHTS)
        ]
        spread: Spread = jax.tree.map(lambda *values: sum(values[1:], values[0]), *parts)
        weight = jnp.float32(WEIGHTS.sum())
        return estimates(spread, {n: g.sum(0) for n, g in grads.items()}, weight)

    found = one({name: jnp.asarray(sums(name), jnp.float32) for name in MU})
    return [dict(zip(found, row, strict=True)) for row in np.stack([*found.values()], 1).tolist()]


@pytest.mark.parametrize("part", TRUTH)
def test_the_estimates_are_unbiased_whatever_the_weights(updates, part):
    for name, truth in zip(("noise/variance", "noise/signal"), TRUTH[part], strict=True):
        values = np.array([update[name + part] for update in updates])
        error = values.std() / math.sqrt(len(values))
        assert abs(values.mean() - truth) < 3 * error, (name, values.mean(), truth, error)
        assert error < 0.1 * truth


@pytest.mark.parametrize("part", TRUTH)
def test_the_ratio_of_running_means_is_the_noise_scale(updates, part):
    noise = NoiseScale(decay=0.999)
    for update in updates:
        noise.see(update)
    variance, signal = TRUTH[part]
    assert noise.ratios()[f"noise_scale{part}"] == pytest.approx(variance / signal, rel=0.1)


def test_one_microbatch_says_nothing():
    grads, weight = {"llm/a": jnp.ones(3)}, jnp.float32(4)
    single = spread_of(grads, weight)
    empty = spread_of({"llm/a": jnp.zeros(3)}, jnp.float32(0))
    for spread in (single, jax.tree.map(jnp.add, single, empty)):
        found = estimates(spread, grads, weight)
        assert all(map(math.isnan, found.values()))
        noise = NoiseScale()
        noise.see({name: float(value) for name, value in found.items()})
        assert noise.ratios() == {}


def test_its_state_survives_json(updates):
    whole, first = NoiseScale(), NoiseScale()
    for update in updates[:7]:
        whole.see(update)
    for update in updates[:3]:
        first.see(update)
    second = NoiseScale(json.loads(json.dumps(first.state())))
    for update in updates[3:7]:
        second.see(update)
    assert second.state() == whole.state()
