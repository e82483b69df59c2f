# SPDX-License-Identifier: Apache-2.0
"""Schedule-free AdamW (arXiv 2405.15682): the weights are an average, the gradient is taken nearby.

x, the average, is what the state calls its parameters: it is evaluated, saved and handed over.
z are the weights that AdamW without momentum would have; y, between them, is where the gradient is
taken.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ScheduleFreeState(NamedTuple):
    """z and second moments by name; how far the average weighs; the share of x in y."""

    count: Any
    z: Any
    nu: Any
    weight: Any  # sum of squared rates so far
    b1: Any


def gradient_point(params: Any, opt_state: Any) -> Any:
    """Where the gradient is to be taken: at the parameters, except by schedule-free optimizers."""
    for state in opt_state:
        if isinstance(state, ScheduleFreeState):
            return _between(state.b1, params, state.z)
    return params


def _between(b1: Any, x: Any, z: Any) -> Any:
    return jax.tree.map(lambda x, z: (z + b1 * (x - z)).astype(x.dtype), x, z)


def schedule_free(
    clock: Callable[[jax.Array], jax.Array],
    rate: Callable[[str, int, jax.Array], jax.Array],
    decay: Callable[[str, int], float],
    b1: float,
    b2: float,
    eps: float,
) -> optax.GradientTransformation:
    """From the gradient at y, the change of x.

    Args:
      clock: any of the rates by updates so far: the others differ by factors, which cancel in how
        much a step weighs in the average.
      rate: that of a parameter by name, axes and updates so far.
      decay: of a parameter by name and axes.
    """

    def init(params: Any) -> ScheduleFreeState:
        z = jax.tree.map(lambda p: p.copy(), params)  # both are donated
        zero = jnp.zeros((), jnp.float32)
        nu = jax.tree.map(jnp.zeros_like, params)
        return ScheduleFreeState(jnp.zeros((), jnp.int32), z, nu, zero, jnp.float32(b1))

    def update(updates: Any, state: Any, params: Any = None, *, step: Any = None, **_: Any) -> Any:
        count, step = state.count + 1, state.count if step is None else step
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, updates)
        y, z = _between(state.b1, params, state.z), {}
        for name, grad in updates.items():
            change = grad / (jnp.sqrt(nu[name] / (1 - b2**count)) + eps)
            change = change + decay(name, grad.ndim) * y[name]
            z[name] = (state.z[name] - rate(name, grad.ndim, step) * change).astype(grad.dtype)
        squared = jnp.square(clock(step))
        weight = state.weight + squared
        share = squared / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
        change = jax.tree.map(lambda x, z: (share * (z - x)).astype(x.dtype), params, z)
        return change, ScheduleFreeState(count, z, nu, weight, state.b1)

    return optax.GradientTransformationExtraArgs(init, update)
