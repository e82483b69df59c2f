# SPDX-License-Identifier: Apache-2.0
"""VideoMAE video tower (arXiv 2203.12602), as Apollo uses it: tokens of an early layer.

N clips, F frames, T time steps, P side of the patch grid, I image side (pixels), S = T*P*P tokens,
D stream.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from apollo_jax.models import layers
from apollo_jax.models.attention import attention
from apollo_jax.models.internvideo2 import tubelets
from data_pipeline.transforms import FrameSpec

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # whatever a folder states


@dataclass(frozen=True)
class Config:
    """Published fields of a VideoMAE encoder; defaults are the large one."""

    kind: Literal["videomae"] = "videomae"
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 16
    num_frames: int = 16
    tubelet_size: int = 2
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True  # of queries and values; keys have none
    feature_layer: int = -2  # hidden_states index; only the layers below it are built

    @classmethod
    def base(cls) -> "Config":
        """MCG-NJU/videomae-base."""
        return cls(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )

    @classmethod
    def large(cls) -> "Config":
        """MCG-NJU/videomae-large."""
        return cls()

    @property
    def built_layers(self) -> int:
        return self.num_hidden_layers + 1 + self.feature_layer

    @property
    def grid(self) -> tuple[int, int, int]:
        """Feature grid (T, H, W) of one clip."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(self.image_size, IMAGE_MEAN, IMAGE_STD, "cv2_bilinear")


class Block(nnx.Module):
    """Pre-norm transformer block: exact GELU, no bias on the keys."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        d, kw = c.hidden_size, dict(dtypes, rngs=rngs)
        self.heads = c.num_attention_heads
        self.norm1 = layers.LayerNorm(d, c.layer_norm_eps, **kw)
        self.q = layers.linear(d, d, ("embed", "heads"), bias=c.qkv_bias, **kw)
        self.k = layers.linear(d, d, ("embed", "heads"), bias=False, **kw)
        self.v = layers.linear(d, d, ("embed", "heads"), bias=c.qkv_bias, **kw)
        self.out = layers.linear(d, d, ("heads", "embed"), bias=True, **kw)
        self.norm2 = layers.LayerNorm(d, c.layer_norm_eps, **kw)
        self.fc1 = layers.linear(d, c.intermediate_size, ("embed", "mlp"), bias=True, **kw)
        self.fc2 = layers.linear(c.intermediate_size, d, ("mlp", "embed"), bias=True, **kw)

    def __call__(self, x: Float[Array, "N S D"]) -> tuple[Float[Array, "N S D"], None]:
        h = self.norm1(x)
        q, k, v = (f(h).reshape(*h.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        x = x + self.out(attention(q, k, v).reshape(x.shape))
        x = x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))
        return x, None


class VideoMAE(nnx.Module):
    """[N, F, I, I, 3] normalised pixels (F = num_frames) -> [N, T, P, P, D] of `feature_layer`."""

    def __init__(
        self, c: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.config, self.dtype = c, dtype
        tubelet_dim = 3 * c.tubelet_size * c.patch_size**2
        self.patch_embed = layers.linear(
            tubelet_dim, c.hidden_size, ("patch", "embed"), bias=True, rngs=rngs, **kw
        )
        self.layers = layers.stack(lambda r: Block(c, rngs=r, **kw), c.built_layers, rngs)

    def __call__(
        self, pixels: Float[Array, "N F I I 3"], *, remat: str = "none"
    ) -> Float[Array, "N T P P D"]:
        c = self.config
        x = tubelets(pixels, c.tubelet_size, c.patch_size).astype(self.dtype)
        x = self.patch_embed(x).reshape(len(pixels), -1, c.hidden_size)
        x = x + jnp.asarray(positions(int(np.prod(c.grid)), c.hidden_size), self.dtype)
        x, _ = layers.fold(self.layers, x, remat=remat)
        return x.reshape(len(pixels), *c.grid, -1)


def positions(count: int, dim: int) -> Float[np.ndarray, "S D"]:
    """The fixed table over the flattened index: sines on even channels, cosines on odd ones."""
    channels = np.arange(dim)
    angles = np.outer(np.arange(count), 10_000.0 ** (-2 * (channels // 2) / dim))
    return np.where(channels % 2, np.cos(angles), np.sin(angles))
