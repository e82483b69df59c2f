# SPDX-License-Identifier: Apache-2.0
"""index.npz: one row per stored medium, found by its id; small and fast to open for 10^6 media.

N media. A dict of a million names takes 150 MB and most of the time to open; here the names stay
one blob of bytes, and 12 bytes per medium find a row in it.
"""

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

# Columns, one row per medium: MediaInfo without its strings, and where the medium lies.
INDEX_DTYPES = {
    "num_frames": np.int64,
    "fps": np.float64,
    "duration": np.float64,
    "stored_frames": np.int32,
    "stored_fps": np.float64,
    "height": np.int32,
    "width": np.int32,
    "shard": np.int32,
    "record": np.int64,  # the medium's first record inside its shard
}
_BLOCK = 1 << 14  # rows at a time where temporaries are many times the result
_FEW = 5000  # names that difflib compares in no noticeable time


class MediaIndex:
    """The index of one folder of shards; never changes, so threads may share it."""

    def __init__(self, path: str | Path):
        """ValueError if the file is damaged or its columns do not fit each other."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as index:
                self.columns = {k: index[k] for k in (*INDEX_DTYPES, "is_video")}
                self._names = index["ids"].tobytes() + b"\0"
        except FileNotFoundError:
            raise
        except Exception as error:  # zipfile, zlib and numpy have one of their own for each damage
            again = f"`apollo-jax shards repair {Path(path).parent}` writes it again"
            raise ValueError(f"{path} is damaged: {error}; {again}") from error
        blob = np.frombuffer(self._names, np.uint8)
        self._starts = np.concatenate(([0], np.flatnonzero(blob == 0) + 1))  # i64[N+1]
        lengths = {name: len(column) for name, column in self.columns.items()}
        if set(lengths.values()) != {len(self)}:
            raise ValueError(f"{path} is damaged: {len(self)} names, but columns of {lengths}")
        self._weights = _weights(int(np.diff(self._starts).max()))
        hashes = _hashes(blob, self._starts, self._weights)
        self._order = hashes.argsort(kind="stable").astype(np.int32)
        self._hashes = hashes[self._order]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def name(self, row: int) -> str:
        return self._names[self._starts[row] : self._starts[row + 1] - 1].decode()

    def names(self) -> list[str]:
        return self._names[:-1].decode().split("\0")

    def find(self, name: str) -> int:
        """The row of an id, -1 if there is none."""
        key = name.encode(errors="surrogatepass")
        if not 0 < len(key) < len(self._weights) + 1:
            return -1
        value = _hash(key, self._weights)
        at = int(self._hashes.searchsorted(value))
        while at < len(self._hashes) and self._hashes[at] == value:
            row = int(self._order[at])
            if self._names[self._starts[row] : self._starts[row + 1] - 1] == key:
                return row
            at += 1
        return -1

    def near(self, name: str) -> str | None:
        """A name that may have been meant: similar, or among very many with the same stem."""
        if len(self) <= _FEW:
            return next(iter(get_close_matches(name, self.names(), 1)), None)
        stem = PurePosixPath(name).stem.encode(errors="surrogatepass")
        at = self._names.find(stem) if stem else -1
        return self.name(int(self._starts.searchsorted(at, "right")) - 1) if at >= 0 else None

    def doubles(self) -> list[str]:
        """Names that stand there more than once."""
        equal = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        rows = np.unique(np.concatenate((self._order[equal], self._order[equal + 1])))
        seen, double = set(), []
        for name in map(self.name, rows.tolist()):
            double += [name] if name in seen else []
            seen.add(name)
        return double

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every medium as a dict of id, is_video and the columns; a million in a few seconds."""
        for begin in range(0, len(self), _BLOCK):
            end = min(begin + _BLOCK, len(self))
            names = self._names[self._starts[begin] : self._starts[end] - 1].decode().split("\0")
            block = {k: v[begin:end].tolist() for k, v in self.columns.items()}
            for name, *values in zip(names, *block.values(), strict=True):
                yield {"id": name, **dict(zip(block, values, strict=True))}


def _weights(count: int) -> np.ndarray:
    """u64[count]: powers of an odd number, modulo 2^64."""
    weights = np.full(count, 0x9E3779B97F4A7C15, np.uint64)
    return np.multiply.accumulate(weights)


def _hash(name: bytes, weights: np.ndarray) -> np.uint64:
    letters = np.frombuffer(name, np.uint8).astype(np.uint64)
    return (letters * weights[: len(letters)]).sum(dtype=np.uint64)


def _hashes(blob: np.ndarray, starts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """u64[N]: `_hash` of every name in the blob u8, each ended by a NUL, which adds nothing."""
    hashes = np.empty(len(starts) - 1, np.uint64)
    for begin in range(0, len(hashes), _BLOCK):
        at = starts[begin : begin + _BLOCK + 1]
        place = np.arange(at[0], at[-1]) - np.repeat(at[:-1], np.diff(at))
        terms = blob[at[0] : at[-1]] * weights[place]
        hashes[begin : begin + _BLOCK] = np.add.reduceat(terms, at[:-1] - at[0])
    return hashes
