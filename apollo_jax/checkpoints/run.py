# SPDX-License-Identifier: Apache-2.0
"""What the folder of a training run holds (see `manager`, which writes it)."""

import json
import os
from pathlib import Path
from typing import Any

from apollo_jax.config import Experiment
from apollo_jax.config_values import from_dict

CONFIG, TOKENIZER, CHECKPOINTS, WEIGHTS = "config.json", "tokenizer", "checkpoints", "weights"
OPTIMIZER, EMA = "optimizer", "ema"  # the moments beside the weights; among them the averages


def is_run(path: str | os.PathLike) -> bool:
    """Whether `path` is the folder of a run that has checkpoints."""
    return (Path(path) / CONFIG).is_file() and (Path(path) / CHECKPOINTS).is_dir()


def is_pairs(path: str | os.PathLike) -> bool:
    """Whether `path` is the folder of a contrastive run, which has two towers and no decoder."""
    return is_run(path) and _of_pairs(json.loads((Path(path) / CONFIG).read_text()))


def _of_pairs(said: Any) -> bool:
    return isinstance(said, dict) and "text" in (said.get("model") or {})


def read_experiment(workdir: str | os.PathLike) -> Experiment:
    """The Experiment of a run. ValueError for a contrastive one, or one of another version."""
    path = Path(workdir) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is not the folder of a run: it has no {CONFIG}")
    try:
        said = json.loads(path.read_text())
        if _of_pairs(said):
            raise ValueError(
                "a contrastive run has two towers and no decoder; an Apollo takes over its tower "
                f"with --config.init_parts.towers.NAME={workdir}"
            )
        return from_dict(Experiment, said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def progress(workdir: Path) -> tuple[str, int, int]:
    """(name of the experiment, steps of the latest finished checkpoint, steps to do) of a run.

    Reads no more of config.json than that, so that runs of any kind and version can be told apart.
    """
    said = json.loads((workdir / CONFIG).read_text())
    done = [int(p.name) for p in (workdir / CHECKPOINTS).iterdir() if p.name.isdigit()]
    return said["name"], max(done, default=0), said["train"]["num_steps"]


def latest_weights(workdir: Path) -> Path:
    """The weights of the latest finished checkpoint. FileNotFoundError without one."""
    folder = workdir / CHECKPOINTS
    steps = sorted(p for p in folder.iterdir() if p.name.isdigit() and (p / WEIGHTS).is_dir())
    if not steps:
        raise FileNotFoundError(f"{folder} holds no finished checkpoint")
    return steps[-1] / WEIGHTS
