# SPDX-License-Identifier: Apache-2.0
"""Low-rank updates (LoRA, arXiv 2106.09685): y = x W + b + alpha / rank (x A) B; A and B train.

W is never changed, and no gradient of its shape exists. Exports hold W + alpha / rank A B.
B batch, D in, R rank, E out.
"""

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from apollo_jax.models import layers

PART = "lora"  # in the names of A and B: "llm/layers/q/lora/a"


@dataclass(frozen=True)
class Updates:
    """Of one component, in which nothing else trains then."""

    rank: int = 0  # 0 = none: the component itself trains
    alpha: float = 16.0
    # Linears by their names ("q", "fc1") or the ends of their paths ("layers/*", "towers/0/*/q").
    targets: tuple[str, ...] = ("layers/*",)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoraConfig:
    """By component."""

    vision_tower: Updates = Updates()
    connector: Updates = Updates()
    llm: Updates = Updates()

    def chosen(self) -> dict[str, Updates]:
        """Of the components that have updates."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: updates for name, updates in own.items() if updates.rank}


class Update(nnx.Module):
    """[*b, D] -> [*b, E]: zero at first, since B is; A is normal with variance 1 / D."""

    def __init__(self, linear: layers.Linear, updates: Updates, rngs: nnx.Rngs):
        *lead, din, dout = linear.kernel.shape  # with a leading axis of layers, in a stack
        *stacked, in_axis, out_axis = linear.kernel.get_metadata()["out_sharding"]
        kw: dict[str, Any] = dict(dtype=linear.param_dtype, rngs=rngs)
        normal = jax.nn.initializers.normal(din**-0.5)
        zeros = jax.nn.initializers.zeros
        rank = updates.rank
        self.a = layers.param((*lead, din, rank), (*stacked, in_axis, None), normal, **kw)
        self.b = layers.param((*lead, rank, dout), (*stacked, None, out_axis), zeros, **kw)
        self.scale, self.dtype = updates.scale, linear.dtype

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b E"]:
        for factor in (self.a, self.b):
            x = layers.dot_of_matrices(x.astype(self.dtype), factor[...].astype(self.dtype), None)
        return x * self.scale


def attach(model: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Give the linears that `config` names an update each.

    Raises ValueError for a pattern that fits none, listing the linears there are, and for a rank
    that one of them cannot have.
    """
    for component, updates in config.chosen().items():
        linears = dict(_linears(model, component))
        for pattern in updates.targets:
            if not any(_fits(path, pattern) for path in linears):
                raise ValueError(
                    f"config.train.lora.{component}.targets: no linear is called {pattern!r}; "
                    f"there are {', '.join(linears) or 'none'}"
                )
        for path, linear in linears.items():
            if any(_fits(path, pattern) for pattern in updates.targets):
                *_, din, dout = linear.kernel.shape
                if updates.rank > min(din, dout):
                    raise ValueError(
                        f"config.train.lora.{component}.rank is {updates.rank}, but {path} is "
                        f"{din} x {dout}: take at most {min(din, dout)}, or leave it out of "
                        "the targets"
                    )
                linear.lora = Update(linear, updates, rngs)


def _linears(model: nnx.Module, component: str) -> Iterator[tuple[str, layers.Linear]]:
    """(path within the component, linear)."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, layers.Linear) and path[0] == component:
            yield "/".join(map(str, path[1:])), module


def _fits(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(f"/{path}", f"*/{pattern}")


def is_update(name: str) -> bool:
    """Whether a parameter of this name is an A or a B."""
    return PART in name.split("/")
