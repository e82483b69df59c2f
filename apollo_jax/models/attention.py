# SPDX-License-Identifier: Apache-2.0
"""Attention behind one function: XLA everywhere, the splash kernel (Pallas) on TPU.

B batch, L query positions, S key positions, N query heads, K key/value heads, G = N / K query
heads per key head, H head dim.

The scores of `attention` on XLA are [B, N, L, S] floats in memory; splash keeps a block of them.
Which one runs follows from the platform of the mesh (`jax.set_mesh`), hence also when a step is
compiled for a TPU topology on a machine that has none.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

from apollo_jax import sharding

LANES = 128  # head dims and lengths are padded to multiples of a TPU's vector lanes
LARGEST_BLOCK = 1024  # 2048 overflows the vector memory of a v5p
SMALLEST_FOR_SPLASH = 256  # below so many queries the scores are small and padding costs more


class Causal(NamedTuple):
    """Query i sees keys j <= i of its own segment."""

    segment_ids: Int[Array, "B L"] | None = None  # None = one segment

    def dense(self, length: int) -> Bool[Array, "#B L L"]:
        """True where query i may see key j."""
        order = jnp.arange(length)
        mask = (order[:, None] >= order[None, :])[None]
        if self.segment_ids is None:
            return mask
        return mask & (self.segment_ids[:, :, None] == self.segment_ids[:, None, :])


Mask = Causal | Bool[Array, "#B #L S"] | None


def attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Any = None,
    *,
    axes: tuple[str, str | None] = ("clips", None),
) -> Float[Array, "B L N H"]:
    """Softmax attention with grouped query heads, scale 1/sqrt(H), softmax in float32.

    Args:
      mask: `Causal`, a boolean array that is True where a query may look (one that may look
        nowhere gets a uniform average), or None: everywhere.
      axes: logical axes of B and of the heads, see `sharding.RULES`.
    """
    dense = isinstance(mask, jax.Array)
    if not dense and sharding.platform() == "tpu" and q.shape[1] >= SMALLEST_FOR_SPLASH:
        segments = mask.segment_ids if isinstance(mask, Causal) else None
        return splash_attention(q, k, v, segments, causal=mask is not None, axes=axes)
    return xla_attention(q, k, v, mask.dense(q.shape[1]) if isinstance(mask, Causal) else mask)


def xla_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B #L S"] | None = None,
) -> Float[Array, "B L N H"]:
    """Attention as two einsums."""
    b, length, n, h = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(b, length, kv_heads, n // kv_heads, h)
    scores = jnp.einsum("blkgh,bskh->bkgls", q, k, preferred_element_type=jnp.float32)
    scores = scores * h**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgls,bskh->blkgh", weights, v)
    return out.reshape(b, length, n, h)


def splash_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segment_ids: Int[Array, "B L"] | None,
    *,
    causal: bool,
    axes: tuple[str, str | None],
    interpret: bool = False,
) -> Float[Array, "B L N H"]:
    """Attention by the Pallas kernel, each device its own part of the batch and of the heads.

    Lengths are padded to blocks, with a segment of their own; head dims to multiples of 128.
    """
    length, keys, head_dim = q.shape[1], k.shape[1], q.shape[3]
    assert length == keys or not causal, "a causal mask needs as many keys as queries"
    if not sharding.divides(k.shape[2], axes[1]):  # every device gets the keys of its own heads
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    queries = segment_ids if segment_ids is not None else jnp.zeros((q.shape[0], length), jnp.int32)
    seen = queries if length == keys else jnp.zeros((q.shape[0], keys), jnp.int32)
    local = _local(causal, length, keys, interpret)
    operands = [_heads_first(x) for x in (q * head_dim**-0.5, k, v)]
    operands += [_padded(s, axis=1, value=-1) for s in (queries, seen)]
    out = sharding.per_device(
        local, operands, [(axes[0], axes[1], None, None)] * 3 + [(axes[0], None)] * 2
    )
    return jnp.swapaxes(out, 1, 2)[:, :length, :, :head_dim]


def _local(causal: bool, length: int, keys: int, interpret: bool) -> Any:
    """The kernel over one device's (q, k, v [B, N, L, H], segment ids of queries and of keys)."""
    padded = [_round_up(n, LANES) for n in (length, keys)]
    block_q, block_kv = (_block(n) for n in padded)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )

    def local(q: Array, k: Array, v: Array, queries: Array, seen: Array) -> Any:
        shape = (padded[0], padded[1])
        pattern = splash.CausalMask(shape) if causal else splash.FullMask(shape)
        run = splash.make_splash_mha(
            splash.MultiHeadMask([pattern] * q.shape[1]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.vmap(run)(q, k, v, splash.SegmentIds(queries, seen))

    return local


def _heads_first(x: Float[Array, "B L N H"]) -> Float[Array, "B N L H"]:
    return _padded(_padded(jnp.swapaxes(x, 1, 2), axis=2), axis=3)


def _padded(x: Array, axis: int, value: int = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, _round_up(x.shape[axis], LANES) - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _block(length: int) -> int:
    """The largest multiple of 128 up to LARGEST_BLOCK that divides `length`."""
    return next(n for n in range(LARGEST_BLOCK, 0, -LANES) if length % n == 0)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
