# SPDX-License-Identifier: Apache-2.0
"""Which rows of a batch a process reads, and how they become part of the global batch.

Processes whose devices differ only along `context` or `tensor` hold parts of the same rows, so
they read the same ones.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from apollo_jax import sharding
from apollo_jax.training.meeting import gather
from data_pipeline.batch import Batch


class Share(NamedTuple):
    """Part `index` of `count` equal parts of the rows; `first` of the processes that read it."""

    index: int
    count: int
    first: bool
    shards: tuple[int, ...]  # of the batch axis, in the order in which the rows are read


def share(mesh: Mesh, process: int | None = None) -> Share:
    """What a process (default: this one) reads.

    Raises ValueError for a mesh on which two processes share some of their rows but not all.
    """
    process = jax.process_index() if process is None else process
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    owners = np.vectorize(lambda d: d.process_index)(mesh.devices).reshape(ways, -1)
    held = {p: tuple(np.flatnonzero((owners == p).any(axis=1)).tolist()) for p in np.unique(owners)}
    parts = sorted(set(held.values()))
    if sum(map(len, parts)) != ways or len({len(p) for p in parts}) > 1:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: its processes share some rows of a batch but not all; "
            "choose mesh.context x mesh.tensor so that it divides a process's devices, or is a "
            "multiple of them"
        )
    mine = held[process]
    first = process == min(p for p, shards in held.items() if shards == mine)
    return Share(parts.index(mine), len(parts), first, mine)


def agree(mine: Share, digest: int) -> None:
    """ValueError, in all processes, if two that read the same rows have not read the same.

    Waits for all. `digest` is of what this process has read.
    """
    if mine.count == jax.process_count():
        return
    said = gather(np.array([mine.index, digest], np.uint32))
    for index in range(mine.count):
        if len({digest for part, digest in said.tolist() if part == index}) > 1:
            alike = ", ".join(str(p) for p, (part, _) in enumerate(said.tolist()) if part == index)
            raise ValueError(
                f"processes {alike} hold parts of the same rows but have read different ones: a "
                "file is not the same for all, or could not be read by one. What was trained on "
                "them is not saved; the same command goes on from the last checkpoint"
            )


def place(rows: Batch, mesh: Mesh) -> Batch:
    """This process's rows as part of the global batch on the mesh."""
    mine = share(mesh)
    size = len(rows.tokens) // len(mine.shards)  # rows of a shard
    shapes = [(len(x) * mine.count, *x.shape[1:]) for x in rows]

    def one(x: np.ndarray, shape: tuple[int, ...], where: NamedSharding) -> Any:
        def part(index: Any) -> np.ndarray:
            start = mine.shards.index((index[0].start or 0) // size) * size
            return x[start : start + size][:, *index[1:]]

        return jax.make_array_from_callback(shape, where, part)

    return Batch(*map(one, rows, shapes, sharding.batch_shardings(shapes, mesh)))
