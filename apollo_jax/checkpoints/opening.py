# SPDX-License-Identifier: Apache-2.0
"""Opening checkpoints: whatever lies at a path, described and not yet read."""

import json
import os
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from apollo_jax.checkpoints import adapters, companions, flat, run, safetensors, weights_folder
from apollo_jax.checkpoints.checkpoint import (
    Checkpoint,
    Part,
    Use,
    apollo_places,
    below,
    fresh_files,
    part_of_weights,
    tower_place,
)
from apollo_jax.checkpoints.foreign import (
    PICKLED_WEIGHTS,
    check_no_key,
    described_part,
    foreign_part,
    open_pickled,
)
from apollo_jax.checkpoints.orbax_arrays import OrbaxArrays
from apollo_jax.checkpoints.pickles import open_torch
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.sources import Source
from apollo_jax.checkpoints.translate import Arrays, Joined, Renamed
from apollo_jax.config import Experiment
from apollo_jax.config_values import from_dict
from apollo_jax.models import apollo, two_towers
from data_pipeline.tokenizer import Tokenizer


def open_checkpoint(
    path: str | os.PathLike,
    *,
    key: str = "",
    said: dict[str, Any] | None = None,
    compare: bool = True,
) -> Checkpoint:
    """What lies at `path`: a published folder, or a file of another layout.

    Args:
      key: which part of the file, like "target_encoder" of a .pth.tar or "img" of an .npz; "ema"
        of a run.
      said: published config fields of a file that has no config.json.
      compare: read a published folder's stored copies, like a tied head, to see that they are
        copies; of many processes one is enough.
    Raises FileNotFoundError for what is not there, ValueError naming every file, field and tensor
    that does not fit.
    """
    folder = Path(path)
    if weights_folder.is_weights(folder) or run.is_run(folder):
        if said:
            raise ValueError(f"{folder} has a {companions.CONFIG}: --config is for what has none")
        if run.is_run(folder):
            return open_run(folder, key)
        check_no_key(folder, key)
        return weights_folder.open_weights(folder)
    if not folder.is_dir() or not (folder / companions.CONFIG).is_file():
        return _alone(foreign_part(folder, key, said or {}))
    if said:
        raise ValueError(f"{folder} has a {companions.CONFIG}: --config is for what has none")
    config = _config(folder)
    if not isinstance(config, apollo.Config):
        return _alone(open_part(folder, config, key, compare=compare))
    if flat.is_flat(folder):
        return open_flat(folder, config, key)
    check_no_key(folder, key)
    folders, places = _folders(config), apollo_places(config)
    parts = {
        place: open_part(folder / name, part, compare=compare)
        for name, (place, part) in zip(folders, places.items(), strict=True)
    }
    return Checkpoint(config, parts, outside(folder))


def read_config(path: str | os.PathLike) -> apollo.Config | layout.PartConfig:
    """The config of what `open_checkpoint` would open, from as little as tells it."""
    folder = Path(path)
    if weights_folder.is_weights(folder):
        return weights_folder.read_config(folder)
    if run.is_run(folder):
        return run.read_experiment(folder).model
    if (folder / companions.CONFIG).is_file():
        return _config(folder)
    return open_checkpoint(path).config


def _config(folder: Path) -> Any:
    """The config of a published folder."""
    read = partial(flat.read, folder) if flat.is_flat(folder) else companions.read
    return layout.config(folder, read)


def _folders(config: apollo.Config) -> list[str]:
    """The folders of an Apollo's parts, in the order of `apollo_places`."""
    return [*(f"{layout.TOWERS}/{name}" for name in config.towers), layout.CONNECTOR, layout.LLM]


def _alone(part: Part) -> Checkpoint:
    return Checkpoint(part.config, {"": part})


def outside(folder: Path) -> companions.Files:
    """The files of an Apollo folder that belong to none of its parts."""
    towers = companions.read(folder / layout.TOWERS)
    return companions.read(folder) | {f"{layout.TOWERS}/{n}": file for n, file in towers.items()}


def open_part(
    folder: Path, config: layout.PartConfig, key: str = "", *, compare: bool = True
) -> Part:
    """A published folder of one part, which must hold exactly the tensors of `config`."""
    files = companions.read(folder)
    if not safetensors.is_there(folder):
        return open_pickled(folder, config, files, key)
    check_no_key(folder, key)
    tensors = safetensors.TensorFolder(folder)
    return described_part(config, files, tensors, folder, compare=compare)


# ---- an Apollo in one flat set of tensors


def open_flat(folder: Path, config: apollo.Config, key: str) -> Checkpoint:
    """A whole Apollo as its training code saves it."""
    if safetensors.is_there(folder):
        check_no_key(folder, key)
        source, passed = safetensors.TensorFolder(folder), {}
    else:
        source, passed = open_torch(folder / PICKLED_WEIGHTS[0], key)
    found, ignored = flat.split(source.stored, list(config.towers), str(folder))
    ignored += [Use(name, ignored=reason) for name, reason in passed.items()]
    parts: dict[str, Part] = {}
    for name, (place, own) in zip(_folders(config), apollo_places(config).items(), strict=True):
        names, rules = found[name], layout.RULES_BY_CONFIG[type(own)]
        fresh = {n: companions.dump(content) for n, content in rules.published(own).items()}
        files = fresh | flat.read(folder, folder / name)  # a root config has no preprocessors
        part = described_part(own, files, Renamed(source, names), folder / name)
        used = [replace(use, tensor=names.get(use.tensor, use.tensor)) for use in part.uses]
        parts[place] = replace(part, stored={}, uses=(*used, *ignored))
        ignored = []
    return Checkpoint(config, parts, flat.outside(folder))


# ---- training runs


def open_run(workdir: Path, key: str = "") -> Checkpoint:
    """The latest weights of a run, or its averages (see `run_weights`).

    With them comes what the published folders held besides from which it began.
    """
    experiment = run.read_experiment(workdir)
    config, weights = experiment.model, run_weights(workdir, experiment, key)
    began, files = _origins(experiment)
    tokenizer = Tokenizer.from_path(workdir / run.TOKENIZER)
    parts = {}
    for place, own in apollo_places(config).items():
        view = below(weights, place)
        if origin := began.get(place):
            part = part_of_weights(own, origin.files, view, origin.unused, origin.names)
            parts[place] = replace(part, stored=origin.stored)
        else:
            words = tokenizer if place == "llm" else None
            fresh = fresh_files(own, view, words)
            parts[place] = part_of_weights(own, fresh, view, Arrays({}), {})
    return Checkpoint(config, parts, files)


def run_weights(workdir: Path, experiment: Experiment, key: str = "") -> Source:
    """The latest weights of a run by name, its low-rank updates merged into them.

    With the key "ema" they are the averages of what trained, and the rest as it is.
    """
    path = run.latest_weights(workdir)
    weights: Source = OrbaxArrays(path)
    if key:
        weights = Joined(
            weights, _averages(path.with_name(run.OPTIMIZER), experiment, weights, key)
        )
    chosen = experiment.train.lora.chosen()
    return adapters.Adapted(weights, chosen) if chosen else weights


def _averages(path: Path, experiment: Experiment, like: Source, key: str) -> Source:
    if key != run.EMA:
        raise ValueError(f"--key {key}: of a run there is only {run.EMA}, or no key")
    if not experiment.train.ema_decay:
        raise ValueError(f"--key {key}: {experiment.name} was trained with train.ema_decay=0")
    mark = f".{run.EMA}."
    found = OrbaxArrays(path, lambda key: mark in key)
    names = {key.partition(mark)[2]: key for key in found.stored}
    return Renamed(found, names, {name: like.stored[name] for name in names})


def open_tower(workdir: Path, wanted: layout.PartConfig) -> Checkpoint:
    """The vision tower of a contrastive run that is of the kind of `wanted`, or its only one."""
    config = from_dict(
        two_towers.Config, json.loads((workdir / run.CONFIG).read_text())["model"], "config.model"
    )
    towers = list(config.towers.values())
    same = [i for i, tower in enumerate(towers) if type(tower) is type(wanted)]
    index = same[0] if same else 0
    view = below(OrbaxArrays(run.latest_weights(workdir)), tower_place(index))
    own = towers[index]
    return _alone(part_of_weights(own, fresh_files(own, view), view, Arrays({}), {}))


def _origins(experiment: Experiment) -> tuple[dict[str, Part], companions.Files]:
    """The published parts that a run began from, and the files outside them."""
    while run.is_run(Path(experiment.init_from)):
        experiment = run.read_experiment(Path(experiment.init_from))
    whole, parts = experiment.init_from, experiment.init_parts
    if whole:
        if not _is_there(whole):
            return {}, {}
        opened = open_checkpoint(whole)
        return dict(opened.parts), opened.files
    paths = {tower_place(i): parts.towers.get(n) for i, n in enumerate(experiment.model.towers)}
    paths |= {"connector": parts.connector, "llm": parts.llm}
    found = {place: path for place, path in paths.items() if path and _is_there(path)}
    return {place: open_checkpoint(path).parts[""] for place, path in found.items()}, {}


def _is_there(path: str) -> bool:
    if not Path(path).exists():
        warnings.warn(
            f"{path}, from which this model was trained, is gone: an export will hold zeros for "
            "the published tensors that the model does not use",
            stacklevel=2,
        )
    return Path(path).exists()
