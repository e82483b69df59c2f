# SPDX-License-Identifier: Apache-2.0
"""What the microbatches of an update add up to on the devices, in float32.

An update is taken from its last microbatch and the sums over those before it: see step.py.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from apollo_jax.training import losses, norm_noise
from apollo_jax.training.noise_scale import Spread, no_spread, spread_of
from apollo_jax.training.optimizers.schedule_free import gradient_point
from apollo_jax.training.state import Arrays, TrainState, merge, on_device
from data_pipeline.batch import Batch


class Accumulated(NamedTuple):
    """Sums over the microbatches so far of an update."""

    grads: Arrays  # of the sum of the losses, cut over the mesh as the parameters are
    sums: losses.Sums
    spread: Spread | None = None  # of their gradients, if it is asked for
    norms: norm_noise.NormSpread | None = None  # of their rows'


class Told(NamedTuple):
    """What is told of the microbatches beside their gradients."""

    spread: bool = False  # of these gradients
    groups: int = 0  # whose loss sums are told apart
    gains: norm_noise.Gains | None = None  # by which rows and modalities are compared


NOTHING = Told()


def shapes_of(abstract: TrainState, told: Told = NOTHING) -> Accumulated:
    """Shapes and shardings of what is accumulated."""

    def shape(like: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes or like.shape, jnp.float32, sharding=like.sharding)

    grads = {name: shape(param) for name, param in abstract.params.items()}
    scalar = shape(abstract.step)
    by_group = shape(abstract.step, told.groups, 2) if told.groups else None
    sums = losses.Sums(scalar, scalar, scalar, by_group)
    spread = norms = None
    if told.spread:
        spread = jax.tree.map(lambda _: scalar, no_spread(abstract.params))
    if told.gains:
        zeros = norm_noise.no_norm_spread(told.gains)
        norms = jax.tree.map(lambda zero: shape(abstract.step, *zero.shape), zeros)
    return Accumulated(grads, sums, spread, norms)


def make_zeros(abstract: TrainState, told: Told) -> Any:
    """Jitted () -> what is accumulated before the first microbatch."""
    shapes = shapes_of(abstract, told)
    places = jax.tree.map(lambda s: s.sharding, shapes)

    @partial(jax.jit, out_shardings=places)
    def zeros() -> Accumulated:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return zeros


def make_add(
    graphdef: nnx.GraphDef,
    loss_sums: Any,
    abstract: TrainState,
    options: Mapping[str, str] | None,
    told: Told,
) -> Any:
    """Jitted (gradients, other sums, params, opt_state, frozen, batch) -> what is accumulated then.

    The old gradients are overwritten; the old sums are not, so that they can be waited for.
    """
    places = jax.tree.map(lambda s: s.sharding, shapes_of(abstract, told))

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
        before = Accumulated(grads, *sums)
        return added(before, graphdef, loss_sums, point, frozen, batch, told.gains)

    return add


def added(
    before: Accumulated,
    graphdef: nnx.GraphDef,
    loss_sums: Any,
    point: Arrays,
    frozen: Arrays,
    batch: Batch,
    gains: norm_noise.Gains | None,
) -> Accumulated:
    """With one more microbatch, its gradient taken at `point`."""

    def loss(sums: losses.Sums):
        return sums.loss, sums

    grads, by_piece, sums = gradients(loss, graphdef, loss_sums, point, frozen, batch, gains)
    spread, rows = before.spread, before.norms
    if spread is not None:
        spread = jax.tree.map(jnp.add, spread, spread_of(grads, sums.weight))
    if rows is not None:
        rows = jax.tree.map(jnp.add, rows, norm_noise.norm_spread_of(by_piece, batch))
    grads = {name: before.grads[name] + grad.astype(jnp.float32) for name, grad in grads.items()}
    return Accumulated(grads, jax.tree.map(jnp.add, before.sums, sums), spread, rows)


def gradients(
    loss: Callable[[losses.Sums], tuple[jax.Array, Any]],
    graphdef: nnx.GraphDef,
    loss_sums: Any,
    point: Arrays,
    frozen: Arrays,
    batch: Batch,
    gains: norm_noise.Gains | None,
) -> tuple[Arrays, Any, Any]:
    """(gradients of the loss, those of `gains` by row and modality, what else `loss` gives).

    `loss` makes of a batch's sums what is differentiated and what is handed on. Off, no probe is
    traced: the program is that of a run that never asked.
    """
    probe = None if gains is None else norm_noise.make_probe(gains, batch)

    def of(params: Arrays, probe: Any):
        asked = {} if probe is None else {"probe": probe}
        return loss(loss_sums(merge(graphdef, params, frozen), batch, **asked))

    (grads, by_piece), rest = jax.grad(of, argnums=(0, 1), has_aux=True)(point, probe)
    return grads, by_piece, rest


def mean_gradients(total: Accumulated, params: Arrays) -> Arrays:
    """Of the mean loss over all microbatches, in the dtypes of the parameters."""
    weight = jnp.maximum(total.sums.weight, 1.0)  # as losses.mean
    return {name: (g / weight).astype(params[name].dtype) for name, g in total.grads.items()}
