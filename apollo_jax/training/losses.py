# SPDX-License-Identifier: Apache-2.0
"""Weighted next-token cross-entropy, with the logits of only a chunk of positions alive at once.

B rows, L tokens, D stream, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class Sums(NamedTuple):
    """Sums over all positions of a batch; add them over batches, then divide by `weight`."""

    loss: Float[Array, ""]  # nats
    correct: Float[Array, ""]  # weight of the positions whose likeliest token is the target
    weight: Float[Array, ""]


def cross_entropy(
    hidden: Float[Array, "B L D"],
    unembed: Callable[[Float[Array, "B l D"]], Float[Array, "B l V"]],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    chunk: int = 0,
) -> Sums:
    """Sums of weights * -log p(target); `chunk` positions of logits at a time (0 = all of them)."""
    if not chunk:
        return _sums(unembed(hidden), targets, weights)

    @jax.checkpoint
    def body(total: Sums, piece: tuple[Array, Array, Array]) -> tuple[Sums, None]:
        h, t, w = piece
        return jax.tree.map(jnp.add, total, _sums(unembed(h), t, w)), None

    def pieces(x: Array) -> Array:  # [B, L, ...] -> [L / chunk, B, chunk, ...]
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(
        body, Sums(zero, zero, zero), jax.tree.map(pieces, (hidden, targets, weights))
    )[0]


def _sums(
    logits: Float[Array, "B l V"], targets: Int[Array, "B l"], weights: Float[Array, "B l"]
) -> Sums:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return Sums(jnp.sum(losses * weights), jnp.sum(hits * weights), jnp.sum(weights))


def mean(sums: Sums) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(loss, accuracy) per unit of weight; 0 for a batch without any."""
    weight = jnp.maximum(sums.weight, 1.0)
    return sums.loss / weight, sums.correct / weight
