# SPDX-License-Identifier: Apache-2.0
"""Layouts of a recipe on a slice: what `plan search` varies, and which outcomes are the best."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

from apollo_jax import meshes, sharding
from apollo_jax.config import Experiment, TrainConfig

_GIB = 2**30
REMATS: tuple[str, ...] = get_args(get_type_hints(TrainConfig)["remat"])


@dataclass(frozen=True)
class Layout:
    """What the search varies; one step holds the same tokens in every layout."""

    mesh: tuple[int, ...]  # devices along sharding.MESH_AXES
    remat: str
    rows: int
    length: int  # of a row
    clips: int  # slots of a row
    accumulate: int = 1  # microbatches

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(sharding.MESH_AXES, self.mesh, strict=True))

    @property
    def clips_of_a_step(self) -> int:
        return self.accumulate * self.rows * self.clips

    def overrides(self) -> tuple[tuple[str, str], ...]:
        """The config fields that ask for this layout."""
        fields = {f"mesh.{axis}": n for axis, n in self.sizes.items()} | {
            "train.remat": self.remat,
            "train.accumulate": self.accumulate,
            "data.batch_size": self.rows,
            "data.length": self.length,
            "data.clips": self.clips,
        }
        return tuple((name, str(value)) for name, value in fields.items())

    def of(self, experiment: Experiment) -> Experiment:
        """The experiment in this layout."""
        data = replace(experiment.data, batch_size=self.rows, length=self.length, clips=self.clips)
        mesh = replace(experiment.mesh, **self.sizes)
        train = replace(experiment.train, remat=self.remat, accumulate=self.accumulate)
        return replace(experiment, data=data, mesh=mesh, train=train)

    def __str__(self) -> str:
        rows = f"{self.accumulate}x" * (self.accumulate > 1) + str(self.rows)
        return (
            f"{meshes.text(self.sizes)} remat={self.remat} {rows}x{self.length} clips={self.clips}"
        )


@dataclass(frozen=True)
class Outcome:
    """What became of a layout: its bounds, or why it was refused."""

    layout: Layout
    seconds: float = 0.0  # at least, per step
    peak: float = 0.0  # bytes per device; of what does not fit, as far as it is known
    refused: str = ""

    def beats(self, other: "Outcome") -> bool:
        """At least as good in all, and better in one; of equals the first in name.

        With more clip slots a step does more, so one with fewer never beats it.
        """
        mine, theirs = ((o.seconds, o.peak, -o.layout.clips_of_a_step) for o in (self, other))
        if mine == theirs:
            return str(self.layout) < str(other.layout)
        return all(a <= b for a, b in zip(mine, theirs, strict=True))

    def __str__(self) -> str:
        return self.refused or f"{self.seconds:.3g} s, {self.peak / _GIB:.2f} GiB"


def neighbours(layout: Layout) -> Iterator[Layout]:
    """The layouts one change away, whether or not they can run; one of each kind in turn."""
    kinds = (_meshes, _remats, _lengths, _accumulations, _clips)
    for turn in itertools.zip_longest(*(kind(layout) for kind in kinds)):
        yield from (found for found in turn if found is not None)


def _meshes(layout: Layout) -> Iterator[Layout]:
    """A prime factor moved from one axis to another."""
    for source, size in enumerate(layout.mesh):
        factor = next((p for p in meshes.divisors(size) if p > 1), 0)
        for target in range(len(layout.mesh)) if factor else ():
            if target != source:
                yield _moved(layout, source, target, factor)


def _moved(layout: Layout, source: int, target: int, factor: int) -> Layout:
    mesh = list(layout.mesh)
    mesh[source], mesh[target] = mesh[source] // factor, mesh[target] * factor
    return replace(layout, mesh=tuple(mesh))


def _remats(layout: Layout) -> Iterator[Layout]:
    """The next ones: they are in the order of their memory."""
    place = REMATS.index(layout.remat)
    for remat in REMATS[max(0, place - 1) : place + 2]:
        if remat != layout.remat:
            yield replace(layout, remat=remat)


def _lengths(layout: Layout) -> Iterator[Layout]:
    """Half the rows at twice the length, or the reverse."""
    length, clips = layout.length, layout.clips
    for half in _half_the_rows(layout):
        yield replace(half, length=length * 2, clips=clips * 2)
    if length % 2 == 0 and clips % 2 == 0:
        yield replace(layout, rows=layout.rows * 2, length=length // 2, clips=clips // 2)


def _accumulations(layout: Layout) -> Iterator[Layout]:
    """Half the rows in twice the microbatches, or the reverse."""
    for half in _half_the_rows(layout):
        yield replace(half, accumulate=layout.accumulate * 2)
    if layout.accumulate % 2 == 0:
        yield replace(layout, rows=layout.rows * 2, accumulate=layout.accumulate // 2)


def _half_the_rows(layout: Layout) -> Iterator[Layout]:
    """Where each device has but one, they are cut: a factor of data or fsdp goes to the others."""
    if layout.rows % 2:
        return
    half = replace(layout, rows=layout.rows // 2)
    data, fsdp, context, tensor = range(len(layout.mesh))
    if half.rows % (layout.mesh[data] * layout.mesh[fsdp]) == 0:
        yield half
        return
    for source in (fsdp, data):
        for target in (context, tensor) if layout.mesh[source] % 2 == 0 else ():
            yield _moved(half, source, target, 2)


def _clips(layout: Layout) -> Iterator[Layout]:
    """Half the clip slots in a row of the same length, or twice as many."""
    if layout.clips % 2 == 0:
        yield replace(layout, clips=layout.clips // 2)
    yield replace(layout, clips=layout.clips * 2)


def pareto(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those that no other beats, fastest first."""
    ran = [o for o in outcomes if not o.refused]
    return sorted((o for o in ran if not any(p.beats(o) for p in ran)), key=lambda o: o.seconds)
