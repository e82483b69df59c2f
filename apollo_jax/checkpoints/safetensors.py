# SPDX-License-Identifier: Apache-2.0
"""Folders of safetensors: one file, or shards with an index."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  teaches numpy the name bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

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
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class Stored(NamedTuple):
    """One tensor on disk."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class TensorFolder:
    """The tensors of a folder: `stored` describes them all, indexing reads one.

    Raises FileNotFoundError if the folder has no weights, ValueError naming the file if one is
    truncated, corrupt, or disagrees with the index.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._open = {name: _open(self.path / name) for name in _files(self.path)}
        self.stored: dict[str, Stored] = {}
        for file, handle in self._open.items():
            for name in handle.keys():  # noqa: SIM118  the handle is no dict
                if name in self.stored:
                    other = self.stored[name].file
                    raise ValueError(f"{self.path}: {name} is in both {other} and {file}")
                part = handle.get_slice(name)
                kind = part.get_dtype()
                if kind not in DTYPES:
                    raise ValueError(f"{self.path / file}: {name} has unsupported dtype {kind}")
                self.stored[name] = Stored(file, tuple(part.get_shape()), DTYPES[kind])
        _check_index(self.path, {name: s.file for name, s in self.stored.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        return self._open[self.stored[name].file].get_tensor(name)


def write(path: Path, tensors: Mapping[str, Stored], get: Callable[[str], np.ndarray]) -> None:
    """Write the files that `tensors` names, one at a time in memory."""
    files: dict[str, list[str]] = {}
    for name, stored in tensors.items():
        files.setdefault(stored.file, []).append(name)
    for file, names in files.items():
        # save_file would write the memory of a transposed view in its own order
        content = {
            name: np.ascontiguousarray(get(name).astype(tensors[name].dtype, copy=False))
            for name in names
        }
        save_file(content, path / file, metadata={"format": "pt"})


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
    return {name: stored._replace(file=files[numbers[name]]) for name, stored in tensors.items()}


def parse_size(size: str | int) -> int:
    """Bytes of '5GB', '200MiB' or a number."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"\s*(\d+)\s*([KMG]?I?)B?\s*", size.upper())
    if not match or match[2] not in UNITS:
        raise ValueError(f"size {size!r} is not like '5GB', '200MB' or '1GiB'")
    return int(match[1]) * UNITS[match[2]]


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
        return json.loads((path / INDEX).read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / INDEX} is not a safetensors index: {error!r}") from error


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or corrupt: {error}; copy it again") from error


def _check_index(path: Path, found: dict[str, str]) -> None:
    if not (path / INDEX).is_file():
        return
    listed = _weight_map(path)
    wrong = [f"{n} (not in {f})" for n, f in listed.items() if found.get(n) != f]
    wrong += [f"{n} (in {f}, not listed)" for n, f in found.items() if n not in listed]
    if wrong:
        raise ValueError(f"{path / INDEX} disagrees with its shards: {', '.join(wrong[:20])}")
