# SPDX-License-Identifier: Apache-2.0
"""The stream of draws: weights, epochs without replacement, a function of the position alone."""

from collections import Counter

import numpy as np
import pytest

from data_pipeline.mixture import Mixture

SIZES = {"text": 7, "image": 50, "video": 23}
WEIGHTS = {"text": 0.02, "image": 1.0, "video": 2.0}


def mixture(seed=0, block=64, sizes=SIZES, weights=WEIGHTS) -> Mixture:
    return Mixture(sizes, weights, seed=seed, block=block)


def draws(mixture: Mixture, block: int) -> list[list[int]]:
    return mixture.block(block).tolist()


def test_weights_hold_per_block_to_one_draw_and_exactly_in_expectation():
    blocks = 4000
    share = np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
    counts = mixture()._counts(blocks)
    assert (counts.sum(1) == 64).all()
    assert (np.abs(counts - 64 * share) < 1.0 + 1e-9).all()
    # A count is a floor or a ceiling of 64 w by a fair coin: its mean's deviation is < .5/sqrt(n).
    np.testing.assert_allclose(counts.mean(0), 64 * share, atol=4 * 0.5 / blocks**0.5)
    drawn = Counter(source for source, _ in draws(mixture(), 3))
    assert [drawn[s] for s in range(3)] == counts[3].tolist()


def test_every_record_once_per_epoch_of_its_source():
    stream = [draw for block in range(20) for draw in draws(mixture(), block)]
    for source, size in enumerate(SIZES.values()):
        records = [record for s, record in stream if s == source]
        epochs = [records[i : i + size] for i in range(0, len(records) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(epochs) < 2 or epochs[0] != epochs[1]
    assert len([r for s, r in stream if s == 2]) > 2 * 23


def test_a_block_is_the_same_whenever_it_is_asked_for():
    forward = [draws(mixture(), i) for i in range(5)]
    again = mixture()
    assert [draws(again, i) for i in (4, 0, 3, 1, 2)] == [forward[i] for i in (4, 0, 3, 1, 2)]
    assert draws(mixture(seed=1), 0) != forward[0]


def test_a_source_keeps_its_order_when_another_comes():
    one = mixture(sizes={"v": 90}, weights={"v": 1})
    alone = [r for b in range(3) for _, r in draws(one, b)]
    both = mixture(sizes={"t": 9, "v": 90}, weights={"t": 1, "v": 1})
    shared = [r for b in range(3) for s, r in draws(both, b) if s == 1]
    assert shared[:90] == alone[: len(shared)][:90]


@pytest.mark.parametrize("weights", [{"a": 0}, {"a": -1}, {"a": float("nan")}])
def test_impossible_weights(weights):
    with pytest.raises(ValueError, match=r"mixture weights must be >= 0 .*'a'"):
        Mixture({"a": 3}, weights, seed=0, block=8)


def test_an_empty_source_may_only_be_switched_off():
    with pytest.raises(ValueError, match="'a' has no records"):
        Mixture({"a": 0, "b": 1}, {"a": 1, "b": 1}, seed=0, block=8)
    off = Mixture({"a": 0, "b": 1}, {"a": 0, "b": 1}, seed=0, block=8)
    assert draws(off, 0) == [[1, 0]] * 8
