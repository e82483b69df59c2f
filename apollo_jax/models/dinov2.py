# SPDX-License-Identifier: Apache-2.0
"""DINOv2 image tower (arXiv 2304.07193), with registers too (arXiv 2309.16588), as Apollo uses it.

N clips, F frames, I image side (pixels), P side of the patch grid, D stream, R registers.
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
from apollo_jax.models.internvideo2 import scaled
from apollo_jax.models.siglip import patchify, sincos_2d
from data_pipeline.transforms import FrameSpec, cubic_weights


@dataclass(frozen=True)
class Config:
    """Published fields of a DINOv2; defaults are the large one.

    interpolation: how the position table is brought to another grid, which Apollo's 16 x 16 always
      needs; "scale_offset" is the authors' rule and that of transformers up to 4.44, "size" that of
      transformers from 4.45 on, "antialias" that of the models with registers.
    """

    kind: Literal["dinov2"] = "dinov2"
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: int = 4
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 0
    table_size: int = 518  # pixels that the position table spans: image_size in config.json
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    layerscale_value: float = 1.0  # of a fresh tower
    interpolation: Literal["scale_offset", "size", "antialias"] = "scale_offset"
    feature_layer: int = -2  # hidden_states index; only the layers below it are built
    image_size: int = 224  # pixels that the tower sees, cut out of
    resize: int = 256
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @classmethod
    def small(cls) -> "Config":
        """facebook/dinov2-small."""
        return cls(hidden_size=384, num_hidden_layers=12, num_attention_heads=6)

    @classmethod
    def base(cls) -> "Config":
        """facebook/dinov2-base."""
        return cls(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)

    @classmethod
    def large(cls) -> "Config":
        """facebook/dinov2-large."""
        return cls()

    @classmethod
    def giant(cls) -> "Config":
        """facebook/dinov2-giant."""
        return cls(
            hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True
        )

    @classmethod
    def large_with_registers(cls) -> "Config":
        """facebook/dinov2-with-registers-large."""
        return cls(num_register_tokens=4, interpolation="antialias")

    @property
    def built_layers(self) -> int:
        return self.num_hidden_layers + 1 + self.feature_layer

    @property
    def mlp_dim(self) -> int:
        """Width inside the MLP; two thirds of it for SwiGLU, in eights."""
        width = self.hidden_size * self.mlp_ratio
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @property
    def grid(self) -> tuple[int, int, int]:
        """Feature grid (T, H, W) of one frame."""
        side = self.image_size // self.patch_size
        return 1, side, side

    @property
    def frame_spec(self) -> FrameSpec:
        statistics = self.image_mean, self.image_std
        return FrameSpec(self.image_size, *statistics, "pil_bicubic", self.resize)


class Block(nnx.Module):
    """Pre-norm transformer block: biased linears, LayerScale, exact GELU or SwiGLU."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        d, kw = c.hidden_size, dict(dtypes, rngs=rngs)
        scale = nnx.initializers.constant(c.layerscale_value)
        gamma = dict(dtype=dtypes["param_dtype"], rngs=rngs)
        self.heads, self.swiglu = c.num_attention_heads, c.use_swiglu_ffn
        self.norm1 = layers.LayerNorm(d, c.layer_norm_eps, **kw)
        self.q = layers.linear(d, d, ("embed", "heads"), bias=True, **kw)
        self.k = layers.linear(d, d, ("embed", "heads"), bias=True, **kw)
        self.v = layers.linear(d, d, ("embed", "heads"), bias=True, **kw)
        self.out = layers.linear(d, d, ("heads", "embed"), bias=True, **kw)
        self.ls1 = layers.param((d,), ("norm",), scale, **gamma)
        self.norm2 = layers.LayerNorm(d, c.layer_norm_eps, **kw)
        inner = 2 * c.mlp_dim if c.use_swiglu_ffn else c.mlp_dim  # gate and value side by side
        self.fc1 = layers.linear(d, inner, ("embed", "mlp"), bias=True, **kw)
        self.fc2 = layers.linear(c.mlp_dim, d, ("mlp", "embed"), bias=True, **kw)
        self.ls2 = layers.param((d,), ("norm",), scale, **gamma)

    def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], None]:
        h = self.norm1(x)
        q, k, v = (f(h).reshape(*h.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        x = x + scaled(self.out(attention(q, k, v).reshape(x.shape)), self.ls1)
        h = self.fc1(self.norm2(x))
        if self.swiglu:
            gate, value = jnp.split(h, 2, axis=-1)
            h = jax.nn.silu(gate) * value
        else:
            h = jax.nn.gelu(h, approximate=False)
        return x + scaled(self.fc2(h), self.ls2), None


class DINOv2(nnx.Module):
    """[N, F, I, I, 3] normalised pixels -> [N, F, P, P, D] features of `feature_layer`.

    Images of any size and shape will do: the position table is interpolated to their grid.
    """

    def __init__(
        self, c: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        d, normal = c.hidden_size, nnx.initializers.normal(0.02)
        token = dict(dtype=param_dtype, rngs=rngs)
        self.config, self.dtype = c, dtype
        self.patch_embed = layers.linear(
            3 * c.patch_size**2, d, ("patch", "embed"), bias=True, rngs=rngs, **kw
        )
        self.cls_token = layers.param((d,), ("embed",), normal, **token)
        fresh = np.pad(sincos_2d(c.table_size // c.patch_size, d), ((1, 0), (0, 0)))
        self.positions = nnx.Param(
            jnp.asarray(fresh, param_dtype), **layers.axes("position", "embed")
        )
        if c.num_register_tokens:
            shape = (c.num_register_tokens, d)
            self.registers = layers.param(shape, ("position", "embed"), normal, **token)
        self.layers = layers.stack(lambda r: Block(c, rngs=r, **kw), c.built_layers, rngs)

    def __call__(
        self, pixels: Float[Array, "N F I J 3"], *, remat: str = "none"
    ) -> Float[Array, "N F P Q D"]:
        n, f, height, width, _ = pixels.shape
        x = self.embed(pixels.reshape(n * f, height, width, 3))
        x, _ = layers.fold(self.layers, x, remat=remat)
        rows, columns = height // self.config.patch_size, width // self.config.patch_size
        return x[:, -rows * columns :].reshape(n, f, rows, columns, -1)

    def embed(self, pixels: Float[Array, "B I J 3"]) -> Float[Array, "B 1+R+P*Q D"]:
        """The first layer's input: CLS, registers (which have no positions), patches."""
        b, height, width, _ = pixels.shape
        patches = self.patch_embed(patchify(pixels, self.config.patch_size).astype(self.dtype))
        table = self.table(height, width).astype(self.dtype)
        first = self.cls_token[...].astype(self.dtype) + table[:1]
        if self.config.num_register_tokens:
            first = jnp.concatenate([first, self.registers[...].astype(self.dtype)])
        patches = patches.reshape(b, -1, patches.shape[-1]) + table[1:]
        return jnp.concatenate([jnp.broadcast_to(first, (b, *first.shape)), patches], axis=1)

    def table(self, height: int, width: int) -> Float[Array, "1+P*Q D"]:
        """CLS's position and those of the patches of an image; interpolated in float32."""
        c = self.config
        side, rows, columns = (x // c.patch_size for x in (c.table_size, height, width))
        if height == width and rows == side:
            return self.positions[...]
        positions = self.positions[...].astype(jnp.float32)
        down, across = (
            jnp.asarray(axis_weights(side, n, c.interpolation), jnp.float32)
            for n in (rows, columns)
        )
        patches = jnp.einsum(
            "ih,jw,hwd->ijd",
            down,
            across,
            positions[1:].reshape(side, side, -1),
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.concatenate([positions[:1], patches.reshape(rows * columns, -1)])


def axis_weights(before: int, after: int, rule: str) -> Float[np.ndarray, "after before"]:
    """The weights of bicubic interpolation along one axis (see `Config.interpolation`)."""
    if rule == "antialias":
        return cubic_weights(before, after)
    step = before / (after + 0.1 if rule == "scale_offset" else after)
    centre = (np.arange(after) + 0.5) * step - 0.5
    weights = np.zeros((after, before))
    for tap in range(-1, 3):
        index = np.floor(centre) + tap
        x = np.abs(centre - index)
        near, far = (1.25 * x - 2.25) * x * x + 1, -0.75 * (((x - 5) * x + 8) * x - 4)  # a = -0.75
        clamped = np.clip(index, 0, before - 1).astype(int)  # beyond the edge, its value goes on
        np.add.at(weights, (np.arange(after), clamped), np.where(x <= 1, near, far))
    return weights
