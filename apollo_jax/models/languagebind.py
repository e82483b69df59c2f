# SPDX-License-Identifier: Apache-2.0
"""LanguageBind video tower (arXiv 2310.01852): CLIP with attention over time before each block.

N clips, T frames, P side of the patch grid, S = 1 + P*P tokens of a frame (CLS first), I image side
(pixels), D stream.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from apollo_jax.models import clip, layers
from apollo_jax.models.siglip import patchify
from data_pipeline.transforms import FrameSpec


@dataclass(frozen=True)
class Config:
    """Published fields of the vision half; defaults are version 1.5, large."""

    kind: Literal["languagebind"] = "languagebind"
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: Literal["quick_gelu", "gelu"] = "gelu"
    num_frames: int = 8
    clip_type: Literal["vl_new", "vl"] = "vl_new"  # vl_new has a CLS token for each frame
    feature_layer: int = -2  # hidden_states index; only the layers below it are built

    def __post_init__(self):
        clip.one_of("hidden_act", self.hidden_act, clip.ACTIVATIONS)
        clip.one_of("clip_type", self.clip_type, ("vl_new", "vl"))

    @classmethod
    def video_v1_5(cls) -> "Config":
        """LanguageBind/LanguageBind_Video_V1.5_FT."""
        return cls()

    @classmethod
    def video_v1(cls) -> "Config":
        """LanguageBind/LanguageBind_Video_merge, and LanguageBind_Video with its LoRA merged."""
        return cls(clip_type="vl")

    @property
    def built_layers(self) -> int:
        return self.num_hidden_layers + 1 + self.feature_layer

    @property
    def grid(self) -> tuple[int, int, int]:
        """Feature grid (T, H, W) of one clip."""
        side = self.image_size // self.patch_size
        return self.num_frames, side, side

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(self.image_size, clip.OPENAI_MEAN, clip.OPENAI_STD, "cv2_bilinear")

    @property
    def frame_tower(self) -> clip.Config:
        """What happens within a frame."""
        return clip.Config(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            layer_norm_eps=self.layer_norm_eps,
            hidden_act=self.hidden_act,
        )


class Block(nnx.Module):
    """Attention over the frames of each position, then a CLIP block within each frame."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        d, kw = c.hidden_size, dict(dtypes, rngs=rngs)
        self.time_embedding = layers.param(
            (c.num_frames, d),
            ("position", "embed"),
            nnx.initializers.normal(d**-0.5),
            dtype=dtypes["param_dtype"],
            rngs=rngs,
        )
        self.time_norm = layers.LayerNorm(d, c.layer_norm_eps, **kw)
        self.time_attention = clip.Attention(d, c.num_attention_heads, **kw)
        self.frame = clip.Block(c.frame_tower, **kw)

    def __call__(self, x: Float[Array, "N T S D"]) -> tuple[Float[Array, "N T S D"], None]:
        n, t, s, d = x.shape
        x = x.swapaxes(1, 2).reshape(n * s, t, d)
        if t > 1:  # it joins the stream itself, anew in every layer
            x = x + self.time_embedding[...].astype(x.dtype)
        x = x + self.time_attention(self.time_norm(x))
        x = x.reshape(n, s, t, d).swapaxes(1, 2)
        x, _ = self.frame(x.reshape(n * t, s, d))
        return x.reshape(n, t, s, d), None


class LanguageBindVideo(nnx.Module):
    """[N, T, I, I, 3] normalised pixels (T = num_frames) -> [N, T, P, P, D] features."""

    def __init__(
        self, c: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        d, kw = c.hidden_size, dict(dtype=dtype, param_dtype=param_dtype)
        self.config = c
        self.patch_size, self.side, self.dtype = c.patch_size, c.grid[1], dtype
        self.patch_embed = layers.linear(
            3 * c.patch_size**2, d, ("patch", "embed"), bias=False, rngs=rngs, **kw
        )
        per_frame = c.clip_type == "vl_new"
        self.cls_token = layers.param(
            (c.num_frames, d) if per_frame else (d,),
            ("position", "embed") if per_frame else ("embed",),
            nnx.initializers.normal(d**-0.5),
            dtype=param_dtype,
            rngs=rngs,
        )
        self.positions = nnx.Param(
            jnp.asarray(clip.fresh_positions(self.side, d), param_dtype),
            **layers.axes("position", "embed"),
        )
        self.pre_norm = layers.LayerNorm(d, c.layer_norm_eps, rngs=rngs, **kw)
        self.layers = layers.stack(lambda r: Block(c, rngs=r, **kw), c.built_layers, rngs)

    def __call__(
        self, pixels: Float[Array, "N T I I 3"], *, remat: str = "none"
    ) -> Float[Array, "N T P P D"]:
        n, t = pixels.shape[:2]
        x = self.patch_embed(patchify(pixels, self.patch_size).astype(self.dtype))
        x = x.reshape(n, t, self.side**2, -1)
        x = clip.with_cls(x, self.cls_token[...]) + self.positions[...].astype(self.dtype)
        x, _ = layers.fold(self.layers, self.pre_norm(x), remat=remat)
        return x[:, :, 1:].reshape(n, t, self.side, self.side, -1)
