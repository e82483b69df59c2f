# SPDX-License-Identifier: Apache-2.0
"""from_pretrained and save_pretrained: published folders to models and back, to the last bit."""

import dataclasses
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apollo_jax.checkpoints import checkpoint, companions
from apollo_jax.checkpoints.checkpoint import tower_place
from apollo_jax.checkpoints.opening import open_checkpoint, open_part, outside
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
    path: str | os.PathLike, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> Any:
    """The model in a folder: an Apollo, or a single tower, connector or decoder.

    Args:
      path: a published folder, or the folder of one of our training runs.
      dtype: what the model computes in.
      param_dtype: what the parameters are held in.
    Raises FileNotFoundError for what is not there, ValueError naming every file, field and tensor
    that does not fit.
    """
    folder, kw = Path(path), dict(dtype=dtype, param_dtype=param_dtype)
    if _is_run(folder):
        return _load_run(folder, **kw)
    opened = open_checkpoint(folder)
    if not isinstance(opened.config, apollo.Config):
        return _build(opened.parts[""], **kw)
    config = opened.config
    model: Any = nnx.eval_shape(lambda: apollo.Apollo(config, rngs=nnx.Rngs(0), **kw))
    built = {place: _build(part, **kw) for place, part in opened.parts.items()}
    model.vision_tower.towers = nnx.List([built[tower_place(i)] for i in range(len(config.towers))])
    model.connector, model.llm = built["connector"], built["llm"]
    model.origin = Origin(opened.files)
    return model


def config_from_pretrained(path: str | os.PathLike) -> apollo.Config | layout.PartConfig:
    """The config of what `from_pretrained` would load."""
    folder = Path(path)
    if _is_run(folder):
        from apollo_jax.checkpoints.manager import read_experiment

        return read_experiment(folder).model
    return layout.config(folder)


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
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; choose another path or pass overwrite=True")
    name = None if dtype is None else jnp.dtype(dtype).name
    save: Any = _save_apollo if isinstance(model, apollo.Apollo) else _save_part
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save(model, temporary, dtype=name, tokenizer=tokenizer, max_shard_size=max_shard_size)
        companions.sync(temporary)
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- reading


def _build(part: checkpoint.Part, **kw: Any) -> Any:
    """The module of a part, its weights on one device."""
    module = layout.RULES_BY_CONFIG[type(part.config)].MODEL
    model = nnx.eval_shape(lambda: module(part.config, rngs=nnx.Rngs(0), **kw))
    graphdef, state = nnx.split(model)
    loaded = [
        (key, leaf.replace(jnp.asarray(part.ours.read(path), leaf.dtype)))
        for path, (key, leaf) in zip(parameters(model), nnx.to_flat_state(state), strict=True)
    ]
    model = nnx.merge(graphdef, nnx.from_flat_state(loaded))
    model.origin = _origin(part)
    return model


def _origin(part: checkpoint.Part) -> Origin:
    unused = {n: part.tensors.read(n) for n, slot in part.slots.items() if not slot.path}
    return Origin(part.files, part.names, part.stored, unused)


def _is_run(folder: Path) -> bool:
    if not (folder / "checkpoints").is_dir():
        return False
    from apollo_jax.checkpoints.manager import is_run  # Orbax takes a second to import

    return is_run(folder)


def _load_run(folder: Path, *, dtype: Any, param_dtype: Any) -> apollo.Apollo:
    from apollo_jax.checkpoints.manager import Checkpoints, read_experiment
    from apollo_jax.training.state import flatten, merge

    experiment, kw = read_experiment(folder), dict(dtype=dtype, param_dtype=param_dtype)
    config = experiment.model
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: apollo.Apollo(config, rngs=nnx.Rngs(0), **kw))
    )
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        for name, leaf in flatten(state).items()
    }
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        _, weights = checkpoints.restore_weights(shapes)
    finally:
        checkpoints.close()
    model = merge(graphdef, weights)
    _adopt(model, experiment)
    return model


def _adopt(model: Any, experiment: Any) -> None:
    """Give a trained model the origins of the published folders its run began from, for export."""
    from apollo_jax.checkpoints.manager import read_experiment

    while _is_run(Path(experiment.init_from)):
        experiment = read_experiment(experiment.init_from)
    whole, parts = experiment.init_from, experiment.init_parts
    towers = dict(zip(model.config.towers, model.vision_tower.towers, strict=True))
    if whole and _is_there(whole):
        folder = Path(whole)
        model.origin = Origin(outside(folder))
        began = [(tower, folder / layout.TOWERS / name) for name, tower in towers.items()]
        began += [(model.connector, folder / layout.CONNECTOR), (model.llm, folder / layout.LLM)]
    else:
        began = [(towers[name], Path(path)) for name, path in parts.towers.items()]
        began += [(model.connector, Path(parts.connector)), (model.llm, Path(parts.llm))]
        began = [(part, path) for part, path in began if path != Path() and _is_there(path)]
    for part, folder in began:
        part.origin = _origin(open_part(folder, part.config))


def _is_there(path: str | Path) -> bool:
    if not Path(path).exists():
        warnings.warn(
            f"{path}, from which this model was trained, is gone: an export will hold zeros for "
            "the published tensors that the model does not use",
            stacklevel=2,
        )
    return Path(path).exists()


# ---- writing


def _save_apollo(
    model: apollo.Apollo, folder: Path, *, dtype: str | None, tokenizer: Any, max_shard_size: Any
) -> None:
    towers = zip(model.config.towers, model.vision_tower.towers, strict=True)
    parts = {f"{layout.TOWERS}/{name}": tower for name, tower in towers}
    parts |= {layout.CONNECTOR: model.connector, layout.LLM: model.llm}
    configs = {}
    for name, part in parts.items():
        own = tokenizer if name == layout.LLM else None
        kw = dict(dtype=dtype, tokenizer=own, max_shard_size=max_shard_size)
        configs[name] = _save_part(part, folder / name, **kw)
    origin = getattr(model, "origin", None)
    if origin is None:
        stated = dtype or parameters(model.llm)["embedding"].dtype.name
        fresh = layout.published(model.config, configs, stated)
        files = {name: companions.dump(content) for name, content in fresh.items()}
    else:
        files = origin.files if dtype is None else companions.state_dtype(origin.files, dtype)
    companions.write(folder, files)


def _save_part(
    part: Any, folder: Path, *, dtype: str | None, tokenizer: Any, max_shard_size: Any
) -> dict[str, Any]:
    """Write one part; its config.json."""
    leaves = parameters(part)
    held = dtype or next(iter(leaves.values())).dtype.name
    origin = getattr(part, "origin", None) or Origin(_fresh(part, held, tokenizer))
    whole = checkpoint.part_of_weights(
        part.config, origin.files, Arrays(leaves), Arrays(origin.unused), origin.names
    )
    whole = dataclasses.replace(whole, stored=origin.stored)
    checkpoint.write_part(folder, whole, dtype=dtype, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save(folder)
    return companions.parse(origin.files, companions.CONFIG, folder)


def _fresh(part: Any, dtype: str, tokenizer: Any) -> companions.Files:
    """The published files of a part that came from no folder."""
    ids = {}
    if tokenizer is not None:
        pad, eos = tokenizer.pad_id, tokenizer.eos_id
        ids = dict(bos_token_id=pad, eos_token_id=eos, pad_token_id=pad)
    extra = {"config.json": ids | dict(torch_dtype=dtype), "generation_config.json": ids}
    published = layout.RULES[type(part)].published(part.config)
    return {n: companions.dump(content | extra.get(n, {})) for n, content in published.items()}


def _replace(finished: Path, target: Path) -> None:
    """Give a finished folder its name; what had it before goes last."""
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(finished, target)
    shutil.rmtree(old, ignore_errors=True)
