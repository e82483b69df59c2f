# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a run, said before anything is compiled or written."""

import fnmatch
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from apollo_jax import meshes, sharding
from apollo_jax.checkpoints import run
from apollo_jax.config import Experiment, unset_paths
from apollo_jax.config_values import differences
from apollo_jax.training import accumulate
from apollo_jax.training.state import TrainState, abstract_model
from data_pipeline.tokenizer import Tokenizer

GIB = 2**30
_ON_CHIP = (None, "device", "unpinned_host")  # the last is what a CPU calls its own
# What may differ between a run and its continuation (the loader checks the data themselves).
FREE = (
    "name", "train.log_every", "train.checkpoint_every", "train.keep", "train.remat",
    "train.offload_optimizer", "evaluation.*", "mesh.*", "init_from", "init_parts.*", "topology",
    "data.frames", "data.tokenizer", "data.threads", "data.prefetch", "data.max_bad_share",
    "data.sources.*.path", "data.sources.*.data_dir", "data.sizes", "data.layout",
    "train.on_nonfinite", "train.spike_factor", "train.max_bad_steps", "train.join_seconds",
    "train.heartbeat_seconds", "train.accumulate", "train.batch_ramp",  # see loading.resume
    "train.noise_scale", "train.noise_scale_norms", "train.profile", "train.wandb",
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
    """ValueError if the config that a run has and that of its continuation differ beyond FREE."""
    changes = differences(held, experiment)
    wrong = [c for c in changes if not any(fnmatch.fnmatch(c.split(": ")[0], f) for f in FREE)]
    if wrong:
        lines = "\n  ".join(wrong)
        raise ValueError(
            f"{workdir} holds a run with another config (then -> now):\n  {lines}\n"
            "continue it with the config it has, or start in another --workdir "
            f"(config.init_from={workdir} takes over the weights)"
        )


def tokenizer_of(experiment: Experiment) -> Tokenizer:
    """The experiment's tokenizer. ValueError for a path that is not set or too many tokens."""
    unset = [f"--config.{name}=PATH" for name in unset_paths(experiment)]
    if unset:
        raise ValueError(f"the config leaves these paths to you:\n  {' '.join(unset)}")
    data = experiment.data
    tokenizer = Tokenizer.from_path(data.tokenizer)
    size, rows = tokenizer.vocab_size, experiment.model.llm.vocab_size
    if size > rows:
        raise ValueError(
            f"tokenizer {data.tokenizer} has {size} tokens, the decoder's table "
            f"(config.model.llm.vocab_size) only {rows}"
        )
    return tokenizer


def layout(experiment: Experiment, mesh: Mapping[str, int]) -> None:
    """ValueError if the batch or the decoder's heads do not divide over the mesh.

    The error names the nearest meshes over as many devices on which everything divides.

    Args:
      mesh: axis -> devices.
    """
    problem = next(refusals(experiment, mesh), None)
    if problem is None:
        return
    divisors = weight_divisors(experiment)
    devices = math.prod(mesh.values())
    every = meshes.every(devices, list(mesh))
    works = [m for m in every if not any(refusals(experiment, m, divisors))]
    near = meshes.listed(meshes.nearest(mesh, works))
    instead = f"mesh {near}" if works else f"no mesh over {devices} devices"
    ways, rows = mesh["data"] * mesh["fsdp"], experiment.data.batch_size
    if rows % ways:
        instead = f"config.data.batch_size={max(1, round(rows / ways)) * ways}, {instead}"
    raise ValueError(f"{problem}; nearest that work: {instead}")


def refusals(
    experiment: Experiment, mesh: Mapping[str, int], divisors: Mapping[str, int] | None = None
) -> Iterator[str]:
    """What does not divide over a mesh; nothing if the experiment can run on it.

    Args:
      mesh: axis -> devices.
      divisors: see `weight_divisors`; without them the weights are not looked at.
    """
    rows, length = experiment.data.batch_size, experiment.data.length
    heads = experiment.model.llm.num_attention_heads
    context, tensor = mesh["context"], mesh["tensor"]
    if rows % (mesh["data"] * mesh["fsdp"]):
        yield (
            f"config.data.batch_size={rows} does not divide over the {mesh['data'] * mesh['fsdp']} "
            f"row shards of mesh {meshes.text(mesh)}"
        )
    if length % (2 * context) and context > 1:
        yield (
            f"config.data.length={length} does not divide into the {2 * context} pieces of mesh "
            f"context={context}"
        )
    if heads % tensor:
        yield f"the decoder's {heads} heads do not divide over mesh tensor={tensor}"
    elif experiment.mesh.attention == "ulysses" and heads % (tensor * context):
        yield (
            f"the decoder's {heads} heads do not divide over mesh context={context} "
            f"tensor={tensor}, as mesh.attention=ulysses needs"
        )
    for axis, largest in (divisors or {}).items():
        if largest % mesh[axis]:
            yield f"the weights do not divide over mesh {axis}={mesh[axis]}, only over {largest}"


def weight_divisors(experiment: Experiment) -> dict[str, int]:
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
    experiment: Experiment, state: TrainState, mesh: Mapping[str, int], limit: float | None = None
) -> None:
    """ValueError if weights, moments and gradients alone exceed a device, with what would do.

    Args:
      state: shapes and shardings.
      limit: bytes of a device; default what this process's first device says, if it does.
    """
    if limit is None:
        limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    gradients = gradients_held(experiment, state)
    held = held_bytes(state, gradients)
    needed = on_device(held, mesh)
    if limit is None or needed <= limit:
        return
    divisors = weight_divisors(experiment)
    every = meshes.every(math.prod(mesh.values()), list(mesh))
    works = [
        m
        for m in every
        if on_device(held, m) <= limit and not any(refusals(experiment, m, divisors))
    ]
    near = meshes.listed(meshes.nearest(mesh, works))
    raise ValueError(
        f"weights, moments and gradients take {needed / GIB:.2f} GiB on each device of mesh "
        f"{meshes.text(mesh)}, which has {limit / GIB:.2f}; "
        + (f"nearest that work: mesh {near}" if near else "no mesh over them works: train less")
    )


def gradients_held(experiment: Experiment, state: TrainState) -> Any:
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
