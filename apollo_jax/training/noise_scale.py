# SPDX-License-Identifier: Apache-2.0
"""Gradient noise scale: how large a batch can be before its gradient is more exact than it is worth
(McCandlish et al. 2018, arXiv 1812.06162, Appendix A), from the microbatches of an update.

Microbatch i of n has the weight w_i (target tokens) and the gradient g_i of its mean loss; all of
them together W and G. With a gradient mu and a covariance S of one unit of weight,
E |g_i|^2 = |mu|^2 + tr(S) / w_i, so that, whatever the weights,

    variance = (sum of w_i |g_i|^2 - W |G|^2) / (n - 1)    has the mean tr(S)
    signal   = |G|^2 - variance / W                        has the mean |mu|^2

The ratio of the two is the noise scale, in units of weight. It is taken of running means, each of
its own: a single update's ratio is biased, and its signal may be negative.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from apollo_jax.training.state import Arrays, component_of

Scalars = dict[str, Any]  # by component, and of all of them under ""
DECAY = 0.99  # of the running means, per update
VARIANCE, SIGNAL, RATIO = "noise/variance", "noise/signal", "noise_scale"


class Spread(NamedTuple):
    """Sums over the microbatches so far of an update."""

    squares: Scalars  # f32[], of w_i |g_i|^2
    count: Any  # f32[], of those that have any weight


def squares_of(grads: Arrays) -> Scalars:
    """Square norms of a gradient in float32: of each component, and of all together."""
    found: Scalars = {"": jnp.zeros((), jnp.float32)}
    for name, grad in grads.items():
        square = jnp.sum(jnp.square(grad.astype(jnp.float32)))
        for part in (component_of(name), ""):
            found[part] = found.get(part, jnp.zeros((), jnp.float32)) + square
    return found


def no_spread(params: Mapping[str, Any]) -> Spread:
    """Before the first microbatch."""
    parts = ("", *sorted({component_of(name) for name in params}))
    return Spread(dict.fromkeys(parts, jnp.zeros((), jnp.float32)), jnp.zeros((), jnp.float32))


def spread_of(grads: Arrays, weight: jax.Array) -> Spread:
    """Of one microbatch, from the gradient of its loss *sum* and its weight."""
    some = weight > 0  # without weight there is no gradient, and no microbatch
    by = jnp.where(some, weight, 1.0)
    return Spread({n: s / by for n, s in squares_of(grads).items()}, some.astype(jnp.float32))


def estimates(spread: Spread, grads: Arrays, weight: jax.Array) -> dict[str, jax.Array]:
    """`noise/variance` and `noise/signal` of one update, of all and by component; NaN if n < 2.

    Args:
      grads: of the sum of the loss over all microbatches.
      weight: of all of them.
    """
    found = {}
    for part, square in squares_of(grads).items():
        variance, signal = estimate(spread.squares[part], spread.count, square, weight)
        found |= {_named(VARIANCE, part): variance, _named(SIGNAL, part): signal}
    return found


def estimate(
    squares: jax.Array, count: jax.Array, square: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(variance, signal), NaN if n < 2.

    Args:
      squares: sum of w_i |g_i|^2.
      count: n.
      square: of the gradient of the sum of the loss, W^2 |G|^2.
      weight: W.
    """
    square = square / jnp.square(weight)
    degrees = jnp.where(count > 1, count - 1, jnp.nan)
    variance = (squares - weight * square) / degrees
    return variance, square - variance / weight


def _named(what: str, part: str) -> str:
    return f"{what}/{part}" if part else what


class NoiseScale:
    """Running means of what the updates estimate, of each part where they have it.

    The same in all processes: what it sees is.
    """

    def __init__(self, state: Mapping[str, Any] | None = None, decay: float = DECAY):
        self.decay = decay
        self.means: dict[str, float] = dict(state["means"]) if state else {}

    def state(self) -> dict[str, Any]:
        """JSON-able: what a continued run must know to go on as this one would have."""
        return {"means": self.means}

    def see(self, metrics: Mapping[str, Any], counts: bool = True) -> dict[str, Any]:
        """Take an update's estimates, if it has any; its metrics with the noise scales beside them.

        An update that does not count, because it was left out or taken back, changes no mean. A
        part whose estimates are no numbers (one microbatch, no video in the rows) stays as it is.
        """
        new = {name: v for name, v in metrics.items() if name.startswith((VARIANCE, SIGNAL))}
        new = {name: float(value) for name, value in jax.device_get(new).items()}
        for variance in (name for name in new if counts and name.startswith(VARIANCE)):
            both = variance, variance.replace(VARIANCE, SIGNAL, 1)
            if all(math.isfinite(new[name]) for name in both):
                for name in both:
                    old = self.means.get(name, 0.0)
                    self.means[name] = self.decay * old + (1 - self.decay) * new[name]
        return {**metrics, **(self.ratios() if new else {})}

    def ratios(self) -> dict[str, float]:
        """`noise_scale` and `noise_scale/PART`; NaN where there is no signal (yet)."""
        found = {}
        for name, variance in self.means.items():
            if name.startswith(VARIANCE):
                signal = self.means[name.replace(VARIANCE, SIGNAL, 1)]
                ratio = variance / signal if signal > 0 else math.nan
                found[name.replace(VARIANCE, RATIO, 1)] = ratio
        return found
