# SPDX-License-Identifier: Apache-2.0
"""One source of tensors seen as another: other names, shapes and groupings, read when asked for.

file layout <-> published tensors (a `Dialect`) <-> our parameters (a `Table`'s slots). Each view
knows for every tensor which parts of the tensors below it are made from, so that a slice of one of
our parameters comes straight from the bytes of a file.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from apollo_jax.checkpoints.rules.dialect import Dialect, Link
from apollo_jax.checkpoints.rules.table import SAME, Slot, Transform
from apollo_jax.checkpoints.sources import (
    Extent,
    Index,
    Source,
    Stored,
    blocks,
    concrete,
    extent_of,
    row_blocks,
    row_slices,
)


@dataclass(frozen=True)
class Piece:
    """`make` of part of a tensor: of all of it, of some rows, or of one index."""

    name: str
    make: Callable[[Any], Any]
    swap: Callable[[Index], Index] | None  # an index of the result -> of the part; None: unknown
    part: slice | int | None = None

    def shape(self, below: Stored) -> tuple[int, ...]:
        """Of the result."""
        rest = below.shape[1:]
        match self.part:
            case None:
                shape = below.shape
            case int():
                shape = rest
            case slice():
                shape = (self.part.stop - self.part.start, *rest)
        return jax.eval_shape(self.make, jax.ShapeDtypeStruct(shape, np.float32)).shape

    def read(self, source: Source, index: Index = ()) -> np.ndarray:
        """The result, or what is at `index` of it."""
        if self.swap is None:
            return self.make(self._part(source, ()))[index]
        full = concrete(index, self.shape(source.stored[self.name])) if index else ()
        return self.make(self._part(source, self.swap(full)))

    def _part(self, source: Source, index: Index) -> np.ndarray:
        match self.part:
            case None:
                return source.read(self.name, index)
            case int(i):
                return source.read(self.name, (slice(i, i + 1), *index))[0]
            case rows:
                inner = index[0] if index else slice(0, rows.stop - rows.start)
                moved = slice(rows.start + inner.start, rows.start + inner.stop)
                return source.read(self.name, (moved, *index[1:]))


@dataclass(frozen=True)
class Recipe:
    """A tensor: its pieces end to end, or stacked along a new leading axis."""

    pieces: tuple[Piece, ...]
    stacked: bool = False


class Translated:
    """`source` seen through recipes."""

    def __init__(self, source: Source, recipes: Mapping[str, Recipe]):
        self.source, self.recipes = source, dict(recipes)
        self.stored = {name: self._describe(recipe) for name, recipe in self.recipes.items()}

    def _describe(self, recipe: Recipe) -> Stored:
        below = [self.source.stored[piece.name] for piece in recipe.pieces]
        shapes = [p.shape(b) for p, b in zip(recipe.pieces, below, strict=True)]
        dtype = np.result_type(*{b.dtype for b in below}).name
        if recipe.stacked:
            return Stored(below[0].file, (len(shapes), *shapes[0]), dtype)
        if len(shapes) == 1:
            return Stored(below[0].file, shapes[0], dtype)
        return Stored(below[0].file, (sum(s[0] for s in shapes), *shapes[0][1:]), dtype)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        recipe, stored = self.recipes[name], self.stored[name]
        if len(recipe.pieces) == 1 and not recipe.stacked:
            return recipe.pieces[0].read(self.source, index)
        rows, *rest = concrete(index, stored.shape)
        out = np.empty(tuple(s.stop - s.start for s in (rows, *rest)), stored.dtype)
        if recipe.stacked:
            for i in range(rows.start, rows.stop):
                out[i - rows.start] = recipe.pieces[i].read(self.source, tuple(rest))
            return out
        start = 0
        for piece in recipe.pieces:
            stop = start + piece.shape(self.source.stored[piece.name])[0]
            first, last = max(start, rows.start), min(stop, rows.stop)
            if first < last:
                inner = (slice(first - start, last - start), *rest)
                out[first - rows.start : last - rows.start] = piece.read(self.source, inner)
            start = stop
        return out

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The tensor in small blocks, in order."""
        dtype = self.stored[name].dtype
        for piece in self.recipes[name].pieces:
            for block in self._piece_blocks(piece):
                yield block.astype(dtype, copy=False)

    def _piece_blocks(self, piece: Piece) -> Iterator[np.ndarray]:
        if piece.make is SAME.inward and piece.part is None:
            yield from blocks(self.source, piece.name)
            return
        below = self.source.stored[piece.name]
        shape = piece.shape(below)
        nbytes = int(np.prod(shape)) * np.dtype(below.dtype).itemsize
        if piece.make is SAME.inward and shape:
            for rows in row_slices(shape, nbytes):
                yield piece.read(self.source, (rows,))
            return
        whole = piece.read(self.source)
        for rows in row_slices(shape, nbytes):
            yield np.array(
                whole[rows] if shape else whole, order="C"
            )  # a view would keep all of it alive


# ---- our parameters <-> published tensors


def to_ours(source: Source, slots: Mapping[str, Slot]) -> Translated:
    """Published tensors by canonical name, seen as our parameters by dotted path."""
    pieces: dict[str, list[Piece]] = {}
    for name, slot in slots.items():
        if slot.path:
            piece = Piece(name, slot.transform.inward, slot.transform.swap)
            pieces.setdefault(slot.path, []).append(piece)
    stacked = {slot.path: slot.layer is not None for slot in slots.values()}
    return Translated(source, {p: Recipe(tuple(made), stacked[p]) for p, made in pieces.items()})


def to_published(source: Source, slots: Mapping[str, Slot]) -> Translated:
    """Our parameters by dotted path, seen as the published tensors that they hold."""
    return Translated(
        source,
        {
            name: Recipe((Piece(s.path, s.transform.outward, s.transform.swap, s.layer),))
            for name, s in slots.items()
            if s.path
        },
    )


# ---- published tensors <-> another layout


def from_dialect(source: Source, dialect: Dialect) -> Translated:
    """Foreign tensors seen as the published ones."""
    recipes: dict[str, Recipe] = {}
    for link in dialect.links:
        recipes |= _recipes(source, link, link.foreign, link.published, link.transform)
    return Translated(source, recipes)


def to_dialect(source: Source, dialect: Dialect) -> Translated:
    """Published tensors seen as the foreign ones."""
    recipes: dict[str, Recipe] = {}
    for link in dialect.links:
        back = replace(link.transform, inward=link.transform.outward, outward=link.transform.inward)
        recipes |= _recipes(source, link, link.published, link.foreign, back)
    return Translated(source, recipes)


def _recipes(
    source: Source, link: Link, below: tuple[str, ...], above: tuple[str, ...], how: Transform
) -> dict[str, Recipe]:
    """Of the tensors `above`, made from those `below`."""
    if len(above) == 1:
        pieces = tuple(Piece(name, how.inward, how.swap) for name in below)
        return {above[0]: Recipe(pieces, link.stacked)}
    rows = source.stored[below[0]].shape[0]
    count = rows // len(above)
    parts = [i if link.stacked else slice(i * count, (i + 1) * count) for i in range(len(above))]
    return {
        name: Recipe((Piece(below[0], how.inward, how.swap, part),))
        for name, part in zip(above, parts, strict=True)
    }


# ---- small views


class Renamed:
    """Some tensors of a source under other names, {new: old}; in other dtypes if `stored` says."""

    def __init__(
        self,
        source: Source,
        names: Mapping[str, str],
        stored: Mapping[str, Stored] | None = None,
    ):
        self.source, self.names = source, dict(names)
        self.stored = stored or {new: source.stored[old] for new, old in names.items()}

    def extent(self, name: str) -> Extent | None:
        same = self.stored[name].dtype == self.source.stored[self.names[name]].dtype
        return extent_of(self.source, self.names[name]) if same else None

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        array = self.source.read(self.names[name], index)
        return array.astype(self.stored[name].dtype, copy=False)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        for block in blocks(self.source, self.names[name]):
            yield block.astype(self.stored[name].dtype, copy=False)


class Joined:
    """Several sources side by side; of a name that two of them have, the last counts."""

    def __init__(self, *sources: Source):
        self._of = {name: source for source in sources for name in source.stored}
        self.stored = {name: source.stored[name] for name, source in self._of.items()}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        return self._of[name].read(name, index)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        return blocks(self._of[name], name)


class Arrays:
    """Arrays in memory, and zeros that are not."""

    def __init__(self, arrays: Mapping[str, Any], zeros: Mapping[str, Stored] | None = None):
        self.arrays = dict(arrays)
        self.stored = dict(zeros or {}) | {
            name: Stored("", tuple(a.shape), np.dtype(a.dtype).name) for name, a in arrays.items()
        }

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        if name in self.arrays:
            return np.asarray(self.arrays[name][index] if index else self.arrays[name])
        stored = self.stored[name]
        shape = tuple(s.stop - s.start for s in concrete(index, stored.shape))
        return np.zeros(shape, stored.dtype)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        return row_blocks(self, name)


class Padded:
    """Tensors with zeros appended along the first axis: {name: rows}."""

    def __init__(self, source: Source, rows: Mapping[str, int]):
        self.source = source
        self.stored = {
            name: replace(s, shape=(rows.get(name, s.shape[0]), *s.shape[1:])) if s.shape else s
            for name, s in source.stored.items()
        }

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        was, now = self.source.stored[name], self.stored[name]
        if was.shape == now.shape:
            return self.source.read(name, index)
        rows, *rest = concrete(index, now.shape)
        out = np.zeros(tuple(s.stop - s.start for s in (rows, *rest)), now.dtype)
        stop = min(rows.stop, was.shape[0])
        if rows.start < stop:
            out[: stop - rows.start] = self.source.read(name, (slice(rows.start, stop), *rest))
        return out

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        if self.source.stored[name] == self.stored[name]:
            return blocks(self.source, name)
        return row_blocks(self, name)


def is_float(dtype: str) -> bool:
    """Whether a dtype name is a floating-point type."""
    return dtype.startswith(("float", "bfloat"))
