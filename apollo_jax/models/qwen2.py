# SPDX-License-Identifier: Apache-2.0
"""Qwen2 / Qwen2.5 / Qwen1.5 decoder (arXiv 2407.10671): GQA, RoPE, SwiGLU, tied or untied head.

B batch, L new tokens, S cached positions, D stream, N query heads, K key/value heads, H head dim,
V vocabulary, Y layers, P pieces of a row (see pieces.py).
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from apollo_jax.models import layers
from apollo_jax.models.attention import Causal, attention
from apollo_jax.models.lookup import lookup
from apollo_jax.models.pieces import Pieces


@dataclass(frozen=True)
class Config:
    """Published fields of a Qwen2 config.

    The sizes are the chat models; the base models allow longer contexts, and those of 14B and more
    have an rms_norm_eps of 1e-5.
    """

    vocab_size: int = 151_936
    hidden_size: int = 2048
    intermediate_size: int = 11_008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32_768
    model_max_length: int = 16_384
    initializer_range: float = 0.02  # deviation of a fresh embedding table

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def norms(self) -> int:
        """How many norms there are, of `hidden_size` gains each."""
        return 2 * self.num_hidden_layers + 1

    @classmethod
    def qwen2p5_0p5b(cls) -> "Config":
        """Qwen/Qwen2.5-0.5B-Instruct."""
        return cls(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
        )

    @classmethod
    def qwen2p5_1p5b(cls) -> "Config":
        """Qwen/Qwen2.5-1.5B-Instruct."""
        return cls(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
        )

    @classmethod
    def qwen2p5_3b(cls) -> "Config":
        """Qwen/Qwen2.5-3B-Instruct."""
        return cls()

    @classmethod
    def qwen2p5_7b(cls) -> "Config":
        """Qwen/Qwen2.5-7B-Instruct."""
        return cls(
            vocab_size=152_064,
            hidden_size=3584,
            intermediate_size=18_944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )

    @classmethod
    def qwen2p5_14b(cls) -> "Config":
        """Qwen/Qwen2.5-14B-Instruct."""
        return cls(
            vocab_size=152_064,
            hidden_size=5120,
            intermediate_size=13_824,
            num_hidden_layers=48,
            num_attention_heads=40,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        )

    @classmethod
    def qwen2p5_32b(cls) -> "Config":
        """Qwen/Qwen2.5-32B-Instruct."""
        return replace(cls.qwen2p5_14b(), intermediate_size=27_648, num_hidden_layers=64)

    @classmethod
    def qwen2p5_72b(cls) -> "Config":
        """Qwen/Qwen2.5-72B-Instruct."""
        return cls(
            vocab_size=152_064,
            hidden_size=8192,
            intermediate_size=29_568,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            tie_word_embeddings=False,
        )

    @classmethod
    def qwen2_0p5b(cls) -> "Config":
        """Qwen/Qwen2-0.5B-Instruct."""
        return cls.qwen2p5_0p5b()

    @classmethod
    def qwen2_1p5b(cls) -> "Config":
        """Qwen/Qwen2-1.5B-Instruct."""
        return cls.qwen2p5_1p5b()

    @classmethod
    def qwen2_7b(cls) -> "Config":
        """Qwen/Qwen2-7B-Instruct."""
        return cls.qwen2p5_7b()

    @classmethod
    def qwen2_72b(cls) -> "Config":
        """Qwen/Qwen2-72B-Instruct."""
        return cls.qwen2p5_72b()

    @classmethod
    def qwen1p5_4b(cls) -> "Config":
        """Qwen/Qwen1.5-4B-Chat: every query head has its own keys and values."""
        return cls(
            hidden_size=2560,
            intermediate_size=6912,
            num_hidden_layers=40,
            num_attention_heads=20,
            num_key_value_heads=20,
            rope_theta=5e6,
            tie_word_embeddings=False,
        )


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far; slot = position, rows may differ in length."""

    k: Float[Array, "Y B S K H"]
    v: Float[Array, "Y B S K H"]
    length: Int[Array, " B"]


def empty_cache(c: Config, batch: int, size: int, dtype: Any = jnp.float32) -> KVCache:
    """A cache for `batch` rows of at most `size` tokens."""
    shape = (c.num_hidden_layers, batch, size, c.num_key_value_heads, c.head_dim)
    zeros = jnp.zeros(shape, dtype)
    return KVCache(zeros, zeros, jnp.zeros(batch, jnp.int32))


class Block(nnx.Module):
    """Pre-norm decoder layer; returns its new keys and values beside the stream."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        d, h, kw = c.hidden_size, c.head_dim, dict(dtypes, rngs=rngs)
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.norm1 = layers.RMSNorm(d, c.rms_norm_eps, **kw)
        self.q = layers.linear(d, self.heads * h, ("embed", "heads"), bias=True, **kw)
        self.k = layers.linear(d, self.kv_heads * h, ("embed", "kv_heads"), bias=True, **kw)
        self.v = layers.linear(d, self.kv_heads * h, ("embed", "kv_heads"), bias=True, **kw)
        self.out = layers.linear(self.heads * h, d, ("heads", "embed"), bias=False, **kw)
        self.norm2 = layers.RMSNorm(d, c.rms_norm_eps, **kw)
        self.gate = layers.linear(d, c.intermediate_size, ("embed", "mlp"), bias=False, **kw)
        self.up = layers.linear(d, c.intermediate_size, ("embed", "mlp"), bias=False, **kw)
        self.down = layers.linear(c.intermediate_size, d, ("mlp", "embed"), bias=False, **kw)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        rope: tuple[Float[Array, "B L 1 H"], Float[Array, "B L 1 H"]],
        mask: Causal | Bool[Array, "B L S+L"],
        index: Int[Array, "B L"] | None = None,
        past_k: Float[Array, "B S K H"] | None = None,
        past_v: Float[Array, "B S K H"] | None = None,
        probe1: Float[Array, "B P D"] | None = None,
        probe2: Float[Array, "B P D"] | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple[Array, Array]]:
        b, length, _ = x.shape
        h = self.norm1(x, index, probe1)
        q = rotate(self.q(h).reshape(b, length, self.heads, -1), *rope)
        k = rotate(self.k(h).reshape(b, length, self.kv_heads, -1), *rope)
        v = self.v(h).reshape(b, length, self.kv_heads, -1)
        keys = k if past_k is None else jnp.concatenate([past_k, k], axis=1)
        values = v if past_v is None else jnp.concatenate([past_v, v], axis=1)
        seen = attention(q, keys, values, mask, axes=("batch", "heads"))
        x = x + self.out(seen.reshape(b, length, -1))
        h = self.norm2(x, index, probe2)
        x = x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))
        return x, (k, v)


class Qwen2(nnx.Module):
    """Embeddings [B, L, D] -> normed hidden states [B, L, D]; `embed` and `unembed` beside it."""

    def __init__(
        self, c: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        normal = jax.nn.initializers.normal(c.initializer_range)
        table = (c.vocab_size, c.hidden_size)
        self.config = c
        self.head_dim, self.rope_theta, self.dtype = c.head_dim, c.rope_theta, dtype
        self.embedding = layers.param(
            table, ("vocab", "embed"), normal, dtype=param_dtype, rngs=rngs
        )
        self.layers = layers.stack(lambda r: Block(c, rngs=r, **kw), c.num_hidden_layers, rngs)
        self.norm = layers.RMSNorm(c.hidden_size, c.rms_norm_eps, rngs=rngs, **kw)
        self.lm_head = (
            None
            if c.tie_word_embeddings
            else layers.param(table, ("vocab", "embed"), normal, dtype=param_dtype, rngs=rngs)
        )

    def embed(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        return lookup(self.embedding[...], tokens, self.dtype)

    @property
    def head(self) -> Float[Array, "V D"]:
        """The table of the output layer, in the dtype of the parameters."""
        return (self.embedding if self.lm_head is None else self.lm_head)[...]

    def unembed(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Logits in float32."""
        table = self.head.astype(self.dtype)
        return jnp.einsum("bld,vd->blv", hidden, table, preferred_element_type=jnp.float32)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        *,
        positions: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"] | None = None,
        cache: KVCache | None = None,
        remat: str = "none",
        zigzag: bool = False,
        pieces: Pieces | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple[Array, Array]]:
        """Causal decoding within segments; with a cache, the new tokens follow the cached ones.

        `zigzag` says that positions are in the order of ring attention. `pieces` ask for gradients
        of the norms' gains: those of all first norms, of all second ones, of the last norm.

        Returns the hidden states and the new keys and values [Y, B, L, K, H] (see `append`).
        """
        rope = rope_tables(positions, self.head_dim, self.rope_theta, self.dtype)
        mask, per_layer = Causal(segment_ids, zigzag), ()
        if cache is not None:
            slots = jnp.arange(cache.k.shape[2])
            seen = slots[None, None] < cache.length[:, None, None]
            seen = jnp.broadcast_to(seen, (*x.shape[:2], slots.size))
            among = mask.dense(x.shape[1])  # the new tokens
            among = jnp.broadcast_to(among, (x.shape[0], *among.shape[1:]))
            mask = jnp.concatenate([seen, among], axis=-1)
            per_layer = (cache.k, cache.v)
        index = probe = None
        if pieces is not None:
            index, depth = pieces.index, self.config.num_hidden_layers
            first, second, (probe,) = jnp.split(pieces.probe, (depth, 2 * depth))
            per_layer = (None, None, first, second)
        x, new = layers.fold(
            self.layers,
            x,
            rope,
            mask,
            index,
            per_layer=per_layer,
            axes=("batch", "length"),
            remat=remat,
        )
        return self.norm(x, index, probe), new


def append(cache: KVCache, new: tuple[Array, Array], length: Int[Array, " B"]) -> KVCache:
    """Write new keys and values [Y, B, L, K, H] after each row's tokens; `length` of L are real.

    One update after the layer scan: carrying the cache through the scan would copy all of it.
    """
    rows = jnp.arange(cache.length.size)[:, None]
    offsets = jnp.arange(new[0].shape[2])[None]
    real = offsets < length[:, None]
    slots = jnp.where(real, cache.length[:, None] + offsets, cache.k.shape[2])
    k, v = (
        old.at[:, rows, slots].set(n.astype(old.dtype), mode="drop")
        for old, n in zip((cache.k, cache.v), new, strict=True)
    )
    return KVCache(k, v, cache.length + length)


def rope_tables(
    positions: Int[Array, "B L"], head_dim: int, theta: float, dtype: Any
) -> tuple[Float[Array, "B L 1 H"], Float[Array, "B L 1 H"]]:
    """Cosine and sine of the rotary angles, the two halves of H repeated, computed in float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(
    x: Float[Array, "B L N H"], cos: Float[Array, "B L 1 H"], sin: Float[Array, "B L 1 H"]
) -> Float[Array, "B L N H"]:
    """Rotary embedding, halves convention."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
