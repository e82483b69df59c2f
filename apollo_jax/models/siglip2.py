# SPDX-License-Identifier: Apache-2.0
"""SigLIP 2 NaFlex image tower (arXiv 2502.14786, Sec 2.4.2): any aspect ratio in so many patches.

SigLIP's blocks on flattened patches; the position table is resized to the grid of each image, and
padding is masked. As Apollo's encoder it sees squares, of which no patch is padding. SigLIP 2 at a
fixed resolution is `siglip`.

N clips, F frames, P side of the patch grid, I image side (pixels), B images, S patches per image,
K values of a patch, T side of the position table, D stream.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from apollo_jax.models import layers, siglip
from data_pipeline.transforms import FrameSpec


@dataclass(frozen=True)
class Config:
    """Published fields of a SigLIP 2 NaFlex vision tower; defaults are SO400M/16."""

    kind: Literal["siglip2"] = "siglip2"
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    patch_size: int = 16
    num_patches: int = 256  # entries of the position table, a square
    max_num_patches: int = 256  # of one image: the resolution, which may be chosen
    layer_norm_eps: float = 1e-6
    feature_layer: int = -2  # hidden_states index; only the layers below it are built
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        if math.isqrt(self.num_patches) ** 2 != self.num_patches:
            raise ValueError(f"num_patches {self.num_patches} is not the square of a side")

    @classmethod
    def base(cls) -> "Config":
        """google/siglip2-base-patch16-naflex."""
        return cls(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
        )

    @classmethod
    def so400m(cls) -> "Config":
        """google/siglip2-so400m-patch16-naflex."""
        return cls()

    @property
    def built_layers(self) -> int:
        return self.num_hidden_layers + 1 + self.feature_layer

    @property
    def table_side(self) -> int:
        return math.isqrt(self.num_patches)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Feature grid (T, H, W) of one square frame, the largest within max_num_patches."""
        side = math.isqrt(self.max_num_patches)
        return 1, side, side

    @property
    def image_size(self) -> int:
        return self.grid[1] * self.patch_size

    @property
    def frame_spec(self) -> FrameSpec:
        return FrameSpec(self.image_size, self.image_mean, self.image_std, "pil_bilinear")

    @property
    def block(self) -> siglip.Config:
        """Its blocks are SigLIP's."""
        return siglip.Config(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            layer_norm_eps=self.layer_norm_eps,
        )


class SigLIP2(nnx.Module):
    """[N, F, I, I, 3] normalised pixels -> [N, F, P, P, D] features of `feature_layer`."""

    def __init__(
        self, c: Config, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.config = c
        self.patch_size, self.table_side, self.dtype = c.patch_size, c.table_side, dtype
        self.patch_embed = layers.linear(
            3 * c.patch_size**2, c.hidden_size, ("patch", "embed"), bias=True, rngs=rngs, **kw
        )
        self.positions = nnx.Param(
            jnp.asarray(siglip.sincos_2d(c.table_side, c.hidden_size), param_dtype),
            **layers.axes("position", "embed"),
        )
        self.layers = layers.stack(
            lambda r: siglip.Block(c.block, rngs=r, **kw), c.built_layers, rngs
        )

    def __call__(
        self, pixels: Float[Array, "N F I I 3"], *, remat: str = "none"
    ) -> Float[Array, "N F P P D"]:
        patches = siglip.patchify(pixels, self.patch_size)
        n, f, rows, columns, k = patches.shape
        shape = jnp.array([[rows, columns]])  # of every frame
        x = self.encode(patches.reshape(n * f, rows * columns, k), None, shape, remat=remat)
        return x.reshape(n, f, rows, columns, -1)

    def encode(
        self,
        patches: Float[Array, "B S K"],
        mask: Bool[Array, "B S"] | None,
        spatial_shapes: Int[Array, "#B 2"],
        *,
        remat: str = "none",
    ) -> Float[Array, "B S D"]:
        """Features of images with any aspect ratio, padded to S patches.

        Args:
          patches: flattened row, column, channel; images row by row.
          mask: True on real patches, None if all are.
          spatial_shapes: patch rows and columns of each image.
        """
        weights = position_weights(spatial_shapes, patches.shape[1], self.table_side)
        table = self.positions[...].astype(jnp.float32)
        positions = jnp.einsum("bst,td->bsd", weights, table, precision=jax.lax.Precision.HIGHEST)
        x = self.patch_embed(patches.astype(self.dtype)) + positions.astype(self.dtype)
        seen = None if mask is None else mask[:, None]
        x, _ = layers.fold(self.layers, x, seen, remat=remat)
        return x


def position_weights(
    spatial_shapes: Int[Array, "B 2"], length: int, side: int
) -> Float[Array, "B S T*T"]:
    """What each entry of a square table adds to each of `length` patches: bilinear, antialiased.

    Padding takes the position of the first patch.
    """
    rows, columns = spatial_shapes[:, :1], spatial_shapes[:, 1:]
    patch = jnp.arange(length)[None]
    patch = jnp.where(patch < rows * columns, patch, 0)
    row, column = (
        axis_weights(patch // columns, rows, side),
        axis_weights(patch % columns, columns, side),
    )
    return (row[..., :, None] * column[..., None, :]).reshape(*patch.shape, side * side)


def axis_weights(
    index: Int[Array, "B S"], size: Int[Array, "B 1"], side: int
) -> Float[Array, "B S T"]:
    """Resampling of one axis from `side` entries to `size`, at `index`: a triangle, half-pixel."""
    scale = side / size.astype(jnp.float32)
    centre = (index.astype(jnp.float32) + 0.5) * scale
    distance = jnp.abs(jnp.arange(side, dtype=jnp.float32) + 0.5 - centre[..., None])
    weights = jnp.maximum(0.0, 1 - distance / jnp.maximum(1.0, scale)[..., None])
    return weights / weights.sum(axis=-1, keepdims=True)
