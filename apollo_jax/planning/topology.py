# SPDX-License-Identifier: Apache-2.0
"""TPU topologies to compile for, and what their chips can do.

The chips' figures are those of the published specifications of Cloud TPU, per chip; a `tpu7x` chip
is two devices. GiB = 2**30 bytes, rates in bytes or FLOPs per second.
"""

import difflib
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

# What libtpu wants to know about the host that it is not on.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Chip:
    """One chip: its memory, its rates, and the shape of its slices."""

    name: str
    hbm: float  # bytes that a program may use
    flops: float  # bf16, dense
    hbm_bandwidth: float
    ici_bandwidth: float  # all links together, one way
    dcn_bandwidth: float  # its part of its machine's network
    dimensions: int  # of a slice
    wraps: int  # a dimension of so many chips closes to a ring
    host_cpus: int  # virtual, of a machine with four chips
    host_chips: int = 4  # chips of one machine in a large slice
    devices: int = 1


_GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 15.75 * _GIB, 197e12, 819e9, 200e9, 3.125e9, 2, 16, 112),
        Chip("v5p", 95.74 * _GIB, 459e12, 2765e9, 600e9, 6.25e9, 3, 4, 208),
        Chip("v6e", 31.25 * _GIB, 918e12, 1640e9, 400e9, 12.5e9, 2, 16, 180),
        Chip("tpu7x", 189.5 * _GIB, 2307e12, 7380e9, 600e9, 12.5e9, 3, 4, 224, devices=2),
    )
}
# What jax calls the devices of these chips, and the GPUs whose peak (bf16, dense) is known here.
_TPU_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
_GPU_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
# Slices by the names under which they are rented: v5p counts cores, two to a chip.
SLICES = {
    "v5e-16": "v5e:4x4",
    "v5e-32": "v5e:4x8",
    "v5e-64": "v5e:8x8",
    "v5e-128": "v5e:8x16",
    "v5e-256": "v5e:16x16",
    "v5p-8": "v5p:2x2x1",
    "v5p-16": "v5p:2x2x2",
    "v5p-32": "v5p:2x2x4",
    "v5p-64": "v5p:2x4x4",
    "v5p-128": "v5p:4x4x4",
    "v5p-256": "v5p:4x4x8",
    "v5p-512": "v5p:4x8x8",
    "v5p-1024": "v5p:8x8x8",
    "v5p-2048": "v5p:8x8x16",
    "v6e-16": "v6e:4x4",
    "v6e-64": "v6e:8x8",
    "v6e-256": "v6e:16x16",
    "tpu7x-64": "tpu7x:4x4x4",
}


@dataclass(frozen=True)
class Topology:
    """`slices` equal slices of one kind of chip, joined by the data-centre network."""

    name: str  # "v5p:4x4x4"
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def hosts(self) -> int:
        return max(1, self.chips // self.chip.host_chips)

    def devices(self) -> list[Any]:
        """The devices as the TPU compiler knows them. ValueError if libtpu is not there."""
        kw: dict[str, Any] = {"num_slices": self.slices} if self.slices > 1 else {}
        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.chip.name}:{_by(self.shape)}", **kw
            )
        except Exception as error:  # whatever libtpu raises, jax wraps it in its own way
            if "not installed" in str(error) or "libtpu" in str(error).lower():
                raise ValueError(
                    "compiling for TPUs needs the libtpu package: pip install 'apollo-jax[tpu]'"
                ) from error
            raise ValueError(f"the TPU compiler does not know {self.name}: {error}") from error
        return list(found.devices)


def parse(name: str) -> Topology:
    """`v5p:4x4x4`, a rented name such as `v5e-256`, or `2*v5e:16x16` for two slices.

    ValueError names the known chips, slices and shapes.
    """
    count, star, slice_name = name.rpartition("*")
    slices = int(count) if star and count.isdigit() else 1
    if star and not count.isdigit():
        raise ValueError(f"topology {name!r}: write the number of slices first, as in 2*v5e:16x16")
    full = SLICES.get(slice_name, slice_name)
    kind, _, sides = full.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", sides):
        near = difflib.get_close_matches(slice_name, [*SLICES, *SLICES.values()], n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(SLICES)}"
        raise ValueError(
            f"topology {name!r} is not CHIP:AxB[xC] with a chip of {', '.join(CHIPS)}; {hint}"
        )
    shape = tuple(int(side) for side in sides.split("x"))
    chip = CHIPS[kind]
    if slices < 1:
        raise ValueError(f"topology {name!r} has no slices; one is {full}, two are 2*{full}")
    if len(shape) != chip.dimensions or 0 in shape:
        example = next(s for s in SLICES.values() if s.startswith(kind))
        raise ValueError(f"{kind} slices have {chip.dimensions} sides, as in {example}: {name!r}")
    if shape[0] % 2 or shape[1] % 2:
        smaller, larger = (
            f"{kind}:{_by((*(max(2, side + side % 2 * way) for side in shape[:2]), *shape[2:]))}"
            for way in (-1, 1)
        )
        near = smaller if smaller == larger else f"{smaller} or {larger}"
        raise ValueError(
            f"topology {name!r}: a machine holds 2x2 chips, so the first two sides are even; "
            f"nearest that work: {near}"
        )
    return Topology(name, chip, shape, slices)


def peak_flops(device_kind: str) -> float:
    """FLOPs per second of one device at its published rate in bf16; 0 = not known here."""
    if device_kind in _TPU_KINDS:
        chip = CHIPS[_TPU_KINDS[device_kind]]
        return chip.flops / chip.devices
    return _GPU_PEAKS.get(device_kind, 0.0)


def use_compiler_only() -> None:
    """Lets this process compile for TPUs and compute on the CPU; before jax makes a backend."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    jax.config.update("jax_platforms", "cpu")


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
