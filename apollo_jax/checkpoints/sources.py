# SPDX-License-Identifier: Apache-2.0
"""Tensors of files by name, read whole or in part and never faster than they are asked for.

A `Source` describes its tensors (`stored`) and reads any slice of one. Files are read, not mapped:
what is resident is what was asked for.
"""

import os
import re
import warnings
import zipfile
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
    stored, extents = {}, {}
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
                extents[name] = Extent(path, _data_offset(path, entry) + header)
    except FileNotFoundError:
        raise
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError) as error:  # the last: encrypted
        raise ValueError(f"{path} is not a readable .npz: {error}; copy it again") from error
    if not stored:
        raise ValueError(f"{path} holds no array" + (f" below {subtree!r}" if subtree else ""))
    return RawFiles(stored, extents)


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


# ---- PyTorch's pickles


WRAPPERS = ("target_encoder", "state_dict", "model", "module", "encoder")
ENCODERS, PREDICTOR = ("target_encoder", "encoder"), "predictor"  # V-JEPA's: the two go together


class TorchTensors:
    """Tensors that torch mapped into memory; read from the file where it says what lies where.

    What is read through a mapping stays resident, file by file the whole checkpoint.
    """

    def __init__(self, path: Path, tensors: dict[str, Any]):
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.stored = {
            name: Stored(path.name, tuple(t.shape), str(t.dtype).removeprefix("torch."))
            for name, t in self._tensors.items()
        }
        mapped = _mappings(path)
        places = {name: _place(t, mapped) for name, t in self._tensors.items()}
        extents = {name: Extent(path, at) for name, at in places.items() if at is not None}
        self._files = RawFiles({name: self.stored[name] for name in extents}, extents)

    def extent(self, name: str) -> Extent | None:
        return self._files.extents.get(name)

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        if name in self._files.stored:
            return self._files.read(name, index)
        import torch  # pyright: ignore[reportMissingImports]

        tensor = self._tensors[name]
        tensor = tensor[concrete(index, tuple(tensor.shape))] if tensor.ndim else tensor
        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view("bfloat16").copy()
        return tensor.contiguous().numpy().copy()


def _mappings(path: Path) -> list[tuple[int, int, int]]:
    """(first address, address behind the last, offset in the file) of a file's mappings (Linux)."""
    maps, found, real = Path("/proc/self/maps"), [], str(path.resolve())
    for line in maps.read_text().splitlines() if maps.is_file() else []:
        addresses, _, offset, _, _, *name = line.split(maxsplit=5)
        if name == [real]:
            first, behind = (int(address, 16) for address in addresses.split("-"))
            found.append((first, behind, int(offset, 16)))
    return found


def _place(tensor: Any, mapped: list[tuple[int, int, int]]) -> int | None:
    """Where in the file the bytes of a tensor lie in order, if they do."""
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    address = tensor.data_ptr()
    size = tensor.numel() * tensor.element_size()
    for first, behind, offset in mapped:
        if first <= address and address + size <= behind:
            return address - first + offset
    return None


def open_torch(path: Path, key: str = "") -> tuple[Source, dict[str, str]]:
    """A pickled state dict, and what else the file holds with the reason it is passed over.

    key: which part of a training checkpoint, like "target_encoder"; default the first of WRAPPERS.
    Raises ValueError naming the file if it holds anything but tensors and plain values, which is
    refused unread; ImportError without torch.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            f"{path} is a pickle, which takes PyTorch to read: pip install 'apollo_jax[torch]'"
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of another protocol, read or refused
            content = torch.load(path, map_location="cpu", mmap=_is_zip(path), weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many kinds, all of them about this file
        raise ValueError(f"{path}: {_refusal(str(error))}") from error
    return _state_dict(path, content, key)


def _refusal(said: str) -> str:
    """What is wrong with a pickle, out of the many lines that torch says."""
    if "TorchScript" in said:
        return (
            "it is a TorchScript archive, which holds code: refused unread; save its tensors with "
            "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), OUT), or take the hub's folder"
        )
    if found := re.search(r"GLOBAL ([\w.]+)", said):
        return f"it holds {found[1]}, which is no tensor; such pickles run code: refused unread"
    if "weights_only" in said:
        return "it is a pickle of something else than tensors: refused unread"
    return "it is truncated, corrupt, or no file of PyTorch's; copy it again"


def _is_zip(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)


def _state_dict(path: Path, content: Any, key: str) -> tuple[Source, dict[str, str]]:
    import torch  # pyright: ignore[reportMissingImports]

    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    parts = [name for name, value in content.items() if isinstance(value, dict)]
    passed = {}
    if key or not any(isinstance(v, torch.Tensor) for v in content.values()):
        chosen = key or next((name for name in WRAPPERS if name in parts), "")
        if chosen not in parts:
            raise ValueError(
                f"{path} has no {chosen!r} with tensors" if key else f"{path} holds no tensors"
            ) from ValueError(f"it holds {', '.join(map(str, content))}")
        beside = content.get(PREDICTOR, {}) if chosen in ENCODERS else {}
        read = {chosen, PREDICTOR} if beside else {chosen}
        passed = {str(n): "another part of the checkpoint" for n in content if n not in read}
        content = {**beside, **content[chosen]}
    passed |= {str(n): "no tensor" for n, v in content.items() if not isinstance(v, torch.Tensor)}
    tensors = {str(n): t for n, t in content.items() if isinstance(t, torch.Tensor)}
    odd = [n for n, t in tensors.items() if t.layout is not torch.strided or t.is_quantized]
    if odd:
        raise ValueError(f"{path}: {', '.join(odd[:5])}: sparse or quantized; save it dense")
    return TorchTensors(path, tensors), passed
