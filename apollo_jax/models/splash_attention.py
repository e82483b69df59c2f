# SPDX-License-Identifier: Apache-2.0
"""The TPU's attention kernel (splash, Pallas): padding to its blocks, whole and block by block.

B batch, L queries, S keys, N query heads, K key/value heads, H head dim. The kernel takes heads
before positions, queries scaled by 1/sqrt(H), and lengths and head dims in multiples of LANES.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
from jaxtyping import Array, Float, Int

from apollo_jax import sharding

LANES = 128  # of a TPU's vector unit
SAVED = "attention"  # by this name remat policies keep what attention gives, see layers.py
LARGEST_BLOCK = 1024  # 2048 overflows the vector memory of a v5p


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
    """Attention by the kernel, each device its own part of the batch and of the heads.

    Lengths are padded to blocks, with a segment of their own; head dims to multiples of LANES.
    """
    length, keys, head_dim = q.shape[1], k.shape[1], q.shape[3]
    assert length == keys or not causal, "a causal mask needs as many keys as queries"
    queries = segment_ids if segment_ids is not None else jnp.zeros((q.shape[0], length), jnp.int32)
    seen = queries if length == keys else jnp.zeros((q.shape[0], keys), jnp.int32)
    operands = [padded(heads_first(x), axis=2) for x in (q * head_dim**-0.5, k, v)]
    operands += [padded(s, axis=1, value=-1) for s in (queries, seen)]

    def local(q: Array, k: Array, v: Array, queries: Array, seen: Array) -> Any:
        run = kernel(q.shape[1], q.shape[2], k.shape[2], causal, interpret=interpret)
        return jax.vmap(run)(q, k, v, splash.SegmentIds(queries, seen))

    out = sharding.per_device(
        local, operands, [(axes[0], axes[1], None, None)] * 3 + [(axes[0], None)] * 2
    )
    return jnp.swapaxes(out, 1, 2)[:, :length, :, :head_dim]


def forward(
    q: Float[Array, "B N L H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    queries: Int[Array, "B L"],
    seen: Int[Array, "B S"],
    causal: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "B N L H"], Float[Array, "B N L"]]:
    """Attention to one block of keys within segments, and the logarithm of its denominator."""
    run = kernel(q.shape[1], q.shape[2], k.shape[2], causal, interpret=interpret, residuals=True)
    out, (denominator,) = jax.vmap(run)(q, k, v, splash.SegmentIds(queries, seen))
    return out, denominator


def backward(
    q: Float[Array, "B N L H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    queries: Int[Array, "B L"],
    seen: Int[Array, "B S"],
    causal: bool,
    out: Float[Array, "B N L H"],
    denominator: Float[Array, "B N L"],
    grad: Float[Array, "B N L H"],
    interpret: bool = False,
) -> tuple[Float[Array, "B N L H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """One block's part of the gradients of q, k and v, where `out` and `denominator` are of all.

    The kernel's own gradient takes those of this block for them, so this calls what is below it.
    """
    run = kernel(q.shape[1], q.shape[2], k.shape[2], causal, interpret=interpret)
    settings = {n: run.kwargs[n] for n in ("mask_value", "is_mqa", "block_sizes", "mask_function")}

    def one(q, k, v, segments, out, denominator, grad):
        residuals = (
            q, k, v, segments, None, out, denominator, run.dq_mask_info, run.dkv_mask_info,
        )  # fmt: skip
        return splash_attention_kernel._splash_attention_bwd(
            save_residuals=False,
            residual_checkpoint_name=None,
            attn_logits_soft_cap=None,
            interpret=interpret,
            res=residuals,
            do=grad,
            **settings,
        )[3:6]

    segments = splash.SegmentIds(queries, seen)
    return jax.vmap(one)(q, k, v, segments, out, denominator, grad)


def kernel(
    heads: int, length: int, keys: int, causal: bool, *, interpret: bool, residuals: bool = False
) -> Any:
    """The kernel for [N, L, H] queries and [K, S, H] keys."""
    block_q, block_kv = block(length), block(keys)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    pattern = splash.CausalMask if causal else splash.FullMask
    return splash.make_splash_mha(
        splash.MultiHeadMask([pattern((length, keys))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        save_residuals=residuals,
        residual_checkpoint_name=None if residuals else SAVED,
        interpret=interpret,
    )


def heads_first(x: Float[Array, "B L N H"]) -> Float[Array, "B N L H"]:
    """Heads before positions, the head dim padded."""
    return padded(jnp.swapaxes(x, 1, 2), axis=3)


def padded(x: Array, axis: int, value: int = 0) -> Array:
    """`x` with an axis padded to a multiple of LANES."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, widths, constant_values=value)


@cache
def block(length: int) -> int:
    """The largest multiple of LANES up to LARGEST_BLOCK that divides `length`."""
    return next(n for n in range(LARGEST_BLOCK, 0, -LANES) if length % n == 0)
