# SPDX-License-Identifier: Apache-2.0
"""The exponential moving average of what trains, kept as if it were a moment of the optimizer.

So it is cut over the mesh as the parameters are, saved and restored with the other moments, counted
by the plan, and left alone by a step that is skipped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_jax.training.state import Arrays, TrainState


class AverageState(NamedTuple):
    """The averages by name, in float32: in bfloat16 a share of 1 - decay would be lost."""

    ema: Arrays


def with_average(
    tx: optax.GradientTransformationExtraArgs, decay: float
) -> optax.GradientTransformationExtraArgs:
    """`tx`, and after each update e = decay e + (1 - decay) p; e is p at first. 0 = `tx` alone."""

    def init(params: Any) -> AverageState:
        copies = {n: jnp.array(p, jnp.float32, copy=True) for n, p in params.items()}
        return AverageState(copies)  # copied since both are donated

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        new: Any = optax.apply_updates(params, updates)
        old = state.ema
        ema = {n: e + (1.0 - decay) * (new[n].astype(e.dtype) - e) for n, e in old.items()}
        return updates, AverageState(ema)

    if not decay:
        return tx
    chain = optax.chain(tx, optax.GradientTransformation(init, update))
    return optax.with_extra_args_support(chain)


def averaged(state: TrainState) -> TrainState:
    """The state with the averages as its parameters, in their dtypes and places; to evaluate."""
    states: Any = state.opt_state
    (found,) = (s for s in states if isinstance(s, AverageState))

    def place(name: str, param: jax.Array) -> jax.Array:
        return jax.device_put(found.ema[name], param.sharding).astype(param.dtype)

    return state._replace(params={n: place(n, p) for n, p in state.params.items()})
