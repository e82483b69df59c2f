# SPDX-License-Identifier: Apache-2.0
"""Which rows processes read, on meshes whose axes lie across them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apollo_jax.sharding import MESH_AXES
from apollo_jax.training.rows import share


def mesh_of(processes: int, **axes: int) -> Any:
    """A mesh whose devices, in order, belong to as many processes."""
    shape = [axes.get(name, 1) for name in MESH_AXES]
    owners = np.repeat(np.arange(processes), np.prod(shape) // processes)
    devices = np.array([SimpleNamespace(process_index=p) for p in owners], object).reshape(shape)
    return SimpleNamespace(devices=devices, shape=dict(zip(MESH_AXES, shape, strict=True)))


@pytest.mark.parametrize(
    ("axes", "parts", "first"),
    [
        (dict(data=8), [0, 1, 2, 3], [True] * 4),
        (dict(data=2, fsdp=4), [0, 1, 2, 3], [True] * 4),
        (dict(data=4, tensor=2), [0, 1, 2, 3], [True] * 4),  # within a process
        (dict(data=2, context=4), [0, 0, 1, 1], [True, False, True, False]),
        (dict(context=2, tensor=4), [0, 0, 0, 0], [True, False, False, False]),
    ],
    ids=str,
)
def test_processes_along_context_or_tensor_read_the_same_rows(axes, parts, first):
    mesh = mesh_of(4, **axes)
    shares = [share(mesh, p) for p in range(4)]
    assert [s.index for s in shares] == parts
    assert [s.first for s in shares] == first
    assert {s.count for s in shares} == {max(parts) + 1}
    ways = axes.get("data", 1) * axes.get("fsdp", 1)
    assert sorted({n for s in shares for n in s.shards}) == list(range(ways))


def test_rows_that_are_shared_in_part_are_refused():
    with pytest.raises(ValueError, match=r"share some rows of a batch but not all.*mesh\.context"):
        share(mesh_of(2, data=1, fsdp=3, context=2), 0)
