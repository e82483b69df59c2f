# SPDX-License-Identifier: Apache-2.0
"""Guard: what becomes of steps whose loss or gradient is no number, or far above the usual.

    stop    the run ends at such a step; nothing of it is saved
    skip    the step leaves parameters and moments as they were (decided inside the jitted step)
    rewind  parameters and moments become those of the last checkpoint, and the batches from there
            to the last one that was taken are stepped over

A step is bad if its loss or gradient norm is not finite, or above `spike_factor` times the median
of the good steps among the last WINDOW. Bad steps are counted, named and written to bad_steps.jsonl
with the records of their batch.
"""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from apollo_jax.config import TrainConfig

BAD_STEPS = "bad_steps.jsonl"
WINDOW, LEAST = 128, 16  # steps of a median, and how many it takes to have one
_NAMED = 8  # records named on the console


class Diverged(ValueError):
    """The guard has stopped a run, in all its processes."""


class Measured(NamedTuple):
    """What is judged of a step."""

    step: int
    loss: float
    grad_norm: float


class Guard:
    """Judges the steps of a run. The same in all processes: what it sees is."""

    def __init__(
        self,
        train: TrainConfig,
        workdir: Path,
        records: Callable[[int], list[str]] = lambda step: [],
        state: dict[str, Any] | None = None,
    ):
        self.train, self.path, self.records = train, workdir / BAD_STEPS, records
        self.console = Console(quiet=jax.process_index() != 0)
        state = state or {"good": [], "bad": 0, "in_a_row": 0}
        self.good = [Measured(*one) for one in state["good"]]
        self.bad, self.in_a_row = state["bad"], state["in_a_row"]
        self.rewind = False  # parameters and moments have to go back to the last checkpoint

    def state(self) -> dict[str, Any]:
        """JSON-able: what a continued run must know to judge as this one would have."""
        return {"good": self.good, "bad": self.bad, "in_a_row": self.in_a_row}

    def limits(self, step: int) -> np.ndarray:
        """f32[2]: loss and gradient norm of `step` must be below these; inf where there is none.

        From steps that are over when `step` is dispatched, wherever the run was interrupted.
        """
        known = [one for one in self.good if one.step < step - 1][-WINDOW:]
        if not self.train.spike_factor or len(known) < LEAST:
            return np.full(2, np.inf, np.float32)
        medians = [statistics.median(one[i] for one in known) for i in (1, 2)]
        return np.float32(self.train.spike_factor) * np.asarray(medians, np.float32)

    def see(self, measured: Measured) -> bool:
        """Take a step's loss and gradient norm; whether it was bad.

        Raises Diverged at a bad step if the policy is to stop, or at too many in a row.
        """
        limits = self.limits(measured.step)
        if all(np.asarray(measured[1:], np.float32) < limits):
            if self.train.spike_factor:
                self.good = [*self.good, measured][-WINDOW - 2 :]
            self.in_a_row = 0
            return False
        self.bad, self.in_a_row = self.bad + 1, self.in_a_row + 1
        why = _reason(measured, limits)
        records = self.records(measured.step)
        self._write(measured, why, records)
        named = ", ".join(records[:_NAMED]) + ", .." * (len(records) > _NAMED)
        policy = self.train.on_nonfinite
        text = f"{why}; its records: {named}"
        if policy == "stop":
            raise Diverged(
                f"{text}\nit is not saved. Lower the learning rates or look at the records (all of "
                f"them are in {self.path}), then run the same command to go on from the last "
                "checkpoint; with --config.train.on_nonfinite=skip or =rewind it goes on by itself"
            )
        if self.in_a_row > self.train.max_bad_steps:
            raise Diverged(
                f"{text}\n{self.in_a_row} bad steps in a row, more than config.train.max_bad_steps="
                f"{self.train.max_bad_steps}: it is not the batches. Lower the learning rates"
            )
        done = "its update is left out" if policy == "skip" else "back to the last checkpoint"
        self.console.print(f"{text}; {done}", style="yellow", soft_wrap=True, markup=False)
        self.rewind = policy == "rewind"
        return True

    def _write(self, measured: Measured, why: str, records: list[str]) -> None:
        if jax.process_index() == 0:
            loss, norm = map(finite, measured[1:])
            line = {"step": measured.step, "why": why, "loss": loss, "grad_norm": norm}
            with open(self.path, "a") as file:
                file.write(json.dumps({**line, "records": records}) + "\n")


def finite(value: float) -> float | None:
    """The value, or None (null) for one that JSON has no word for."""
    return value if math.isfinite(value) else None


def _reason(measured: Measured, limits: np.ndarray) -> str:
    for name, value, limit in zip(("loss", "gradient norm"), measured[1:], limits, strict=True):
        if not np.float32(value) < limit:
            text = f"the {name} of step {measured.step} is {value:.6g}"
            spike = f", above {limit:.4g}, train.spike_factor times the median"
            return text + spike * math.isfinite(value)
    raise AssertionError("a step within its limits")
