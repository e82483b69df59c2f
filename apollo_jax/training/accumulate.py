# SPDX-License-Identifier: Apache-2.0
"""What the microbatches of an update add up to on the devices, in float32.

An update is taken from its last microbatch and the sums over those before it: see step.py.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from apollo_jax.training import losses
from apollo_jax.training.noise_scale import Spread, no_spread, spread_of
from apollo_jax.training.optimizers.schedule_free import gradient_point
from apollo_jax.training.state import Arrays, TrainState, merge, on_device
from data_pipeline.batch import Batch


class Accumulated(NamedTuple):
    """Sums over the microbatches so far of an update."""

    grads: Arrays  # of the sum of the losses, cut over the mesh as the parameters are
    sums: losses.Sums
    spread: Spread | None = None  # of their gradients, if it is asked for


def shapes_of(abstract: TrainState, spread: bool = False, groups: int = 0) -> Accumulated:
    """Shapes and shardings of what is accumulated; `groups` are those of its loss sums."""

    def shape(like: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes or like.shape, jnp.float32, sharding=like.sharding)

    grads = {name: shape(param) for name, param in abstract.params.items()}
    scalar = shape(abstract.step)
    by_group = shape(abstract.step, groups, 2) if groups else None
    sums = losses.Sums(scalar, scalar, scalar, by_group)
    spreads = jax.tree.map(lambda _: scalar, no_spread(abstract.params)) if spread else None
    return Accumulated(grads, sums, spreads)


def make_zeros(abstract: TrainState, spread: bool = False, groups: int = 0) -> Any:
    """Jitted () -> what is accumulated before the first microbatch."""
    shapes = shapes_of(abstract, spread, groups)
    places = jax.tree.map(lambda s: s.sharding, shapes)

    @partial(jax.jit, out_shardings=places)
    def zeros() -> Accumulated:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return zeros


def make_add(
    graphdef: nnx.GraphDef,
    loss_sums: Any,
    abstract: TrainState,
    options: Mapping[str, str] | None = None,
    spread: bool = False,
    groups: int = 0,
) -> Any:
    """Jitted (gradients, other sums, params, opt_state, frozen, batch) -> what is accumulated then.

    The old gradients are overwritten; the old sums are not, so that they can be waited for.
    """
    places = jax.tree.map(lambda s: s.sharding, shapes_of(abstract, spread, groups))

    @partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=places,
        compiler_options=dict(options or {}),
        keep_unused=True,  # moments too, which are there: the compiler is to count their memory
    )
    def add(
        grads: Arrays, sums: tuple, params: Arrays, opt_state: Any, frozen: Arrays, batch: Any
    ) -> Accumulated:
        point = gradient_point(params, on_device(opt_state, abstract.opt_state))
        return added(Accumulated(grads, *sums), graphdef, loss_sums, point, frozen, batch)

    return add


def added(
    before: Accumulated,
    graphdef: nnx.GraphDef,
    loss_sums: Any,
    point: Arrays,
    frozen: Arrays,
    batch: Batch,
) -> Accumulated:
    """With one more microbatch, its gradient taken at `point`."""

    def loss(params: Arrays):
        sums = loss_sums(merge(graphdef, params, frozen), batch)
        return sums.loss, sums

    grads, sums = jax.grad(loss, has_aux=True)(point)
    spread = before.spread
    if spread is not None:
        spread = jax.tree.map(jnp.add, spread, spread_of(grads, sums.weight))
    grads = {name: before.grads[name] + grad.astype(jnp.float32) for name, grad in grads.items()}
    return Accumulated(grads, jax.tree.map(jnp.add, before.sums, sums), spread)


def mean_gradients(total: Accumulated, params: Arrays) -> Arrays:
    """Of the mean loss over all microbatches, in the dtypes of the parameters."""
    weight = jnp.maximum(total.sums.weight, 1.0)  # as losses.mean
    return {name: (g / weight).astype(params[name].dtype) for name, g in total.grads.items()}
