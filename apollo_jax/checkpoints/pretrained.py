# SPDX-License-Identifier: Apache-2.0
"""from_pretrained and save_pretrained: published folders to models and back, to the last bit."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apollo_jax.checkpoints import safetensors
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.rules.table import slots, spellings, to_ours, to_published
from apollo_jax.checkpoints.safetensors import Stored, TensorFolder
from apollo_jax.models import apollo, connectors, internvideo2, qwen2, siglip

Path_ = str | os.PathLike
Part = siglip.SigLIP | internvideo2.InternVideo2 | connectors.Connector | qwen2.Qwen2
PartConfig = siglip.Config | internvideo2.Config | connectors.Config | qwen2.Config

# What travels with the weights: configs, tokenizers, modelling code, licences.
COMPANIONS = {".json", ".txt", ".py", ".md", ".model", ".jinja", ""}


class Origin:
    """What a folder holds beyond the parameters, kept on the host for the way back.

    A static attribute of the module it came with: compared by identity, never seen by jax.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        stored: Mapping[str, Stored] = {},  # noqa: B006  never written to
        names: Mapping[str, str] = {},  # noqa: B006
        unused: Mapping[str, np.ndarray] = {},  # noqa: B006
    ):
        self.files = files  # by name, byte for byte
        self.stored = stored  # file and dtype of each tensor
        self.names = names  # canonical name -> the spelling found
        self.unused = unused  # the tensors that no parameter takes


def from_pretrained(
    path: Path_, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
) -> apollo.Apollo | Part:
    """The model in a published folder: an Apollo, or a single tower, connector or decoder.

    Args:
      path: folder with a config.json.
      dtype: what the model computes in.
      param_dtype: what the parameters are held in.
    Raises FileNotFoundError for what is not there, ValueError naming every file, field and tensor
    that does not fit.
    """
    folder = Path(path)
    files = _read_files(folder)
    if _model_type(files, folder) != "apollo":
        return _load_part(folder, dtype=dtype, param_dtype=param_dtype)
    config = _apollo_config(folder, files)
    kw = dict(dtype=dtype, param_dtype=param_dtype)
    model = nnx.eval_shape(lambda: apollo.Apollo(config, rngs=nnx.Rngs(0), **kw))
    model.vision_tower.towers = nnx.List(
        [
            _load_part(folder / layout.TOWERS / name, tower, **kw)
            for name, tower in config.towers.items()
        ]
    )
    model.connector = _load_part(folder / layout.CONNECTOR, config.connector, **kw)
    model.llm = _load_part(folder / layout.LLM, config.llm, **kw)
    tower_files = _read_files(folder / layout.TOWERS)
    tower_files = {f"{layout.TOWERS}/{name}": content for name, content in tower_files.items()}
    model.origin = Origin(files | tower_files)
    return model


def config_from_pretrained(path: Path_) -> apollo.Config | PartConfig:
    """The config of what `from_pretrained` would load."""
    folder = Path(path)
    files = _read_files(folder)
    if _model_type(files, folder) == "apollo":
        return _apollo_config(folder, files)
    return _part_config(folder, files)


def save_pretrained(
    model: apollo.Apollo | Part,
    path: Path_,
    *,
    dtype: Any = None,
    tokenizer: Any = None,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
) -> None:
    """Write the published layout, which the PyTorch code loads; `path` appears when it is complete.

    A model that came from a folder takes along everything that folder held. Published tensors that
    the model has no parameter for are zeros otherwise.

    Args:
      dtype: of the tensors; default as they were read, or as the parameters are.
      tokenizer: its files are written beside the decoder.
      max_shard_size: like '5GB'; default the shards that were read, 5 GB for new ones.
      overwrite: replace an existing `path` (FileExistsError otherwise).
    """
    target = Path(path)
    if target.exists() and not overwrite and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists; choose another path or pass overwrite=True")
    kw = dict(
        dtype=None if dtype is None else jnp.dtype(dtype).name, max_shard_size=max_shard_size
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if isinstance(model, apollo.Apollo):
            _save_apollo(model, temporary, tokenizer=tokenizer, **kw)
        else:
            _save_part(model, temporary, tokenizer=tokenizer, **kw)
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_apollo(
    model: apollo.Apollo, folder: Path, *, dtype: str | None, tokenizer: Any, max_shard_size: Any
) -> None:
    kw = dict(dtype=dtype, max_shard_size=max_shard_size)
    towers = zip(model.config.towers, model.vision_tower.towers, strict=True)
    parts = {f"{layout.TOWERS}/{name}": tower for name, tower in towers}
    parts |= {layout.CONNECTOR: model.connector, layout.LLM: model.llm}
    configs = {}
    for name, part in parts.items():
        own = tokenizer if name == layout.LLM else None
        configs[name] = _save_part(part, folder / name, tokenizer=own, **kw)
    origin = getattr(model, "origin", None)
    if origin is None:
        held = _leaves(model.llm)["embedding"].dtype.name
        fresh = layout.published(model.config, configs, dtype or held)
        _write_files(folder, {name: _dump(content) for name, content in fresh.items()})
    else:
        _write_files(folder, _with_dtype(origin.files, dtype))


def _load_part(
    folder: Path, config: PartConfig | None = None, *, dtype: Any, param_dtype: Any
) -> Any:
    files = _read_files(folder)
    config = _part_config(folder, files) if config is None else config
    rules = layout.RULES_BY_CONFIG[type(config)]
    model = nnx.eval_shape(
        lambda: rules.MODEL(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype)
    )
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    leaves = {_dotted(key): leaf for key, leaf in flat}
    table = rules.table(config, _json(files, "config.json", folder))
    expected = slots(table, leaves)
    tensors = TensorFolder(folder)
    shapes = {name: stored.shape for name, stored in tensors.stored.items()}
    names = spellings(table, expected, shapes, str(folder))
    _check_copies(table.copies, names, tensors, folder)
    arrays = {
        key: jnp.asarray(value, leaves[key].dtype)
        for key, value in to_ours(expected, lambda name: tensors[names[name]])
    }
    state = nnx.from_flat_state((key, leaf.replace(arrays[_dotted(key)])) for key, leaf in flat)
    model = nnx.merge(graphdef, state)
    unused = {name: tensors[names[name]] for name, slot in expected.items() if not slot.path}
    model.origin = Origin(files, tensors.stored, names, unused)
    return model


def _save_part(
    part: Part, folder: Path, *, dtype: str | None, tokenizer: Any, max_shard_size: Any
) -> dict[str, Any]:
    """Write one part; its config.json."""
    rules, leaves = layout.RULES[type(part)], _leaves(part)
    origin = getattr(part, "origin", None)
    held = next(iter(leaves.values())).dtype.name
    if origin is None:
        files = _fresh_files(rules.published(part.config), dtype or held, tokenizer)
    else:
        files = _with_dtype(origin.files, dtype)
    config = _json(files, "config.json", folder)
    table = rules.table(part.config, config)
    expected = slots(table, leaves)
    names = {n: n for n in [*expected, *table.copies]} if origin is None else origin.names
    old = {} if origin is None else origin.stored
    unused = {} if origin is None else origin.unused
    tensors = {}
    for name, spelling in names.items():
        was = old.get(spelling, Stored(safetensors.SINGLE, (), held))
        slot = expected[table.copies.get(name, name)]
        tensors[spelling] = Stored(was.file, slot.shape, dtype or was.dtype)
    reshard = origin is None or dtype is not None or max_shard_size is not None
    if reshard:
        tensors = safetensors.shard(tensors, max_shard_size or safetensors.MAX_SHARD_SIZE)
        files = {name: content for name, content in files.items() if name != safetensors.INDEX}

    canonical = {spelling: table.copies.get(name, name) for name, spelling in names.items()}

    def get(spelling: str) -> np.ndarray:
        name = canonical[spelling]
        slot = expected[name]
        if slot.path:
            return to_published(slot, leaves)
        return unused[name] if name in unused else np.zeros(slot.shape, np.float32)

    folder.mkdir(parents=True, exist_ok=True)
    _write_files(folder, files)
    safetensors.write(folder, tensors, get, index=reshard)
    if tokenizer is not None:
        tokenizer.save(folder)
    return config


def _apollo_config(folder: Path, files: dict[str, bytes]) -> apollo.Config:
    root = layout.root(_json(files, "config.json", folder), str(folder))
    tower_folder = folder / layout.TOWERS
    listing = _json(_read_files(tower_folder), "config.json", tower_folder)
    towers = {
        name: dataclasses.replace(
            _part_config(tower_folder / name), feature_layer=root["mm_vision_select_layer"]
        )
        for name in layout.tower_folders(listing, str(tower_folder))
    }
    frames = [t.num_frames for t in towers.values() if isinstance(t, internvideo2.Config)]
    try:
        return apollo.Config(
            towers=towers,
            connector=_part_config(folder / layout.CONNECTOR),
            llm=_part_config(folder / layout.LLM),
            clip_duration=root["clip_duration"],
            frames_per_clip=max(frames, default=apollo.Config.frames_per_clip),
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _part_config(folder: Path, files: dict[str, bytes] | None = None) -> Any:
    files = _read_files(folder) if files is None else files
    names = [n for n in ("config.json", "preprocessor_config.json") if n in files]
    rules = layout.PARTS[_model_type(files, folder)]
    return rules.config({name: _json(files, name, folder) for name in names}, str(folder))


def _model_type(files: dict[str, bytes], folder: Path) -> str:
    config = _json(files, "config.json", folder)
    known = ["apollo", *layout.PARTS]
    kinds = [config.get("model_type"), *(config.get("architectures") or [])]
    for kind in kinds:
        if kind in known:
            return kind
    raise ValueError(f"{folder}/config.json: model_type {kinds[0]!r} is not one of {known}")


def _check_copies(
    copies: dict[str, str], names: dict[str, str], tensors: TensorFolder, folder: Path
) -> None:
    for copy, of in copies.items():
        if copy in names and tensors[copy].tobytes() != tensors[names[of]].tobytes():
            raise ValueError(
                f"{folder}: {copy} differs from {of} although config.json ties them; "
                "set tie_word_embeddings to false to keep both"
            )


def _leaves(module: nnx.Module) -> dict[str, jax.Array]:
    return {_dotted(key): leaf[...] for key, leaf in nnx.to_flat_state(nnx.state(module))}


def _dotted(key: tuple) -> str:
    return ".".join(map(str, key))


def _read_files(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in COMPANIONS]
    if not (folder / "config.json").is_file():
        here = ", ".join(p.name for p in sorted(folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} has no config.json (it holds {here})")
    return {p.name: p.read_bytes() for p in files if not p.name.startswith(".")}


def _json(files: dict[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(files[name])
    except ValueError as error:
        raise ValueError(f"{folder}/{name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{folder}/{name} must hold one JSON object")
    return content


def _fresh_files(published: dict[str, Any], dtype: str, tokenizer: Any) -> dict[str, bytes]:
    ids = {}
    if tokenizer is not None:
        pad, eos = tokenizer.pad_id, tokenizer.eos_id
        ids = dict(bos_token_id=pad, eos_token_id=eos, pad_token_id=pad)
    extra = {"config.json": ids | dict(torch_dtype=dtype), "generation_config.json": ids}
    return {name: _dump(content | extra.get(name, {})) for name, content in published.items()}


def _with_dtype(files: dict[str, bytes], dtype: str | None) -> dict[str, bytes]:
    """The files, their config.json stating `dtype` if one is given."""
    if dtype is None:
        return files
    said: Callable[[str], dict[str, str]] = {
        "torch_dtype": dtype,
        "dtype": dtype,
        "model_dtype": f"torch.{dtype}",
    }.items
    out = dict(files)
    for name in files:
        if name.endswith("config.json"):
            content = json.loads(files[name])
            for part in (content, *(v for v in content.values() if isinstance(v, dict))):
                part.update({key: value for key, value in said() if key in part})
            out[name] = _dump(content)
    return out


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _replace(temporary: Path, target: Path) -> None:
    """Put a finished folder in place of what was there."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    shutil.rmtree(old, ignore_errors=True)
