# SPDX-License-Identifier: Apache-2.0
"""A table too large for one device, shared by a group of neighbours along a mesh axis.

As it is stored, each of the N devices along the axis has D / N columns of all rows [V, D / N].
While a group of G works together, each of its devices has V / G rows with all columns, and works
for the positions of the whole group. So what travels in each turn is positions, not rows; the
table and its gradient travel once.

Rows are padded to a multiple of G. Tables cross the mesh transposed: a part of the columns of a
transpose is whole tiles of a TPU's memory, a part of its own columns is not, and would be copied
once more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

_HELD_BYTES = 2**28  # of a device's rows and their gradient
NOT_A_TOKEN = jnp.iinfo(jnp.int32).max


class Group(NamedTuple):
    """The devices that share a table; of one device, nothing travels."""

    axis: str | None = None
    size: int = 1

    def _inside(self) -> list[list[int]]:
        count = lax.axis_size(self.axis)
        return [list(range(i, i + self.size)) for i in range(0, count, self.size)]

    def _across(self) -> list[list[int]]:
        return [list(group) for group in zip(*self._inside(), strict=True)]

    def rows(self, table: Float[Array, "V d"], dtype: Any) -> Float[Array, "D v"]:
        """This device's rows with all columns, transposed."""
        columns = table.astype(dtype).T
        if self.axis is None:
            return columns
        columns = jnp.pad(columns, [(0, 0), (0, -columns.shape[1] % self.size)])
        if self.size > 1:
            columns = lax.all_to_all(
                columns, self.axis, 1, 0, axis_index_groups=self._inside(), tiled=True
            )
        return lax.all_gather(
            columns, self.axis, axis_index_groups=self._across(), axis=0, tiled=True
        )

    def scatter(self, gradient: Float[Array, "D v"], count: int) -> Float[Array, "V d"]:
        """The reverse of `rows`: this device's columns of the sum over all groups; V is `count`."""
        if self.axis is None:
            return gradient.T
        mine = lax.psum_scatter(
            gradient, self.axis, scatter_dimension=0, axis_index_groups=self._across(), tiled=True
        )
        if self.size > 1:
            mine = lax.all_to_all(
                mine, self.axis, 0, 1, axis_index_groups=self._inside(), tiled=True
            )
        return mine[:, :count].T

    def index(self) -> Int[Array, ""] | int:
        """This device's place in its group."""
        return 0 if self.size == 1 else lax.axis_index(self.axis) % self.size

    def ids(self, table: Float[Array, "V d"], over: tuple[str, ...]) -> Int[Array, " v"]:
        """Tokens of this device's rows; NOT_A_TOKEN where padded.

        `table` is a part of the vocabulary's, the other parts lying over the mesh axes `over`.
        """
        count = table.shape[0]
        held = -(-count // self.size)
        row = self.index() * held + jnp.arange(held)
        return jnp.where(row < count, lax.axis_index(over) * count + row, NOT_A_TOKEN)

    def positions(self, x: Array) -> Array:
        """The positions [c, ...] of all devices of the group [G c, ...]."""
        if self.size == 1:
            return x
        return lax.all_gather(x, self.axis, axis_index_groups=self._inside(), tiled=True)

    def own(self, x: Array) -> Array:
        """Of the group's positions this device's; of the others zero."""
        place = jnp.arange(x.shape[0]) // (x.shape[0] // self.size)
        return x if self.size == 1 else jnp.where(place == self.index(), x, 0)

    def part(self, x: Array) -> Array:
        """Of the group's positions [G c] this device's [c]."""
        return x if self.size == 1 else x.reshape(self.size, -1)[self.index()]

    def sum_positions(self, x: Array) -> Array:
        """This device's positions of the group's sum."""
        if self.size == 1:
            return x
        return lax.psum_scatter(x, self.axis, axis_index_groups=self._inside(), tiled=True)

    def reduce(self, reduction: Callable[..., Array], x: Array) -> Array:
        """lax.psum, pmax or pmin over the group."""
        if self.size == 1:
            return x
        return reduction(x, self.axis, axis_index_groups=self._inside())


def alone(axes: tuple[str, ...]) -> Group:
    """Groups of one device each along the axis over which columns are spread, if any."""
    return Group(axes[0]) if axes else Group()


def group(table: Float[Array, "V d"], axes: tuple[str, ...], trained: bool) -> Group:
    """The smallest group along that axis whose devices can hold their rows and their gradient."""
    if not axes:
        return Group()
    count = lax.axis_size(axes[0])
    needed = table.size * count * (6 if trained else 2)  # rows in bfloat16, gradient in float32
    enough = (n for n in range(1, count) if count % n == 0 and needed <= n * _HELD_BYTES)
    return Group(axes[0], next(enough, count))
