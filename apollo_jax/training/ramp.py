# SPDX-License-Identifier: Apache-2.0
"""Ramp: of how many microbatches each update of a run consists."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ramp(NamedTuple):
    """A step function of the updates so far; pieces as in `train.batch_ramp`."""

    pieces: tuple[tuple[int, int], ...]  # (updates so far from which on, microbatches), from 0 on

    def at(self, update: int) -> int:
        """Microbatches of the update that follows `update` others."""
        return next(count for first, count in reversed(self.pieces) if first <= update)

    def before(self, update: int) -> int:
        """Microbatches of the first `update` updates together."""
        ends = [first for first, _ in self.pieces[1:]] + [update]
        pairs = zip(self.pieces, ends, strict=True)
        return sum(count * max(0, min(end, update) - first) for (first, count), end in pairs)

    def traced_at(self, update: jax.Array) -> jax.Array:
        """As `at`, of a number that is known when the compiled program runs; i32[]."""
        count = jnp.int32(self.pieces[0][1])
        for first, after in self.pieces[1:]:
            count = jnp.where(update >= first, jnp.int32(after), count)
        return count

    def traced_before(self, update: jax.Array) -> jax.Array:
        """As `before`, of a number that is known when the compiled program runs; i32[]."""
        taken = jnp.int32(self.pieces[0][1]) * update
        for (_, count), (first, after) in pairwise(self.pieces):
            taken = taken + (after - count) * jnp.maximum(update - first, 0)
        return taken

    @property
    def most(self) -> int:
        """Microbatches of the largest update."""
        return max(count for _, count in self.pieces)


Pieces = tuple[tuple[int, int], ...]


def reached(pieces: Pieces, updates: int) -> Pieces:
    """The pieces that a run of so many updates comes to."""
    return (*pieces[:1], *(piece for piece in pieces[1:] if piece[0] < updates))


def left_out(pieces: Pieces, updates: int) -> list[str]:
    """What to tell of the others."""
    late = ",".join(f"{first}:{count}" for first, count in pieces if first >= updates)
    return [f"config.train.batch_ramp: {late} is left out, the run ends at {updates}"] * bool(late)


def problems(
    accumulate: int, pieces: Pieces, updates: int, noise_scale: bool = False
) -> Iterator[str]:
    """What is wrong with `train.accumulate` and `train.batch_ramp`, by name."""
    most = max([accumulate, *(count for _, count in reached(pieces, updates))])
    if noise_scale and most < 2:
        yield (
            "config.train.noise_scale compares the microbatches of an update, which has only one "
            f"in all {updates} updates here: set config.train.accumulate, or a piece of "
            "config.train.batch_ramp before the end, to 2 or more (and data.batch_size to fewer "
            "rows)"
        )
    if not pieces:
        return
    name = f"config.train.batch_ramp {','.join(f'{a}:{b}' for a, b in pieces)}"
    if accumulate != 1:
        yield f"{name} says how many microbatches an update has: leave train.accumulate at 1"
    if pieces[0][0] != 0:
        yield f"{name} must begin at update 0"
    if any(later <= sooner for (sooner, _), (later, _) in pairwise(pieces)):
        yield f"{name} must go from earlier to later updates"
    if any(count < 1 for _, count in pieces):
        yield f"{name} has an update without a microbatch; at least 1"
