# SPDX-License-Identifier: Apache-2.0
"""The fitted critical batch of losses whose critical batch is known, or that have none."""

import numpy as np
import pytest

from apollo_jax.training.critical_batch_fit import fit

ROWS = 8.0 * 2 ** np.arange(5)
PROGRESS = 0.2  # nats, of very small batches


def losses(critical: float) -> np.ndarray:
    return 2.0 - PROGRESS / (1 + ROWS / critical)


def tails(means: np.ndarray, noise: float, seed: int, blocks: int = 32) -> np.ndarray:
    """Blocks of noisy means: `noise` is of the mean of a fork, rows vary for all forks alike."""
    rng = np.random.default_rng(seed)
    own = noise * blocks**0.5 * rng.normal(size=(len(means), blocks))
    return means[:, None] + own + 0.05 * rng.normal(size=blocks)


def fitted(found: np.ndarray) -> dict:
    return fit(ROWS[: len(found)], found.mean(axis=1), found)


@pytest.mark.parametrize("critical", [10.0, 32.0, 100.0])
def test_without_noise_it_is_found(critical):
    found = fitted(tails(losses(critical), 0.0, 0))
    assert found["rows"] == pytest.approx(critical, rel=0.01)
    assert found["low"] <= found["rows"] <= found["high"] < 1.05 * found["low"]


def test_the_interval_holds_it_about_as_often_as_it_says():
    found = [fitted(tails(losses(32.0), 0.003, seed)) for seed in range(200)]
    assert all(one["rows"] for one in found)
    assert 0.9 < np.mean([one["low"] <= 32.0 <= one["high"] for one in found]) < 0.99


def test_more_noise_makes_it_wider():
    found = (fitted(tails(losses(32.0), noise, 1)) for noise in (0.003, 0.001))
    wide, narrow = (np.log(one["high"] / one["low"]) for one in found)
    assert 2.5 < wide / narrow < 3.5


def test_losses_off_the_curve_make_it_wider_whatever_their_noise():
    off = losses(32.0) + np.array([0.0, 0.004, 0.0, -0.004, 0.0])
    found, exact = (fitted(tails(one, 0.0, 0)) for one in (off, losses(32.0)))
    assert found["high"] / found["low"] > 1.2 > exact["high"] / exact["low"]


@pytest.mark.parametrize(
    "means",
    [np.full(5, 2.0), losses(32.0)[::-1], np.array([2.0, 2.2, 2.0, 2.2, 2.0])],
    ids=["flat", "better with size", "up and down"],
)
def test_losses_that_do_not_fix_it_give_no_number(means):
    assert fitted(tails(means, 0.0, 0))["rows"] is None
    found = [fitted(tails(means, 0.003, seed)) for seed in range(100)]
    assert np.mean([one["rows"] is None for one in found]) > 0.95
    assert "do not fix it" in found[0]["reason"]


def test_a_critical_batch_far_beyond_the_forks_is_not_invented():
    found = [fitted(tails(losses(3000.0), 0.001, seed)) for seed in range(100)]
    assert np.mean([one["rows"] is None for one in found]) > 0.95


@pytest.mark.parametrize(("forks", "blocks"), [(3, 32), (5, 3)])
def test_it_takes_four_forks_and_four_blocks(forks, blocks):
    found = fitted(tails(losses(32.0)[:forks], 0.0, 0, blocks))
    assert found["rows"] is None
    assert f"these are {forks} and {blocks}" in found["reason"]
