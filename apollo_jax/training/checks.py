# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a run, said before anything is compiled or written."""

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from apollo_jax import meshes, sharding
from apollo_jax.checkpoints import run
from apollo_jax.config import Experiment, unset_paths
from apollo_jax.config_values import differences
from apollo_jax.models import splash_attention as splash
from apollo_jax.training import accumulate
from apollo_jax.training.state import TrainState, abstract_model
from data_pipeline.tokenizer import Tokenizer

GIB = 2**30
_ON_CHIP = (None, "device", "unpinned_host")  # the last is what a CPU calls its own
# What may differ between a run and its continuation (the loader checks the data themselves).
FREE = (
    "name", "train.log_every", "train.checkpoint_every", "train.keep", "train.local_*",
    "train.remat", "train.offload_optimizer", "evaluation.*", "mesh.*", "init_from",
    "init_parts.*", "topology",
    "data.frames", "data.tokenizer", "data.threads", "data.prefetch", "data.max_bad_share",
    "data.sources.*.path", "data.sources.*.data_dir", "data.sizes", "data.layout",
    "train.on_nonfinite", "train.spike_factor", "train.max_bad_steps", "train.join_seconds",
    "train.heartbeat_seconds", "train.accumulate", "train.batch_ramp",  # see loading.resume
    "train.noise_scale", "train.noise_scale_norms", "train.profile", "train.wandb",
    "positions_per_sample",
    # Rates are a function of the update alone, so what comes may change like the ramp.
    "train.num_steps", "optimizer.schedule_by", "optimizer.rate_rule", "optimizer.base_batch",
)  # fmt: skip


def continues(experiment: Experiment, workdir: Path) -> bool:
    """Whether `workdir` holds this run already.

    Raises ValueError if its run has a config that differs in more than FREE fields.
    """
    if not run.is_run(workdir):
        return False
    refuse_changes(workdir, run.read_experiment(workdir), experiment)
    return True


def refuse_changes(workdir: Path, held: Any, experiment: Any) -> None:
    """ValueError if the config that a run has and that of its continuation differ beyond FREE.

    The same for an end that lies behind.
    """
    changes = differences(held, experiment)
    wrong = [c for c in changes if not any(fnmatch.fnmatch(c.split(": ")[0], f) for f in FREE)]
    if wrong:
        lines = "\n  ".join(wrong)
        raise ValueError(
            f"{workdir} holds a run with another config (then -> now):\n  {lines}\n"
            "continue it with the config it has, or start in another --workdir "
            f"(config.init_from={workdir} takes over the weights)"
        )
    done, asked = run.progress(workdir)[1], experiment.train.num_steps
    if asked < done:
        raise ValueError(f"config.train.num_steps={asked}: {workdir} has done {done} already")


def tokenizer_of(experiment: Any, rows: int, field: str) -> Tokenizer:
    """The experiment's tokenizer. ValueError for a path that is not set or too many tokens.

    Args:
      rows: of the model's table of tokens; config.`field` says so.
    """
    unset = [f"--config.{name}=PATH" for name in unset_paths(experiment)]
    if unset:
        raise ValueError(f"the config leaves these paths to you:\n  {' '.join(unset)}")
    data = experiment.data
    tokenizer = Tokenizer.from_path(data.tokenizer)
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} tokens, the model's table "
            f"(config.{field}) only {rows}"
        )
    return tokenizer


class Machine(NamedTuple):
    """What of the devices, beside their number, decides which layouts work."""

    slices: int = 1  # that only the data-centre network joins; they lie along mesh data
    tpu: bool = False

    @classmethod
    def here(cls) -> "Machine":
        """Of this process's devices and those that it reaches."""
        devices = jax.devices()
        return cls(sharding.slice_count(devices), devices[0].platform == "tpu")


def layout(experiment: Experiment, mesh: Mapping[str, int], machine: Machine | None = None) -> None:
    """ValueError if the batch or the decoder's heads do not divide over the mesh.

    The error names what would: the nearest rows, length and meshes over as many devices.

    Args:
      mesh: axis -> devices.
      machine: default that of this process.
    """
    machine = machine or Machine.here()
    problem = next(refusals(experiment, mesh, machine=machine), None)
    if problem is None:
        return
    divisors, data = weight_divisors(experiment), experiment.data
    devices = math.prod(mesh.values())
    instead = []
    longest = experiment.model.llm.max_position_embeddings
    for field, value in (
        ("batch_size", _multiple(data.batch_size, mesh["data"] * mesh["fsdp"])),
        ("length", _multiple(data.length, _pieces(experiment, mesh, machine), longest)),
    ):
        changed = replace(experiment, data=replace(data, **{field: value}))
        if not any(refusals(changed, mesh, divisors, machine)):
            instead.append(f"config.data.{field}={value}")
    every = meshes.every(devices, list(mesh))
    works = [m for m in every if not any(refusals(experiment, m, divisors, machine))]
    if works:
        instead.append(f"mesh {meshes.listed(meshes.nearest(mesh, works))}")
    instead = instead or [f"no mesh over {devices} devices"]
    raise ValueError(f"{problem}; nearest that work: {' or '.join(instead)}")


def _multiple(value: int, unit: int, most: int | None = None) -> int:
    """The multiple of `unit` nearest to `value`, one at least and `most` at most."""
    times = round(value / unit) if most is None else min(round(value / unit), most // unit)
    return max(1, times) * unit


def _pieces(experiment: Experiment, mesh: Mapping[str, int], machine: Machine) -> int:
    """What divides a row: ring attention takes two pieces for each device, on TPUs in blocks."""
    if mesh["context"] == 1 or experiment.mesh.attention != "ring":
        return 1
    return 2 * mesh["context"] * (splash.LANES if machine.tpu else 1)


def refusals(
    experiment: Experiment,
    mesh: Mapping[str, int],
    divisors: Mapping[str, int] | None = None,
    machine: Machine | None = None,
) -> Iterator[str]:
    """What does not divide over a mesh; nothing if the experiment can run on it.

    Args:
      mesh: axis -> devices.
      divisors: see `weight_divisors`; without them the weights are not looked at.
      machine: default that of this process.
    """
    machine = machine or Machine.here()
    rows, length = experiment.data.batch_size, experiment.data.length
    heads = experiment.model.llm.num_attention_heads
    context, tensor = mesh["context"], mesh["tensor"]
    if mesh["data"] % machine.slices:
        yield (
            f"mesh data={mesh['data']} does not divide over {machine.slices} slices, which lie "
            "along it"
        )
    if rows % (mesh["data"] * mesh["fsdp"]):
        yield (
            f"config.data.batch_size={rows} does not divide over the {mesh['data'] * mesh['fsdp']} "
            f"row shards of mesh {meshes.text(mesh)}"
        )
    pieces = _pieces(experiment, mesh, machine)
    if length % pieces:
        blocks = f" of a multiple of {splash.LANES} positions" if machine.tpu else ""
        yield (
            f"config.data.length={length} does not divide into the {2 * context} pieces{blocks} "
            f"that ring attention takes on mesh context={context}"
        )
    if heads % tensor:
        yield f"the decoder's {heads} heads do not divide over mesh tensor={tensor}"
    elif experiment.mesh.attention == "ulysses" and heads % (tensor * context):
        yield (
            f"the decoder's {heads} heads do not divide over mesh context={context} "
            f"tensor={tensor}, as mesh.attention=ulysses needs"
        )
    yield from indivisible(mesh, divisors)


def indivisible(
    mesh: Mapping[str, int], divisors: Mapping[str, int] | None = None
) -> Iterator[str]:
    """Axes of a mesh over which the weights do not divide."""
    for axis, largest in (divisors or {}).items():
        if largest % mesh[axis]:
            yield f"the weights do not divide over mesh {axis}={mesh[axis]}, only over {largest}"


def weight_divisors(experiment: Any) -> dict[str, int]:
    """By mesh axis the largest number of devices that divides every weight cut along it."""
    one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    _, shapes = abstract_model(experiment.model, experiment.train, (), one)
    found: dict[str, int] = {}
    for shape in shapes.values():
        for size, axis in zip(shape.shape, shape.sharding.spec, strict=True):
            if axis is not None:
                found[axis] = math.gcd(found.get(axis, 0), size)
    return found


def memory(
    experiment: Any,
    state: TrainState,
    mesh: Mapping[str, int],
    limit: float | None = None,
    machine: Machine | None = None,
    refusals: Callable[..., Iterator[str]] = refusals,
) -> None:
    """ValueError if weights, moments and gradients alone exceed a device, with what would do.

    Args:
      experiment: an Experiment, or any kind of run with `refusals` of its own.
      state: shapes and shardings.
      limit: bytes of a device; default what this process's first device says, if it does.
      machine: default that of this process.
    """
    if limit is None:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    gradients = gradients_held(experiment, state)
    held = held_bytes(state, gradients)
    needed = on_device(held, mesh)
    if limit is None or needed <= limit:
        return
    divisors, machine = weight_divisors(experiment), machine or Machine.here()
    every = meshes.every(math.prod(mesh.values()), list(mesh))
    works = [
        m
        for m in every
        if on_device(held, m) <= limit and not any(refusals(experiment, m, divisors, machine))
    ]
    near = meshes.listed(meshes.nearest(mesh, works))
    raise ValueError(
        f"weights, moments and gradients take {needed / GIB:.2f} GiB on each device of mesh "
        f"{meshes.text(mesh)}, which has {limit / GIB:.2f}; "
        + (f"nearest that work: mesh {near}" if near else "no mesh over them works: train less")
    )


def gradients_held(experiment: Any, state: TrainState) -> Any:
    """Shapes of the gradients that are there at once: sums over microbatches, or what a clip needs.

    A clip by their norm needs all of them; accumulated ones are float32, and clipped in place.
    """
    if experiment.train.ramp.most > 1:
        return accumulate.shapes_of(state).grads
    return state.params if experiment.optimizer.clip_norm > 0 else {}


def held_bytes(state: TrainState, gradients: Any) -> dict[tuple[str, ...], int]:
    """Bytes in the chips' memory by the mesh axes that cut them, all chips together."""
    found: dict[tuple[str, ...], int] = {}
    for leaf in jax.tree.leaves((state, gradients)):
        if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding.memory_kind in _ON_CHIP:
            cut = [part if isinstance(part, tuple) else (part,) for part in leaf.sharding.spec]
            axes = tuple(axis for part in cut for axis in part if axis)
            found[axes] = found.get(axes, 0) + math.prod(leaf.shape) * leaf.dtype.itemsize
    return found


def on_device(held: Mapping[tuple[str, ...], int], mesh: Mapping[str, int]) -> float:
    """Of `held_bytes` what one device of a mesh has."""
    return sum(n / math.prod(mesh[axis] for axis in axes) for axes, n in held.items())
