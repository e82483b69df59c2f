# SPDX-License-Identifier: Apache-2.0
"""Weighted next-token cross-entropy on any mesh; linear_cross_entropy.py has the arithmetic.

B rows, L tokens, D stream, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from apollo_jax import sharding
from apollo_jax.training import linear_cross_entropy as linear

Cut = Literal["positions", "vocabulary"]
BY_GROUP = "by_group"  # of the metrics of a step, as in `Sums`


class Sums(NamedTuple):
    """Sums over all positions of a batch; add them over batches, then divide by `weight`."""

    loss: Float[Array, ""]  # nats
    correct: Float[Array, ""]  # weight of the positions whose likeliest token is the target
    weight: Float[Array, ""]
    # Loss and weight of each group of positions, where they are told apart.
    by_group: Float[Array, "G 2"] | None = None


def mean(sums: Sums) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(loss, accuracy) per unit of weight; 0 for a batch without any."""
    weight = jnp.maximum(sums.weight, 1.0)
    return sums.loss / weight, sums.correct / weight


def cross_entropy(
    hidden: Float[Array, "B L D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B L"],
    weights: Float[Array, "B L"],
    *,
    chunk: int = 0,
    cut: Cut = "positions",
    skip_below: float = 0.0,
    groups: Int[Array, "B L"] | None = None,
    num_groups: int = 0,
) -> Sums:
    """Sums of weights * -log p(target), with p = softmax(hidden . table) in float32.

    At a time each device holds as many logits as `chunk` positions have (0 = all); `cut` says of
    what, see linear_cross_entropy.py.
    Products are taken in the dtype of `hidden`; their sums and the table's gradient are float32.
    `skip_below` > 0 leaves out of the gradients the blocks of the vocabulary in which no
    probability (less one at the target) reaches it; that needs cut="vocabulary". Given each
    position's group, a number below `num_groups`, loss and weight are summed by group too.
    Gradients flow to `hidden` and `table` alone, and from `loss` alone.
    """
    if skip_below and cut != "vocabulary":
        raise ValueError(f"skip_below={skip_below} skips blocks: it needs cut='vocabulary'")
    weights = weights.astype(jnp.float32)
    method = _Method(cut, chunk, skip_below)
    found: Any = _sums(hidden, table, targets, weights, method)
    by_group = None
    if groups is not None and num_groups:
        mine = groups == jnp.arange(num_groups)[:, None, None]  # [G, B, L], not in memory
        both = (lax.stop_gradient(found[2]) * weights, weights)
        by_group = jnp.stack([jnp.sum(jnp.where(mine, x, 0.0), axis=(1, 2)) for x in both], axis=1)
    return Sums(found[0], found[1], jnp.sum(weights), by_group)


class _Method(NamedTuple):
    cut: Cut
    chunk: int
    skip_below: float


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sums(hidden: Array, table: Array, targets: Array, weights: Array, method: _Method) -> Any:
    """(loss, correct, loss of each position unweighted), without gradients."""
    arrays = (hidden, table, targets, weights)
    if method.cut == "vocabulary":
        return _by_vocabulary(arrays, method)[:3]
    return _by_positions(arrays, method, (False, False))[:3]


def _forward(hidden: Any, table: Any, targets: Any, weights: Any, method: _Method) -> Any:
    arrays = (hidden.value, table.value, targets.value, weights.value)
    trained = table.perturbed  # whether anyone asks for its gradient: known while tracing
    if method.cut == "vocabulary":
        *sums, lse = _by_vocabulary(arrays, method)
        return tuple(sums), (arrays, lse, () if trained else None)
    *sums, d_hidden, d_table = _by_positions(arrays, method, (True, trained))
    return tuple(sums), (d_hidden, d_table, jnp.zeros((), table.value.dtype))


def _backward(method: _Method, kept: Any, cotangents: Any) -> Any:
    scale = cotangents[0]  # of the loss; hits have no gradient
    if isinstance(scale, SymbolicZero):
        return None, None, None, None
    if method.cut == "vocabulary":
        (hidden, table, targets, weights), lse, trained = kept
        d_hidden, d_table = _on_devices(
            linear.gradients_by_vocabulary,
            (hidden, table, targets, weights * scale, lse),
            ("hidden", "table"),
            chunk=method.chunk,
            skip_below=method.skip_below,
            trained=trained is not None,
        )
    else:
        d_hidden, d_table, table = kept  # of the table only its dtype
        d_hidden = d_hidden * scale.astype(d_hidden.dtype)
        d_table = None if d_table is None else d_table * scale
    return d_hidden, None if d_table is None else d_table.astype(table.dtype), None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _by_positions(arrays: tuple[Array, ...], method: _Method, gradients: tuple[bool, bool]) -> Any:
    results = ("sum", "sum", "position", "hidden", "table")
    settings = dict(chunk=method.chunk, gradients=gradients)
    return _on_devices(linear.by_positions, arrays, results, **settings)


def _by_vocabulary(arrays: tuple[Array, ...], method: _Method) -> Any:
    results = ("sum", "sum", "position", "position")
    return _on_devices(linear.by_vocabulary, arrays, results, chunk=method.chunk)


def _on_devices(
    function: Callable[..., Any],
    arrays: tuple[Array, ...],
    results: tuple[str, ...],
    **settings: Any,
) -> Any:
    """`function` on each device's positions and part of the table.

    `arrays` are hidden, table and others [B, L]; `results` says how each result is laid out.
    """
    tokens = sharding.layout(arrays[0].shape, "batch", "length", None)
    rows = sharding.layout(arrays[1].shape, "vocab", "embed")
    vocab, embed = (sharding.mesh_axes(part) for part in rows)
    over = tuple(axis for part in tokens for axis in sharding.mesh_axes(part))
    embed = tuple(axis for axis in embed if axis in over)  # its gradient is scattered over them
    layouts = {
        "sum": P(),
        "position": P(*tokens[:2]),
        "hidden": tokens,
        "table": P(vocab or None, embed or None),
    }
    inputs = ("hidden", "table", *["position"] * (len(arrays) - 2))
    return sharding.on_devices(
        partial(function, axes=linear.Axes(over, vocab, embed), **settings),
        tuple(layouts[name] for name in inputs),
        tuple(layouts[name] for name in results),
    )(*arrays)
