# SPDX-License-Identifier: Apache-2.0
"""Tensors of files by name, read whole or in part and never faster than they are asked for.

A `Source` describes its tensors (`stored`) and reads any slice of one. Files are read, not mapped:
what is resident is what was asked for.
"""

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  teaches numpy the name bfloat16
import numpy as np

Index = tuple[slice, ...]  # of the leading axes; () is everything

BLOCK_BYTES = 4 << 20  # what is in memory of a tensor that only passes through


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class Source(Protocol):
    """Tensors by name."""

    @property
    def stored(self) -> Mapping[str, Stored]: ...

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """The tensor, or the part of it at `index`."""
        ...


def blocks(source: Source, name: str) -> Iterator[np.ndarray]:
    """A tensor in pieces of about BLOCK_BYTES along its first axis, in order."""
    own = getattr(source, "blocks", None)
    yield from own(name) if own else row_blocks(source, name)


def row_blocks(source: Source, name: str) -> Iterator[np.ndarray]:
    """`blocks` of a source whose rows can be read one by one."""
    stored = source.stored[name]
    for rows in row_slices(stored.shape, stored.nbytes):
        yield source.read(name, (rows,) if stored.shape else ())


def row_slices(shape: tuple[int, ...], nbytes: int) -> Iterator[slice]:
    """Slices of the first axis that hold about BLOCK_BYTES each."""
    count = shape[0] if shape else 1
    step = max(1, count * BLOCK_BYTES // max(nbytes, 1))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def concrete(index: Index, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """`index` for every axis, with its bounds."""
    index = (*index, *(slice(None) for _ in shape[len(index) :]))
    bounds = (s.indices(n) for s, n in zip(index, shape, strict=True))
    return tuple(slice(start, max(start, stop)) for start, stop, step in bounds if step == 1)


@dataclass(frozen=True)
class Extent:
    """Where a tensor's bytes lie: little-endian, first axis slowest."""

    path: Path
    offset: int


def extent_of(source: Source, name: str) -> Extent | None:
    """Where a tensor's bytes lie in a file as they are to be, if they do."""
    own = getattr(source, "extent", None)
    return own(name) if own else None


class RawFiles:
    """Tensors whose bytes lie in files as they are."""

    def __init__(self, stored: Mapping[str, Stored], extents: Mapping[str, Extent]):
        self.stored, self.extents = dict(stored), dict(extents)

    def extent(self, name: str) -> Extent:
        return self.extents[name]

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        stored, extent = self.stored[name], self.extents[name]
        if not stored.shape:
            return _pread(extent, 0, (), stored.dtype)
        rows, *rest = concrete(index, stored.shape)
        row = stored.nbytes // stored.shape[0] if stored.shape[0] else 0
        count = rows.stop - rows.start
        if all(s == slice(0, n) for s, n in zip(rest, stored.shape[1:], strict=True)):
            shape = (count, *stored.shape[1:])
            return _pread(extent, rows.start * row, shape, stored.dtype)
        out = np.empty((count, *(s.stop - s.start for s in rest)), stored.dtype)
        for part in row_slices((count,), count * row):
            start, stop = rows.start + part.start, rows.start + part.stop
            shape = (stop - start, *stored.shape[1:])
            out[part] = _pread(extent, start * row, shape, stored.dtype)[:, *rest]
        return out


def _pread(extent: Extent, offset: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    out = np.empty(shape, dtype)
    view, done = out.reshape(-1).view(np.uint8).data, 0
    with open(extent.path, "rb", buffering=0) as file:
        while done < len(view):
            got = os.preadv(file.fileno(), [view[done:]], extent.offset + offset + done)
            if not got:
                raise ValueError(f"{extent.path} ends early: it is truncated; copy it again")
            done += got
    return out


# ---- numpy's .npz, as big_vision writes it


def open_npz(path: Path, subtree: str = "") -> Source:
    """The arrays of an uncompressed .npz; `subtree` keeps those below it, without its name.

    Raises ValueError naming the file if it is no such archive or its arrays are objects.
    """
    stored, extents, entries = {}, {}, {}
    prefix = f"{subtree.strip('/')}/" if subtree else ""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if name == entry.filename or not (name := _below(name, prefix)):
                    continue
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{path} is compressed; write it again with numpy.savez")
                with archive.open(entry) as file:
                    shape, dtype = _npy_header(file, f"{path}: {entry.filename}")
                    header = file.tell()
                stored[name] = Stored(path.name, shape, dtype)
                if entry.file_size != header + stored[name].nbytes:
                    raise ValueError(f"{path}: {entry.filename} is shorter or longer than it says")
                begin = _data_offset(path, entry)
                extents[name] = Extent(path, begin + header)
                entries[name] = (entry, Extent(path, begin))
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError) as error:  # the last: encrypted
        raise ValueError(f"{path} is not a readable .npz: {error}; copy it again") from error
    if not stored:
        raise ValueError(f"{path} holds no array" + (f" below {subtree!r}" if subtree else ""))
    return Npz(stored, extents, entries)


class Npz(RawFiles):
    """The arrays of an .npz, each checked as a whole before it is first read."""

    def __init__(
        self,
        stored: Mapping[str, Stored],
        extents: Mapping[str, Extent],
        entries: Mapping[str, tuple[zipfile.ZipInfo, Extent]],
    ):
        super().__init__(stored, extents)
        self._unchecked = dict(entries)

    def extent(self, name: str) -> Extent:
        self._check(name)
        return super().extent(name)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        self._check(name)
        return super().read(name, index)

    def _check(self, name: str) -> None:
        if name not in self._unchecked:
            return
        entry, begin = self._unchecked[name]
        found = 0
        for rows in row_slices((entry.file_size,), entry.file_size):
            part = _pread(begin, rows.start, (rows.stop - rows.start,), "uint8")
            found = zlib.crc32(part.data, found)
        if found != entry.CRC:
            raise ValueError(
                f"{begin.path}: {entry.filename} is corrupt, its checksum differs; copy it again"
            )
        del self._unchecked[name]


def _below(name: str, prefix: str) -> str:
    """`name` without `prefix`, which may stand below params/ or opt/target/; "" elsewhere."""
    for root in ("", "params/", "opt/target/"):
        if prefix and name.startswith(root + prefix):
            return name.removeprefix(root + prefix)
    return "" if prefix else name


def _npy_header(file: Any, where: str) -> tuple[tuple[int, ...], str]:
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise ValueError(f"{where} is no array of numpy's: {error}") from error
    if dtype.hasobject:
        raise ValueError(f"{where} holds Python objects, not numbers: refused")
    if fortran and len(shape) > 1:
        raise ValueError(f"{where} is in Fortran order; write it again in C order")
    if dtype.str == "|V2":  # as numpy saves bfloat16
        return shape, "bfloat16"
    if dtype.kind not in "biufc" or dtype.byteorder == ">":
        raise ValueError(f"{where} is {dtype.str}; numbers, little-endian, are read")
    return shape, dtype.name


def _data_offset(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind its local header."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return entry.header_offset + 30 + name + extra
