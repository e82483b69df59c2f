# SPDX-License-Identifier: Apache-2.0
"""From files to the devices of a mesh: each process reads the slices that its devices hold."""

from collections.abc import Mapping

import jax
import numpy as np

from apollo_jax.checkpoints.sources import Index, Source, concrete


def place(source: Source, like: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The tensors named in `like` in its dtypes and shardings, one after the other.

    Nothing but the slices for this process's devices is read, and only one tensor's at a time.
    """
    return {name: _place(source, name, shape) for name, shape in like.items()}


def _place(source: Source, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
    read: dict[tuple, np.ndarray] = {}  # devices that hold the same slice share it

    def part(index: Index | None) -> np.ndarray:
        full = concrete(index or (), like.shape)
        key = tuple((s.start, s.stop) for s in full)
        if key not in read:
            read[key] = source.read(name, full).astype(like.dtype, copy=False)
        return read[key]

    assert like.sharding is not None, f"{name} has no sharding"
    return jax.make_array_from_callback(like.shape, like.sharding, part)
