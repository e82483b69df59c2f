# SPDX-License-Identifier: Apache-2.0
"""V-JEPA video tower (arXiv 2404.08471): the normed output of its last block.

N clips, F frames, T time steps, P side of the patch grid, I image side (pixels), S = T*P*P tokens,
D stream.
"""

import math
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

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPS = 1e-6


@dataclass(frozen=True)
class Config:
    """Published fields of a V-JEPA encoder; defaults are ViT-H/16 at 384."""

    kind: Literal["vjepa"] = "vjepa"
    embed_dim: int = 1280
    depth: int = 32
    num_heads: int = 16
    mlp_ratio: float = 4.0
    crop_size: int = 384
    patch_size: int = 16
    num_frames: int = 16
    tubelet_size: int = 2
    uniform_power: bool = True  # fresh positions: time, rows and columns get equal widths

    @classmethod
    def vitl16(cls) -> "Config":
        """vitl16.pth.tar."""
        return cls(embed_dim=1024, depth=24, crop_size=224)

    @classmethod
    def vith16(cls) -> "Config":
        """vith16.pth.tar."""
        return cls(crop_size=224)

    @classmethod
    def vith16_384(cls) -> "Config":
        """vith16-384.pth.tar."""
        return cls()

    @property
    def hidden_size(self) -> int:
        return self.embed_dim

    @property
    def image_size(self) -> int:
        return self.crop_size

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def built_layers(self) -> int:
        return self.depth

    @property
    def grid(self) -> tuple[int, int, int]:
        """Feature grid (T, H, W) of one clip."""
        side = self.crop_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(self.crop_size, IMAGE_MEAN, IMAGE_STD, "cv2_bilinear")


class Block(nnx.Module):
    """Pre-norm transformer block: fused and biased q, k, v; exact GELU."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        d, kw = c.embed_dim, dict(dtypes, rngs=rngs)
        self.heads = c.num_heads
        self.norm1 = layers.LayerNorm(d, EPS, **kw)
        self.qkv = layers.linear(d, 3 * d, ("embed", "heads"), bias=True, **kw)
        self.proj = layers.linear(d, d, ("heads", "embed"), bias=True, **kw)
        self.norm2 = layers.LayerNorm(d, EPS, **kw)
        self.fc1 = layers.linear(d, c.mlp_dim, ("embed", "mlp"), bias=True, **kw)
        self.fc2 = layers.linear(c.mlp_dim, d, ("mlp", "embed"), bias=True, **kw)

    def __call__(self, x: Float[Array, "N S D"]) -> tuple[Float[Array, "N S D"], None]:
        q, k, v = (
            a.reshape(*a.shape[:2], self.heads, -1)
            for a in jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)
        )
        x = x + self.proj(attention(q, k, v).reshape(x.shape))
        x = x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))
        return x, None


class VJEPA(nnx.Module):
    """[N, F, I, I, 3] normalised pixels -> [N, T, P, P, D] features."""

    def __init__(
        self, c: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.config, self.dtype = c, dtype
        tubelet_dim = 3 * c.tubelet_size * c.patch_size**2
        self.patch_embed = layers.linear(
            tubelet_dim, c.embed_dim, ("patch", "embed"), bias=True, rngs=rngs, **kw
        )
        table = sincos_3d(c.grid, c.embed_dim, c.uniform_power)
        self.positions = nnx.Param(
            jnp.asarray(table, param_dtype), **layers.axes("position", "embed")
        )
        self.layers = layers.stack(lambda r: Block(c, rngs=r, **kw), c.depth, rngs)
        self.norm = layers.LayerNorm(c.embed_dim, EPS, rngs=rngs, **kw)

    def __call__(
        self, pixels: Float[Array, "N F h w 3"], *, remat: str = "none"
    ) -> Float[Array, "N T r c D"]:
        """Of clips of any length and size; the positions follow theirs."""
        patches = tubelets(pixels, self.config.tubelet_size, self.config.patch_size)
        x = self.patch_embed(patches.astype(self.dtype))
        n, *grid, d = x.shape
        x = (x + self.positions_at(tuple(grid)).astype(self.dtype)).reshape(n, -1, d)
        x, _ = layers.fold(self.layers, x, remat=remat)
        return self.norm(x).reshape(n, *grid, d)

    def positions_at(self, grid: tuple[int, ...]) -> Float[Array, "T r c D"]:
        """The stored table, interpolated trilinearly to another grid (half-pixel centres)."""
        table = self.positions[...].reshape(*self.config.grid, -1).astype(jnp.float32)
        if grid == self.config.grid:
            return table
        shape = (*grid, table.shape[-1])
        precision = jax.lax.Precision.HIGHEST
        return jax.image.resize(table, shape, "linear", antialias=False, precision=precision)


def with_clips(tower: VJEPA, *, num_frames: int, crop_size: int) -> VJEPA:
    """The tower for clips of another length or size, its positions interpolated for good.

    It is a fresh model: what the folder it was loaded from holds besides stays behind.
    """
    c = replace(tower.config, num_frames=num_frames, crop_size=crop_size)
    dtype = tower.positions[...].dtype
    kw: Any = dict(dtype=tower.dtype, param_dtype=dtype)
    out = nnx.eval_shape(lambda: VJEPA(c, rngs=nnx.Rngs(0), **kw))
    table = tower.positions_at(c.grid).reshape(-1, c.embed_dim)
    state = nnx.state(tower)
    state["positions"] = out.positions.replace(table.astype(dtype))
    nnx.update(out, state)
    return out


def sincos_3d(
    grid: tuple[int, int, int], dim: int, uniform_power: bool
) -> Float[np.ndarray, "S D"]:
    """A fresh tower's positions, as published: time, row and column side by side, cut to `dim`."""
    equal, half = 2 * math.ceil(dim / 6), dim // 2
    widths = (equal,) * 3 if uniform_power else (half, half // 2, half // 2)
    axes = np.indices(grid).reshape(3, -1)
    return np.concatenate([sincos(a, w) for a, w in zip(axes, widths, strict=True)], axis=1)[
        :, :dim
    ]


def sincos(positions: np.ndarray, dim: int) -> Float[np.ndarray, "S dim"]:
    """Sines, then cosines, of positions at dim // 2 frequencies."""
    count = dim // 2
    angles = np.outer(positions, 10_000.0 ** (-np.arange(count) / count))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
