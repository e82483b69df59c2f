# SPDX-License-Identifier: Apache-2.0
"""What the numbers of a run may be: one table for all kinds of runs."""

import dataclasses
import fnmatch
import math
import operator
from collections.abc import Iterator
from typing import Any

from apollo_jax.config_values import leaves

_SHARE = "at least 0 and below 1"  # of what was, in running means
# Fields (one or, with *, several) and what they may be; no number may be nan or infinite.
RANGES = {
    "data.batch_size": "at least 1",
    "data.length": "at least 1",
    "rates.*": "at least 0",
    "train.num_steps": "at least 1",
    "train.accumulate": "at least 1",
    "train.lora.*.rank": "at least 0",
    "train.lora.*.alpha": "above 0",
    "train.ema_decay": _SHARE,
    "train.loss_chunk": "at least 0",
    "train.loss_skip_below": "at least 0",
    "train.log_every": "at least 1",
    "train.checkpoint_every": "at least 1",
    "train.keep": "at least 1",
    "train.local_every": "at least 1",
    "train.spike_factor": "exactly 0 or above 1",
    "train.max_bad_steps": "at least 1",
    "train.join_seconds": "at least 1",
    "train.heartbeat_seconds": "at least 1",
    "optimizer.learning_rates.*": "at least 0",
    "optimizer.warmup_ratio": "at least 0 and at most 1",
    "optimizer.clip_norm": "at least 0",
    "optimizer.b1": _SHARE,
    "optimizer.b2": _SHARE,
    "optimizer.eps": "above 0",
    "optimizer.weight_decay": "at least 0",
    "optimizer.rate_by_role.*": "at least 0",
    "optimizer.decay_by_*": "at least 0",
    "optimizer.base_batch": "at least 0",
    "optimizer.adafactor.min_dim": "at least 1",
    "optimizer.adafactor.decay": "above 0 and at most 1",
    "optimizer.adafactor.b2_cap": "above 0 and below 1",
    "optimizer.adafactor.clip_rms": "at least 0",
    "optimizer.adafactor.momentum": _SHARE,
    "optimizer.adafactor.eps": "above 0",
    "optimizer.lars.trust": "above 0",
    "optimizer.lars.momentum": _SHARE,
    "optimizer.lion.b[12]": _SHARE,
    "optimizer.muon.momentum": _SHARE,
    "optimizer.muon.steps": "at least 1",
    "optimizer.apollo*.rank": "at least 1",
    "optimizer.apollo*.alpha": "above 0",
    "optimizer.apollo*.every": "at least 1",
    "optimizer.apollo*.growth": "exactly 0 or at least 1",
}
_TESTS = {
    "exactly": operator.eq,
    "at least": operator.ge,
    "at most": operator.le,
    "above": operator.gt,
    "below": operator.lt,
}


def out_of_range(run: Any) -> Iterator[str]:
    """Every number of a run (an Experiment, or another kind) that is not what it may be."""
    numbers = ("data", "train", "optimizer", "rates")
    groups = (f.name for f in dataclasses.fields(run) if f.name in numbers)
    values = leaves({name: dataclasses.asdict(getattr(run, name)) for name in groups})
    for pattern, allowed in RANGES.items():
        for name in fnmatch.filter(values, pattern):
            if not _within(values[name], allowed):
                yield f"config.{name} is {values[name]}, must be {allowed}"


def _within(value: float, allowed: str) -> bool:
    """Whether it passes the tests of `allowed`, "exactly 0 or at least 1 and below 2"."""

    def passes(test: str) -> bool:
        word, _, bound = test.rpartition(" ")
        return _TESTS[word](value, float(bound))

    ways = (way.split(" and ") for way in allowed.split(" or "))
    return math.isfinite(value) and any(all(map(passes, way)) for way in ways)
