# SPDX-License-Identifier: Apache-2.0
"""The mesh, and the one table from logical axis names to mesh axes (GSPMD)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Models name their axes; only this table knows the mesh.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # rows of a Batch
    "clips": ("data", "fsdp", "tensor"),  # vision runs on every chip, however the decoder is cut
    "length": None,
    "layers": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "latents": None,
    "patch": None,
    "position": None,
    "norm": None,
}


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one axis may be -1 and takes what is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (default: all). ValueError if they do not fit."""
    devices = jax.devices() if devices is None else devices
    shape = [config.data, config.fsdp, config.tensor]
    if shape.count(-1) > 1 or any(n == 0 or n < -1 for n in shape):
        raise ValueError(f"mesh {config}: axes must be positive, at most one -1")
    known = math.prod(n for n in shape if n != -1)
    if -1 in shape:
        shape[shape.index(-1)] = max(1, len(devices) // known)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh data x fsdp x tensor = {' x '.join(map(str, shape))} does not use exactly the "
            f"{len(devices)} devices present; set mesh.data=-1 or make the product {len(devices)}"
        )
    return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec(*names: str | None) -> P:
    """PartitionSpec of an array whose axes carry these logical names (None = not sharded)."""
    unknown = [n for n in names if n is not None and n not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; known: {', '.join(RULES)}")
    return P(*(None if n is None else RULES[n] for n in names))


def param_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """NamedShardings in the tree of `state` (abstract or concrete), from each leaf's axis names.

    Raises ValueError naming the parameter whose axis the mesh does not divide.
    """

    def one(path: tuple, leaf: nnx.Variable) -> nnx.Variable:
        names = leaf.get_metadata().get("out_sharding") or (None,) * leaf.ndim
        partition = spec(*names)
        _check_divides(".".join(str(p.key) for p in path), leaf.shape, partition, mesh)
        return leaf.replace(NamedSharding(mesh, partition))

    return jax.tree_util.tree_map_with_path(
        one, state, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def _check_divides(name: str, shape: tuple[int, ...], partition: P, mesh: Mesh) -> None:
    for axis, (size, mesh_axes) in enumerate(zip(shape, partition, strict=True)):
        parts = _ways(mesh_axes, mesh)
        if size % parts:
            raise ValueError(
                f"{name}: axis {axis} of shape {shape} does not divide over {parts} devices "
                f"({mesh_axes}); choose a mesh whose {mesh_axes} axis divides {size}"
            )


def _ways(mesh_axes: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    axes = () if mesh_axes is None else np.atleast_1d(np.asarray(mesh_axes)).tolist()
    return math.prod(mesh.shape[a] for a in axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every field of a Batch: rows over data and fsdp."""
    return NamedSharding(mesh, spec("batch"))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin the layout of `x` by logical axis names; a no-op outside `jax.set_mesh`.

    An axis that the mesh does not divide is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    parts = [
        p if size % _ways(p, mesh) == 0 else None
        for size, p in zip(x.shape, spec(*names), strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, P(*parts))


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': what the mesh in use is made of, else the default backend."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def per_device(
    function: Callable[..., jax.Array],
    arrays: Sequence[jax.Array],
    names: Sequence[tuple[str | None, ...]],
) -> jax.Array:
    """function(*arrays), run by each device of the mesh on its own part; nothing is exchanged.

    `names` are the logical axes of each array; the result is laid out as the first. Kernels that
    the compiler cannot partition are called this way.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(*arrays)
    specs = [_dividing(x.shape, spec(*n), mesh) for x, n in zip(arrays, names, strict=True)]
    mapped = jax.shard_map(function, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
    return mapped(*arrays)


def ways(name: str) -> int:
    """Into how many parts the mesh in use splits an axis of this logical name."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(spec(name)[0], mesh)


def divides(size: int, name: str | None) -> bool:
    """Whether the mesh in use splits an axis of this size and logical name evenly."""
    return name is None or size % ways(name) == 0


def _dividing(shape: tuple[int, ...], partition: P, mesh: AbstractMesh) -> P:
    """`partition` with as many mesh axes on each axis as divide its size."""
    parts = []
    for size, mesh_axes in zip(shape, partition, strict=True):
        axes = () if mesh_axes is None else tuple(np.atleast_1d(np.asarray(mesh_axes)).tolist())
        while axes and size % _ways(axes, mesh):
            axes = axes[:-1]
        parts.append(axes or None)
    return P(*parts)
