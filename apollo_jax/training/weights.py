# SPDX-License-Identifier: Apache-2.0
"""Where a run's first weights come from: random, a whole model, or parts by path.

Everything that can be wrong with a source is said before anything is compiled.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from apollo_jax.checkpoints import manager, placement, run, weights_folder
from apollo_jax.checkpoints.checkpoint import Checkpoint
from apollo_jax.checkpoints.opening import open_checkpoint, open_tower, run_weights
from apollo_jax.checkpoints.translate import Renamed
from apollo_jax.config import REQUIRED, Experiment
from apollo_jax.config_values import differences
from apollo_jax.models import lora
from apollo_jax.training.state import Arrays, Shapes, random_weights
from data_pipeline.tokenizer import Tokenizer

# Fields of a published part's config that its weights do not depend on.
_LIMITS = ("max_position_embeddings", "model_max_length", "initializer_range")
NAMED = "run:"  # in `init_from`: by the name of its experiment
_CLIPS = (*_LIMITS, "feature_layer", "frames_per_clip")  # of a part: the whole says


def located(experiment: Experiment, workdir: str | os.PathLike, begun: bool) -> Experiment:
    """The experiment with a folder in `init_from`, where it has the name of a run.

    That is the one finished run of that name beside `workdir`; a run that has `begun` keeps the
    folder that it took. Raises FileNotFoundError naming all runs that lie there, or ValueError.
    """
    if not experiment.init_from.startswith(NAMED):
        return experiment
    if begun:
        return replace(experiment, init_from=run.read_experiment(workdir).init_from)
    name, folder = experiment.init_from.removeprefix(NAMED), Path(os.path.abspath(workdir)).parent
    runs = {p: run.progress(p) for p in sorted(folder.glob("*")) if run.is_run(p)}
    found = [p for p, (own, done, steps) in runs.items() if own == name and done >= steps]
    if len(found) == 1:
        return replace(experiment, init_from=str(found[0]))
    choose = "name one with --config.init_from=PATH"
    if found:
        paths = ", ".join(map(str, found))
        raise ValueError(f"config.init_from {experiment.init_from} could be {paths}; {choose}")
    lines = [f"{p}: {own}, {done} of {steps} steps" for p, (own, done, steps) in runs.items()]
    there = "\n  ".join(lines or ["no run at all"])
    raise FileNotFoundError(
        f"{experiment.name} starts from a finished run of {name} (config.init_from), looked for "
        f"beside {workdir}; {folder} has\n  {there}\ntrain or finish that one first, or {choose}"
    )


def initial_weights(experiment: Experiment, shapes: Shapes) -> tuple[Arrays, str]:
    """The weights of step 0 in the dtypes and places of `shapes`, and where they are from.

    Raises FileNotFoundError or ValueError naming the path and what does not fit.
    """
    base = {n: s for n, s in shapes.items() if not lora.is_update(n)}
    fresh = {n: s for n, s in shapes.items() if n not in base}
    weights, origin = _without_updates(experiment, base)
    if fresh:
        weights |= random_weights(experiment.model, experiment.train, fresh, experiment.seed)
    return weights, origin


def _without_updates(experiment: Experiment, shapes: Shapes) -> tuple[Arrays, str]:
    path, parts = experiment.init_from, list(_parts(experiment))
    if path and parts:
        raise ValueError("config.init_from names a whole model; clear it or config.init_parts")
    if path and run.is_run(path):
        return _from_run(path, experiment, shapes)
    if path:
        return _from_folder(path, experiment, shapes), path
    words = experiment.data.tokenizer
    loaded = [load_part(prefix, path, config, shapes, words) for prefix, path, config in parts]
    weights = random_weights(experiment.model, experiment.train, shapes, experiment.seed)
    for part in loaded:
        weights |= part
    return weights, ", ".join(["random", *(f"{prefix} from {path}" for prefix, path, _ in parts)])


def _from_run(path: str, experiment: Experiment, shapes: Shapes) -> tuple[Arrays, str]:
    _check_config(path, run.read_experiment(path).model, experiment.model)
    _check_tokenizer(f"config.init_from {path}", path, experiment.data.tokenizer)
    checkpoints, of = manager.Checkpoints(path, read_only=True), run.read_experiment(path)
    found = checkpoints.stored_shapes()
    _check_shapes(path, {n: s for n, s in found.items() if not lora.is_update(n)}, shapes)
    if of.train.lora.chosen():
        step = int(run.latest_weights(Path(path)).parent.name)
        weights = placement.place(run_weights(Path(path), of), shapes)
    else:
        step, weights = checkpoints.restore_weights(shapes)
    checkpoints.close()
    _, latest, steps = run.progress(Path(path))
    if step < latest:
        folder = Path(path) / run.CHECKPOINTS / f"{latest:08d}"
        raise ValueError(
            f"config.init_from {path} ({of.name}): its checkpoint of step {latest} is damaged, and "
            f"the one of step {step} of {steps} is not what the run ended with. Continue that run "
            "with its own command, which does the missing steps again; or, to start from step "
            f"{step}, move {folder} away"
        )
    return weights, f"{path} ({of.name}) after step {step} of {steps}"


def _from_folder(path: str, experiment: Experiment, shapes: Shapes) -> Arrays:
    checkpoint = open_checkpoint(path, compare=jax.process_index() == 0)
    if not isinstance(checkpoint.config, type(experiment.model)):
        raise ValueError(f"config.init_from {path} is not a whole Apollo; use config.init_parts")
    _check_config(path, checkpoint.config, experiment.model, ignore=_LIMITS)
    _check_tokenizer(f"config.init_from {path}", path, experiment.data.tokenizer)
    return _load(checkpoint, path, "", shapes)


def _parts(experiment: Experiment) -> Iterator[tuple[str, str, Any]]:
    """(prefix of its weights' names, path, config in the experiment) of each part given."""
    model, paths = experiment.model, experiment.init_parts
    yield from tower_parts(model.towers, paths.towers)
    rest = [("connector/", paths.connector, model.connector), ("llm/", paths.llm, model.llm)]
    yield from (part for part in rest if part[1] not in ("", REQUIRED))


def tower_parts(towers: Mapping[str, Any], paths: Mapping[str, str]) -> list[tuple[str, str, Any]]:
    """(prefix, path, config) of each tower that has a path. ValueError for an unknown tower."""
    if unknown := set(paths) - set(towers):
        known = ", ".join(towers)
        raise ValueError(f"config.init_parts.towers names {sorted(unknown)}; the model has {known}")
    found = [
        (f"vision_tower/towers/{i}/", paths.get(name, ""), tower)
        for i, (name, tower) in enumerate(towers.items())
    ]
    return [part for part in found if part[1] not in ("", REQUIRED)]


def load_part(prefix: str, path: str, config: Any, shapes: Shapes, tokenizer: str = "") -> Arrays:
    """The weights of a published folder, or of a contrastive run's tower, under `prefix`.

    Raises ValueError or FileNotFoundError if it is not there, not the part in `config`, or a
    decoder whose folder has another tokenizer than that at the path `tokenizer`.
    """
    if run.is_pairs(path):
        checkpoint = open_tower(Path(path), config)
    else:
        checkpoint = open_checkpoint(path, compare=jax.process_index() == 0)
    found = checkpoint.config
    if type(found) is not type(config):
        kinds = " but ".join(type(c).__module__.rpartition(".")[2] for c in (found, config))
        raise ValueError(f"config.init_parts: {path} holds {kinds} is wanted")
    _check_config(path, found, config, ignore=_CLIPS)
    if prefix == "llm/":
        _check_tokenizer(f"config.init_parts.llm {path}", path, tokenizer)
    own = {n: s for n, s in shapes.items() if n.startswith(prefix)}
    return _load(checkpoint, path, prefix, own)


def _load(checkpoint: Checkpoint, path: str, prefix: str, shapes: Shapes) -> Arrays:
    """The weights of a checkpoint where they belong, each process reading its own slices."""
    names = {prefix + name: name for name in checkpoint.ours.stored}
    source = Renamed(checkpoint.ours, names)
    _check_shapes(path, {name: stored.shape for name, stored in source.stored.items()}, shapes)
    return placement.place(source, shapes)


def _check_tokenizer(what: str, path: str, tokenizer: str) -> None:
    """ValueError if a decoder learnt the ids of another tokenizer; some folders hold none."""
    for own in (Path(path, run.TOKENIZER), Path(path, weights_folder.PUBLISHED), Path(path)):
        try:
            learnt = Tokenizer.from_path(own)
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ValueError(f"{what} has a tokenizer that cannot be read: {error}") from error
        if difference := learnt.difference(Tokenizer.from_path(tokenizer)):
            raise ValueError(
                f"{what} was trained with another tokenizer than config.data.tokenizer "
                f"{tokenizer}: {difference}; its own is {own}"
            )
        return


def _check_config(path: str, found: Any, wanted: Any, ignore: tuple[str, ...] = ()) -> None:
    wrong = [
        d
        for d in differences(found, wanted)
        if d.partition(":")[0].rpartition(".")[2] not in ignore
    ]
    if wrong:
        lines = "\n  ".join(wrong)
        raise ValueError(f"the model in {path} is not the one in config.model:\n  {lines}")


def _check_shapes(path: str, found: Mapping[str, tuple], wanted: Shapes) -> None:
    problems = [f"missing {name} {s.shape}" for name, s in wanted.items() if name not in found]
    problems += [
        f"unexpected {name} {shape}" for name, shape in found.items() if name not in wanted
    ]
    problems += [
        f"{name} is {found[name]}, must be {s.shape}"
        for name, s in wanted.items()
        if name in found and tuple(found[name]) != tuple(s.shape)
    ]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        lines = "\n  ".join(problems[:20])
        raise ValueError(f"the weights in {path} do not fit this model:\n  {lines}{more}")
