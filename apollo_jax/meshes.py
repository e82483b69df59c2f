# SPDX-License-Identifier: Apache-2.0
"""Meshes as plain sizes, axis -> devices: all there are, the nearest ones, and how they read."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

Sizes = dict[str, int]


def every(devices: int, axes: Sequence[str]) -> Iterator[Sizes]:
    """All ways to write `devices` as a product over `axes`."""
    first, *rest = axes
    if not rest:
        yield {first: devices}
        return
    for size in divisors(devices):
        for others in every(devices // size, rest):
            yield {first: size, **others}


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def nearest(wanted: Mapping[str, int], among: Iterable[Sizes], count: int = 2) -> list[Sizes]:
    """The `count` meshes whose sizes along the axes of `wanted` differ least, as ratios.

    Of two at one distance the one with fewer axes cut comes first.
    """

    def distance(mesh: Sizes) -> tuple[float, int]:
        ratios = (abs(math.log2(mesh[axis] / max(1, size))) for axis, size in wanted.items())
        return round(sum(ratios), 6), sum(n > 1 for n in mesh.values())

    return sorted(among, key=distance)[:count]


def text(mesh: Mapping[str, int]) -> str:
    """`fsdp=4 tensor=2`: the axes that are cut."""
    return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


def listed(meshes: Iterable[Mapping[str, int]]) -> str:
    """The meshes in words, for an error."""
    return " or ".join(text(mesh) for mesh in meshes)
