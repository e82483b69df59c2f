# SPDX-License-Identifier: Apache-2.0
"""V-JEPA 2 video tower (arXiv 2506.09985): the normed output of its last block.

N clips, F frames, T time steps, P side of the patch grid, I image side (pixels), S = T*P*P tokens,
D stream, K attention heads, H head dim, R = 3*A rotated channels of a head, A for each axis.
"""

from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Config:
    """Published fields of a V-JEPA 2 encoder; defaults are ViT-L at 256."""

    kind: Literal["vjepa2"] = "vjepa2"
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: float = 4.0
    crop_size: int = 256
    patch_size: int = 16
    frames_per_clip: int = 64  # no weight depends on it
    tubelet_size: int = 2
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @classmethod
    def vitl_256(cls) -> "Config":
        """facebook/vjepa2-vitl-fpc64-256."""
        return cls()

    @classmethod
    def vith_256(cls) -> "Config":
        """facebook/vjepa2-vith-fpc64-256."""
        return cls(hidden_size=1280, num_hidden_layers=32)

    @classmethod
    def vitg_256(cls) -> "Config":
        """facebook/vjepa2-vitg-fpc64-256."""
        return cls(
            hidden_size=1408, num_hidden_layers=40, num_attention_heads=22, mlp_ratio=48 / 11
        )

    @classmethod
    def vitg_384(cls) -> "Config":
        """facebook/vjepa2-vitg-fpc64-384."""
        return replace(cls.vitg_256(), crop_size=384)

    @property
    def image_size(self) -> int:
        return self.crop_size

    @property
    def num_frames(self) -> int:
        return self.frames_per_clip

    @property
    def mlp_dim(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def built_layers(self) -> int:
        return self.num_hidden_layers

    @property
    def grid(self) -> tuple[int, int, int]:
        """Feature grid (T, H, W) of one clip."""
        side = self.crop_size // self.patch_size
        return self.frames_per_clip // self.tubelet_size, side, side

    @property
    def frame_spec(self) -> FrameSpec:
        """Its published processor's: what lies beyond the centre is cut off."""
        resize = int(self.crop_size * 256 / 224)
        return FrameSpec(self.crop_size, self.image_mean, self.image_std, "pil_bilinear", resize)


class Block(nnx.Module):
    """Pre-norm transformer block: rotated queries and keys, exact GELU."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        d, kw = c.hidden_size, dict(dtypes, rngs=rngs)
        self.heads = c.num_attention_heads
        self.norm1 = layers.LayerNorm(d, c.layer_norm_eps, **kw)
        self.q = layers.linear(d, d, ("embed", "heads"), bias=c.qkv_bias, **kw)
        self.k = layers.linear(d, d, ("embed", "heads"), bias=c.qkv_bias, **kw)
        self.v = layers.linear(d, d, ("embed", "heads"), bias=c.qkv_bias, **kw)
        self.out = layers.linear(d, d, ("heads", "embed"), bias=True, **kw)
        self.norm2 = layers.LayerNorm(d, c.layer_norm_eps, **kw)
        self.fc1 = layers.linear(d, c.mlp_dim, ("embed", "mlp"), bias=True, **kw)
        self.fc2 = layers.linear(c.mlp_dim, d, ("mlp", "embed"), bias=True, **kw)

    def __call__(
        self, x: Float[Array, "N S D"], angles: Float[Array, "S R"]
    ) -> tuple[Float[Array, "N S D"], None]:
        h = self.norm1(x)
        q, k, v = (f(h).reshape(*h.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        q, k = rotate(q, angles), rotate(k, angles)
        x = x + self.out(attention(q, k, v).reshape(x.shape))
        x = x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))
        return x, None


class VJEPA2(nnx.Module):
    """[N, F, I, I, 3] normalised pixels, F any multiple of the tubelet -> [N, T, P, P, D]."""

    def __init__(
        self, c: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.config, self.dtype = c, dtype
        tubelet_dim = 3 * c.tubelet_size * c.patch_size**2
        self.patch_embed = layers.linear(
            tubelet_dim, c.hidden_size, ("patch", "embed"), bias=True, rngs=rngs, **kw
        )
        self.layers = layers.stack(lambda r: Block(c, rngs=r, **kw), c.num_hidden_layers, rngs)
        self.norm = layers.LayerNorm(c.hidden_size, c.layer_norm_eps, rngs=rngs, **kw)

    def __call__(
        self, pixels: Float[Array, "N F I I 3"], *, remat: str = "none"
    ) -> Float[Array, "N T P P D"]:
        c = self.config
        if pixels.shape[1] < c.tubelet_size:  # a still
            pixels = jnp.tile(pixels, (1, c.tubelet_size, 1, 1, 1))
        x = self.patch_embed(tubelets(pixels, c.tubelet_size, c.patch_size).astype(self.dtype))
        n, *grid, d = x.shape
        angles = rotations(tuple(grid), d // c.num_attention_heads)
        x, _ = layers.fold(self.layers, x.reshape(n, -1, d), angles, remat=remat)
        return self.norm(x).reshape(n, *grid, d)


def rotations(grid: tuple[int, ...], head_dim: int) -> Float[Array, "S R"]:
    """Angles of time, row and column: an even third of the channels each, the rest goes unrotated.

    Each axis has its frequencies twice, one run after the other, although `rotate` turns
    neighbours: a quirk of the published code that the weights have learned.
    """
    count = head_dim // 3 // 2
    frequencies = np.tile(10_000.0 ** (-np.arange(count) / count), 2).astype(np.float32)
    index = jnp.moveaxis(jnp.indices(grid, jnp.float32), 0, -1)  # [T, P, P, 3]
    return (index[..., None] * frequencies).reshape(-1, 3 * 2 * count)


def rotate(x: Float[Array, "N S K H"], angles: Float[Array, "S R"]) -> Float[Array, "N S K H"]:
    """Turn the first R channels in pairs of neighbours (x0, x1), in float32."""
    width = angles.shape[-1]
    turning = x[..., :width].astype(jnp.float32)
    even, odd = turning[..., ::2], turning[..., 1::2]
    across = jnp.stack([-odd, even], axis=-1).reshape(turning.shape)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    turned = (turning * cos + across * sin).astype(x.dtype)
    return jnp.concatenate([turned, x[..., width:]], axis=-1)
