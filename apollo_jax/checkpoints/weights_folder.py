# SPDX-License-Identifier: Apache-2.0
"""Weights alone in Orbax's format: a checkpoint to start training from, on any mesh.

    folder/config.json             the model
    folder/weights/                our parameters (Orbax, OCDBT; names as in a training run)
    folder/published/PART/         what the published folder held besides: files, unused tensors

Its arrays are those of orbax_arrays.py; Orbax reads it like any checkpoint.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from apollo_jax.checkpoints import companions, safetensors
from apollo_jax.checkpoints.checkpoint import (
    Checkpoint,
    Part,
    apollo_places,
    below,
    part_of_weights,
)
from apollo_jax.checkpoints.orbax_arrays import OrbaxArrays, write_arrays
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.sources import Source, Stored
from apollo_jax.checkpoints.translate import Arrays, Renamed, is_float
from apollo_jax.config_values import from_dict
from apollo_jax.models import apollo

WEIGHTS, PUBLISHED, UNUSED, LAYOUT = "weights", "published", "unused.safetensors", "layout.json"
FORMAT = "apollo_jax weights"


def is_weights(folder: Path) -> bool:
    """Whether `folder` holds weights that `write` wrote."""
    path = folder / companions.CONFIG
    if not (folder / WEIGHTS).is_dir() or not path.is_file():
        return False
    return _json(path).get("format") == FORMAT


def _json(path: Path) -> dict[str, Any]:
    return companions.parse({path.name: path.read_bytes()}, path.name, path.parent)


def write(folder: Path, checkpoint: Checkpoint, dtype: str | None = None) -> None:
    """Write a checkpoint's parameters, in `dtype` or as they are, and what goes with them."""
    ours = checkpoint.ours
    names = {name: name for name in ours.stored}
    as_stored = {
        name: dataclasses.replace(s, dtype=_dtype(s, dtype)) for name, s in ours.stored.items()
    }
    write_arrays(folder / WEIGHTS, Renamed(ours, names, as_stored))
    companions.write(folder / PUBLISHED, _saying(checkpoint.files, dtype))
    for place, part in checkpoint.parts.items():
        _write_rest(folder / PUBLISHED / place, part, dtype)
    kind = _kind(checkpoint.config)
    content = dict(format=FORMAT, kind=kind, model=dataclasses.asdict(checkpoint.config))
    text = json.dumps(content, indent=2)  # unsorted: towers stand in channel order
    companions.write(folder, {companions.CONFIG: text.encode()})


def _write_rest(folder: Path, part: Part, dtype: str | None) -> None:
    """The published files, where its tensors lay, and those that no parameter holds."""
    laid = {
        spelling: dataclasses.asdict(stored) | dict(dtype=_dtype(stored, dtype))
        for spelling, stored in part.stored.items()
    }
    content = dict(names=dict(part.names), stored=laid)
    files = _saying(part.files, dtype)
    companions.write(folder, {**files, LAYOUT: json.dumps(content).encode()})
    unused = {name: name for name, slot in part.slots.items() if not slot.path}
    was = {name: part.tensors.stored[name] for name in unused}
    stored = {
        name: dataclasses.replace(s, file=UNUSED, dtype=_dtype(s, dtype)) for name, s in was.items()
    }
    if stored:
        safetensors.write(folder, Renamed(part.tensors, unused, stored))


def _dtype(stored: Stored, dtype: str | None) -> str:
    return dtype if dtype and is_float(stored.dtype) else stored.dtype


def _saying(files: companions.Files, dtype: str | None) -> companions.Files:
    return files if dtype is None else companions.state_dtype(dict(files), dtype)


def read_config(folder: Path) -> Any:
    """The config of the model in `folder`."""
    content = _json(folder / companions.CONFIG)
    if content.get("kind") not in _KINDS:
        raise ValueError(f"{folder / companions.CONFIG}: kind {content.get('kind')!r} is unknown")
    try:
        config = from_dict(_KINDS[content["kind"]], content.get("model") or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / companions.CONFIG}: {error}") from error
    where = str(folder / companions.CONFIG)
    if isinstance(config, apollo.Config):
        layout.check_names(config.towers, where)
    for part in apollo_places(config).values() if isinstance(config, apollo.Config) else [config]:
        layout.checked(part, where)
    return config


def open_weights(folder: Path) -> Checkpoint:
    """The checkpoint that `write` wrote."""
    config = read_config(folder)
    weights, published = OrbaxArrays(folder / WEIGHTS), folder / PUBLISHED
    places = apollo_places(config) if isinstance(config, apollo.Config) else {"": config}
    parts = {
        place: _part(part, below(weights, place), published / place)
        for place, part in places.items()
    }
    outside = companions.below(published, skip=places) if "" not in places else {}
    return Checkpoint(config, parts, outside)


def _part(config: Any, view: Source, folder: Path) -> Part:
    files = companions.read(folder)
    said = companions.parse(files, LAYOUT, folder)
    del files[LAYOUT]
    for stored in said["stored"].values():
        safetensors.check_plain(stored["file"], str(folder / LAYOUT))
    rest = folder / UNUSED
    unused = safetensors.open_file(rest) if rest.is_file() else Arrays({})
    part = part_of_weights(config, files, view, unused, said["names"])
    stored = {
        spelling: Stored(s["file"], tuple(s["shape"]), s["dtype"])
        for spelling, s in said["stored"].items()
    }
    return dataclasses.replace(part, stored=stored)


def _kind(config: Any) -> str:
    return next(kind for kind, cls in _KINDS.items() if cls is type(config))


_KINDS: dict[str, type] = {
    rules.__name__.rpartition(".")[2]: rules.Config for rules in layout.RULES.values()
} | {"apollo": apollo.Config}
