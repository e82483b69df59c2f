# SPDX-License-Identifier: Apache-2.0
"""Weights alone in Orbax's format: a checkpoint to start training from, on any mesh.

    folder/config.json             the model
    folder/weights/                our parameters (Orbax, OCDBT; names as in a training run)
    folder/published/PART/         what the published folder held besides: files, unused tensors

Written and read slice by slice through tensorstore, so that no tensor is ever whole in memory;
Orbax reads it like any checkpoint.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from apollo_jax.checkpoints import companions, safetensors
from apollo_jax.checkpoints.checkpoint import (
    Checkpoint,
    Part,
    apollo_places,
    below,
    part_of_weights,
)
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.sources import (
    BLOCK_BYTES,
    Index,
    Source,
    Stored,
    blocks,
    concrete,
)
from apollo_jax.checkpoints.translate import Arrays, Renamed, is_float
from apollo_jax.config_values import from_dict
from apollo_jax.models import apollo

WEIGHTS, PUBLISHED, UNUSED, LAYOUT = "weights", "published", "unused.safetensors", "layout.json"
FORMAT = "apollo_jax weights"
METADATA = "_METADATA"
CHECKED = dict(id="zlib", level=0)  # bytes as they are, with a checksum for each chunk


# ---- arrays


class OrbaxArrays:
    """The arrays of one Orbax item by their keys joined with dots; those that `among` takes."""

    def __init__(self, path: Path, among: Callable[[str], bool] = lambda _: True):
        self.path = path
        self._arrays = {key: self._open(key) for key in _names(path / METADATA) if among(key)}
        self.stored = {
            key: Stored(path.name, tuple(a.shape), a.dtype.name) for key, a in self._arrays.items()
        }

    def _open(self, name: str) -> Any:
        try:
            return ts.open(_spec(self.path, name), open=True).result()
        except Exception as error:  # of many kinds, all about these files
            raise self._damaged(name, error) from error

    def _damaged(self, name: str, error: Exception) -> ValueError:
        said = " ".join(str(error).split())[:160]
        return ValueError(f"{self.path}: {name} is damaged or missing, copy it again ({said})")

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        stored = self.stored[name]
        full = concrete(index, stored.shape)
        out = np.empty(tuple(s.stop - s.start for s in full), stored.dtype)
        self._fill(out, name, full)
        return out

    def _fill(self, out: np.ndarray, name: str, index: Index) -> None:
        """Read into `out` few chunks at a time: each is held twice while it is decoded."""
        chunks = self.chunks(name)
        wide = (a for a, (n, chunk) in enumerate(zip(out.shape, chunks, strict=True)) if n > chunk)
        axis = next(wide, None)
        if out.nbytes <= BLOCK_BYTES or axis is None:
            try:
                out[...] = self._arrays[name][index].read().result()
            except Exception as error:
                raise self._damaged(name, error) from error
            return
        start, stop = index[axis].start, index[axis].stop
        middle = (start + stop) // 2
        middle -= middle % chunks[axis]
        middle = middle if middle > start else start - start % chunks[axis] + chunks[axis]
        before = (slice(None),) * axis
        for part in (slice(start, middle), slice(middle, stop)):
            inner = out[*before, slice(part.start - start, part.stop - start)]
            self._fill(inner, name, (*index[:axis], part, *index[axis + 1 :]))

    def chunks(self, name: str) -> tuple[int, ...]:
        """The shape of the pieces in which a tensor is stored, each of them read as a whole."""
        return tuple(self._arrays[name].spec().to_json()["metadata"]["chunks"])

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """A tensor in pieces along its first axis, none of which splits a chunk."""
        stored = self.stored[name]
        if not stored.shape:
            yield self.read(name)
            return
        rows = self.chunks(name)[0]
        wanted = stored.shape[0] * BLOCK_BYTES // max(1, stored.nbytes)
        step = max(rows, wanted // rows * rows)
        for start in range(0, stored.shape[0], step):
            yield self.read(name, (slice(start, min(start + step, stored.shape[0])),))


def _names(path: Path) -> list[str]:
    """The arrays that an item's metadata lists. ValueError naming the file if it lists none."""
    try:
        leaves = json.loads(path.read_text())["tree_metadata"].values()
        return [".".join(key["key"] for key in leaf["key_metadata"]) for leaf in leaves]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: copy the checkpoint again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, copy it again ({error!r})") from error


def write_arrays(path: Path, source: Source) -> None:
    """An Orbax item with the tensors of `source`, written block by block."""
    skeleton = {name: np.zeros(1, np.int8) for name in source.stored}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), skeleton)
    for name, stored in source.stored.items():
        chunks = _chunks(stored)
        metadata = dict(
            shape=stored.shape,
            chunks=chunks,
            compressor=CHECKED,
            dtype=_zarr(stored.dtype),
        )
        spec = _spec(path.absolute(), name) | dict(metadata=metadata)
        array = ts.open(spec, create=True, delete_existing=True).result()
        if stored.nbytes <= BLOCK_BYTES:
            array.write(source.read(name)).result()
        else:
            _write_chunks(array, source, name, chunks)


def _write_chunks(array: Any, source: Source, name: str, chunks: list[int]) -> None:
    """Write a large tensor, which comes in order, by rows of whole chunks: none is written twice.

    Chunks are 1 along the axes before `axis`, and whole along those behind it.
    """
    stored = source.stored[name]
    axis = next(a for a in range(len(chunks)) if stored.shape[a + 1 :] == tuple(chunks[a + 1 :]))
    outer, count, rest = stored.shape[:axis], stored.shape[axis], stored.shape[axis + 1 :]
    buffer, first, filled = np.empty((chunks[axis], *rest), stored.dtype), 0, 0
    for block in blocks(source, name):
        rows = block.reshape(-1, *rest)
        while len(rows):
            wanted = min(chunks[axis], count - first % count)  # the last of each is shorter
            take = min(wanted - filled, len(rows))
            buffer[filled : filled + take] = rows[:take]
            rows, filled = rows[take:], filled + take
            if filled == wanted:
                at = tuple(map(int, np.unravel_index(first // count, outer))) if outer else ()
                start = first % count
                array[*at, start : start + filled].write(buffer[:filled]).result()
                first, filled = first + filled, 0


def _spec(path: Path, name: str) -> dict[str, Any]:
    store = dict(driver="ocdbt", base=f"file://{path.absolute()}/", path=f"{name}/")
    return dict(driver="zarr", kvstore=store)


def _chunks(stored: Stored) -> list[int]:
    """Pieces of at most BLOCK_BYTES, whole in the last axes: what a host of a pod reads."""
    chunks, room = list(stored.shape), BLOCK_BYTES // np.dtype(stored.dtype).itemsize
    for axis in range(len(chunks)):
        rest = int(np.prod(chunks[axis + 1 :], dtype=np.int64))
        chunks[axis] = max(1, min(chunks[axis], room // max(1, rest)))
        if rest <= room:
            break
    return chunks


def _zarr(dtype: str) -> str:
    return "bfloat16" if dtype == "bfloat16" else np.dtype(dtype).str


# ---- folders


def is_weights(folder: Path) -> bool:
    """Whether `folder` holds weights that `write` wrote."""
    path = folder / companions.CONFIG
    if not (folder / WEIGHTS).is_dir() or not path.is_file():
        return False
    return _json(path).get("format") == FORMAT


def _json(path: Path) -> dict[str, Any]:
    return companions.parse({path.name: path.read_bytes()}, path.name, path.parent)


def write(folder: Path, checkpoint: Checkpoint, dtype: str | None = None) -> None:
    """Write a checkpoint's parameters, in `dtype` or as they are, and what goes with them."""
    ours = checkpoint.ours
    names = {name: name for name in ours.stored}
    as_stored = {
        name: dataclasses.replace(s, dtype=_dtype(s, dtype)) for name, s in ours.stored.items()
    }
    write_arrays(folder / WEIGHTS, Renamed(ours, names, as_stored))
    companions.write(folder / PUBLISHED, _saying(checkpoint.files, dtype))
    for place, part in checkpoint.parts.items():
        _write_rest(folder / PUBLISHED / place, part, dtype)
    kind = _kind(checkpoint.config)
    content = dict(format=FORMAT, kind=kind, model=dataclasses.asdict(checkpoint.config))
    text = json.dumps(content, indent=2)  # unsorted: towers stand in channel order
    companions.write(folder, {companions.CONFIG: text.encode()})


def _write_rest(folder: Path, part: Part, dtype: str | None) -> None:
    """The published files, where its tensors lay, and those that no parameter holds."""
    laid = {
        spelling: dataclasses.asdict(stored) | dict(dtype=_dtype(stored, dtype))
        for spelling, stored in part.stored.items()
    }
    content = dict(names=dict(part.names), stored=laid)
    files = _saying(part.files, dtype)
    companions.write(folder, {**files, LAYOUT: json.dumps(content).encode()})
    unused = {name: name for name, slot in part.slots.items() if not slot.path}
    was = {name: part.tensors.stored[name] for name in unused}
    stored = {
        name: dataclasses.replace(s, file=UNUSED, dtype=_dtype(s, dtype)) for name, s in was.items()
    }
    if stored:
        safetensors.write(folder, Renamed(part.tensors, unused, stored))


def _dtype(stored: Stored, dtype: str | None) -> str:
    return dtype if dtype and is_float(stored.dtype) else stored.dtype


def _saying(files: companions.Files, dtype: str | None) -> companions.Files:
    return files if dtype is None else companions.state_dtype(dict(files), dtype)


def read_config(folder: Path) -> Any:
    """The config of the model in `folder`."""
    content = _json(folder / companions.CONFIG)
    if content.get("kind") not in _KINDS:
        raise ValueError(f"{folder / companions.CONFIG}: kind {content.get('kind')!r} is unknown")
    try:
        config = from_dict(_KINDS[content["kind"]], content.get("model") or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / companions.CONFIG}: {error}") from error
    where = str(folder / companions.CONFIG)
    if isinstance(config, apollo.Config):
        layout.check_names(config.towers, where)
    for part in apollo_places(config).values() if isinstance(config, apollo.Config) else [config]:
        layout.checked(part, where)
    return config


def open_weights(folder: Path) -> Checkpoint:
    """The checkpoint that `write` wrote."""
    config = read_config(folder)
    weights, published = OrbaxArrays(folder / WEIGHTS), folder / PUBLISHED
    places = apollo_places(config) if isinstance(config, apollo.Config) else {"": config}
    parts = {
        place: _part(part, below(weights, place), published / place)
        for place, part in places.items()
    }
    outside = companions.below(published, skip=places) if "" not in places else {}
    return Checkpoint(config, parts, outside)


def _part(config: Any, view: Source, folder: Path) -> Part:
    files = companions.read(folder)
    said = companions.parse(files, LAYOUT, folder)
    del files[LAYOUT]
    for stored in said["stored"].values():
        safetensors.check_plain(stored["file"], str(folder / LAYOUT))
    rest = folder / UNUSED
    unused = safetensors.open_file(rest) if rest.is_file() else Arrays({})
    part = part_of_weights(config, files, view, unused, said["names"])
    stored = {
        spelling: Stored(s["file"], tuple(s["shape"]), s["dtype"])
        for spelling, s in said["stored"].items()
    }
    return dataclasses.replace(part, stored=stored)


def _kind(config: Any) -> str:
    return next(kind for kind, cls in _KINDS.items() if cls is type(config))


_KINDS: dict[str, type] = {
    rules.__name__.rpartition(".")[2]: rules.Config for rules in layout.RULES.values()
} | {"apollo": apollo.Config}
