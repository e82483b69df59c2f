# SPDX-License-Identifier: Apache-2.0
"""Colour planes become RGB on the device, bit for bit as libjpeg-turbo decodes the same JPEG."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simplejpeg

from apollo_jax.models import pixels
from data_pipeline import canvas

S = 64
convert = jax.jit(pixels.to_rgb)
# Both sides even, either odd, smaller than the canvas, and so narrow that libjpeg does not smooth.
SIZES = [
    (64, 64), (36, 64), (64, 36), (35, 64), (36, 63), (63, 35), (61, 61), (20, 24), (3, 5), (9, 6),
    (64, 4), (64, 3), (2, 64), (1, 1),
]  # fmt: skip


def jpeg_of(kind: str, height: int, width: int) -> bytes:
    rng = np.random.default_rng(height * S + width)
    if kind == "noise":
        picture = rng.integers(0, 256, (height, width, 3), np.uint8)
    else:
        colours = rng.integers(0, 256, (3, 4, 3), np.uint8)
        picture = cv2.resize(colours, (width, height), interpolation=cv2.INTER_CUBIC)
    return simplejpeg.encode_jpeg(picture, 90, colorsubsampling="420")


@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_the_device_decodes_as_libjpeg_does(kind):
    jpegs = [jpeg_of(kind, *size) for size in SIZES]
    planes = np.full((len(SIZES), 1, S * S * 3 // 2), 200, np.uint8)
    geometry = np.zeros((len(SIZES), 4), np.int32)
    for clip, (jpeg, size) in enumerate(zip(jpegs, SIZES, strict=True)):
        geometry[clip], views = canvas.open_pictures(planes[clip : clip + 1], *size)
        canvas.draw_jpeg(jpeg, tuple(view[0, 0] for view in views))
    rgb = np.asarray(convert(planes, geometry))[:, 0]
    for square, (top, left, height, width), jpeg in zip(rgb, geometry, jpegs, strict=True):
        ours = square[top : top + height, left : left + width]
        np.testing.assert_array_equal(ours, simplejpeg.decode_jpeg(jpeg), f"{height}x{width}")


def test_every_colour_is_converted_as_libjpeg_does():
    """Y, Cb and Cr by themselves: flat JPEGs of every chroma, quality 100."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (64, 3), np.uint8)
    flat = np.broadcast_to(colours[:, None, None], (64, S, S, 3))
    jpegs = [
        simplejpeg.encode_jpeg(np.ascontiguousarray(f), 100, colorsubsampling="420") for f in flat
    ]
    planes = np.zeros((64, 1, S * S * 3 // 2), np.uint8)
    _, views = canvas.open_pictures(planes, S, S)
    for clip, jpeg in enumerate(jpegs):
        canvas.draw_jpeg(jpeg, tuple(view[clip, 0] for view in views))
    rgb = np.asarray(convert(planes, np.tile(np.array([0, 0, S, S], np.int32), (64, 1))))[:, 0]
    np.testing.assert_array_equal(rgb, [simplejpeg.decode_jpeg(j) for j in jpegs])


def test_an_rgb_canvas_stays():
    frames = jnp.zeros((1, 2, 8, 8, 3), jnp.uint8)
    assert pixels.to_rgb(frames, jnp.zeros((1, 4), jnp.int32)) is frames
