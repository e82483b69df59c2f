# SPDX-License-Identifier: Apache-2.0
"""InternVideo2 video tower (arXiv 2403.15377), as Apollo uses it: stage-2 1B and its distillations.

N clips, F frames, T time steps, P side of the patch grid, I image side (pixels), D stream.
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
from apollo_jax.models.siglip import sincos
from data_pipeline.transforms import FrameSpec


@dataclass(frozen=True)
class Config:
    """Published fields of the tower (`d_model`, not the misleading `hidden_size`)."""

    kind: Literal["internvideo2"] = "internvideo2"
    d_model: int = 1408
    depth: int = 40
    num_heads: int = 16
    mlp_ratio: float = 48 / 11
    img_size: int = 224
    patch_size: int = 14
    num_frames: int = 4
    tubelet_size: int = 1
    init_values: float = 1e-5  # LayerScale of a fresh tower
    feature_layer: int = -2  # x_vis_return_idx: only the blocks below it are built
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @classmethod
    def stage2_1b(cls) -> "Config":
        """OpenGVLab/InternVideo2-Stage2_1B-224p-f4."""
        return cls()

    @classmethod
    def distilled_small(cls) -> "Config":
        """OpenGVLab/InternVideo2_distillation_models, stage1/S14/S14_dist_1B_stage2."""
        return cls(d_model=384, depth=12, num_heads=6, mlp_ratio=4.0, num_frames=8)

    @classmethod
    def distilled_base(cls) -> "Config":
        """OpenGVLab/InternVideo2_distillation_models, stage1/B14/B14_dist_1B_stage2."""
        return cls(d_model=768, depth=12, num_heads=12, mlp_ratio=4.0, num_frames=8)

    @classmethod
    def distilled_large(cls) -> "Config":
        """OpenGVLab/InternVideo2_distillation_models, stage1/L14/L14_dist_1B_stage2."""
        return cls(d_model=1024, depth=24, num_heads=16, mlp_ratio=4.0, num_frames=8)

    @property
    def built_layers(self) -> int:
        return self.depth + 1 + self.feature_layer

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def image_size(self) -> int:
        return self.img_size

    @property
    def mlp_dim(self) -> int:
        return int(self.d_model * self.mlp_ratio)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Feature grid (T, H, W) of one clip."""
        side = self.img_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(self.img_size, self.image_mean, self.image_std, "cv2_bilinear")


class Block(nnx.Module):
    """Pre-norm block: RMSNorm, q/k normed over the full width, exact GELU, LayerScale."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        d, kw = c.d_model, dict(dtypes, rngs=rngs)
        scale = nnx.initializers.constant(c.init_values)
        gamma = dict(dtype=dtypes["param_dtype"], rngs=rngs)
        self.heads = c.num_heads
        self.norm1 = layers.RMSNorm(d, 1e-6, **kw)
        self.qkv = layers.linear(d, 3 * d, ("embed", "heads"), bias=False, **kw)
        self.q_norm = layers.RMSNorm(d, 1e-6, **kw)
        self.k_norm = layers.RMSNorm(d, 1e-6, **kw)
        self.proj = layers.linear(d, d, ("heads", "embed"), bias=True, **kw)
        self.ls1 = layers.param((d,), ("norm",), scale, **gamma)
        self.norm2 = layers.RMSNorm(d, 1e-6, **kw)
        self.fc1 = layers.linear(d, c.mlp_dim, ("embed", "mlp"), bias=True, **kw)
        self.fc2 = layers.linear(c.mlp_dim, d, ("mlp", "embed"), bias=True, **kw)
        self.ls2 = layers.param((d,), ("norm",), scale, **gamma)

    def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], None]:
        q, k, v = jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)
        q, k, v = (
            a.reshape(*a.shape[:2], self.heads, -1) for a in (self.q_norm(q), self.k_norm(k), v)
        )
        out = self.proj(attention(q, k, v).reshape(x.shape))
        x = x + scaled(out, self.ls1)
        out = self.fc2(jax.nn.gelu(self.fc1(self.norm2(x)), approximate=False))
        return x + scaled(out, self.ls2), None


def scaled(x: Array, gamma: nnx.Param) -> Array:
    """LayerScale, multiplied in float32."""
    return (x.astype(jnp.float32) * gamma[...].astype(jnp.float32)).astype(x.dtype)


class InternVideo2(nnx.Module):
    """[N, F, I, I, 3] normalised pixels (F = num_frames) -> [N, T, P, P, D] features."""

    def __init__(
        self, c: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.config = c
        self.patch, self.tubelet, self.grid, self.dtype = (
            c.patch_size,
            c.tubelet_size,
            c.grid,
            dtype,
        )
        tubelet_dim = 3 * c.tubelet_size * c.patch_size**2
        self.patch_embed = layers.linear(
            tubelet_dim, c.d_model, ("patch", "embed"), bias=True, rngs=rngs, **kw
        )
        normal = nnx.initializers.normal(0.02)
        self.cls_token = layers.param(
            (c.d_model,), ("embed",), normal, dtype=param_dtype, rngs=rngs
        )
        self.positions = nnx.Param(
            jnp.asarray(sincos_3d(c.grid, c.d_model), param_dtype),
            **layers.axes("position", "embed"),
        )
        self.layers = layers.stack(lambda r: Block(c, rngs=r, **kw), c.built_layers, rngs)

    def __call__(
        self, pixels: Float[Array, "N F I I 3"], *, remat: str = "none"
    ) -> Float[Array, "N T P P D"]:
        n = pixels.shape[0]
        x = self.patch_embed(tubelets(pixels, self.tubelet, self.patch).astype(self.dtype))
        x = x.reshape(n, -1, x.shape[-1])
        cls = jnp.broadcast_to(self.cls_token[...].astype(self.dtype), (n, 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.positions[...].astype(self.dtype)
        x, _ = layers.fold(self.layers, x, remat=remat)
        return x[:, 1:].reshape(n, *self.grid, -1)


def with_frames(tower: InternVideo2, num_frames: int) -> InternVideo2:
    """The tower for clips of another length, its positions resampled in time as the authors do.

    It is a fresh model: what the folder it was loaded from holds besides stays behind.
    """
    c, table = replace(tower.config, num_frames=num_frames), tower.positions[...]
    kw: Any = dict(dtype=tower.dtype, param_dtype=table.dtype)
    out = nnx.eval_shape(lambda: InternVideo2(c, rngs=nnx.Rngs(0), **kw))
    state = nnx.state(tower)
    state["positions"] = out.positions.replace(resampled(table, tower.grid[0], c.grid[0]))
    nnx.update(out, state)
    return out


def resampled(
    positions: Float[Array, "1+S*P*P D"], before: int, after: int
) -> Float[Array, "1+T*P*P D"]:
    """A position table of `before` time steps for `after`: linear, half-pixel; CLS as it is."""
    times = positions[1:].reshape(before, -1).astype(jnp.float32)
    shape, precision = (after, times.shape[1]), jax.lax.Precision.HIGHEST
    times = jax.image.resize(times, shape, "linear", antialias=False, precision=precision)
    times = times.reshape(-1, positions.shape[1]).astype(positions.dtype)
    return jnp.concatenate([positions[:1], times])


def tubelets(
    pixels: Float[Array, "N F I I 3"], tubelet: int, patch: int
) -> Float[Array, "N T P P K"]:
    """Non-overlapping space-time patches, flattened time, row, column, channel."""
    n, frames, height, width, channels = pixels.shape
    t, rows, columns = frames // tubelet, height // patch, width // patch
    x = pixels[:, : t * tubelet, : rows * patch, : columns * patch]
    x = x.reshape(n, t, tubelet, rows, patch, columns, patch, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(n, t, rows, columns, -1)


def sincos_3d(grid: tuple[int, int, int], dim: int) -> Float[np.ndarray, "1+T*P*P D"]:
    """A fresh tower's positions: 1/4 of the channels for time, 3/4 for space; zero for CLS."""
    t, rows, columns = grid
    time_dim, space_dim = dim // 4, (dim - dim // 4) // 2
    temperature = 2 * max(grid)
    y, x = np.mgrid[:rows, :columns].reshape(2, -1)
    space = np.concatenate([sincos(a, space_dim, temperature) for a in (x, y)], axis=1)
    time = sincos(np.arange(t), time_dim, temperature)
    full = np.concatenate([np.repeat(time, rows * columns, axis=0), np.tile(space, (t, 1))], axis=1)
    return np.pad(full, ((1, 0), (0, dim - full.shape[1])))
