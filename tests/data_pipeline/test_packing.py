# SPDX-License-Identifier: Apache-2.0
"""Packing: budgets, fill, the endless plan, and segments that know nothing of each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch import empty_batch
from data_pipeline.conversation import Rendered
from data_pipeline.loader import WINDOW
from data_pipeline.mixture import Mixture
from data_pipeline.packing import Plan, least_rows, pack, place

L, C = 100, 12
SIZE = st.tuples(st.integers(1, L), st.integers(0, C)) | st.just((0, 0))


@settings(max_examples=60, deadline=None)
@given(st.lists(SIZE, max_size=60))
def test_rows_hold_every_sample_once_within_both_budgets(sizes):
    rows = pack(np.array(sizes), L, C)
    assert sorted(sample for row in rows for sample in row) == list(range(len(sizes)))
    for row in rows:
        assert sum(sizes[sample][0] for sample in row) <= L
        assert sum(sizes[sample][1] for sample in row) <= C
        assert row == sorted(row)
    assert len(rows) >= 1


@pytest.mark.parametrize(
    ("length", "clips", "per_clip"),
    [(4096, 80, 44), (4096, 48, 44), (4096, 64, 44), (8192, 32, 143), (8192, 48, 143)],
)
def test_fill_is_close_to_the_best_possible(length, clips, per_clip):
    """Where tokens bind, where clips do, and where both do."""
    rng, n = np.random.default_rng(0), WINDOW
    kind = rng.choice(4, n, p=[0.14, 0.20, 0.06, 0.60])  # text, image, several images, video
    drawn = [rng.integers(low, high, n) for low, high in ((0, 1), (1, 2), (2, 6), (3, 31))]
    slots = np.choose(kind, drawn)
    tokens = rng.integers(40, 400, n) + per_clip * slots
    sizes = np.stack([tokens, slots], 1)
    rows = pack(sizes, length, clips)
    assert sorted(sample for row in rows for sample in row) == list(range(n))
    assert (np.array([sizes[row].sum(0) for row in rows]) <= [length, clips]).all()
    assert least_rows(sizes, length, clips) / len(rows) >= 0.995


def test_unusable_samples_are_spread_over_the_rows():
    rows = pack(np.array([(0, 0)] * 4 + [(60, 0)] * 4), L, C)
    assert [len(row) for row in rows] == [2] * 4
    assert pack(np.zeros((3, 2)), L, C) == [[0, 1, 2]]
    assert pack(np.array([(5, 0)]), L, 0) == [[0]]


def test_a_sample_larger_than_a_row_is_refused():
    with pytest.raises(ValueError, match="exceeds a row of 100 tokens and 12 clips"):
        pack(np.array([(L + 1, 0)]), L, C)


def plan(start=(0, 0)) -> Plan:
    mixture = Mixture({"a": 40, "b": 9}, {"a": 3, "b": 1}, seed=5, block=32)
    size = np.random.default_rng(1).integers([1, 0], [L, C], (2, 40, 2))
    return Plan(mixture, lambda draws: size[draws[:, 0], draws[:, 1]], L, C, seed=5, start=start)


def test_the_plan_is_one_sequence_however_it_is_cut():
    whole, _ = plan().rows(0, 120)
    for step in (1, 7, 50):
        pieces = plan()
        rows = [row for first in range(0, 120, step) for row in pieces.rows(first, step)[0]]
        assert rows[:120] == whole
    assert plan().rows(33, 4)[0] == whole[33:37]


def test_the_plan_continues_from_every_cursor():
    whole, _ = plan().rows(0, 130)
    cut = plan()
    for first in range(0, 120, 5):
        _, cursor = cut.rows(first, 5)
        again = plan(cursor)
        assert again.rows(first + 5, 5)[0] == whole[first + 5 : first + 10]
        assert cursor[1] <= first + 5
    assert cursor[0] > 3  # the windows behind are not planned again


def rendered(n: int, visual: slice, answer: slice) -> Rendered:
    index = np.full(n, -1, np.int32)
    index[visual] = np.arange(len(index[visual]))
    weights = np.zeros(n, np.float32)
    weights[answer] = 1
    return Rendered(np.arange(10, 10 + n, dtype=np.int32), weights, index)


def test_segments_are_isolated():
    batch = empty_batch(2, 16, 3, 1, 2)
    place(batch, 1, rendered(6, slice(1, 3), slice(4, 6)), segment=1, token=0, visual=0)
    place(batch, 1, rendered(5, slice(0, 2), slice(3, 5)), segment=2, token=6, visual=2)
    assert batch.segment_ids[1].tolist() == [1] * 6 + [2] * 5 + [0] * 5
    assert batch.positions[1].tolist() == [*range(6), *range(5)] + [0] * 5
    assert batch.tokens[1].tolist() == [*range(10, 16), *range(10, 15)] + [0] * 5
    assert batch.targets[1].tolist() == [*range(11, 16), 0, *range(11, 15), 0] + [0] * 5
    weighted = np.flatnonzero(batch.loss_weights[1]).tolist()
    assert weighted == [3, 4, 8, 9]  # each position that learns an answer's token
    assert batch.visual_index[1].tolist() == [-1, 0, 1, -1, -1, -1, 2, 3] + [-1] * 8
    for field, empty in zip(batch, empty_batch(2, 16, 3, 1, 2), strict=True):
        np.testing.assert_array_equal(field[0], empty[0])  # the other row is untouched
