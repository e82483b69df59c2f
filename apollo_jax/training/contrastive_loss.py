# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses between two towers over all pairs of a batch, in memory flat in the chips.

Sigmoid (SigLIP, arXiv 2303.15343) and softmax (CLIP, arXiv 2103.00020). The devices of the mesh
stand in one ring and each keeps the rows of both towers that are its own. Copies of the two go
round in opposite directions, so that the links carry something both ways, no gradient travels and
each device adds up those of its own rows. The losses are `custom_vjp`s: autodiff of a ring keeps
the scores of every stop, which grow with the number of chips.

B rows in all, b rows of a device, D width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from apollo_jax import sharding

Rows = Float[Array, "B D"]
Scores = Float[Array, "b b"]
Scalar = Float[Array, ""]


class Loss(NamedTuple):
    """The mean over rows, and what it is the mean of. Gradients flow from `mean` alone."""

    mean: Scalar
    rows: Float[Array, "B"]


@jax.custom_vjp
def sigmoid_loss(x: Rows, y: Rows, scale: Scalar, bias: Scalar) -> Loss:
    """-log sigmoid(z (scale x_i y_j + bias)) per row, summed over all j; z is 1 if i = j, else -1.

    Row i of `x` belongs to row i of `y`, and both are of length 1 as a rule. Products are made in
    the dtype of the rows, sums in float32. Under `jax.set_mesh` the rows are spread over all of its
    devices.

    Raises ValueError if the devices do not divide the rows.
    """
    (by_row,), (loss,) = _on_ring(_sigmoid_value, (x, y), (scale, bias))
    return Loss(loss, by_row)


def _sigmoid_forward(x: Rows, y: Rows, scale: Scalar, bias: Scalar) -> tuple[Loss, tuple]:
    # A pair's slope depends on no other pair: one round makes the value and the gradients.
    (dx, dy, by_row), (loss, dscale, dbias) = _on_ring(_sigmoid_gradients, (x, y), (scale, bias))
    kept = (dx, dy, dscale.astype(scale.dtype), dbias.astype(bias.dtype))
    return Loss(loss, by_row), kept


def _times(gradients: tuple[Array, ...], g: Loss) -> tuple[Array, ...]:
    return tuple(d * g.mean.astype(d.dtype) for d in gradients)


sigmoid_loss.defvjp(_sigmoid_forward, _times)


@jax.custom_vjp
def softmax_loss(x: Rows, y: Rows, scale: Scalar) -> Loss:
    """Cross-entropy of finding y_i by x_i and x_i by y_i among all rows, with scores scale x_i y_j.

    The mean over rows and over both directions; otherwise as `sigmoid_loss`.
    """
    return _softmax_forward(x, y, scale)[0]


def _softmax_forward(x: Rows, y: Rows, scale: Scalar) -> tuple[Loss, tuple]:
    (by_row, *normalisers), (loss,) = _on_ring(_softmax_value, (x, y), (scale,))
    return Loss(loss, by_row), (x, y, *normalisers, scale)


def _softmax_backward(kept: tuple[Array, ...], g: Loss) -> tuple[Array, ...]:
    *rows, scale = kept
    (dx, dy), (dscale,) = _on_ring(_softmax_gradients, tuple(rows), (scale,))
    return _times((dx, dy, dscale.astype(scale.dtype)), g)


softmax_loss.defvjp(_softmax_forward, _softmax_backward)


def retrieved(x: Rows, y: Rows) -> Scalar:
    """How many rows find their own among all rows of the other side; the mean of both directions.

    A row that another one equals in its score is not found. No gradient passes.
    """
    _, (count,) = _on_ring(_retrieved, tuple(map(jax.lax.stop_gradient, (x, y))), ())
    return count * x.shape[0]


class Ring(NamedTuple):
    """All devices of a mesh, each beside the next."""

    axes: tuple[str, ...]
    size: int

    def shift(self, tree: Any, by: int) -> Any:
        """What the device `by` places before this one holds."""
        pairs = [(i, (i + by) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda a: jax.lax.ppermute(a, self.axes, pairs), tree)

    def mean(self, x: Scalar, rows: Array) -> Scalar:
        """The sum of all devices' `x` per row."""
        return jax.lax.psum(x, self.axes) / (rows.shape[0] * self.size)

    def travel(
        self, visit: Callable[[Any, Any, Any, Any], Any], sums: Any, onward: Any, back: Any = None
    ) -> Any:
        """sums = visit(stop, sums, onward, back) at every stop; the two hop as visits compute."""

        def hop(stop: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            _, onward, back = carry
            return visit(stop, *carry), self.shift(onward, 1), self.shift(back, -1)

        carry = jax.lax.fori_loop(0, self.size - 1, hop, (sums, onward, back))
        return visit(self.size - 1, *carry)


def _on_ring(local: Callable, rows: tuple[Array, ...], scalars: tuple[Array, ...]) -> Any:
    """(rows, scalars) that the devices make of their parts by local(ring, *rows, *scalars)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("a contrastive loss needs a mesh: call it under jax.set_mesh")
    total = rows[0].shape[0]
    if total % mesh.size:
        raise ValueError(
            f"{total} rows of a contrastive batch do not divide over the {mesh.size} devices of "
            f"the mesh; the nearest that do: {max(1, round(total / mesh.size)) * mesh.size}"
        )
    split = sharding.spec("clips")
    mapped = jax.shard_map(
        partial(local, Ring(mesh.axis_names, mesh.size)),
        in_specs=((split,) * len(rows)) + ((P(),) * len(scalars)),
        out_specs=(split, P()),
        check_vma=False,
    )
    return mapped(*rows, *(s.astype(jnp.float32) for s in scalars))


# ---- sigmoid, on one device


def _sigmoid_value(ring: Ring, x: Rows, y: Rows, scale: Scalar, bias: Scalar) -> tuple:
    def visit(stop: Any, by_row: Array, theirs: Rows, back: None) -> Array:
        del back
        loss, _ = _sigmoid(scale * _products(x, theirs) + bias, _pairs(x, stop))
        return by_row + jnp.sum(loss, axis=1)

    by_row = ring.travel(visit, jnp.zeros(x.shape[0]), y)
    return (by_row,), (ring.mean(jnp.sum(by_row), x),)


def _sigmoid_gradients(ring: Ring, x: Rows, y: Rows, scale: Scalar, bias: Scalar) -> tuple:
    def visit(stop: Any, sums: tuple, their_y: Rows, their_x: Rows) -> tuple:
        dx, dy, total, by_row, dscale, dbias = sums
        products = _products(x, their_y)
        loss, slopes = _sigmoid(scale * products + bias, _pairs(x, stop))
        dscale += jnp.sum(slopes * products)
        dx += _gather(slopes, their_y)
        _, mirrored = _sigmoid(scale * _products(y, their_x) + bias, _pairs(x, stop))
        dy += _gather(mirrored, their_x)
        total, by_row = total + jnp.sum(loss), by_row + jnp.sum(loss, axis=1)
        return dx, dy, total, by_row, dscale, dbias + jnp.sum(slopes)

    zero = jnp.zeros(())
    sums = (*_zeros(x, y), zero, jnp.zeros(x.shape[0]), zero, zero)
    dx, dy, total, by_row, *slopes = ring.travel(visit, sums, y, x)
    means = tuple(ring.mean(s, x) for s in (total, *slopes))
    return (*_per_row(ring, scale, dx, dy, x), by_row), means


def _sigmoid(scores: Scores, pairs: Array) -> tuple[Scores, Scores]:
    """Losses of scores and their slopes; `pairs` is True where the two belong together."""
    z = jnp.where(pairs, 1.0, -1.0)
    return jax.nn.softplus(-z * scores), -z * jax.nn.sigmoid(-z * scores)


# ---- softmax, on one device


class Normaliser(NamedTuple):
    """sum_j exp(score_ij) = exp(largest) * total, of every row i."""

    largest: Float[Array, "b"]
    total: Float[Array, "b"]

    @classmethod
    def of(cls, scores: Scores, axis: int) -> "Normaliser":
        largest = jnp.max(scores, axis)
        return cls(largest, jnp.sum(jnp.exp(scores - jnp.expand_dims(largest, axis)), axis))

    def __add__(self, other: "Normaliser") -> "Normaliser":  # pyright: ignore
        largest = jnp.maximum(self.largest, other.largest)
        mine, theirs = (n.total * jnp.exp(n.largest - largest) for n in (self, other))
        return Normaliser(largest, mine + theirs)

    def shares(self, scores: Scores, axis: int) -> Scores:
        """Softmax over all devices' scores."""
        largest, total = (jnp.expand_dims(v, axis) for v in self)
        return jnp.exp(scores - largest) / total


def _softmax_value(ring: Ring, x: Rows, y: Rows, scale: Scalar) -> tuple:
    """((loss of each row, normaliser of each x over all y, of each y over all x), (loss,))."""

    def visit(stop: Any, sums: tuple, theirs: Rows, back: None) -> tuple[Normaliser, Normaliser]:
        del stop, back
        by_x, by_their_y = sums
        scores = scale * _products(x, theirs)
        # What these rows found at the stops before comes after them: their scores need not wait.
        by_their_y = ring.shift(by_their_y, 1) + Normaliser.of(scores, axis=0)
        return by_x + Normaliser.of(scores, axis=1), by_their_y

    nothing = Normaliser(jnp.full(x.shape[0], -jnp.inf), jnp.zeros(x.shape[0]))
    by_x, by_y = ring.travel(visit, (nothing, nothing), y)
    by_y = ring.shift(by_y, 1)  # home
    right = scale * jnp.einsum("id,id->i", x, y, preferred_element_type=jnp.float32)
    one, other = ((n.largest - right) + jnp.log(n.total) for n in (by_x, by_y))
    by_row = (one + other) / 2
    return (by_row, by_x, by_y), (ring.mean(jnp.sum(by_row), x),)


def _softmax_gradients(
    ring: Ring, x: Rows, y: Rows, by_x: Normaliser, by_y: Normaliser, scale: Scalar
) -> tuple:
    def visit(stop: Any, sums: tuple, theirs_y: tuple, theirs_x: tuple) -> tuple:
        dx, dy, dscale = sums
        slopes, products = _softmax((x, by_x), theirs_y, scale, stop)
        mirrored, _ = _softmax((y, by_y), theirs_x, scale, stop)
        dx += _gather(slopes, theirs_y[0])
        dy += _gather(mirrored, theirs_x[0])
        return dx, dy, dscale + jnp.sum(slopes * products)

    sums = (*_zeros(x, y), jnp.zeros(()))
    dx, dy, dscale = ring.travel(visit, sums, (y, by_y), (x, by_x))
    return _per_row(ring, scale, dx, dy, x), (ring.mean(dscale, x),)


def _softmax(own: tuple, theirs: tuple, scale: Scalar, stop: Any) -> tuple[Scores, Scores]:
    """(slopes of the loss in the scores, products) between (rows, their normalisers)."""
    (x, by_x), (y, by_y) = own, theirs
    products = _products(x, y)
    scores = scale * products
    found = (by_x.shares(scores, axis=1) + by_y.shares(scores, axis=0)) / 2
    return found - _pairs(x, stop).astype(jnp.float32), products


# ---- retrieval, on one device


def _retrieved(ring: Ring, x: Rows, y: Rows) -> tuple:
    def visit(stop: Any, best: tuple[Array, Array], their_y: Rows, their_x: Rows) -> tuple:
        def others(own: Rows, theirs: Rows) -> Array:
            return jnp.max(jnp.where(_pairs(x, stop), -jnp.inf, _products(own, theirs)), axis=1)

        by_x, by_y = best
        return jnp.maximum(by_x, others(x, their_y)), jnp.maximum(by_y, others(y, their_x))

    nothing = jnp.full(x.shape[0], -jnp.inf)
    right = jnp.einsum("id,id->i", x, y, preferred_element_type=jnp.float32)
    found = [right > best for best in ring.travel(visit, (nothing, nothing), y, x)]
    hits = jnp.sum(jnp.stack(found).astype(jnp.float32)) / 2
    return (), (ring.mean(hits, x),)


# ---- both


def _products(x: Rows, y: Rows) -> Scores:
    return jnp.einsum("id,jd->ij", x, y, preferred_element_type=jnp.float32)


def _gather(slopes: Scores, y: Rows) -> Rows:
    """float32 sums of y's rows."""
    weights = slopes.astype(y.dtype)
    return jnp.einsum("ij,jd->id", weights, y, preferred_element_type=jnp.float32)


def _pairs(x: Rows, stop: Any) -> Array:
    """bool[b, b]: row i belongs to row i of the own rows, which are met at the first stop."""
    return jnp.eye(x.shape[0], dtype=bool) & (stop == 0)


def _zeros(x: Rows, y: Rows) -> tuple[Rows, Rows]:
    return jnp.zeros(x.shape, jnp.float32), jnp.zeros(y.shape, jnp.float32)


def _per_row(ring: Ring, scale: Scalar, dx: Rows, dy: Rows, like: Rows) -> tuple[Rows, Rows]:
    share = scale / (like.shape[0] * ring.size)
    return (share * dx).astype(like.dtype), (share * dy).astype(like.dtype)
