# SPDX-License-Identifier: Apache-2.0
"""uint8 canvases to an encoder's normalised pixels, on the device: colours, padding, size, values.

N clips, F frames, S canvas side, P = S*S*3/2, R side it is resized to, I encoder image side.

The exact host path (bit for bit the official preprocessing) is `data_pipeline.transforms`; this one
differs from it by the rounding of the resampling.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

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


def to_rgb(
    frames: UInt8[Array, "N F S S 3"] | UInt8[Array, "N F P"], geometry: Int[Array, "N 4"]
) -> UInt8[Array, "N F S S 3"]:
    """Either layout of `Batch.frames` as RGB; planes become what libjpeg-turbo makes of them.

    Bit for bit: chroma is upsampled by its "fancy" triangle filter, 3/4 of the nearest sample and
    1/4 of the next along each side, the picture's edge repeated (jdsample.c), then its 16-bit
    fixed-point conversion follows (jdcolor.c; ITU-T T.871). Around the picture the values mean
    nothing.

    Upsampling is two small matrix products, with integers that bfloat16 and float32 hold exactly:
    on a TPU, interleaving even and odd columns moves six times the bytes.
    """
    if frames.ndim == 5:
        return frames
    n, f, p = frames.shape
    side = math.isqrt(p * 2 // 3)
    y = frames[..., : side * side].reshape(n, f, side, side).astype(jnp.int32)
    chroma = frames[..., side * side :].reshape(n, f, 2, side // 2, side // 2)
    top, left, height, width = (geometry[:, i, None] for i in range(4))
    narrow = width <= 4  # libjpeg only repeats their samples
    rows = triangle(top, height, narrow, side).astype(jnp.bfloat16)
    columns = triangle(left, width, narrow, side).astype(jnp.float32)  # the sums reach 1020
    x = jnp.einsum(
        "nij,nfcjk->nfcik", rows, chroma.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    x = jnp.einsum("nlk,nfcik->nfcil", columns, x, precision=jax.lax.Precision.HIGHEST)
    odd = ((jnp.arange(side) - left) % 2)[:, None, None, None]
    blue, red = jnp.moveaxis(((x.astype(jnp.int32) + 8 - odd) >> 4) - 128, 2, 0)
    half = 1 << 15
    rgb = (
        y + ((91881 * red + half) >> 16),
        y + ((-22554 * blue - 46802 * red + half) >> 16),
        y + ((116130 * blue + half) >> 16),
    )
    return jnp.clip(jnp.stack(rgb, axis=-1), 0, 255).astype(jnp.uint8)


def triangle(
    start: Int[Array, "N 1"], size: Int[Array, "N 1"], narrow: Bool[Array, "N 1"], side: int
) -> Int[Array, "N S s"]:
    """4 x the weights of the s = S / 2 chroma samples in each of S pixels along one side."""
    pixel = jnp.arange(side) - start  # counted from the picture's edge
    near = pixel // 2
    beside = jnp.clip(near + jnp.where(pixel % 2 == 0, -1, 1), 0, (size + 1) // 2 - 1)
    beside = jnp.where(narrow, near, beside)
    sample = jnp.arange(side // 2) - start[..., None] // 2
    is_near, is_beside = (sample == i[..., None] for i in (near, beside))
    return 3 * is_near.astype(jnp.int32) + is_beside.astype(jnp.int32)


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
