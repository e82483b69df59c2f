# SPDX-License-Identifier: Apache-2.0
"""Attention behind one function: XLA everywhere, the splash kernel (Pallas) on TPU, cuDNN's on
GPU; and, where positions are cut over the mesh, a ring or an exchange of positions for heads.

B batch, L query positions, S key positions, N query heads, K key/value heads, G = N / K query
heads per key head, H head dim.

The scores of `attention` on XLA are [B, N, L, S] floats in memory; splash keeps a block of them.
Which one runs follows from the platform of the mesh (`jax.set_mesh`), hence also when a step is
compiled for a TPU topology on a machine that has none.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from apollo_jax import sharding
from apollo_jax.models.ring_attention import ring_attention
from apollo_jax.models.splash_attention import SAVED, splash_attention

SMALLEST_FOR_SPLASH = 256 * 256  # scores of a head; fewer are small, and padding costs more


class Causal(NamedTuple):
    """Query i sees keys j <= i of its own segment."""

    segment_ids: Int[Array, "B L"] | None = None  # None = one segment
    zigzag: bool = False  # positions are in the order of `ring_attention.zigzag`

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
    q, k, v = checkpoint_name((q, k, v), "qkv")  # to remat policies, see layers.py
    if isinstance(mask, Causal) and axes[0] == "batch" and sharding.ways("length") > 1:
        return _across_context(q, k, v, mask, axes)
    k, v = _for_each_device(q, k, v, axes[1])
    return _within_device(q, k, v, mask, axes)


def _within_device(q: Array, k: Array, v: Array, mask: Any, axes: tuple[str, str | None]) -> Array:
    dense = isinstance(mask, jax.Array)
    scores = q.shape[1] * k.shape[1]
    if not dense and sharding.platform() == "tpu" and scores >= SMALLEST_FOR_SPLASH:
        segments = mask.segment_ids if isinstance(mask, Causal) else None
        return splash_attention(q, k, v, segments, causal=mask is not None, axes=axes)
    if sharding.platform() == "gpu" and q.dtype.itemsize == 2 and q.shape[3] % 8 == 0:
        return fused_attention(q, k, v, mask, implementation="cudnn")
    return xla_attention(q, k, v, mask.dense(q.shape[1]) if isinstance(mask, Causal) else mask)


def _across_context(
    q: Array, k: Array, v: Array, mask: Causal, axes: tuple[str, str | None]
) -> Array:
    """Causal attention over positions that are cut over the mesh axis `context`."""
    if mask.zigzag:
        segments = mask.segment_ids
        segments = jnp.zeros(q.shape[:2], jnp.int32) if segments is None else segments
        k, v = _for_each_device(q, k, v, axes[1])
        return ring_attention(q, k, v, segments, axes=axes)
    # Ulysses (arXiv 2309.14509): all positions of a part of the heads, then back.
    ways, heads = sharding.ways("all_heads"), q.shape[2]
    if heads % ways:
        divide = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"mesh.attention=ulysses cuts {heads} query heads over {ways} devices (mesh.context x "
            f"mesh.tensor), which must be one of {divide}; or set mesh.attention=ring"
        )
    k, v = _for_each_device(q, k, v, "all_heads")
    q, k, v = (sharding.constrain(x, "batch", None, "all_heads", None) for x in (q, k, v))
    out = _within_device(q, k, v, mask, (axes[0], "all_heads"))
    return sharding.constrain(out, "batch", "length", axes[1], None)


def _for_each_device(q: Array, k: Array, v: Array, heads: str | None) -> tuple[Array, Array]:
    """Keys and values repeated as often as it takes for devices to have those of their queries."""
    ways, kv_heads = 1 if heads is None else sharding.ways(heads), k.shape[2]
    times = ways // math.gcd(ways, kv_heads)
    if times == 1 or q.shape[2] % (kv_heads * times):
        return k, v
    return jnp.repeat(k, times, axis=2), jnp.repeat(v, times, axis=2)


def fused_attention(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Any = None,
    *,
    implementation: Literal["xla", "cudnn"],
) -> Float[Array, "B L N H"]:
    """Attention by jax.nn; cuDNN's kernel takes 16-bit floats and head dims in multiples of 8."""
    causal = isinstance(mask, Causal) and mask.segment_ids is None
    if isinstance(mask, Causal):
        mask = None if causal else mask.dense(q.shape[1])
    mask = None if mask is None else mask[:, None]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation=implementation
    )
    return checkpoint_name(out, SAVED)


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
    return checkpoint_name(out.reshape(b, length, n, h), SAVED)
