# SPDX-License-Identifier: Apache-2.0
"""Softmax cross-entropy of a linear head, value and gradients, without the logits in memory.

For position t with hidden state h_t, weight w_t and target y_t, over the rows e_v of the table,

    z_tv = h_t . e_v        loss = sum_t w_t (lse_t - z_t,y_t)      lse_t = log sum_v exp z_tv
    s_tv = w_t (exp(z_tv - lse_t) - [v = y_t])                      (slope of the loss in z_tv)
    dh_t = sum_v s_tv e_v   de_v = sum_t s_tv h_t

are three products of T x D x V: z, dh, de. Only a piece of z exists at a time, cut either way:

along "positions": a piece has all of V, so lse and with it the gradients follow at once, in the
    forward pass; nothing is computed twice. The table and, if it trains, its gradient in float32
    are held by a group of devices, each with some of their rows, see shared_table.py; alone or
    without `fsdp` and `tensor`, by each device.
along "vocabulary": a first pass over blocks of the table finds lse; the backward pass makes z
    again, four products in all. Nothing as large as the table exists: its blocks are gathered
    over `fsdp` and the blocks of its gradient scattered as they come.

A table that is not differentiated (a frozen head) gets no gradient: one product less.

B rows, L positions of a row and V rows of the table on one device, D stream; T = B x L positions.
The functions run on each device, on its own part of the arrays; `Axes` says over which mesh axes
the other parts lie.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from apollo_jax.training import shared_table
from apollo_jax.training.shared_table import NOT_A_TOKEN, Group

_ALONE = Group()
_LANES = 128  # blocks of the vocabulary are a multiple of it


class Axes(NamedTuple):
    """Mesh axes over which each device holds a part; empty = each holds all of it."""

    tokens: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()  # rows of the table
    embed: tuple[str, ...] = ()  # its columns; among the axes of the tokens


# ---- along positions


def by_positions(
    hidden: Float[Array, "B L D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    *,
    axes: Axes,
    chunk: int,
    gradients: tuple[bool, bool],
) -> tuple[
    Array, Array, Float[Array, "B L"], Float[Array, "B L D"] | None, Float[Array, "V D"] | None
]:
    """(loss, correct, loss of each position, gradient of hidden, of table in float32).

    `chunk` positions at a time (0 = all). `gradients` says which of (hidden, table) are wanted; the
    others are None. Losses of positions are not weighted.
    """
    group = shared_table.group(table, axes.embed, gradients[1])
    columns, ids = group.rows(table, hidden.dtype), group.ids(table, axes.vocab)

    def body(d_table: Array | None, piece: tuple[Array, Array, Array]):
        h, t, w = map(group.positions, piece)
        z = _masked(_dot(h, columns, (1, 0)), ids)
        seen = _together(_see(_nothing_seen(t.shape[0]), z, ids, t), axes, group)
        loss, correct, lse = _sums(seen, t, group.own(w))
        each = group.part(lse - seen.target)
        if not any(gradients):
            return d_table, (loss, correct, each, None)
        s = (_slopes(z, lse, ids, t) * w[:, None]).astype(h.dtype)
        d_hidden = group.sum_positions(lax.psum(_dot(s, columns, (1, 1)), axes.vocab))
        if d_table is not None:
            d_table = d_table + _dot(h, s, (0, 0))
        return d_table, (loss, correct, each, d_hidden.astype(h.dtype))

    count = targets.size
    chunk = min(chunk or count, count)

    def pieces(x: Array) -> Array:  # [B, L, ...] -> [T / c, c, ...]; what is added weighs nothing
        x = x.reshape(count, *x.shape[2:])
        x = jnp.pad(x, [(0, -count % chunk)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, chunk, *x.shape[1:])

    d_table = jnp.zeros(columns.shape, jnp.float32) if gradients[1] else None
    arrays = (pieces(hidden), pieces(targets), pieces(weights))
    d_table, (loss, correct, each, d_hidden) = lax.scan(body, d_table, arrays)
    loss, correct = lax.psum((jnp.sum(loss), jnp.sum(correct)), axes.tokens)
    if d_hidden is not None:
        d_hidden = d_hidden.reshape(-1, hidden.shape[-1])[:count].reshape(hidden.shape)
    if d_table is not None:
        d_table = _scatter(group, d_table, table.shape[0], axes)
    each = each.reshape(-1)[:count].reshape(targets.shape)
    return loss, correct, each, d_hidden, d_table


# ---- along the vocabulary


def by_vocabulary(
    hidden: Float[Array, "B L D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    *,
    axes: Axes,
    chunk: int,
) -> tuple[Array, Array, Float[Array, "B L"], Float[Array, "B L"]]:
    """(loss, correct, loss of each position unweighted, lse).

    As many logits at a time as `chunk` positions have (0 = all).
    """

    h, t, w = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
    size, blocks = _blocks(h, table, chunk)

    def body(seen: _Seen, block: Int[Array, ""]):
        columns, ids, _ = _block(table, block, size, h.dtype, axes)
        return _see(seen, _masked(_dot(h, columns, (1, 0)), ids), ids, t), None

    seen, _ = lax.scan(body, _nothing_seen(t.shape[0]), blocks)
    seen = _together(seen, axes)
    loss, correct, lse = _sums(seen, t, w)
    loss, correct = lax.psum((loss, correct), axes.tokens)
    return loss, correct, (lse - seen.target).reshape(targets.shape), lse.reshape(targets.shape)


def gradients_by_vocabulary(
    hidden: Float[Array, "B L D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    lse: Float[Array, "B L"],
    *,
    axes: Axes,
    chunk: int,
    skip_below: float,
    trained: bool,
) -> tuple[Float[Array, "B L D"], Float[Array, "V D"] | None]:
    """Gradients of hidden and, if `trained`, of the table in float32.

    A block in which no |slope| / weight reaches `skip_below` is taken for zero (0 = none is).
    """

    h, t = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    w, lse = weights.reshape(-1), lse.reshape(-1)
    size, blocks = _blocks(h, table, chunk)

    def body(carry: tuple[Array, Array | None], block: Int[Array, ""]):
        d_hidden, d_table = carry
        columns, ids, start = _block(table, block, size, h.dtype, axes)
        slope = _slopes(_masked(_dot(h, columns, (1, 0)), ids), lse, ids, t)
        s = (slope * w[:, None]).astype(h.dtype)

        def products(s: Array) -> tuple[Array, Array | None]:
            return _dot(s, columns, (1, 1)), _dot(h, s, (0, 0)) if trained else None

        if skip_below:
            matters = jnp.any((jnp.abs(slope) >= skip_below) & (w != 0)[:, None])
            more, d_columns = lax.cond(matters, products, _zeros_like(products), s)
        else:
            more, d_columns = products(s)
        if d_table is not None and d_columns is not None:
            there = lax.dynamic_slice_in_dim(d_table, start, size)
            # added: the last block meets rows again
            there = there + _scatter(shared_table.alone(axes.embed), d_columns, size, axes)
            d_table = lax.dynamic_update_slice_in_dim(d_table, there, start, 0)
        return (d_hidden + more, d_table), None

    zeros = jnp.zeros(h.shape, jnp.float32)
    d_table = jnp.zeros(table.shape, jnp.float32) if trained else None
    (d_hidden, d_table), _ = lax.scan(body, (zeros, d_table), blocks)
    d_hidden = lax.psum(d_hidden, axes.vocab).astype(hidden.dtype)
    return d_hidden.reshape(hidden.shape), d_table


def _zeros_like(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A function that returns zeros where `function` returns arrays."""
    return lambda x: jax.tree.map(
        lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(function, x)
    )


def _blocks(hidden: Array, table: Array, chunk: int) -> tuple[int, Int[Array, " n"]]:
    """(rows of a block, numbers of the blocks)."""
    positions, rows = hidden.shape[0], table.shape[0]
    size = -(-chunk * rows // positions) if chunk else rows
    size = min(rows, -(-size // _LANES) * _LANES)
    size = next((n for n in range(size, size // 2, -_LANES) if rows % n == 0), size)
    return size, jnp.arange(-(-rows // size))


def _block(
    table: Array, block: Int[Array, ""], size: int, dtype: jnp.dtype, axes: Axes
) -> tuple[Float[Array, "D b"], Int[Array, " b"], Int[Array, ""]]:
    """(rows of the table, their tokens, first row); the last block starts early to be full.

    Rows that an earlier block has had are no token here.
    """
    start = jnp.minimum(block * size, table.shape[0] - size)
    rows = lax.dynamic_slice_in_dim(table, start, size)
    group = shared_table.alone(axes.embed)
    ids = lax.dynamic_slice_in_dim(group.ids(table, axes.vocab), start, size)
    ids = jnp.where(start + jnp.arange(size) >= block * size, ids, NOT_A_TOKEN)
    return group.rows(rows, dtype), ids, start


def _masked(z: Array, ids: Array) -> Array:
    """What is no token is never likely; finite, for a device may have nothing else."""
    return jnp.where(ids == NOT_A_TOKEN, jnp.finfo(z.dtype).min, z)


# ---- both


class _Seen(NamedTuple):
    """What is known of each position's logits after a part of the vocabulary."""

    top: Float[Array, " T"]  # the largest
    best: Int[Array, " T"]  # its token, the first of several
    total: Float[Array, " T"]  # sum of exp(z - top)
    target: Float[Array, " T"]  # logit of the target


def _nothing_seen(length: int) -> _Seen:
    zeros = jnp.zeros(length, jnp.float32)
    return _Seen(jnp.full_like(zeros, -jnp.inf), jnp.zeros(length, jnp.int32), zeros, zeros)


def _see(seen: _Seen, z: Float[Array, "T b"], ids: Int[Array, " b"], targets: Array) -> _Seen:
    """`seen` and the logits of the tokens `ids` (the online softmax)."""
    highest = jnp.max(z, axis=-1)
    top = jnp.maximum(seen.top, highest)
    best = jnp.where(highest > seen.top, ids[jnp.argmax(z, axis=-1)], seen.best)
    total = seen.total * jnp.exp(seen.top - top) + jnp.sum(jnp.exp(z - top[:, None]), axis=-1)
    target = jnp.sum(jnp.where(ids == targets[:, None], z, 0.0), axis=-1)
    return _Seen(top, best, total, seen.target + target)


def _together(seen: _Seen, axes: Axes, group: Group = _ALONE) -> _Seen:
    """What the devices have seen that hold the parts of the vocabulary."""

    def over(reduction: Callable[..., Array], x: Array) -> Array:
        return group.reduce(reduction, reduction(x, axes.vocab))

    top = over(lax.pmax, seen.top)
    best = over(lax.pmin, jnp.where(seen.top == top, seen.best, NOT_A_TOKEN))
    total = over(lax.psum, seen.total * jnp.exp(seen.top - top))
    return _Seen(top, best, total, over(lax.psum, seen.target))


def _sums(seen: _Seen, targets: Array, weights: Array) -> tuple[Array, Array, Array]:
    """(loss, correct, lse) of positions whose whole vocabulary was seen."""
    lse = seen.top + jnp.log(seen.total)
    hits = (seen.best == targets).astype(jnp.float32)
    return jnp.sum((lse - seen.target) * weights), jnp.sum(hits * weights), lse


def _slopes(z: Array, lse: Array, ids: Array, targets: Array) -> Float[Array, "T b"]:
    """s / w."""
    return jnp.exp(z - lse[:, None]) - (ids == targets[:, None]).astype(jnp.float32)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Product over one axis of each, in float32."""
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _scatter(group: Group, d_columns: Float[Array, "D v"], rows: int, axes: Axes) -> Array:
    """This device's columns of the sum of all devices' gradients, [rows, d]."""
    rest = tuple(axis for axis in axes.tokens if axis != group.axis)
    return lax.psum(group.scatter(d_columns, rows), rest)
