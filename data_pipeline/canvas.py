# SPDX-License-Identifier: Apache-2.0
"""Canvases: the squares that pictures are drawn on, in one of two layouts told by their shape.

n clips, F frames per clip, S side in pixels, h x w the picture:

    rgb      u8[n, F, S, S, 3]
    yuv420   u8[n, F, S*S*3//2]   Y as S x S, then Cb and Cr as S/2 x S/2, with full-range values

The picture is centred, its first row at top = (S - h) // 2, its first column at left likewise; its
ceil(h/2) x ceil(w/2) samples of Cb and Cr begin at top // 2 and left // 2. Around it are zeros;
the device puts the encoder's padding colour there (`apollo_jax.models.pixels`).
"""

import math

import numpy as np
import simplejpeg

from data_pipeline.jpeg_planes import decode_planes

LAYOUTS = ("rgb", "yuv420")
Picture = tuple[np.ndarray, ...]  # (RGB,) or (Y, Cb, Cr): views into one frame of a canvas


def frame_shape(layout: str, size: int) -> tuple[int, ...]:
    """Shape of one frame with a side of `size` pixels; ValueError for what cannot be."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if layout == "rgb":
        return size, size, 3
    if size % 2:
        raise ValueError(f"layout='yuv420' needs an even frame_size, not {size}")
    return (size * size * 3 // 2,)


def side(canvas: np.ndarray) -> int:
    """S of u8[n, F, S, S, 3] or u8[n, F, S*S*3//2]."""
    return canvas.shape[2] if canvas.ndim == 5 else math.isqrt(canvas.shape[2] * 2 // 3)


def planes_of(canvas: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """u8[..., S*S*3//2] -> views Y [..., S, S], Cb and Cr [..., S/2, S/2]."""
    lead, size = canvas.shape[:-1], math.isqrt(canvas.shape[-1] * 2 // 3)
    half, area = size // 2, size * size
    chroma = canvas[..., area:].reshape(*lead, 2, half, half)
    return canvas[..., :area].reshape(*lead, size, size), chroma[..., 0, :, :], chroma[..., 1, :, :]


def open_pictures(canvas: np.ndarray, height: int, width: int) -> tuple[np.ndarray, Picture]:
    """Where an h x w picture belongs, i32[4] top, left, height, width, and its views [n, F, ...].

    What lies around it becomes zero.
    """
    size = side(canvas)
    top, left = (size - height) // 2, (size - width) // 2
    geometry = np.array([top, left, height, width], np.int32)
    if canvas.ndim == 5:
        return geometry, (_cut(canvas, top, left, height, width),)
    luma, *chroma = planes_of(canvas)
    half = (top // 2, left // 2, -(-height // 2), -(-width // 2))
    return geometry, (
        _cut(luma, top, left, height, width),
        *(_cut(plane, *half) for plane in chroma),
    )


def _cut(plane: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    plane[:, :, :top] = plane[:, :, top + height :] = 0
    plane[:, :, :, :left] = plane[:, :, :, left + width :] = 0
    return plane[:, :, top : top + height, left : left + width]


def draw_jpeg(jpeg: memoryview | bytes, picture: Picture) -> None:
    """Decodes a JPEG of exactly the picture's size; ValueError for another size or damage.

    Planes come from 4:2:0 JPEGs alone: then they are what the JPEG holds, and RGB made of them on
    the device is what libjpeg-turbo makes of it.
    """
    if len(picture) == 3:
        return decode_planes(jpeg, picture)
    (target,) = picture
    # Full-width pictures are contiguous rows of the canvas: no copy is needed.
    whole = simplejpeg.decode_jpeg(jpeg, buffer=target if target.flags.c_contiguous else None)
    if whole.shape != target.shape:
        raise ValueError(f"JPEG of {whole.shape} where {target.shape} was stored")
    if not target.flags.c_contiguous:
        target[:] = whole


def copy_picture(source: Picture, target: Picture) -> None:
    for a, b in zip(source, target, strict=True):
        b[:] = a
