# SPDX-License-Identifier: Apache-2.0
"""The mesh, and the one table from logical axis names to mesh axes (GSPMD)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_jax import meshes
from data_pipeline.batch import Batch

MESH_AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. Models name their axes; only this table knows the mesh.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # rows of a Batch
    "clips": MESH_AXES,  # vision runs on every chip, however the decoder is cut
    "row_clips": ("context", "tensor"),  # the clip slots of a row
    "length": "context",  # the positions of a row
    "lookup": "context",  # channels of the visual tokens while they are looked up
    "layers": None,
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "all_heads": ("tensor", "context"),  # heads while each device sees whole rows (Ulysses)
    "vocab": "tensor",
    "latents": None,
    "patch": None,
    "position": None,
    "norm": None,
}


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one axis may be -1 and takes what is left.

    Slices that only the data-centre network joins lie along `data`.
    """

    data: int = -1  # rows
    fsdp: int = 1  # rows, and the parameters
    context: int = 1  # positions of a row
    tensor: int = 1  # heads, hidden units, vocabulary
    # How attention crosses `context`: keys and values go round, or heads for positions.
    attention: Literal["ring", "ulysses"] = "ring"
    sparse_cores: bool = True  # exchange beside the products, on chips that have such cores


def mesh_sizes(config: MeshConfig, devices: int, slices: int = 1) -> dict[str, int]:
    """Axis -> devices, -1 filled in. ValueError, with the nearest that work, for what does not.

    `slices` lie along `data`.
    """
    asked = {axis: getattr(config, axis) for axis in MESH_AXES}
    free = [axis for axis, size in asked.items() if size == -1]
    fixed = {axis: size for axis, size in asked.items() if size != -1}
    named = {axis: f"config.mesh.{axis}={size}" for axis, size in asked.items()}
    sizes = asked | {axis: max(1, devices // max(1, math.prod(fixed.values()))) for axis in free}
    if wrong := [named[axis] for axis, size in fixed.items() if size < 1]:
        why = f"{', '.join(wrong)}: an axis has one device or more, or -1 for what is left"
    elif len(free) > 1:
        why = f"{', '.join(named[axis] for axis in free)}: at most one axis takes what is left"
    elif math.prod(sizes.values()) != devices:
        why = f"mesh {meshes.text(fixed)} on {devices} devices does not use each of them once"
    elif sizes["data"] % slices:
        why = f"mesh data={sizes['data']} does not divide over {slices} slices, which lie along it"
    else:
        return sizes
    every = (mesh for mesh in meshes.every(devices, MESH_AXES) if mesh["data"] % slices == 0)
    near = meshes.nearest(fixed, every)
    raise ValueError(f"{why}; nearest that work: {meshes.listed(near)}")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of MESH_AXES over `devices` (default: all). ValueError if they do not fit."""
    devices = jax.devices() if devices is None else devices
    shape = list(mesh_sizes(config, len(devices), slice_count(devices)).values())
    return Mesh(_arrange(shape, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def slice_count(devices: Sequence[Any]) -> int:
    """How many slices, which only the data-centre network joins, the devices are of."""
    return len({getattr(d, "slice_index", 0) for d in devices})


def _arrange(shape: list[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in mesh order: neighbours along an axis are neighbours in the machine."""
    slices = slice_count(devices)
    if slices > 1:
        within = [shape[0] // slices, *shape[1:]]
        across = [slices, *[1] * (len(shape) - 1)]
        return mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:  # an axis that is no product of the machine's
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def spec(*names: str | None) -> P:
    """PartitionSpec of an array whose axes carry these logical names (None = not sharded)."""
    unknown = [n for n in names if n is not None and n not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; known: {', '.join(RULES)}")
    return P(*(None if n is None else RULES[n] for n in names))


def param_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """NamedShardings in the tree of `state` (abstract or concrete), from each leaf's axis names.

    Raises ValueError naming the parameter whose axis the mesh does not divide, and what would.
    """
    variables = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_variable)[0]
    _check_divide({".".join(str(p.key) for p in path): v for path, v in variables}, mesh)
    return jax.tree.map(
        lambda v: v.replace(NamedSharding(mesh, _partition(v))), state, is_leaf=_is_variable
    )


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _partition(variable: nnx.Variable) -> P:
    return spec(*(variable.get_metadata().get("out_sharding") or (None,) * variable.ndim))


def _check_divide(variables: dict[str, nnx.Variable], mesh: Mesh) -> None:
    common: dict[Any, int] = {}  # what divides every size that is cut along an axis
    worst: dict[Any, tuple[str, tuple[int, ...]]] = {}
    for name, variable in variables.items():
        for size, axis in zip(variable.shape, _partition(variable), strict=True):
            common[axis] = math.gcd(common.get(axis, 0), size)
            if size % _ways(axis, mesh):
                worst.setdefault(axis, (name, variable.shape))
    for axis, (name, shape) in worst.items():
        works = meshes.nearest(
            {axis: mesh.shape[axis]}, [{axis: n} for n in meshes.divisors(common[axis])]
        )
        raise ValueError(
            f"{name} of shape {shape} does not divide over mesh {axis}={mesh.shape[axis]}; nearest "
            f"that divide every weight: {meshes.listed(works)}"
        )


def _ways(mesh_axes: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    axes = () if mesh_axes is None else np.atleast_1d(np.asarray(mesh_axes)).tolist()
    return math.prod(mesh.shape[a] for a in axes)


def batch_shardings(shapes: Sequence[tuple[int, ...]], mesh: Mesh) -> list[NamedSharding]:
    """How each field of a Batch of these shapes is laid out: rows over data and fsdp.

    What is large is also cut over the other axes, by clip slots.
    """
    large = ("frames", "frame_geometry")

    def one(field: str, shape: tuple[int, ...]) -> NamedSharding:
        partition = spec("batch", "row_clips") if field in large else spec("batch")
        return NamedSharding(mesh, _dividing(shape[: len(partition)], partition, mesh))

    return [one(field, shape) for field, shape in zip(Batch._fields, shapes, strict=True)]


_EXCHANGED_THERE = ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "all_reduce")
_TOO_SMALL = 2**20  # bytes: not worth a program of the SparseCores, each takes long to compile


def compiler_options(mesh: Mesh | AbstractMesh, sparse_cores: bool = True) -> dict[str, str]:
    """What the compiler is asked for on these devices, beside its defaults.

    On TPUs, left to itself, it makes every gather of a weight along a long `fsdp` axis an
    all-reduce of padded slices, twice the bytes, and waits for it. With these it gathers the
    weights of the next layer beside the products of this one, and scatters gradients so: on v5e
    within the products' own programs (later releases of libtpu refuse that on others, for wrong
    results and hangs), elsewhere on the SparseCores, which on tpu7x it does unasked. Along a short
    axis it would cut each product into as many parts as there are devices, to send one while it
    computes another: parts so thin that most of the time goes into main memory.
    """
    if isinstance(mesh, AbstractMesh):  # for shapes alone
        return {}
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return {}
    options = {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_prefer_async_allgather_to_allreduce": "true",
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",  # none is that large
    }
    if device.device_kind == "TPU v5 lite":
        options |= {
            "xla_tpu_enable_async_collective_fusion": "true",
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        }
    asked = ("TPU v5", "TPU v6 lite") if sparse_cores else ("TPU v5", "TPU v6 lite", "TPU7x")
    if device.device_kind in asked:
        for kind in _EXCHANGED_THERE:
            there = str(sparse_cores).lower()
            options[f"xla_tpu_enable_sparse_core_collective_offload_{kind}"] = there
            if kind[0] not in "23":  # one limit for gathers of all dimensions
                options[f"xla_tpu_sparse_core_{kind}_offload_min_size_in_bytes"] = str(_TOO_SMALL)
    return options


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pin the layout of `x` by logical axis names; a no-op outside `jax.set_mesh`.

    An axis is cut by as many of its mesh axes as divide it, the first ones first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _dividing(x.shape, spec(*names), mesh))


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


def layout(shape: tuple[int, ...], *names: str | None) -> P:
    """How an array whose axes carry these logical names lies on the mesh in use.

    Each axis is cut by as many of its mesh axes as divide it, the first ones first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return P(*(None,) * len(shape)) if mesh.empty else _dividing(shape, spec(*names), mesh)


def mesh_axes(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a PartitionSpec."""
    return (part,) if isinstance(part, str) else tuple(part or ())


def on_devices(function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function`, run by each device on its parts by these layouts; it exchanges by axis names."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)


def ways(name: str) -> int:
    """Into how many parts the mesh in use splits an axis of this logical name."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(spec(name)[0], mesh)


def divides(size: int, name: str | None) -> bool:
    """Whether the mesh in use splits an axis of this size and logical name evenly."""
    return name is None or size % ways(name) == 0


def _dividing(shape: tuple[int, ...], partition: P, mesh: Mesh | AbstractMesh) -> P:
    """`partition` with as many mesh axes on each axis as divide its size."""
    parts = []
    for size, mesh_axes in zip(shape, partition, strict=True):
        axes = () if mesh_axes is None else tuple(np.atleast_1d(np.asarray(mesh_axes)).tolist())
        while axes and size % _ways(axes, mesh):
            axes = axes[:-1]
        parts.append(axes or None)
    return P(*parts)
