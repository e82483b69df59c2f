# SPDX-License-Identifier: Apache-2.0
"""Causal attention over positions that are cut over the mesh axis `context` (arXiv 2310.01889).

Each device keeps its queries; keys and values go round the ring, one device further at a time,
while the device attends to those it has. Of 2c pieces of a row, device i holds the pieces i and
2c-1-i ("zig-zag"): whatever comes from an earlier device, all its queries see the first half; from
a later one, its second half sees all. So every device has the same work in every turn.

B batch, L positions of this device, N query heads, K key/value heads, H head dim, c devices.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Shaped

from apollo_jax import sharding
from apollo_jax.models import splash_attention as splash

AXIS = "context"
Partial = tuple[Float[Array, "B N L H"], Float[Array, "B N L"]]  # averages, log denominators


def zigzag(x: Shaped[Array, "B L"]) -> Shaped[Array, "B L"]:
    """Positions in the order in which ring attention expects them on the mesh in use."""
    ways = sharding.ways("length")
    if x.shape[1] % (2 * ways):
        raise ValueError(
            f"rows of {x.shape[1]} positions do not divide into {2 * ways} pieces, two for each "
            f"device of mesh.context={ways}; choose data.length as a multiple of {2 * ways}"
        )
    order = [piece for i in range(ways) for piece in (i, 2 * ways - 1 - i)]
    pieces = x.reshape(x.shape[0], 2 * ways, -1)
    return jnp.concatenate([pieces[:, n] for n in order], axis=1)


def ring_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    segment_ids: Int[Array, "B L"],
    *,
    axes: tuple[str, str | None],
    interpret: bool = False,
) -> Float[Array, "B L N H"]:
    """Causal attention within segments over whole rows in `zigzag` order.

    Args:
      axes: logical axes of B and of the heads.
      interpret: run the TPU's kernel by interpretation; else it runs on TPUs alone.
    """
    head_dim = q.shape[-1]
    kernel = interpret or sharding.platform() == "tpu"
    if kernel and q.shape[1] % (2 * sharding.ways("length") * splash.LANES):
        multiple = 2 * sharding.ways("length") * splash.LANES
        raise ValueError(
            f"ring attention on TPUs takes rows of a multiple of {multiple} positions (two pieces "
            f"for each device of mesh.context, in blocks of {splash.LANES}), not {q.shape[1]}; "
            "change data.length, or set mesh.attention=ulysses"
        )
    operands = [jnp.swapaxes(x, 1, 2) for x in (q * head_dim**-0.5, k, v)]
    if kernel:
        operands = [splash.padded(x, axis=3) for x in operands]
    local = partial(_ring, interpret if kernel else None)
    names = (axes[0], axes[1], "length", None)
    out = sharding.per_device(local, [*operands, segment_ids], [names] * 3 + [(axes[0], "length")])
    return jnp.swapaxes(out, 1, 2)[..., :head_dim]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(interpret: bool | None, q: Array, k: Array, v: Array, segments: Array) -> Array:
    return _ring_forward(interpret, q, k, v, segments)[0]


def _ring_forward(
    interpret: bool | None,
    q: Float[Array, "B N L H"],
    k: Float[Array, "B K L H"],
    v: Float[Array, "B K L H"],
    segments: Int[Array, "B L"],
) -> tuple[Array, tuple]:
    """This device's queries over the keys of all devices."""
    forward, _ = _blocks(interpret)
    half = q.shape[2] // 2
    device, ways = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)

    def earlier(k: Array, v: Array, seen: Array) -> Partial:
        return forward(q, k[:, :, :half], v[:, :, :half], segments, seen[:, :half], False)

    def later(k: Array, v: Array, seen: Array) -> Partial:
        out, denominator = forward(q[:, :, half:], k, v, segments[:, half:], seen, False)
        nothing = jnp.full_like(denominator, -jnp.inf)
        return (
            jnp.concatenate([jnp.zeros_like(out), out], axis=2),
            jnp.concatenate([nothing, denominator], axis=2),
        )

    def turn(number: Array, carry: tuple) -> tuple:
        keys, total = carry
        following = _pass_on(keys)  # under way while this device computes
        found = jax.lax.cond(device >= number, earlier, later, *keys)
        return following, _add(total, found)

    keys = (k, v, segments)
    following = _pass_on(keys)
    out, denominator = forward(q, k, v, segments, segments, True)
    total = (out.astype(jnp.float32), denominator)
    _, (out, denominator) = jax.lax.fori_loop(1, ways, turn, (following, total))
    out, denominator = checkpoint_name((out.astype(q.dtype), denominator), splash.SAVED)
    return out, (q, k, v, segments, out, denominator)


def _ring_backward(interpret: bool | None, residuals: tuple, grad: Array) -> tuple:
    """The same turns; the gradients of keys and values go round with them, and come home."""
    q, k, v, segments, out, denominator = residuals
    _, backward = _blocks(interpret)
    half = q.shape[2] // 2
    device, ways = jax.lax.axis_index(AXIS), jax.lax.axis_size(AXIS)

    def after(*xs: Array) -> Any:
        return [x[:, :, half:] for x in xs]

    def earlier(k: Array, v: Array, seen: Array) -> tuple[Array, Array, Array]:
        keys = (k[:, :, :half], v[:, :, :half], segments, seen[:, :half])
        dq, dk, dv = backward(q, *keys, False, out, denominator, grad)
        rest = jnp.zeros_like(dk)
        dk, dv = (jnp.concatenate([x, rest], axis=2) for x in (dk, dv))
        return dq, dk, dv

    def later(k: Array, v: Array, seen: Array) -> tuple[Array, Array, Array]:
        (queries,) = after(q)
        rest = after(out, denominator, grad)
        dq, dk, dv = backward(queries, k, v, segments[:, half:], seen, False, *rest)
        return jnp.concatenate([jnp.zeros_like(dq), dq], axis=2), dk, dv

    def turn(number: Array, carry: tuple) -> tuple:
        keys, dq, dkv = carry
        following, dkv = _pass_on(keys), _pass_on(dkv)
        found = jax.lax.cond(device >= number, earlier, later, *keys)
        mine, *theirs = (x.astype(jnp.float32) for x in found)
        return following, dq + mine, [a + b for a, b in zip(dkv, theirs, strict=True)]

    keys = (k, v, segments)
    following = _pass_on(keys)
    first = backward(q, k, v, segments, segments, True, out, denominator, grad)
    dq, *dkv = (x.astype(jnp.float32) for x in first)
    _, dq, dkv = jax.lax.fori_loop(1, ways, turn, (following, dq, dkv))
    dk, dv = _pass_on(dkv)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)


def _pass_on(tree: Any) -> Any:
    """To the next device; returns what the one before had."""
    ways = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(tree, AXIS, [(i, (i + 1) % ways) for i in range(ways)])


def _add(a: Partial, b: Partial) -> Partial:
    """Attention to the keys of both."""
    denominator = jnp.logaddexp(a[1], b[1])
    shares = [jnp.exp(x[1] - denominator)[..., None] for x in (a, b)]
    out = a[0] * shares[0] + b[0].astype(jnp.float32) * shares[1]
    return out, denominator


def _blocks(interpret: bool | None) -> tuple[Any, Any]:
    """Attention to one block of keys and its gradient: by the kernel, or (None) in einsums."""
    if interpret is None:
        return _forward, _backward
    return partial(splash.forward, interpret=interpret), partial(
        splash.backward, interpret=interpret
    )


def _scores(q: Array, k: Array, queries: Array, seen: Array, causal: bool) -> Array:
    """[B, K, N / K, L, S], masked, in float32."""
    b, n, length, h = q.shape
    q = q.reshape(b, k.shape[1], n // k.shape[1], length, h)
    scores = jnp.einsum("bkglh,bksh->bkgls", q, k, preferred_element_type=jnp.float32)
    mask = queries[:, :, None] == seen[:, None, :]
    if causal:
        mask &= jnp.tril(jnp.ones((length, length), bool))
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min / 2)


def _forward(q: Array, k: Array, v: Array, queries: Array, seen: Array, causal: bool) -> Partial:
    scores = _scores(q, k, queries, seen, causal)
    denominator = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - denominator[..., None]).astype(v.dtype)
    out = jnp.einsum("bkgls,bksh->bkglh", weights, v)
    return out.reshape(q.shape), denominator.reshape(q.shape[:3])


def _backward(
    q: Array,
    k: Array,
    v: Array,
    queries: Array,
    seen: Array,
    causal: bool,
    out: Array,
    denominator: Array,
    grad: Array,
) -> tuple[Array, Array, Array]:
    b, kv_heads, _, h = k.shape
    groups = (b, kv_heads, q.shape[1] // kv_heads, q.shape[2])
    scores = _scores(q, k, queries, seen, causal)
    weights = jnp.exp(scores - denominator.reshape(groups)[..., None])
    q, out, grad = (x.reshape(*groups, h) for x in (q, out, grad))
    dv = jnp.einsum("bkgls,bkglh->bksh", weights.astype(grad.dtype), grad)
    dots = jnp.einsum("bkglh,bksh->bkgls", grad, v, preferred_element_type=jnp.float32)
    own = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1)
    dscores = (weights * (dots - own[..., None])).astype(q.dtype)
    dq = jnp.einsum("bkgls,bksh->bkglh", dscores, k)
    dk = jnp.einsum("bkgls,bkglh->bksh", dscores, q)
    return dq.reshape(b, -1, *dq.shape[3:]), dk, dv
