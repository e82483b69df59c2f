# SPDX-License-Identifier: Apache-2.0
"""CLIP image tower (arXiv 2103.00020), and LanguageBind's for images, which is one.

N clips, F frames, P side of the patch grid, S = 1 + P*P tokens (CLS first), I image side (pixels),
D stream, H head dim.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from apollo_jax.models import layers
from apollo_jax.models.attention import attention
from apollo_jax.models.siglip import patchify, sincos_2d
from data_pipeline.transforms import FrameSpec

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def quick_gelu(x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    """OpenAI's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


def one_of(name: str, value: str, known: Collection[str]) -> None:
    """ValueError naming a field and what it may be."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}, supported are {', '.join(known)}")


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": partial(jax.nn.gelu, approximate=False)}


@dataclass(frozen=True)
class Config:
    """Published fields of a CLIP vision tower; defaults are OpenAI's ViT-L/14 at 336."""

    kind: Literal["clip"] = "clip"
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    feature_layer: int = -2  # hidden_states index; only the layers below it are built
    image_mean: tuple[float, float, float] = OPENAI_MEAN
    image_std: tuple[float, float, float] = OPENAI_STD
    resample: Literal["pil_bicubic", "torch_bicubic"] = "pil_bicubic"
    resize: int = 0  # side before the centre crop to image_size; 0 crops nothing

    def __post_init__(self):
        one_of("hidden_act", self.hidden_act, ACTIVATIONS)

    @classmethod
    def large_336(cls) -> "Config":
        """openai/clip-vit-large-patch14-336."""
        return cls()

    @classmethod
    def languagebind_image(cls) -> "Config":
        """LanguageBind/LanguageBind_Image."""
        return cls(image_size=224, hidden_act="gelu", resample="torch_bicubic")

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
        size, resize = self.image_size, self.resize
        return FrameSpec(size, self.image_mean, self.image_std, self.resample, resize)


class Attention(nnx.Module):
    """Full self-attention with biased linears."""

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs, **dtypes: Any):
        kw = dict(dtypes, rngs=rngs, bias=True)
        self.heads = heads
        self.q = layers.linear(dim, dim, ("embed", "heads"), **kw)
        self.k = layers.linear(dim, dim, ("embed", "heads"), **kw)
        self.v = layers.linear(dim, dim, ("embed", "heads"), **kw)
        self.out = layers.linear(dim, dim, ("heads", "embed"), **kw)

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q, self.k, self.v))
        return self.out(attention(q, k, v).reshape(x.shape))


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        d, kw = c.hidden_size, dict(dtypes, rngs=rngs)
        self.activation = ACTIVATIONS[c.hidden_act]
        self.norm1 = layers.LayerNorm(d, c.layer_norm_eps, **kw)
        self.attention = Attention(d, c.num_attention_heads, **kw)
        self.norm2 = layers.LayerNorm(d, c.layer_norm_eps, **kw)
        self.fc1 = layers.linear(d, c.intermediate_size, ("embed", "mlp"), bias=True, **kw)
        self.fc2 = layers.linear(c.intermediate_size, d, ("mlp", "embed"), bias=True, **kw)

    def __call__(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S D"], None]:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x)))), None


class CLIP(nnx.Module):
    """[N, F, I, I, 3] normalised pixels -> [N, F, P, P, D] features of `feature_layer`."""

    def __init__(
        self, c: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        d, kw = c.hidden_size, dict(dtype=dtype, param_dtype=param_dtype)
        self.config = c
        self.patch_size, self.side, self.dtype = c.patch_size, c.grid[1], dtype
        self.patch_embed = layers.linear(
            3 * c.patch_size**2, d, ("patch", "embed"), bias=False, rngs=rngs, **kw
        )
        normal = nnx.initializers.normal(d**-0.5)
        self.cls_token = layers.param((d,), ("embed",), normal, dtype=param_dtype, rngs=rngs)
        self.positions = nnx.Param(
            jnp.asarray(fresh_positions(self.side, d), param_dtype),
            **layers.axes("position", "embed"),
        )
        self.pre_norm = layers.LayerNorm(d, c.layer_norm_eps, rngs=rngs, **kw)
        self.layers = layers.stack(lambda r: Block(c, rngs=r, **kw), c.built_layers, rngs)

    def __call__(
        self, pixels: Float[Array, "N F I I 3"], *, remat: str = "none"
    ) -> Float[Array, "N F P P D"]:
        n, f = pixels.shape[:2]
        x = self.patch_embed(patchify(pixels, self.patch_size).astype(self.dtype))
        x = x.reshape(n * f, self.side**2, -1)
        x = with_cls(x, self.cls_token[...]) + self.positions[...].astype(self.dtype)
        x, _ = layers.fold(self.layers, self.pre_norm(x), remat=remat)
        return x[:, 1:].reshape(n, f, self.side, self.side, -1)


def with_cls(x: Float[Array, "*b S D"], cls: Float[Array, "*c D"]) -> Float[Array, "*b 1+S D"]:
    """Put the CLS token before the patches of each picture."""
    cls = jnp.broadcast_to(cls[..., None, :].astype(x.dtype), (*x.shape[:-2], 1, x.shape[-1]))
    return jnp.concatenate([cls, x], axis=-2)


def fresh_positions(side: int, dim: int) -> Float[np.ndarray, "1+P*P D"]:
    """Where a fresh tower's learned positions start: sines and cosines, zero for CLS."""
    return np.pad(sincos_2d(side, dim), ((1, 0), (0, 0)))
