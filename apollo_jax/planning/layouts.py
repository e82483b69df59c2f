# SPDX-License-Identifier: Apache-2.0
"""Layouts of a recipe on a slice: what `plan search` varies, and which outcomes are the best."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

from apollo_jax import meshes, sharding
from apollo_jax.config import Experiment, TrainConfig

_GIB = 2**30
REMATS: tuple[str, ...] = get_args(get_type_hints(TrainConfig)["remat"])


@dataclass(frozen=True)
class Layout:
    """What the search varies; one step holds the same tokens and clips in every layout."""

    mesh: tuple[int, ...]  # devices along sharding.MESH_AXES
    remat: str
    rows: int
    length: int  # of a row
    clips: int  # of a row
    accumulate: int = 1  # microbatches

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(sharding.MESH_AXES, self.mesh, strict=True))

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
        return f"{meshes.text(self.sizes)} remat={self.remat} {rows}x{self.length}"


@dataclass(frozen=True)
class Outcome:
    """What became of a layout: its bounds, or why it was refused."""

    layout: Layout
    seconds: float = 0.0  # at least, per step
    peak: float = 0.0  # bytes per device; of what does not fit, as far as it is known
    refused: str = ""

    def beats(self, other: "Outcome") -> bool:
        """At least as good in both, and better in one; of equals the first in name."""
        mine, theirs = (self.seconds, self.peak), (other.seconds, other.peak)
        if mine == theirs:
            return str(self.layout) < str(other.layout)
        return mine[0] <= theirs[0] and mine[1] <= theirs[1]

    def __str__(self) -> str:
        return self.refused or f"{self.seconds:.3g} s, {self.peak / _GIB:.2f} GiB"


def neighbours(layout: Layout) -> Iterator[Layout]:
    """The layouts one change away, whether or not they can run."""
    for source, size in enumerate(layout.mesh):
        factor = next((p for p in meshes.divisors(size) if p > 1), 0)
        for target in range(len(layout.mesh)) if factor else ():
            if target != source:
                mesh = list(layout.mesh)
                mesh[source], mesh[target] = size // factor, mesh[target] * factor
                yield replace(layout, mesh=tuple(mesh))
    place = REMATS.index(layout.remat)
    for remat in REMATS[max(0, place - 1) : place + 2]:  # they are in the order of their memory
        if remat != layout.remat:
            yield replace(layout, remat=remat)
    rows, length, clips = layout.rows, layout.length, layout.clips
    if rows % 2 == 0:
        yield replace(layout, rows=rows // 2, length=length * 2, clips=clips * 2)
        yield replace(layout, rows=rows // 2, accumulate=layout.accumulate * 2)
    if layout.accumulate % 2 == 0:
        yield replace(layout, rows=rows * 2, accumulate=layout.accumulate // 2)
    if length % 2 == 0 and clips % 2 == 0:
        yield replace(layout, rows=rows * 2, length=length // 2, clips=clips // 2)


def pareto(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Those that no other beats, fastest first."""
    ran = [o for o in outcomes if not o.refused]
    return sorted((o for o in ran if not any(p.beats(o) for p in ran)), key=lambda o: o.seconds)
