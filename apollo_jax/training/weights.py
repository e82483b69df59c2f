# SPDX-License-Identifier: Apache-2.0
"""Where a run's first weights come from: random, a whole model, or parts by path.

Everything that can be wrong with a source is said before anything is compiled.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from apollo_jax.checkpoints import manager, placement, run
from apollo_jax.checkpoints.checkpoint import Checkpoint
from apollo_jax.checkpoints.opening import open_checkpoint, open_tower
from apollo_jax.checkpoints.translate import Renamed
from apollo_jax.config import Experiment, differences
from apollo_jax.training.state import Arrays, Shapes, random_weights
from data_pipeline.tokenizer import Tokenizer

# Fields of a published part's config that its weights do not depend on.
_LIMITS = ("max_position_embeddings", "model_max_length", "initializer_range")
_CLIPS = (*_LIMITS, "feature_layer", "frames_per_clip")  # of a part: the whole says


def initial_weights(experiment: Experiment, shapes: Shapes) -> tuple[Arrays, str]:
    """The weights of step 0 in the dtypes and places of `shapes`, and where they are from.

    Raises FileNotFoundError or ValueError naming the path and what does not fit.
    """
    path, parts = experiment.init_from, list(_parts(experiment))
    if path and parts:
        raise ValueError("config.init_from names a whole model; clear it or config.init_parts")
    if path and run.is_run(path):
        return _from_run(path, experiment, shapes)
    if path:
        return _from_folder(path, experiment, shapes), path
    loaded = [_load_part(prefix, path, config, shapes) for prefix, path, config in parts]
    weights = random_weights(experiment.model, experiment.train, shapes, experiment.seed)
    for part in loaded:
        weights |= part
    return weights, ", ".join(["random", *(f"{prefix} from {path}" for prefix, path, _ in parts)])


def _from_run(path: str, experiment: Experiment, shapes: Shapes) -> tuple[Arrays, str]:
    _check_config(path, run.read_experiment(path).model, experiment.model)
    tokenizer = Path(path) / run.TOKENIZER
    paths = (tokenizer, experiment.data.tokenizer)
    if len({Tokenizer.from_path(p).fingerprint for p in paths}) > 1:
        raise ValueError(
            f"config.init_from {path} was trained with another tokenizer than config.data.tokenizer"
            f" {experiment.data.tokenizer}; its own is {tokenizer}"
        )
    checkpoints = manager.Checkpoints(path, read_only=True)
    _check_shapes(path, checkpoints.stored_shapes(), shapes)
    step, weights = checkpoints.restore_weights(shapes)
    checkpoints.close()
    return weights, f"{path} after step {step}"


def _from_folder(path: str, experiment: Experiment, shapes: Shapes) -> Arrays:
    checkpoint = open_checkpoint(path, compare=jax.process_index() == 0)
    if not isinstance(checkpoint.config, type(experiment.model)):
        raise ValueError(f"config.init_from {path} is not a whole Apollo; use config.init_parts")
    _check_config(path, checkpoint.config, experiment.model, ignore=_LIMITS)
    return _load(checkpoint, path, "", shapes)


def _parts(experiment: Experiment) -> Iterator[tuple[str, str, Any]]:
    """(prefix of its weights' names, path, config in the experiment) of each part given."""
    model, paths = experiment.model, experiment.init_parts
    unknown = set(paths.towers) - set(model.towers)
    if unknown:
        known = ", ".join(model.towers)
        raise ValueError(f"config.init_parts.towers names {sorted(unknown)}; the model has {known}")
    parts = [
        (f"vision_tower/towers/{i}/", paths.towers.get(name, ""), tower)
        for i, (name, tower) in enumerate(model.towers.items())
    ]
    parts += [("connector/", paths.connector, model.connector), ("llm/", paths.llm, model.llm)]
    return (part for part in parts if part[1])


def _load_part(prefix: str, path: str, config: Any, shapes: Shapes) -> Arrays:
    if run.is_pairs(path):
        checkpoint = open_tower(Path(path), config)
    else:
        checkpoint = open_checkpoint(path, compare=jax.process_index() == 0)
    found = checkpoint.config
    if type(found) is not type(config):
        kinds = " but ".join(type(c).__module__.rpartition(".")[2] for c in (found, config))
        raise ValueError(f"config.init_parts: {path} holds {kinds} is wanted")
    _check_config(path, found, config, ignore=_CLIPS)
    own = {n: s for n, s in shapes.items() if n.startswith(prefix)}
    return _load(checkpoint, path, prefix, own)


def _load(checkpoint: Checkpoint, path: str, prefix: str, shapes: Shapes) -> Arrays:
    """The weights of a checkpoint where they belong, each process reading its own slices."""
    names = {prefix + name: name for name in checkpoint.ours.stored}
    source = Renamed(checkpoint.ours, names)
    _check_shapes(path, {name: stored.shape for name, stored in source.stored.items()}, shapes)
    return placement.place(source, shapes)


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
