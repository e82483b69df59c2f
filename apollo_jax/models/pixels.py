# SPDX-License-Identifier: Apache-2.0
"""uint8 canvases to an encoder's normalised pixels, on the device.

N clips, F frames, S canvas side, R side it is resized to, I encoder image side. The exact host path
(bit for bit the official preprocessing) is `data_pipeline.transforms`; this one differs by
resampling rounding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from data_pipeline.transforms import FrameSpec


def prepare(
    frames: UInt8[Array, "N F S S 3"], geometry: Int[Array, "N 4"], spec: FrameSpec
) -> Float[Array, "N F I I 3"]:
    """Pad with the encoder's colour, resize the square, cut its middle, normalise; float32.

    Args:
      geometry: top, left, height, width of the picture inside the square.
      spec: size, statistics and resampling of the encoder.
    """
    x = jnp.where(
        inside(geometry, frames.shape[2])[:, None, ..., None],
        frames,
        jnp.asarray(spec.pad_colour, jnp.uint8),
    ).astype(jnp.float32)
    if spec.side != frames.shape[2]:
        x = resize(x, spec)
    x = x[:, :, spec.middle, spec.middle]
    mean, std = (jnp.asarray(v, jnp.float32) for v in (spec.mean, spec.std))
    return (x / 255.0 - mean) / std


def inside(geometry: Int[Array, "N 4"], side: int) -> jax.Array:
    """bool[N, S, S], True on the picture."""
    top, left, height, width = (geometry[:, i, None, None] for i in range(4))
    y, x = jnp.arange(side)[None, :, None], jnp.arange(side)[None, None, :]
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


def resize(x: Float[Array, "N F S S 3"], spec: FrameSpec) -> Float[Array, "N F R R 3"]:
    """Resize to spec.side in grey levels; PIL rounds them after the columns and after the rows."""
    n, f, side, _, _ = x.shape
    columns, both = (n, f, side, spec.side, 3), (n, f, spec.side, spec.side, 3)
    if spec.resample == "cv2_bilinear":
        return _rounded(_resize(x, both, "linear", antialias=False))
    if spec.resample == "torch_bicubic":
        return _resize(x, both, "cubic", antialias=True)
    method = "cubic" if spec.resample == "pil_bicubic" else "linear"
    x = _rounded(_resize(x, columns, method, antialias=True))
    return _rounded(_resize(x, both, method, antialias=True))


def _resize(x: jax.Array, shape: tuple[int, ...], method: str, *, antialias: bool) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST
    return jax.image.resize(x, shape, method, antialias=antialias, precision=precision)


def _rounded(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.floor(x + 0.5), 0.0, 255.0)  # halves go up, as in PIL and OpenCV
