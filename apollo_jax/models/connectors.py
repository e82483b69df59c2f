# SPDX-License-Identifier: Apache-2.0
"""Connectors: project fused features to the decoder's width, resample to Q tokens per clip.

N clips, S = T*H*W feature positions, V vision channels, D decoder width, Q visual tokens,
R query heads, K key/value heads, H head dim.  Paper Sec 4.3, Table 1.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from apollo_jax.models import layers
from apollo_jax.models.attention import attention
from apollo_jax.sharding import constrain

PROJECTORS = ("mlp1x_gelu", "mlp2x_gelu", "perceiver_mlp", "conv2d_KxK")
RESAMPLERS = ("perciver", "avg")  # the first is the published spelling


@dataclass(frozen=True)
class Config:
    """Fields of the published `mm_connector/config.json`; defaults are the released ones."""

    vision_hidden_size: int = 2560
    text_hidden_size: int = 2048
    token_input_shape: tuple[int, int, int] = (4, 27, 27)
    projector_type: str = "mlp1x_gelu"
    resampler_type: str = "perciver"
    num_output_tokens: int = 128
    resampler_depth: int = 1
    resampler_n_heads: int = 16
    resampler_head_dim: int = 96
    num_key_value_heads: int = 4
    ff_multi: int = 4

    def __post_init__(self):
        if not re.fullmatch(r"mlp[12]x_gelu|perceiver_mlp|conv2d_\d+x\d+", self.projector_type):
            raise ValueError(
                f"connector.projector_type {self.projector_type!r} is unknown; "
                f"known: {', '.join(PROJECTORS)}"
            )
        if self.resampler_type not in RESAMPLERS:
            raise ValueError(
                f"connector.resampler_type {self.resampler_type!r} is unknown; "
                f"known: {', '.join(RESAMPLERS)}"
            )
        if self.resampler_type == "avg":
            _ = self.pooled_side  # raises if the token count has no square grid

    @property
    def pooled_side(self) -> int:
        """Side of the pooled grid: time is kept, each step becomes side x side tokens."""
        frames = self.token_input_shape[0]
        side = math.isqrt(self.num_output_tokens // frames)
        if side * side * frames != self.num_output_tokens:
            raise ValueError(
                f"connector.num_output_tokens {self.num_output_tokens} must be {frames} (time "
                "steps) times a square for the avg resampler"
            )
        return side


class MLP(nnx.Module):
    """`mlpNx_gelu`: N linears with exact GELU between them (one linear: no activation)."""

    def __init__(self, din: int, dout: int, depth: int, **kw: Any):
        self.linears = nnx.List(
            [
                layers.linear(din if i == 0 else dout, dout, ("patch", "embed"), bias=True, **kw)
                for i in range(depth)
            ]
        )

    def __call__(self, x: Float[Array, "*b V"]) -> Float[Array, "*b D"]:
        x = self.linears[0](x)
        for linear in list(self.linears)[1:]:
            x = linear(jax.nn.gelu(x, approximate=False))
        return x


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), no biases."""

    def __init__(self, din: int, hidden: int, dout: int, *, din_axis: str = "embed", **kw: Any):
        gated = jax.nn.initializers.variance_scaling(0.4, "fan_in", "normal")
        down = jax.nn.initializers.variance_scaling(0.2, "fan_in", "normal")
        self.gate = layers.linear(din, hidden, (din_axis, "mlp"), bias=False, init=gated, **kw)
        self.up = layers.linear(din, hidden, (din_axis, "mlp"), bias=False, init=gated, **kw)
        self.down = layers.linear(hidden, dout, ("mlp", "embed"), bias=False, init=down, **kw)

    def __call__(self, x: Float[Array, "*b V"]) -> Float[Array, "*b D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Conv2D(nnx.Module):
    """`conv2d_KxK`: two bias-free convolutions per time step, stride = kernel, SiLU between."""

    def __init__(self, din: int, dout: int, kernel: int, **kw: Any):
        area = kernel * kernel
        self.kernel = kernel
        self.conv1 = layers.linear(din * area, dout, ("patch", "embed"), bias=False, **kw)
        self.conv2 = layers.linear(dout * area, dout, ("patch", "embed"), bias=False, **kw)

    def __call__(self, x: Float[Array, "N T h w V"]) -> Float[Array, "N T H W D"]:
        x = jax.nn.silu(self.conv1(space_to_depth(x, self.kernel)))
        return self.conv2(space_to_depth(x, self.kernel))


def space_to_depth(x: Float[Array, "*b h w c"], k: int) -> Float[Array, "*b H W k*k*c"]:
    """k x k neighbourhoods into channels (row, column, channel); a remainder is dropped."""
    *lead, h, w, c = x.shape
    x = x[..., : h // k * k, : w // k * k, :].reshape(*lead, h // k, k, w // k, k, c)
    return jnp.moveaxis(x, -4, -3).reshape(*lead, h // k, w // k, k * k * c)


class WeightedNorm(nnx.Module):
    """LayerNorm followed by a second elementwise gain (`wheight` in the checkpoint)."""

    def __init__(self, dim: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        normal = jax.nn.initializers.normal(0.02)
        self.norm = layers.LayerNorm(dim, 1e-5, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gain = layers.param(
            (dim,),
            ("norm",),
            lambda key, shape, dt: 1 + normal(key, shape, dt),
            dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        return self.norm(x) * self.gain[...].astype(x.dtype)


class PerceiverLayer(nnx.Module):
    """Latents attend to [context ; latents], then a gated MLP; both residual."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, **dtypes: Any):
        d, h, kw = c.text_hidden_size, c.resampler_head_dim, dict(dtypes, rngs=rngs)
        self.heads, self.kv_heads = c.resampler_n_heads, c.num_key_value_heads
        self.latents_norm = WeightedNorm(d, **kw)
        self.context_norm = WeightedNorm(d, **kw)
        self.q = layers.linear(d, self.heads * h, ("embed", "heads"), bias=False, **kw)
        self.k = layers.linear(d, self.kv_heads * h, ("embed", "kv_heads"), bias=False, **kw)
        self.v = layers.linear(d, self.kv_heads * h, ("embed", "kv_heads"), bias=False, **kw)
        self.out = layers.linear(self.heads * h, d, ("heads", "embed"), bias=False, **kw)
        self.mlp_norm = WeightedNorm(d, **kw)
        self.mlp = GatedMLP(d, c.ff_multi * d, d, **kw)

    def __call__(
        self, z: Float[Array, "N Q D"], context: Float[Array, "N S D"]
    ) -> tuple[Float[Array, "N Q D"], None]:
        n, q_len, _ = z.shape
        latents = self.latents_norm(z)
        keys = jnp.concatenate([self.context_norm(context), latents], axis=1)
        q = self.q(latents).reshape(n, q_len, self.heads, -1)
        k, v = (f(keys).reshape(n, keys.shape[1], self.kv_heads, -1) for f in (self.k, self.v))
        z = z + self.out(attention(q, k, v).reshape(n, q_len, -1))
        return z + self.mlp(self.mlp_norm(z)), None


class Perceiver(nnx.Module):
    """Perceiver resampler: [N, S, D] -> [N, Q, D]; no positions beyond the towers' own."""

    def __init__(self, c: Config, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        shape = (c.num_output_tokens, c.text_hidden_size)
        self.dtype = dtype
        self.latents = layers.param(
            shape, ("latents", "embed"), latents_init, dtype=param_dtype, rngs=rngs
        )
        self.layers = layers.stack(
            lambda r: PerceiverLayer(c, rngs=r, **kw), c.resampler_depth, rngs
        )
        self.norm = WeightedNorm(c.text_hidden_size, rngs=rngs, **kw)

    def __call__(self, x: Float[Array, "N S D"], *, remat: str = "none") -> Float[Array, "N Q D"]:
        latents = self.latents[...].astype(self.dtype)
        z = jnp.broadcast_to(latents, (x.shape[0], *latents.shape))
        z, _ = layers.fold(self.layers, z, x, remat=remat)
        return self.norm(z)


def latents_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Truncated normal around 0.5 with deviation 0.1, as the authors initialise latents."""
    return 0.5 + 0.1 * jax.random.truncated_normal(key, -5.0, 5.0, shape, dtype)


def average_pool(x: Float[Array, "N T h w D"], side: int) -> Float[Array, "N Q D"]:
    """Adaptive average pooling of each time step to side x side tokens."""
    rows, columns = (jnp.asarray(pooling_matrix(n, side), x.dtype) for n in x.shape[2:4])
    x = jnp.einsum("nthwd,ah,bw->ntabd", x, rows, columns)
    return x.reshape(x.shape[0], -1, x.shape[-1])


def pooling_matrix(size: int, bins: int) -> Float[np.ndarray, "bins size"]:
    """Row i averages positions floor(i*size/bins) .. ceil((i+1)*size/bins)."""
    matrix = np.zeros((bins, size))
    for i in range(bins):
        start, stop = i * size // bins, -(-(i + 1) * size // bins)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


class Connector(nnx.Module):
    """[N, S, V] fused features -> [N, Q, D] visual tokens, each clip by itself."""

    def __init__(
        self, c: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        v, d = c.vision_hidden_size, c.text_hidden_size
        self.config = c
        self.grid, self.dtype = c.token_input_shape, dtype
        if c.projector_type.startswith("conv2d"):
            self.proj = Conv2D(v, d, int(c.projector_type.rpartition("x")[2]), **kw)
        elif c.projector_type == "perceiver_mlp":
            self.proj = GatedMLP(v, c.ff_multi * d, d, din_axis="patch", **kw)
        else:
            self.proj = MLP(v, d, int(c.projector_type[3]), **kw)
        self.resampler = Perceiver(c, **kw) if c.resampler_type == "perciver" else None
        self.pooled_side = c.pooled_side if c.resampler_type == "avg" else 0

    def __call__(
        self, features: Float[Array, "N S V"], *, remat: str = "none"
    ) -> Float[Array, "N Q D"]:
        n = features.shape[0]
        x = features.astype(self.dtype).reshape(n, *self.grid, -1)
        x = constrain(self.proj(x), "clips", None, None, None, None)
        if self.resampler is None:
            return average_pool(x, self.pooled_side)
        return self.resampler(x.reshape(n, -1, x.shape[-1]), remat=remat)
