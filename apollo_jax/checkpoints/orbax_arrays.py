# SPDX-License-Identifier: Apache-2.0
"""Arrays in Orbax's format (OCDBT), written and read slice by slice through tensorstore.

So no tensor is ever whole in memory; Orbax reads them like any checkpoint.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from apollo_jax.checkpoints.sources import BLOCK_BYTES, Index, Source, Stored, blocks, concrete

METADATA = "_METADATA"
CHECKED = dict(id="zlib", level=0)  # bytes as they are, with a checksum for each chunk


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
            spec = _spec(self.path, name) | dict(fill_missing_data_reads=False)
            return ts.open(spec, open=True).result()
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
