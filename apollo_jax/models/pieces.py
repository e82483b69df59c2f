# SPDX-License-Identifier: Apache-2.0
"""Gradients of gains by piece: a row's positions fall into pieces, of one modality each, say.

The gradient of a gain is a sum over positions: of what comes back to the product with it, times
what goes into it. The part of it from the positions of a piece is the gradient of the loss of these
positions alone, if no others attend to them, and packed segments do not attend to each other.

B rows, L positions, P pieces of a row, D stream, N norms.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from apollo_jax import sharding


class Pieces(NamedTuple):
    """Asks for the gradients of a decoder's gains by piece: the "gradient" of `probe` is they."""

    index: Int[Array, "B L"]  # of the piece that a position is in, -1 for none
    probe: Float[Array, "N B P D"]  # zeros; nothing that is computed forward depends on them


@jax.custom_vjp
def gained(
    y: Float[Array, "B L D"],
    gain: Float[Array, " D"],
    index: Int[Array, "B L"],
    probe: Float[Array, "B P D"],
) -> Float[Array, "B L D"]:
    """y * gain, in float32; the cotangent of `probe` is the gradient of `gain` by piece."""
    del index, probe
    return y * gain


def _forward(y: Array, gain: Array, index: Array, probe: Array) -> tuple[Array, tuple]:
    return y * gain, (y, gain, index, jnp.arange(probe.shape[1]))


def _backward(kept: tuple, back: Array) -> tuple:
    y, gain, index, pieces = kept
    each = back * y
    member = (index[..., None] == pieces).astype(each.dtype)
    exact = jax.lax.Precision.HIGHEST  # one factor is 0 or 1
    by_piece = jnp.einsum("blp,bld->bpd", member, each, precision=exact)
    by_piece = sharding.constrain(by_piece, "batch", None, None)
    return back * gain, jnp.sum(each, axis=(0, 1)), None, by_piece


gained.defvjp(_forward, _backward)
