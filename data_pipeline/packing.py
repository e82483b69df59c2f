# SPDX-License-Identifier: Apache-2.0
"""Packing: samples of known length to rows of L tokens and C clip slots, before any decoding.

n samples, of (tokens, clips) each. Draws are taken a window at a time and packed into as few rows
as possible, so only one window's lengths need to be known. The sequence of rows is a pure function
of the draws: only exact arithmetic decides.
"""

from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from data_pipeline.batch import Batch
from data_pipeline.conversation import Rendered
from data_pipeline.mixture import Mixture

Draw = tuple[int, int]  # source, record

_GOOD = 1.003  # times the least possible number of rows (and one): no better plan is looked for
_SHARPNESS = 64.0  # how much more a row's balance counts than its size, see _balanced


def least_rows(sizes: np.ndarray, length: int, clips: int) -> float:
    """A lower bound of the rows that samples i[n, 2] need: that of the scarcer budget."""
    tokens, slots = np.asarray(sizes, np.int64).reshape(-1, 2).sum(0).tolist()
    return max(tokens / max(length, 1), slots / max(clips, 1))


def pack(sizes: np.ndarray, length: int, clips: int) -> list[list[int]]:
    """Sample numbers per row, for samples of i[n, 2] (tokens, clips).

    Samples of size (0, 0), those known to be unusable, are spread evenly over the rows.
    """
    need = np.asarray(sizes, np.int64).reshape(-1, 2)
    budget = np.array([length, clips], np.int64)
    if (need > budget).any():
        raise ValueError(f"a sample exceeds a row of {length} tokens and {clips} clips")
    useful = np.flatnonzero(need.any(axis=1))
    good = _GOOD * least_rows(need, length, clips) + 1
    rows: list[list[int]] | None = None
    for method in (_best_fit, _balanced_quadratic, _balanced_linear):
        found = method(need[useful], budget)
        if rows is None or len(found) < len(rows):
            rows = found
        if len(rows) <= good:
            break
    packed = [useful[row].tolist() for row in rows or []] or [[]]
    for number, sample in enumerate(np.flatnonzero(~need.any(axis=1)).tolist()):
        packed[number % len(packed)].append(sample)
    return [sorted(row) for row in packed]


def _best_fit(need: np.ndarray, budget: np.ndarray) -> list[list[int]]:
    """Largest first, each into the row that it fills best: next to perfect if one budget binds."""
    share = need / np.maximum(budget, 1)
    tokens, slots, taken = need[:, 0].tolist(), need[:, 1].tolist(), share.sum(axis=1).tolist()
    room = np.tile(budget[:, None], len(need))
    slack = np.full(len(need), 2.0)
    rows: list[list[int]] = []
    for sample in np.argsort(-share.max(axis=1), kind="stable").tolist():
        opened = len(rows)
        fits = (room[0, :opened] >= tokens[sample]) & (room[1, :opened] >= slots[sample])
        best = int(np.where(fits, slack[:opened], 3.0).argmin()) if opened else 0
        if not opened or not fits[best]:
            best = opened
            rows.append([])
        rows[best].append(sample)
        room[0, best] -= tokens[sample]
        room[1, best] -= slots[sample]
        slack[best] -= taken[sample]
    return rows


def _balanced_quadratic(need: np.ndarray, budget: np.ndarray) -> list[list[int]]:
    return _balanced(need, budget, power=2)


def _balanced_linear(need: np.ndarray, budget: np.ndarray) -> list[list[int]]:
    return _balanced(need, budget, power=1)


def _balanced(need: np.ndarray, budget: np.ndarray, power: int) -> list[list[int]]:
    """Row by row, each towards its part of both sums, so that neither kind of sample is left over.

    Where both budgets bind, rows full of clips would waste the tokens that texts need later. After
    the largest sample left, a row takes the one that comes nearest to its aim while it keeps what
    is left of both (1 = all of the aim) the same; the more so, the emptier the row is.
    """
    order = np.argsort(-(need / np.maximum(budget, 1)).max(axis=1), kind="stable")
    tokens, slots = np.ascontiguousarray(need[order].T)
    left = need.sum(axis=0)
    rows: list[list[int]] = []
    while len(order):
        aim = np.maximum(left / max(1.0, (left / np.maximum(budget, 1)).max()), 1e-3)
        share_t, share_c = tokens / aim[0], slots / aim[1]
        lean = share_t - share_c
        taken = np.zeros(len(order), bool)
        room_t, room_c = budget.tolist()
        want_t = want_c = 1.0
        best, row = 0, []
        while True:
            row.append(int(order[best]))
            taken[best] = True
            room_t, room_c = room_t - int(tokens[best]), room_c - int(slots[best])
            want_t, want_c = want_t - float(share_t[best]), want_c - float(share_c[best])
            fits = (tokens <= room_t) & (slots <= room_c) & ~taken
            weight = _SHARPNESS * max(want_t, want_c, 0.0) ** power
            off = (share_t - want_t) ** 2 + (share_c - want_c) ** 2
            off += weight * (lean - (want_t - want_c)) ** 2
            best = int(np.where(fits, off, np.inf).argmin())
            if not fits[best]:
                break
        rows.append(row)
        left = left - need[row].sum(axis=0)
        order, tokens, slots = order[~taken], tokens[~taken], slots[~taken]
    return rows


class Plan:
    """The endless sequence of rows, each a tuple of draws; windows are planned when first needed.

    `sizes_of(draws i64[n, 2])` gives i32[n, 2] (tokens, clips), (0, 0) for records that cannot be
    used. `start` is a cursor (window, its first row) as returned by `rows`: planning resumes there.
    """

    def __init__(
        self,
        mixture: Mixture,
        sizes_of: Callable[[np.ndarray], np.ndarray],
        length: int,
        clips: int,
        *,
        seed: int,
        start: tuple[int, int] = (0, 0),
    ):
        self._mixture, self._sizes_of = mixture, sizes_of
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
        rows = pack(self._sizes_of(draws), *self._budget)
        np.random.default_rng([self._seed, 3, self._next_window]).shuffle(rows)
        named: list[Draw] = list(map(tuple, draws.tolist()))
        self._rows += [tuple(named[sample] for sample in row) for row in rows]
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
