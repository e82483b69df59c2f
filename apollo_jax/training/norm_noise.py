# SPDX-License-Identifier: Apache-2.0
"""Gradient noise scale by modality, from the gains of the decoder's norms: the noise of all of a
transformer's parameters follows theirs (Gray et al. 2024, arXiv 2411.00999).

The formulas are those of noise_scale.py. Instead of microbatches, pieces are compared: what a row
holds of a modality for each modality, and whole rows for all of them. Their gradients are a
by-product of the backward pass, see models/pieces.py.

N norms, B rows, L positions, M modalities, D stream.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from apollo_jax import sharding
from apollo_jax.training.noise_scale import SIGNAL, VARIANCE, estimate
from data_pipeline.batch import MODALITIES, Batch

PARTS = ("norms", *(f"norms/{modality}" for modality in MODALITIES))


class Gains(NamedTuple):
    """Those of a decoder's norms."""

    count: int
    width: int


class NormSpread(NamedTuple):
    """Sums over the rows so far of an update, each of all modalities together, then of each."""

    squares: Float[Array, " M+1"]  # of w |g|^2
    count: Float[Array, " M+1"]  # of pieces that have any weight
    weight: Float[Array, " M+1"]
    grads: Float[Array, "N M D"]  # of the sum of the loss


def modality_of(batch: Batch) -> Int[Array, "B L"]:
    """The number of each position's modality, -1 on padding."""
    return jnp.where(batch.segment_ids > 0, batch.groups % len(MODALITIES), -1)


def make_probe(gains: Gains, batch: Batch) -> Float[Array, "N B M D"]:
    """Zeros, whose "gradient" is that of each gain by row and modality."""
    shape = (gains.count, batch.tokens.shape[0], len(MODALITIES), gains.width)
    return sharding.constrain(jnp.zeros(shape, jnp.float32), None, "batch", None, None)


def no_norm_spread(gains: Gains) -> NormSpread:
    """Before the first rows."""
    parts = jnp.zeros(len(PARTS), jnp.float32)
    grads = jnp.zeros((gains.count, len(MODALITIES), gains.width), jnp.float32)
    return NormSpread(parts, parts, parts, grads)


def norm_spread_of(by_piece: Float[Array, "N B M D"], batch: Batch) -> NormSpread:
    """Of a batch.

    Args:
      by_piece: gradients of the sum of its loss.
    """
    mine = modality_of(batch)[..., None] == jnp.arange(len(MODALITIES))  # [B, L, M]
    weights = jnp.sum(jnp.where(mine, batch.loss_weights[..., None], 0.0), axis=1)
    weights = jnp.concatenate([jnp.sum(weights, axis=1, keepdims=True), weights], axis=1)
    whole = jnp.sum(jnp.square(jnp.sum(by_piece, axis=2)), axis=(0, 2))  # [B]
    each = jnp.sum(jnp.square(by_piece), axis=(0, 3))  # [B, M]
    squares = jnp.concatenate([whole[:, None], each], axis=1)
    some = weights > 0  # without weight there is no gradient, and no piece
    squares = jnp.where(some, squares / jnp.where(some, weights, 1.0), 0.0)
    count, weight = jnp.sum(some.astype(jnp.float32), axis=0), jnp.sum(weights, axis=0)
    return NormSpread(jnp.sum(squares, axis=0), count, weight, jnp.sum(by_piece, axis=1))


def norm_estimates(spread: NormSpread) -> dict[str, Any]:
    """`noise/variance/norms` and `noise/signal/norms` of an update, and both by modality.

    NaN where less than two pieces have weight.
    """
    whole = jnp.sum(jnp.square(jnp.sum(spread.grads, axis=1)))
    each = jnp.sum(jnp.square(spread.grads), axis=(0, 2))
    squares = jnp.concatenate([whole[None], each])
    variance, signal = estimate(spread.squares, spread.count, squares, spread.weight)
    found = {f"{VARIANCE}/{part}": variance[i] for i, part in enumerate(PARTS)}
    return found | {f"{SIGNAL}/{part}": signal[i] for i, part in enumerate(PARTS)}
