# SPDX-License-Identifier: Apache-2.0
"""Drawing the next token: greedy, temperature, nucleus (top-p, arXiv 1904.09751).

B rows, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sample(
    key: Array,
    logits: Float[Array, "B V"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " B"]:
    """One id per row: the likeliest at temperature 0, else drawn from the nucleus."""

    def draw() -> Array:
        return jax.random.categorical(key, nucleus(logits / temperature, top_p))

    # A branch, not a select: greedy decoding must not pay for sorting the vocabulary.
    return jax.lax.cond(temperature > 0, draw, lambda: jnp.argmax(logits, axis=-1))


def nucleus(logits: Float[Array, "B V"], top_p: Float[Array, ""]) -> Float[Array, "B V"]:
    """-inf outside the smallest set of likeliest tokens whose mass reaches `top_p` (1 = all)."""
    ranked = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # mass of the likelier tokens
    # Rounding makes `before` reach 1 in the tail, which top_p = 1 must not cut off.
    kept = (before < top_p) | (top_p >= 1)
    weakest = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < weakest, -jnp.inf, logits)
