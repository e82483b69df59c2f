# SPDX-License-Identifier: Apache-2.0
"""The vision tower: encoders side by side on one grid, channels concatenated (paper Sec 4.2).

N clips, F frames per clip, I an encoder's image side, (T, H, W) the common grid, D channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from apollo_jax.models import (
    clip,
    dinov2,
    internvideo2,
    languagebind,
    siglip,
    siglip2,
    videomae,
    vjepa,
    vjepa2,
)
from apollo_jax.sharding import constrain

TowerConfig = (
    siglip.Config
    | internvideo2.Config
    | clip.Config
    | languagebind.Config
    | dinov2.Config
    | videomae.Config
    | vjepa.Config
    | vjepa2.Config
    | siglip2.Config
)
TOWERS = {
    "siglip": siglip.SigLIP,
    "internvideo2": internvideo2.InternVideo2,
    "clip": clip.CLIP,
    "languagebind": languagebind.LanguageBindVideo,
    "dinov2": dinov2.DINOv2,
    "videomae": videomae.VideoMAE,
    "vjepa": vjepa.VJEPA,
    "vjepa2": vjepa2.VJEPA2,
    "siglip2": siglip2.SigLIP2,
}


def common_grid(towers: dict[str, TowerConfig]) -> tuple[int, int, int]:
    """The grid all features are brought to: (max T, max side, max side)."""
    grids = [t.grid for t in towers.values()]
    side = max(g[1] for g in grids)
    return max(g[0] for g in grids), side, side


class VisionTower(nnx.Module):
    """{name: [N, F, I, I, 3] normalised pixels} -> [N, T*H*W, D] fused features."""

    def __init__(self, towers: dict[str, TowerConfig], *, rngs: nnx.Rngs, **dtypes: Any):
        self.names = tuple(towers)
        self.grid = common_grid(towers)
        self.times = tuple(t.grid[0] for t in towers.values())
        self.frames = tuple(getattr(t, "num_frames", 1) for t in towers.values())
        self.towers = nnx.List([TOWERS[t.kind](t, rngs=rngs, **dtypes) for t in towers.values()])

    def __call__(
        self, pixels: dict[str, Float[Array, "N F I I 3"]], *, remat: str = "none"
    ) -> Float[Array, "N S D"]:
        features = self.features(pixels, remat=remat)
        fused = jnp.concatenate([self.align(f) for f in features.values()], axis=-1)
        fused = constrain(fused, "clips", None, None, None, None)
        return fused.reshape(fused.shape[0], -1, fused.shape[-1])

    def features(
        self, pixels: dict[str, Float[Array, "N F I I 3"]], *, remat: str = "none"
    ) -> dict[str, Float[Array, "N t h w d"]]:
        """Each tower's own features on its own grid."""
        missing = [n for n in self.names if n not in pixels]
        if missing:
            raise ValueError(f"pixels lack towers {missing}; this model has {list(self.names)}")
        out = {}
        for name, tower, frames in zip(self.names, self.towers, self.frames, strict=True):
            x = constrain(pixels[name], "clips", None, None, None, None)
            wanted = self.grid[0] if frames == 1 else frames  # an image tower follows the grid
            out[name] = tower(match_frames(x, wanted), remat=remat)
        return out

    def align(self, features: Float[Array, "N t h w d"]) -> Float[Array, "N T H W d"]:
        """Trilinear interpolation to the common grid, half-pixel centres, in float32."""
        if features.shape[1:4] == self.grid:
            return features
        shape = (features.shape[0], *self.grid, features.shape[-1])
        resized = jax.image.resize(
            features.astype(jnp.float32),
            shape,
            "linear",
            antialias=False,
            precision=jax.lax.Precision.HIGHEST,
        )
        return resized.astype(features.dtype)


def match_frames(x: Float[Array, "N F *i"], wanted: int) -> Float[Array, "N {wanted} *i"]:
    """The official rule: repeat a single frame, stride down a multiple, refuse the rest."""
    frames = x.shape[1]
    if frames == wanted:
        return x
    if frames == 1:
        return jnp.repeat(x, wanted, axis=1)
    if frames % wanted == 0:
        return x[:, :: frames // wanted]
    raise ValueError(
        f"clips have {frames} frames but the tower takes {wanted}: use {wanted}, a multiple or 1"
    )
