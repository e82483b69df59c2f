# SPDX-License-Identifier: Apache-2.0
"""uint8 canvases to an encoder's normalised pixels, on the device: colours, padding, size, values.

N clips, F frames, S canvas side, P = S*S*3/2, R side it is resized to, I encoder image side.

`prepare` is the exact host path (`data_pipeline.transforms`, bit for bit the official one) but for
the rounding of the resampling. Largest difference in grey levels, and share of values that differ,
of pictures with a natural spectrum, for any geometry (float32; a CPU):

    384 -> 384                     0           nothing is resampled
    pil_bicubic    384 -> 224      1, 0.01 %   also 287x383 or 100x150 -> 384
    pil_bilinear   384 -> 224      1, 1 %
    cv2_bilinear   384 -> 224      0           1, 0.1 % for 100x150 -> 224
    torch_bicubic  384 -> 224      0.001       never rounded

In features of small SigLIP and InternVideo2 of fixed random weights, the relative distance (L2) is
3e-7 where the values are the same, 3e-5 at most elsewhere. PIL's and torch's filters are
antialiased, wider by the factor of reduction; OpenCV's is not.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from data_pipeline.transforms import FrameSpec


def prepare(
    frames: UInt8[Array, "N F S S 3"], geometry: Int[Array, "N 4"], spec: FrameSpec
) -> Float[Array, "N F I I 3"]:
    """Pad to a square with the encoder's colour, resize it, cut its middle, normalise; float32.

    The square is as large as the picture's longer side: smaller pictures than the canvas grow.

    Args:
      geometry: top, left, height, width of the picture on the canvas.
      spec: size, statistics and resampling of the encoder.
    """
    x = jnp.where(
        inside(geometry, frames.shape[2])[:, None, ..., None],
        frames,
        jnp.asarray(spec.pad_colour, jnp.uint8),
    ).astype(jnp.float32)
    x = resize(x, geometry, spec)[:, :, spec.middle, spec.middle]
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


def resize(
    x: Float[Array, "N F S S 3"], geometry: Int[Array, "N 4"], spec: FrameSpec
) -> Float[Array, "N F R R 3"]:
    """Each picture's square to spec.side, in grey levels, columns first as PIL and OpenCV do."""
    top, left, height, width = (geometry[:, i, None, None] for i in range(4))
    length = jnp.maximum(jnp.maximum(height, width), 1)  # 1: an empty slot has no picture
    rows, columns = (
        Axis(start - (length - size) // 2, length, x.shape[2], spec.side)
        for start, size in ((top, height), (left, width))
    )
    if spec.resample == "cv2_bilinear":
        return opencv_bilinear(x, rows, columns)
    x = _along_columns(filtered(columns, spec.resample), x)
    x = _rounded(x) if spec.resample.startswith("pil") else x
    x = _along_rows(filtered(rows, spec.resample), x)
    return x if spec.resample == "torch_bicubic" else _rounded(x)


class Axis(NamedTuple):
    """`length` of S = `before` pixels, beginning at `start`, that become R = `after`."""

    start: Int[Array, "N 1 1"]
    length: Int[Array, "N 1 1"]
    before: int
    after: int

    def numbers(self) -> tuple[Int[Array, "N 1 S"], Int[Array, "R 1"]]:
        """Of the pixels before, counted from the start, and after."""
        return jnp.arange(self.before) - self.start, jnp.arange(self.after)[:, None]


def filtered(axis: Axis, resample: str) -> Float[Array, "N R S"]:
    """Weights of PIL's and torch's antialiased filters, which end with the square."""
    pixel, out = axis.numbers()
    apart = jnp.abs((2 * pixel + 1) * axis.after - (2 * out + 1) * axis.length)  # exact
    x = apart / (2 * jnp.maximum(axis.length, axis.after))
    weights = _cubic(x) if resample.endswith("bicubic") else jnp.maximum(1 - x, 0.0)
    weights = jnp.where((pixel >= 0) & (pixel < axis.length), weights, 0.0)
    return weights / weights.sum(axis=-1, keepdims=True)


def opencv_bilinear(
    x: Float[Array, "N F S S 3"], rows: Axis, columns: Axis
) -> Float[Array, "N F R R 3"]:
    """cv2.INTER_LINEAR of uint8, not antialiased: weights of 11 bits, truncated between."""
    left, right, near, far = _two_taps(columns)
    x = _along_columns(near * left + far * right, x)  # integers below 2**20, exact in float32
    x = jnp.floor(x / 16)
    above, below, near, far = _two_taps(rows)
    levels = 0
    for picked, weight in ((above, near), (below, far)):
        rows_of_x = _along_rows(picked, x).astype(jnp.int32)
        levels += (rows_of_x * weight.astype(jnp.int32)[:, None, :, :, None]) >> 16
    return jnp.asarray((levels + 2) >> 2, jnp.float32)


def _two_taps(axis: Axis) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Which two pixels make one, f32[N, R, S] of 0 and 1, and weights f32[N, R, 1] of 2048."""
    pixel, out = axis.numbers()
    first, rest = jnp.divmod((2 * out + 1) * axis.length - axis.after, 2 * axis.after)
    last = axis.length - 1
    share = jnp.where((first < 0) | (first >= last), 0.0, rest / (2 * axis.after))
    first = jnp.clip(first, 0, last)
    picked = (pixel == first, pixel == jnp.minimum(first + 1, last))
    one, two = (p.astype(jnp.float32) for p in picked)
    return one, two, jnp.round((1 - share) * 2048), jnp.round(share * 2048)


def _along_columns(weights: Float[Array, "N R S"], x: jax.Array) -> jax.Array:
    return jnp.einsum("njk,nfikc->nfijc", weights, x, precision=jax.lax.Precision.HIGHEST)


def _along_rows(weights: Float[Array, "N R S"], x: jax.Array) -> jax.Array:
    return jnp.einsum("nji,nfikc->nfjkc", weights, x, precision=jax.lax.Precision.HIGHEST)


def _cubic(x: jax.Array) -> jax.Array:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def _rounded(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.floor(x + 0.5), 0.0, 255.0)  # halves go up, as in PIL and OpenCV
