# SPDX-License-Identifier: Apache-2.0
"""Throughput: how fast the steps between two lines of the log went, and what they had of the chips.

Time that evaluations, checkpoints and compilers took is not theirs and counts nowhere here.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from apollo_jax.planning.topology import peak_flops
from apollo_jax.training.goodput import Goodput
from apollo_jax.training.ramp import Ramp
from data_pipeline.loader import LoadStats

GIB = 2**30
ONE_EACH = Ramp(((0, 1),))


class Throughput:
    """Adds up steps until `restart`.

    Args:
      step: updates so far.
      parts: equal parts into which the processes cut a batch; what this one counts is one of them.
      ramp: how many microbatches each update has.
      needs: seconds of a microbatch at the devices' peak, see `peak_seconds`; 0 = not known.
    """

    def __init__(
        self,
        goodput: Goodput,
        step: int,
        parts: int = 1,
        ramp: Ramp = ONE_EACH,
        needs: float = 0.0,
    ):
        self.goodput, self.parts, self.ramp, self.needs = goodput, parts, ramp, needs
        self.restart(step)

    def restart(self, step: int) -> None:
        """Count from here, after `step`, on."""
        self.since, self.held_up, self.step = time.perf_counter(), self.goodput.held_up(), step
        self.samples = self.tokens = self.frames = 0
        self.waited = 0.0
        self.fill: list[tuple[float, float]] = []

    def add(self, stats: LoadStats, waited: float) -> None:
        """A batch that was dispatched, for which the loop waited so many seconds."""
        self.samples += stats.samples
        self.tokens, self.frames = self.tokens + stats.tokens, self.frames + stats.frames
        self.waited += waited
        self.fill.append((stats.fill_tokens, stats.fill_clips))

    def values(self, step: int) -> dict[str, float]:
        """The rates up to `step`, which is over."""
        held_up = self.goodput.held_up() - self.held_up
        seconds = max(time.perf_counter() - self.since - held_up, 1e-9)
        batches = self.ramp.before(step) - self.ramp.before(self.step)
        fill_tokens, fill_clips = np.mean(self.fill, axis=0).tolist()
        return {
            "samples_per_second": self.samples * self.parts / seconds,
            "tokens_per_second": self.tokens * self.parts / seconds,
            "frames_per_second": self.frames * self.parts / seconds,
            "data_wait": self.waited / seconds,
            "seconds_per_step": seconds / (step - self.step),
            "fill_tokens": fill_tokens,
            "fill_clips": fill_clips,
            **({"mfu": self.needs * batches / seconds} if self.needs else {}),
        }


def peak_seconds(experiment: Any, flops_of: Callable[[Any], float] | None = None) -> float:
    """Seconds in which these devices could do what a microbatch needs; 0 if no one says.

    That are the model's FLOPs as `flops_of` counts them, which is the planner's `model_flops`, on a
    batch that is full, at the published bf16 rate. Call it before a mesh is set.
    """
    peak = sum(peak_flops(device.device_kind) for device in jax.devices())
    if not peak:
        return 0.0
    from apollo_jax.planning import flops  # nobody else needs the planner

    return (flops_of or flops.model_flops)(experiment) / peak


def memory(devices: Sequence[Any]) -> dict[str, float]:
    """GiB of the fullest of `devices`: in use, at the peak so far, and there. None on CPUs."""
    said = [s for s in (device.memory_stats() for device in devices) if s]
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
    return {
        f"memory/{name}_gib": max(s[key] for s in said) / GIB
        for name, key in names.items()
        if said and all(key in s for s in said)
    }
