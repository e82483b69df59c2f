# SPDX-License-Identifier: Apache-2.0
"""What can be set for a single optimizer; what all or most of them share is in OptimizerConfig."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

_OWN = ("adafactor", "lars", "lion", "muon", "apollo", "apollo_mini")
_WITHOUT_ADAM = ("adafactor", "lars", "lion")


@dataclass(frozen=True)
class ByRole:
    """A factor for the parameters of each role (`roles.role_of`)."""

    matrix: float = 1.0
    embedding: float = 1.0
    head: float = 1.0
    norm: float = 1.0
    bias: float = 1.0


def no_decay() -> ByRole:
    """The usual exception of norms and biases."""
    return ByRole(norm=0.0, bias=0.0)


@dataclass(frozen=True)
class ByComponent:
    """A factor for the parameters of each component."""

    vision_tower: float = 1.0
    connector: float = 1.0
    llm: float = 1.0


@dataclass(frozen=True)
class Adafactor:
    """The defaults are those of big_vision's `scale_by_adafactor` (arXiv 2106.04560, Sec 3.4)."""

    min_dim: int = 32  # matrices with two axes at least this long keep row and column means
    decay: float = 0.8  # second moments decay by 1 - t^-decay
    b2_cap: float = 0.999  # but at most by this
    clip_rms: float = 0.0  # largest rms of a layer's update; 0 = no limit
    momentum: float = 0.9  # 0 = none
    momentum_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    eps: float = 1e-30


@dataclass(frozen=True)
class Lars:
    """arXiv 1708.03888."""

    trust: float = 1e-3
    momentum: float = 0.9


@dataclass(frozen=True)
class Lion:
    """arXiv 2302.06675: rates about a tenth of AdamW's, decay about ten times."""

    b1: float = 0.9
    b2: float = 0.99
    momentum_dtype: Literal["bfloat16", "float32"] = "float32"


@dataclass(frozen=True)
class Muon:
    """For matrices (kellerjordan.github.io/posts/muon); what is none is left to Adam."""

    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5  # of the Newton-Schulz iteration
    # "rms": 0.2 sqrt(max(rows, columns)), so that AdamW's rates fit (arXiv 2502.16982, Sec 2.2);
    # "width": sqrt(max(1, columns out / rows in)), as first published, for rates of about 0.02.
    scale: Literal["rms", "width"] = "rms"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the iteration


@dataclass(frozen=True)
class Apollo:
    """For matrices (arXiv 2412.05270); what is none is left to Adam."""

    rank: int = 256
    each: Literal["channel", "tensor"] = "channel"  # what has a scaling factor of its own
    alpha: float = 1.0  # times the update
    every: int = 200  # steps between two projections
    growth: float = 1.01  # of an update's norm from step to step, at most; 0 = no limit
    tables: bool = False  # also for embeddings and heads
    seed: int = 0


def apollo_mini() -> Apollo:
    """APOLLO-Mini (Sec 4.3): rank 1, one factor per tensor."""
    return Apollo(rank=1, each="tensor", alpha=128**0.5)


def unread(config: Any) -> Iterator[str]:
    """What is set for an optimizer that is not the chosen one: a line for each field.

    Args:
      config: an OptimizerConfig.
    """
    plain = type(config)(name=config.name)
    for name in _OWN:
        if name == config.name:
            continue
        own, usual = (asdict(getattr(c, name)) for c in (config, plain))
        for field, value in own.items():
            if value != usual[field]:
                yield (
                    f"config.optimizer.{name}.{field}={value} has no effect: "
                    f"config.optimizer.name is {config.name}"
                )
    for field in ("b1", "b2", "eps"):
        value = getattr(config, field)
        if config.name in _WITHOUT_ADAM and value != getattr(plain, field):
            yield f"config.optimizer.{field}={value} has no effect: {config.name} does not read it"


def rate_problems(rule: str, base: int) -> Iterator[str]:
    """What is wrong with the rule by which rates follow the batch, and the batch it starts from."""
    if rule != "none" and base < 1:
        yield (
            f"config.optimizer.rate_rule is {rule}, config.optimizer.base_batch {base}: set it to "
            "the rows of an update (data.batch_size x microbatches) that the learning rates are for"
        )
    if rule == "none" and base:
        yield f"config.optimizer.base_batch is {base}, but config.optimizer.rate_rule is none"
