# SPDX-License-Identifier: Apache-2.0
"""Mixture: which record of which source stands at which position of an endless stream.

The stream is a pure function of (seed, position). It comes in blocks; each source's share of a
block is its weight, rounded up or down by a coin that makes the expectation exact (systematic
sampling), and the block is shuffled. A source's own draws run through a fresh permutation of its
records per epoch: every record exactly once before any record again.
"""

import zlib
from collections.abc import Mapping
from functools import lru_cache

import numpy as np


def draw_weights(
    weights: Mapping[str, float], weight_by: str, tokens: Mapping[str, np.ndarray | None]
) -> dict[str, float]:
    """By which weights the sources' samples are drawn, so that `weights` are shares of what is
    said: 'samples', or 'tokens', exactly in expectation. `tokens` i[n] are those of every record,
    None if they are not known. Raises ValueError if that keeps the shares from being computed.
    """
    if weight_by == "samples":
        return dict(weights)
    if weight_by != "tokens":
        raise ValueError(f"weight_by={weight_by!r} must be 'samples' or 'tokens'")
    drawn = {}
    for name, weight in weights.items():
        lengths = tokens[name]
        if lengths is None:
            raise ValueError(
                f"weight_by='tokens' needs the sizes of all samples of source {name!r}; measure "
                "them once: apollo-jax data check --config FILE (and say the same "
                "config.data.sizes, a folder for them, if the source is not a file)"
            )
        mean = float(np.mean(lengths))
        if weight > 0 and mean == 0:
            raise ValueError(f"source {name!r} has no sample that fits a row")
        drawn[name] = weight / mean if weight > 0 else 0.0
    return drawn


class Mixture:
    """Blocks of (source, record) draws from sources of `sizes` records at `weights`.

    Raises ValueError for weights that are negative, all zero, or on an empty source.
    """

    def __init__(
        self, sizes: Mapping[str, int], weights: Mapping[str, float], *, seed: int, block: int
    ):
        self.names = list(sizes)
        self.block_size = block
        self._sizes = [sizes[name] for name in self.names]
        self._seed = seed
        share = np.array([weights[name] for name in self.names], np.float64)
        if not np.all(np.isfinite(share)) or np.any(share < 0) or share.sum() <= 0:
            raise ValueError(f"mixture weights must be >= 0 and not all 0, got {dict(weights)}")
        for name, size, weight in zip(self.names, self._sizes, share, strict=True):
            if weight > 0 and size < 1:
                raise ValueError(f"source {name!r} has no records to draw")
        self._edges = np.concatenate([[0.0], np.cumsum(share) / share.sum()])
        self._edges[-1] = 1.0
        self._order = lru_cache(maxsize=2 * len(self.names))(self._permutation)

    def block(self, index: int) -> np.ndarray:
        """The draws at positions [index * block, (index + 1) * block), i64[block, 2].

        Each is (source, record), by their numbers.
        """
        counts = self._counts(index + 1)
        before = counts[:-1].sum(0)
        draws = np.empty((self.block_size, 2), np.int64)
        draws[:, 0] = np.repeat(np.arange(len(self.names)), counts[-1])
        self._rng(0, index).shuffle(draws[:, 0])
        for source in np.flatnonzero(counts[-1]).tolist():
            epochs, places = np.divmod(
                before[source] + np.arange(counts[-1, source]), self._sizes[source]
            )
            records = [
                self._order(source, epoch)[places[epochs == epoch]]
                for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
            ]
            draws[draws[:, 0] == source, 1] = np.concatenate(records)
        return draws

    def _counts(self, blocks: int) -> np.ndarray:
        """Draws per source in each of the first `blocks` blocks: i64[blocks, sources]."""
        coins = self._rng(1).random(blocks)[:, None]
        upto = np.ceil(self._edges * self.block_size - coins).astype(np.int64)
        return np.diff(upto, axis=1)

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        name = zlib.crc32(self.names[source].encode())  # the order survives other sources' coming
        return self._rng(2, name, epoch).permutation(self._sizes[source])

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])
