# SPDX-License-Identifier: Apache-2.0
"""from_pretrained and save_pretrained: published folders to models and back, to the last bit."""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from apollo_jax.checkpoints import companions
from apollo_jax.checkpoints.checkpoint import (
    Checkpoint,
    fresh_files,
    part_of_weights,
    tokenizer_files,
    tower_place,
)
from apollo_jax.checkpoints.opening import open_checkpoint, read_config
from apollo_jax.checkpoints.placement import place
from apollo_jax.checkpoints.published import appearing, claim, write_apollo, write_parts
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.rules.table import parameters
from apollo_jax.checkpoints.sources import Stored
from apollo_jax.checkpoints.translate import Arrays
from apollo_jax.models import (
    apollo,
    clip,
    connectors,
    dinov2,
    internvideo2,
    languagebind,
    qwen2,
    siglip,
    siglip2,
    videomae,
    vjepa,
    vjepa2,
)
from apollo_jax.sharding import param_shardings

Tower = (
    siglip.SigLIP
    | siglip2.SigLIP2
    | internvideo2.InternVideo2
    | clip.CLIP
    | languagebind.LanguageBindVideo
    | dinov2.DINOv2
    | videomae.VideoMAE
    | vjepa.VJEPA
    | vjepa2.VJEPA2
)
Part = Tower | connectors.Connector | qwen2.Qwen2


@dataclass(frozen=True, eq=False, repr=False)
class Origin:
    """What a published folder holds beyond the parameters, kept on the host for the way back.

    A static attribute of the module it came with: compared by identity, never seen by jax.
    """

    files: companions.Files
    names: Mapping[str, str] = field(default_factory=dict)  # canonical -> the spelling found
    stored: Mapping[str, Stored] = field(default_factory=dict)  # by the spelling found
    unused: Mapping[str, np.ndarray] = field(default_factory=dict)  # by canonical name


def from_pretrained(
    path: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> Any:
    """The model in a checkpoint: an Apollo, or a single tower, connector or decoder.

    Args:
      path: a published folder, a file that `apollo-jax convert` reads, or the folder of a run.
      dtype: what the model computes in.
      param_dtype: what the parameters are held in.
      mesh: where the parameters go, sharded as in training, each process reading the slices of its
        own devices; default whole, on one device.
    Raises FileNotFoundError for what is not there, ValueError naming every file, field and tensor
    that does not fit.
    """
    opened = open_checkpoint(path, compare=jax.process_index() == 0)
    model = build(opened, dtype=dtype, param_dtype=param_dtype, mesh=mesh)
    _adopt(model, opened)
    return model


def build(
    opened: Checkpoint,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    device: Any = None,
) -> Any:
    """The model of a checkpoint, its parameters over `mesh` or whole on `device`."""
    module: Any = (
        apollo.Apollo
        if isinstance(opened.config, apollo.Config)
        else layout.RULES_BY_CONFIG[type(opened.config)].MODEL
    )
    kw = dict(dtype=dtype, param_dtype=param_dtype)
    model = nnx.eval_shape(lambda: module(opened.config, rngs=nnx.Rngs(0), **kw))
    graphdef, state = nnx.split(model)
    here = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
    places = nnx.to_flat_state(param_shardings(state, mesh)) if mesh else None
    loaded = []
    for i, (key, leaf) in enumerate(nnx.to_flat_state(state)):
        sharding = places[i][1].get_value() if places else here
        like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        name = "/".join(map(str, key))
        loaded.append((key, leaf.replace(place(opened.ours, {name: like})[name])))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def _adopt(model: Any, opened: Checkpoint) -> None:
    """Keep with a model what its checkpoint held besides, for the way back.

    Not the tensors, of a model spread over processes: it is not saved from here.
    """
    here = not spread(model)
    for module, part in zip(modules(model).values(), opened.parts.values(), strict=True):
        unused = {name: part.unused.read(name) for name in part.unused.stored if here}
        module.origin = Origin(part.files, part.names, part.stored, unused)
    if opened.files:
        model.origin = Origin(opened.files)


def spread(model: nnx.Module) -> bool:
    """Whether other processes hold some of the parameters."""
    leaves = parameters(model).values()
    return not all(getattr(leaf, "is_fully_addressable", True) for leaf in leaves)


def modules(model: Any) -> dict[str, Any]:
    """The parts of an Apollo by their place in it, or the one part alone."""
    if not isinstance(model, apollo.Apollo):
        return {"": model}
    towers = {tower_place(i): tower for i, tower in enumerate(model.vision_tower.towers)}
    return {**towers, "connector": model.connector, "llm": model.llm}


def config_from_pretrained(path: str | os.PathLike) -> apollo.Config | layout.PartConfig:
    """The config of what `from_pretrained` would load."""
    return read_config(path)


def save_pretrained(
    model: apollo.Apollo | Part,
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    tokenizer: Any = None,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the published layout, which the PyTorch code loads; `path` appears when it is complete.

    A model that came from a folder takes along everything that folder held; otherwise published
    tensors that the model has no parameter for are zeros.

    Args:
      dtype: of the tensors; default as they were read, or as the parameters are.
      tokenizer: its files are written beside the decoder.
      max_shard_size: like '5GB'; default the shards that were read, 5 GB for new ones.
      overwrite: replace an existing `path` (FileExistsError otherwise).
    """
    target = Path(os.path.abspath(path))
    claim(target, overwrite)
    kw = dict(dtype=None if dtype is None else jnp.dtype(dtype).name, max_shard_size=max_shard_size)
    checkpoint = checkpoint_of(model, tokenizer)
    write: Any = write_apollo if isinstance(model, apollo.Apollo) else write_parts
    with appearing(target) as temporary:
        write(temporary, checkpoint, **kw)


def checkpoint_of(model: Any, tokenizer: Any = None) -> Checkpoint:
    """A model in memory as a checkpoint. ValueError if it is spread over processes."""
    if spread(model):
        raise ValueError(
            "the model is spread over several processes, none of which holds all of it; export a "
            "checkpoint of its training run instead: apollo-jax convert RUN TARGET"
        )
    parts = {}
    for at, module in modules(model).items():
        weights, words = Arrays(parameters(module)), tokenizer if at in ("llm", "") else None
        origin = getattr(module, "origin", None)
        if origin is None:
            origin = Origin(fresh_files(module.config, weights, words))
        elif words is not None:
            files = {**origin.files, **tokenizer_files(words)}
            origin = dataclasses.replace(origin, files=files)
        part = part_of_weights(
            module.config, origin.files, weights, Arrays(origin.unused), origin.names
        )
        parts[at] = dataclasses.replace(part, stored=origin.stored)
    files = getattr(getattr(model, "origin", None), "files", {}) if "" not in parts else {}
    return Checkpoint(model.config, parts, files)
