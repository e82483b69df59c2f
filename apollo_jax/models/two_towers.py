# SPDX-License-Identifier: Apache-2.0
"""Two towers for contrastive pretraining: Apollo's vision tower and a small encoder of captions.

The vision tower is the very module that an Apollo has, down to the layers that it leaves away, so
that what is pretrained here is what is built there. Each side is pooled by a learned query (SigLIP,
arXiv 2303.15343: a MAP head), over all frames of a clip at once. The text encoder looks both ways.

B pairs, F frames, S canvas side, T caption tokens, K features of one side, D stream, E embedding.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from apollo_jax.models import layers, pixels, siglip
from apollo_jax.models.attention import attention
from apollo_jax.models.vision_tower import TowerConfig, VisionTower
from apollo_jax.sharding import constrain

COMPONENTS = ("vision_tower", "text", "heads")


@dataclass(frozen=True)
class TextConfig:
    """A caption encoder; defaults are the text side of SigLIP's base model."""

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_tokens: int = 64  # T, longer captions lose their end
    layer_norm_eps: float = 1e-6

    @property
    def block(self) -> siglip.Config:
        """What SigLIP's block wants to know."""
        return siglip.Config(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            layer_norm_eps=self.layer_norm_eps,
        )


@dataclass(frozen=True)
class Config:
    """Both towers and the width at which they meet."""

    towers: dict[str, TowerConfig]
    text: TextConfig = TextConfig()
    embedding_size: int = 768
    frames_per_clip: int = 1  # F, all of which an image encoder sees, one by one
    scale: float = 10.0  # at first; SigLIP's, CLIP's is 1 / 0.07
    bias: float = -10.0  # at first; of the sigmoid loss alone

    @property
    def frame_size(self) -> int:
        """Side of the canvas that serves every encoder, in pixels."""
        return max(t.frame_spec.side for t in self.towers.values())

    @property
    def width(self) -> int:
        """Channels of the vision tower."""
        return sum(t.hidden_size for t in self.towers.values())


class Pool(nnx.Module):
    """Attention of a learned query over features, then a projection; in all SigLIP's MAP head."""

    def __init__(self, dim: int, out: int, *, rngs: nnx.Rngs, **dtypes: Any):
        kw = dict(dtypes, rngs=rngs, bias=True)
        self.heads = next(n for n in (16, 12, 8, 6, 4, 2, 1) if dim % n == 0)
        normal = nnx.initializers.normal(0.02)
        dtype = dtypes.get("param_dtype", jnp.float32)
        self.probe = layers.param((dim,), ("embed",), normal, dtype=dtype, rngs=rngs)
        self.norm_in = layers.LayerNorm(
            dim, 1e-6, dtype=dtypes["dtype"], param_dtype=dtype, rngs=rngs
        )
        self.q = layers.linear(dim, dim, ("embed", "heads"), **kw)
        self.k = layers.linear(dim, dim, ("embed", "heads"), **kw)
        self.v = layers.linear(dim, dim, ("embed", "heads"), **kw)
        self.out = layers.linear(dim, dim, ("heads", "embed"), **kw)
        self.project = layers.linear(dim, out, ("embed", None), **kw)

    def __call__(
        self, x: Float[Array, "B K D"], mask: Bool[Array, "B 1 K"] | None = None
    ) -> Float[Array, "B E"]:
        x = self.norm_in(x)
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        q, k, v = (
            f(a).reshape(*a.shape[:2], self.heads, -1)
            for f, a in ((self.q, probe), (self.k, x), (self.v, x))
        )
        return self.project(self.out(attention(q, k, v, mask).reshape(probe.shape)))[:, 0]


class Text(nnx.Module):
    """[B, T] tokens to [B, T, D] states."""

    def __init__(self, c: TextConfig, *, rngs: nnx.Rngs, **dtypes: Any):
        d = c.hidden_size
        kw = dict(dtype=dtypes.get("param_dtype", jnp.float32), rngs=rngs)
        normal = nnx.initializers.normal(d**-0.5)
        self.embedding = layers.param((c.vocab_size, d), ("vocab", "embed"), normal, **kw)
        self.positions = layers.param((c.max_tokens, d), ("position", "embed"), normal, **kw)
        self.dtype = dtypes["dtype"]
        self.layers = layers.stack(
            lambda r: siglip.Block(c.block, rngs=r, **dtypes), c.num_hidden_layers, rngs
        )

    def __call__(
        self, tokens: Int[Array, "B T"], there: Bool[Array, "B T"], *, remat: str = "none"
    ) -> Float[Array, "B T D"]:
        x = (self.embedding[...][tokens] + self.positions[...]).astype(self.dtype)
        x = constrain(x, "clips", None, None)
        return layers.fold(self.layers, x, there[:, None, :], remat=remat)[0]


class Heads(nnx.Module):
    """What belongs to neither tower."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        kw = dict(dtypes, rngs=rngs)
        self.vision = Pool(c.width, c.embedding_size, **kw)
        self.text = Pool(c.text.hidden_size, c.embedding_size, **kw)
        self.log_scale = nnx.Param(jnp.asarray(math.log(c.scale), jnp.float32), **layers.axes())
        self.bias = nnx.Param(jnp.asarray(c.bias, jnp.float32), **layers.axes())


class TwoTowers(nnx.Module):
    """Clips and captions to embeddings of length 1."""

    def __init__(
        self,
        config: Config,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        kw = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        self.config, self.dtype = config, dtype
        self.vision_tower = VisionTower(config.towers, **kw)
        times, height, width = self.vision_tower.grid  # an image encoder alone would see one frame
        self.vision_tower.grid = (max(times, config.frames_per_clip), height, width)
        self.text = Text(config.text, **kw)
        self.heads = Heads(config, **kw)

    def embed_clips(
        self,
        frames: UInt8[Array, "B F S S 3"] | UInt8[Array, "B F P"],
        geometry: Int[Array, "B 4"],
        *,
        remat: str = "none",
    ) -> Float[Array, "B E"]:
        """uint8 canvases, RGB or planes, to embeddings."""
        frames = pixels.to_rgb(frames, geometry)
        prepared = {
            name: pixels.prepare(frames, geometry, tower.frame_spec)
            for name, tower in self.config.towers.items()
        }
        return self._unit(self.heads.vision(self.vision_tower(prepared, remat=remat)))

    def embed_captions(
        self, tokens: Int[Array, "B T"], there: Bool[Array, "B T"], *, remat: str = "none"
    ) -> Float[Array, "B E"]:
        """Tokens, and where they are rather than padding, to embeddings."""
        x = self.text(tokens, there, remat=remat)
        return self._unit(self.heads.text(x, there[:, None, :]))

    def _unit(self, x: Float[Array, "B E"]) -> Float[Array, "B E"]:
        x = x.astype(jnp.float32)
        return (x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-12)).astype(
            self.dtype
        )
