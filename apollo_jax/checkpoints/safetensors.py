# SPDX-License-Identifier: Apache-2.0
"""Folders of safetensors: one file, or shards with an index."""

import dataclasses
import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from apollo_jax.checkpoints.sources import Extent, RawFiles, Source, Stored, blocks, extent_of

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_SIZE = "5GB"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class TensorFolder(RawFiles):
    """The tensors of a folder: `stored` describes them all, `read` reads one or a part of it.

    Raises FileNotFoundError if the folder has no weights, ValueError naming the file if one is
    truncated, corrupt, or disagrees with the index.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        stored: dict[str, Stored] = {}
        extents: dict[str, Extent] = {}
        for file in _files(self.path):
            for name, (tensor, extent) in _tensors(self.path / file).items():
                if name in stored:
                    other = stored[name].file
                    raise ValueError(f"{self.path}: {name} is in both {other} and {file}")
                stored[name], extents[name] = dataclasses.replace(tensor, file=file), extent
        _check_index(self.path, {name: s.file for name, s in stored.items()})
        super().__init__(stored, extents)


def open_file(path: Path) -> RawFiles:
    """The tensors of one file."""
    found = _tensors(path)
    return RawFiles({n: t for n, (t, _) in found.items()}, {n: e for n, (_, e) in found.items()})


def _tensors(path: Path) -> dict[str, tuple[Stored, Extent]]:
    try:
        with safe_open(path, framework="np"):  # checks the whole header
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}; copy it again") from error
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    unsupported = [f"{n} has {t['dtype']}" for n, t in header.items() if t["dtype"] not in DTYPES]
    if unsupported:
        raise ValueError(f"{path}: unsupported dtypes: {', '.join(unsupported[:20])}")
    return {
        name: (
            Stored(path.name, tuple(tensor["shape"]), DTYPES[tensor["dtype"]]),
            Extent(path, 8 + size + tensor["data_offsets"][0]),
        )
        for name, tensor in header.items()
    }


def write(folder: Path, source: Source) -> None:
    """Write the files that `source.stored` names, block by block.

    The bytes of tensors that are in a file already are copied by the kernel, where it can.
    """
    files: dict[str, list[str]] = {}
    for name, stored in source.stored.items():
        files.setdefault(stored.file, []).append(name)
    for file, names in files.items():
        with open(folder / file, "wb") as out:
            out.write(_header({name: source.stored[name] for name in names}))
            for name in _by_alignment(names, source.stored):
                found = extent_of(source, name)
                if found and _copied(found, source.stored[name].nbytes, out):
                    continue
                for block in blocks(source, name):
                    out.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


def _copied(found: Extent, count: int, out: BinaryIO) -> bool:
    """Append `count` bytes of a file, or False if this system cannot."""
    if not hasattr(os, "copy_file_range"):  # Linux has it
        return False
    out.flush()
    to, done = out.fileno(), 0
    with open(found.path, "rb", buffering=0) as file:
        while done < count:
            try:
                got = os.copy_file_range(file.fileno(), to, count - done, found.offset + done)
            except OSError as error:
                if done or error.errno not in CANNOT_COPY:
                    raise
                return False
            if not got:
                raise ValueError(f"{found.path} ends early: it is truncated; copy it again")
            done += got
    return True


def _by_alignment(names: list[str], stored: Mapping[str, Stored]) -> list[str]:
    """The library's order: wide types first, so that all are aligned; then by name."""
    return sorted(names, key=lambda name: (-np.dtype(stored[name].dtype).itemsize, name))


def _header(tensors: Mapping[str, Stored]) -> bytes:
    names = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in _by_alignment(list(tensors), tensors):
        tensor = tensors[name]
        if tensor.dtype not in names:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors cannot hold")
        ends = [offset, offset + tensor.nbytes]
        header[name] = dict(dtype=names[tensor.dtype], shape=tensor.shape, data_offsets=ends)
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(tensors: Mapping[str, Stored]) -> bytes:
    """The content of model.safetensors.index.json."""
    total = sum(stored.nbytes for stored in tensors.values())
    weight_map = {name: stored.file for name, stored in tensors.items()}
    text = dict(metadata=dict(total_size=total), weight_map=weight_map)
    return (json.dumps(text, indent=2, sort_keys=True) + "\n").encode()


def shard(tensors: Mapping[str, Stored], max_size: str | int) -> dict[str, Stored]:
    """The same tensors spread over files of at most `max_size` bytes (or one tensor)."""
    limit, used, number = parse_size(max_size), 0, 1
    numbers = {}
    for name, stored in tensors.items():
        if used and used + stored.nbytes > limit:
            number, used = number + 1, 0
        used += stored.nbytes
        numbers[name] = number
    files = {
        n: SINGLE if number == 1 else f"model-{n:05d}-of-{number:05d}.safetensors"
        for n in range(1, number + 1)
    }
    return {
        name: dataclasses.replace(stored, file=files[numbers[name]])
        for name, stored in tensors.items()
    }


def parse_size(size: str | int) -> int:
    """Bytes of '5GB', '200MiB' or a number."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+)\s*([KMG]?I?)B?\s*", size.upper())
    if not match or match[2] not in UNITS or not int(match[1]):
        raise ValueError(f"size {size!r} is not like '5GB', '200MB' or '1GiB'")
    return int(match[1]) * UNITS[match[2]]


def is_there(path: Path) -> bool:
    """Whether a folder has safetensors under the published names."""
    return (path / INDEX).is_file() or (path / SINGLE).is_file()


def _files(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        files = sorted(set(_weight_map(path).values()))
        absent = [name for name in files if not (path / name).is_file()]
        if absent:
            raise FileNotFoundError(f"{path / INDEX} lists {', '.join(absent)}: not in the folder")
        return files
    if (path / SINGLE).is_file():
        return [SINGLE]
    here = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    raise FileNotFoundError(
        f"{path} holds neither {SINGLE} nor {INDEX} (it holds {', '.join(here) or 'nothing'})"
    )


def _weight_map(path: Path) -> dict[str, str]:
    try:
        listed = dict(json.loads((path / INDEX).read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / INDEX} is not a safetensors index: {error!r}") from error
    for file in listed.values():
        check_plain(file, str(path / INDEX))
    return listed


def check_plain(file: Any, where: str) -> None:
    """ValueError if a listed file is not the plain name of one in its folder: no way out of it."""
    if not isinstance(file, str) or not file or file == ".." or re.search(r"[/\\\0]", file):
        raise ValueError(f"{where} lists {file!r}: not the name of a file in its folder; refused")


def _check_index(path: Path, found: dict[str, str]) -> None:
    if not (path / INDEX).is_file():
        return
    listed = _weight_map(path)
    wrong = [f"{n} (not in {f})" for n, f in listed.items() if found.get(n) != f]
    wrong += [f"{n} (in {f}, not listed)" for n, f in found.items() if n not in listed]
    if wrong:
        raise ValueError(f"{path / INDEX} disagrees with its shards: {', '.join(wrong[:20])}")
