# SPDX-License-Identifier: Apache-2.0
"""SigLIP image tower (arXiv 2303.15343), as Apollo uses it: patch features of an early layer.

SigLIP 2 (arXiv 2502.14786) at a fixed resolution is the same tower; see `siglip2` for the other.

N clips, F frames, P side of the patch grid, I image side (pixels), D stream, H head dim.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from apollo_jax.models import layers
from apollo_jax.models.attention import attention
from data_pipeline.transforms import FrameSpec


@dataclass(frozen=True)
class Config:
    """Published fields of a SigLIP vision tower; defaults are SO400M/14 at 384."""

    kind: Literal["siglip"] = "siglip"
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    feature_layer: int = -2  # hidden_states index; only the layers below it are built
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: str = "pil_bicubic"

    @classmethod
    def so400m_384(cls) -> "Config":
        """google/siglip-so400m-patch14-384."""
        return cls()

    @classmethod
    def base(cls, image_size: int = 224) -> "Config":
        """google/siglip-base-patch16-{224,256,384,512}."""
        return cls(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            image_size=image_size,
            patch_size=16,
        )

    @classmethod
    def large(cls, image_size: int = 256) -> "Config":
        """google/siglip-large-patch16-{256,384}."""
        return cls(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=image_size,
            patch_size=16,
        )

    @classmethod
    def siglip2_base(cls, image_size: int = 224) -> "Config":
        """google/siglip2-base-patch16-{224,256,384,512}."""
        return replace(cls.base(image_size), resample="pil_bilinear")

    @classmethod
    def siglip2_large(cls, image_size: int = 256) -> "Config":
        """google/siglip2-large-patch16-{256,384,512}."""
        return replace(cls.large(image_size), resample="pil_bilinear")

    @classmethod
    def siglip2_so400m(cls, image_size: int = 384, patch_size: int = 14) -> "Config":
        """google/siglip2-so400m-patch14-{224,384} and -patch16-{256,384,512}."""
        return cls(image_size=image_size, patch_size=patch_size, resample="pil_bilinear")

    @classmethod
    def siglip2_giant(cls, image_size: int = 384) -> "Config":
        """google/siglip2-giant-opt-patch16-{256,384}."""
        return cls(
            hidden_size=1536,
            intermediate_size=6144,
            num_hidden_layers=40,
            num_attention_heads=16,
            image_size=image_size,
            patch_size=16,
            resample="pil_bilinear",
        )

    @property
    def built_layers(self) -> int:
        return self.num_hidden_layers + 1 + self.feature_layer

    @property
    def grid(self) -> tuple[int, int, int]:
        """Feature grid (T, H, W) of one frame."""
        side = self.image_size // self.patch_size
        return 1, side, side

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(self.image_size, self.image_mean, self.image_std, self.resample)


class Block(nnx.Module):
    """Pre-norm transformer block: biased linears, tanh-GELU."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        d, kw = c.hidden_size, dict(dtypes, rngs=rngs)
        self.heads = c.num_attention_heads
        self.norm1 = layers.LayerNorm(d, c.layer_norm_eps, **kw)
        self.q = layers.linear(d, d, ("embed", "heads"), bias=True, **kw)
        self.k = layers.linear(d, d, ("embed", "heads"), bias=True, **kw)
        self.v = layers.linear(d, d, ("embed", "heads"), bias=True, **kw)
        self.out = layers.linear(d, d, ("heads", "embed"), bias=True, **kw)
        self.norm2 = layers.LayerNorm(d, c.layer_norm_eps, **kw)
        self.fc1 = layers.linear(d, c.intermediate_size, ("embed", "mlp"), bias=True, **kw)
        self.fc2 = layers.linear(c.intermediate_size, d, ("mlp", "embed"), bias=True, **kw)

    def __call__(
        self, x: Float[Array, "B S D"], mask: Bool[Array, "B 1 S"] | None = None
    ) -> tuple[Float[Array, "B S D"], None]:
        h = self.norm1(x)
        q, k, v = (f(h).reshape(*h.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        x = x + self.out(attention(q, k, v, mask).reshape(x.shape))
        x = x + self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=True))
        return x, None


class SigLIP(nnx.Module):
    """[N, F, I, I, 3] normalised pixels -> [N, F, P, P, D] features of `feature_layer`."""

    def __init__(
        self, c: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.config = c
        self.patch_size, self.side, self.dtype = c.patch_size, c.grid[1], dtype
        self.patch_embed = layers.linear(
            3 * c.patch_size**2, c.hidden_size, ("patch", "embed"), bias=True, rngs=rngs, **kw
        )
        self.positions = nnx.Param(
            jnp.asarray(sincos_2d(self.side, c.hidden_size), param_dtype),
            **layers.axes("position", "embed"),
        )
        self.layers = layers.stack(lambda r: Block(c, rngs=r, **kw), c.built_layers, rngs)

    def __call__(
        self, pixels: Float[Array, "N F I I 3"], *, remat: str = "none"
    ) -> Float[Array, "N F P P D"]:
        n, f = pixels.shape[:2]
        x = self.patch_embed(patchify(pixels, self.patch_size).astype(self.dtype))
        x = x.reshape(n * f, self.side**2, -1) + self.positions[...].astype(self.dtype)
        x, _ = layers.fold(self.layers, x, remat=remat)
        return x.reshape(n, f, self.side, self.side, -1)


def with_image_size(tower: SigLIP, image_size: int) -> SigLIP:
    """The tower for images of another size, its position table resampled as big_vision does.

    It is a fresh model: what the folder it was loaded from holds besides stays behind.
    """
    c, table = replace(tower.config, image_size=image_size), tower.positions[...]
    kw: Any = dict(dtype=tower.dtype, param_dtype=table.dtype)
    out = nnx.eval_shape(lambda: SigLIP(c, rngs=nnx.Rngs(0), **kw))
    state = nnx.state(tower)
    state["positions"] = out.positions.replace(
        jnp.asarray(resampled(np.asarray(table), c.grid[1]), table.dtype)
    )
    nnx.update(out, state)
    return out


def resampled(positions: Float[np.ndarray, "S*S D"], side: int) -> Float[np.ndarray, "P*P D"]:
    """A position table for a grid of `side` patches: linear, corner on corner (big_vision)."""
    before = math.isqrt(len(positions))
    at = np.linspace(0, before - 1, side)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(before)))
    grid = positions.astype(np.float64).reshape(before, before, -1)
    grid = np.einsum("ri,cj,ijd->rcd", weights, weights, grid, optimize=True)
    return grid.reshape(side * side, -1).astype(positions.dtype)


def patchify(pixels: Float[Array, "*b I I 3"], patch: int) -> Float[Array, "*b P P K"]:
    """Non-overlapping patches, flattened row, column, channel; the remainder at the edge goes."""
    *lead, height, width, channels = pixels.shape
    rows, columns = height // patch, width // patch
    x = pixels[..., : rows * patch, : columns * patch, :]
    x = x.reshape(*lead, rows, patch, columns, patch, channels)
    x = jnp.moveaxis(x, -4, -3)  # [*b, rows, columns, patch, patch, channels]
    return x.reshape(*lead, rows, columns, patch * patch * channels)


def sincos_2d(side: int, dim: int) -> Float[np.ndarray, "P*P D"]:
    """2-D sine-cosine table: where a fresh tower's learned positions start (as in big_vision)."""
    y, x = np.mgrid[:side, :side].reshape(2, -1)
    table = np.concatenate([sincos(axis, dim // 2, 2 * side) for axis in (x, y)], axis=1)
    return np.pad(table, ((0, 0), (0, dim - table.shape[1])))


def sincos(positions: np.ndarray, dim: int, temperature: float) -> Float[np.ndarray, "n dim"]:
    """Sines and cosines of `positions` at dim // 2 frequencies from 1 down to 1 / temperature.

    The temperature follows the grid: the usual 10,000 leaves most channels constant on a small one.
    """
    count = dim // 2
    frequencies = temperature ** -(np.arange(count) / max(1, count - 1))
    angles = np.outer(positions, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
