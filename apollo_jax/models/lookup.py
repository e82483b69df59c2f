# SPDX-License-Identifier: Apache-2.0
"""Rows of an embedding table, with a gradient that is summed piece by piece.

The gradient of plain indexing is one scatter of all tokens: where the table is cut along its
channels, of every row on the mesh. The TPU compiler sorts them first, and a sort of half a million
tokens alone takes it as long as several layers of a decoder.

B rows, L tokens, V vocabulary, D stream; N tokens of which a device has d channels and v words.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from apollo_jax import sharding

PIECE = 2**14  # tokens that are sorted and added at a time; XLA itself sorts more than these


def lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B L"], dtype: Any
) -> Float[Array, "B L D"]:
    """table[tokens] in `dtype`; tokens are not negative.

    The gradient of more than PIECE tokens of a device is summed in float32, and then rounded.
    """
    table = table.astype(dtype)
    return table[tokens] if tokens.size <= PIECE else _rows(table, tokens, table.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(table: Array, tokens: Array, size: int) -> Array:
    del size
    return table[tokens]


def _forward(table: Array, tokens: Array, size: int) -> tuple[Array, Array]:
    return _rows(table, tokens, size), tokens


def _backward(size: int, tokens: Array, back: Float[Array, "B L D"]) -> tuple[Array, None]:
    """Each device sums its channels and words over all tokens along the axes that cut these."""
    vocab, embed = sharding.layout((size, back.shape[-1]), "vocab", "embed")
    taken = sharding.mesh_axes(vocab) + sharding.mesh_axes(embed)
    cut = sharding.layout(tokens.shape, "batch", "length")
    rows, length = (tuple(a for a in sharding.mesh_axes(part) if a not in taken) for part in cut)

    def gradient(tokens: Int[Array, "b l"], back: Float[Array, "b l d"]) -> Float[Array, "v d"]:
        mine = size // sharding.ways("vocab") if vocab else size
        first = mine * lax.axis_index(vocab) if vocab else 0
        total = _sum(tokens.reshape(-1) - first, back.reshape(-1, back.shape[-1]), mine)
        return lax.psum(total, rows + length) if rows + length else total

    positions = P(rows or None, length or None)
    inputs = positions, P(*positions, embed)
    return sharding.on_devices(gradient, inputs, P(vocab, embed))(tokens, back), None


_rows.defvjp(_forward, _backward)


def _sum(words: Int[Array, " N"], back: Float[Array, "N d"], size: int) -> Float[Array, "v d"]:
    """What comes back to each word from 0 to `size`; that to others is left out."""
    words = jnp.where(words < 0, size, words)  # not the last ones
    count = len(words)
    if count <= PIECE:
        return jnp.zeros((size, back.shape[-1]), back.dtype).at[words].add(back, mode="drop")

    def add(i: Array, total: Array) -> Array:
        start = jnp.minimum(i * PIECE, count - PIECE)  # the last piece begins within another
        places = jnp.arange(PIECE)
        piece = lax.dynamic_slice_in_dim(words, start, PIECE)
        piece = jnp.where(start + places < i * PIECE, size, piece)
        piece, order = lax.sort((piece, places), num_keys=1, is_stable=False)
        rows = lax.dynamic_slice_in_dim(back, start, PIECE)
        rows = rows.at[order].get(mode="promise_in_bounds").astype(jnp.float32)
        return total.at[piece].add(rows, mode="drop", indices_are_sorted=True)

    total = jnp.zeros((size, back.shape[-1]), jnp.float32)
    return lax.fori_loop(0, -(-count // PIECE), add, total).astype(back.dtype)
