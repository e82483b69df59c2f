# SPDX-License-Identifier: Apache-2.0
"""Packing: samples of known length to rows of L tokens and C clip slots, before any decoding.

Draws are taken a window at a time and packed best-fit-decreasing, so rows fill up while only one
window's lengths need to be known. The sequence of rows is a pure function of the draws.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np

from data_pipeline.batch import Batch
from data_pipeline.conversation import Rendered
from data_pipeline.mixture import Mixture

Draw = tuple[int, int]  # source, record


def pack(sizes: Sequence[tuple[int, int]], length: int, clips: int) -> list[list[int]]:
    """Best-fit-decreasing into rows of two budgets: (tokens, clips) per sample to sample numbers.

    Samples of size (0, 0), those known to be unusable, are spread evenly over the rows.
    """
    need = np.array(sizes, np.int64).reshape(-1, 2)
    budget = np.array([length, clips], np.int64)
    if (need > budget).any():
        raise ValueError(f"a sample exceeds a row of {length} tokens and {clips} clips")
    share = need / np.maximum(budget, 1)
    room = np.tile(budget, (len(need), 1))
    rows: list[list[int]] = []
    for sample in np.argsort(-share.max(axis=1), kind="stable").tolist():
        if not need[sample].any():
            continue
        left = room[: len(rows)] - need[sample]
        slack = np.where((left >= 0).all(axis=1), (left / np.maximum(budget, 1)).sum(axis=1), 3.0)
        best = int(slack.argmin()) if rows and slack.min() < 3.0 else len(rows)
        if best == len(rows):
            rows.append([])
        rows[best].append(sample)
        room[best] -= need[sample]
    rows = rows or [[]]
    for number, sample in enumerate(np.flatnonzero(~need.any(axis=1)).tolist()):
        rows[number % len(rows)].append(sample)
    return [sorted(row) for row in rows]


class Plan:
    """The endless sequence of rows, each a tuple of draws; windows are planned when first needed.

    `size_of(draw)` gives (tokens, clips), (0, 0) for a record that cannot be used. `start` is a
    cursor (window, its first row) as returned by `rows`: planning resumes there.
    """

    def __init__(
        self,
        mixture: Mixture,
        size_of: Callable[[Draw], tuple[int, int]],
        length: int,
        clips: int,
        *,
        seed: int,
        start: tuple[int, int] = (0, 0),
    ):
        self._mixture, self._size_of = mixture, size_of
        self._budget = (length, clips)
        self._seed = seed
        self._next_window, self._end = start
        self._rows: list[tuple[Draw, ...]] = []  # planned and not yet behind us, up to _end
        self._windows: list[int] = [self._next_window]
        self._firsts: list[int] = [self._end]  # first row of each of _windows

    def rows(self, first: int, count: int) -> tuple[list[tuple[Draw, ...]], tuple[int, int]]:
        """Rows [first, first + count), and the cursor from which the rows after them follow.

        Rows are asked for in rising order.
        """
        while self._end < first + count:
            self._plan_window()
        begin = self._end - len(self._rows)
        assert first >= begin, "rows of a plan are asked for in rising order"
        taken = self._rows[first - begin : first - begin + count]
        del self._rows[: first - begin + count]
        held = bisect_right(self._firsts, first + count) - 1
        del self._windows[:held], self._firsts[:held]
        return taken, (self._windows[0], self._firsts[0])

    def _plan_window(self) -> None:
        draws = self._mixture.block(self._next_window)
        rows = pack([self._size_of(draw) for draw in draws], *self._budget)
        np.random.default_rng([self._seed, 3, self._next_window]).shuffle(rows)
        self._rows += [tuple(draws[sample] for sample in row) for row in rows]
        self._end += len(rows)
        self._next_window += 1
        self._windows.append(self._next_window)
        self._firsts.append(self._end)


def place(
    batch: Batch, row: int, sample: Rendered, *, segment: int, token: int, visual: int
) -> None:
    """Writes one sample's text into `row` as a segment of its own, from position `token` on.

    Its visual tokens count from `visual` in the row. Position i learns token i + 1 of the same
    segment; the last one learns nothing.
    """
    n = len(sample.tokens)
    span, shifted = slice(token, token + n), slice(token, token + n - 1)
    batch.tokens[row, span] = sample.tokens
    batch.targets[row, shifted] = sample.tokens[1:]
    batch.loss_weights[row, shifted] = sample.loss_weights[1:]
    batch.positions[row, span] = np.arange(n)
    batch.segment_ids[row, span] = segment
    batch.visual_index[row, span] = np.where(
        sample.visual_index >= 0, sample.visual_index + visual, -1
    )
