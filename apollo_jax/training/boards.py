# SPDX-License-Identifier: Apache-2.0
"""Boards: where a run's numbers and pictures go. metrics.jsonl, TensorBoard and, if asked, W&B."""

import dataclasses
import importlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from apollo_jax.config import Experiment
from apollo_jax.training.guard import finite

METRICS, TENSORBOARD, WANDB_ID = "metrics.jsonl", "tensorboard", "wandb_id"
_FLUSH = 1  # seconds that TensorBoard may be behind; its own flush() leaves what is still queued


class Boards:
    """Open files of one run, in its first process; the others write nothing.

    What was written beyond step `start` is forgotten: a continued run writes those steps again.
    """

    def __init__(self, workdir: Path, *, start: int = 0, primary: bool = True, wandb: Any = None):
        self.primary, self.wandb = primary, wandb
        if primary:
            forget_after(workdir / METRICS, start)
            self.file = open(workdir / METRICS, "a")  # noqa: SIM115  closed by close()
            self.tensorboard = SummaryWriter(
                str(workdir / TENSORBOARD), purge_step=start + 1, flush_secs=_FLUSH
            )

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the same as scalars; what is no number is null."""
        if not self.primary:
            return
        known = {name: finite(value) for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **known}) + "\n")
        self.file.flush()
        scalars = {name: value for name, value in known.items() if value is not None}
        for name, value in scalars.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(scalars, step=step)

    def show(self, step: int, name: str, picture: np.ndarray, text: str) -> None:
        """A picture u8[h, w, 3], and what is said about it (Markdown), in TensorBoard."""
        if self.primary:
            self.tensorboard.add_image(name, picture, step, dataformats="HWC")
            self.tensorboard.add_text(name, text, step)
            self.tensorboard.flush()

    def close(self) -> None:
        """Close all of them."""
        if self.primary:
            self.file.close()
            self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish()


def find_wandb(project: str) -> Any:
    """The wandb package if a project is named, else None. ValueError if it is not installed."""
    if not project:
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"config.train.wandb={project} logs to Weights & Biases, whose package is not "
            "installed: pip install wandb (or leave the field empty)"
        ) from error


def open_boards(experiment: Experiment, workdir: Path, start: int) -> Boards:
    """Those of a run that has done `start` steps.

    A W&B run is among them if the config names a project; continued, it is the same one.
    """
    primary, run = jax.process_index() == 0, None
    wandb = find_wandb(experiment.train.wandb)
    if wandb is not None and primary:
        kept = workdir / WANDB_ID
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        run = wandb.init(
            project=experiment.train.wandb,
            name=experiment.name,
            id=kept.read_text(),
            resume="allow",
            dir=str(workdir),
            config=dataclasses.asdict(experiment),
        )
    return Boards(workdir, start=start, primary=primary, wandb=run)


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of `path` beyond `step`: a resumed run writes those steps again."""
    if not path.exists():
        return
    kept = [line for line in whole_lines(path) if (n := _step_of(line)) is not None and n <= step]
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    os.replace(temporary, path)


def evaluated(workdir: Path, step: int) -> bool:
    """Whether a run has written what it found on held-out sources at `step`."""
    path = workdir / METRICS
    lines = [line for line in whole_lines(path) if _step_of(line) == step] if path.exists() else []
    return any(name.startswith("eval/") for line in lines for name in json.loads(line))


def whole_lines(path: Path) -> list[str]:
    """Of a file of JSON values, without one that was cut off while it was written.

    Values may hold other characters at which `splitlines` would split, as U+2028.
    """
    return [line.decode() for line in path.read_bytes().split(b"\n")[:-1]]


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return None
