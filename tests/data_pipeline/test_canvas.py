# SPDX-License-Identifier: Apache-2.0
"""Colour planes on canvases: exactly what the JPEG holds, by either decoder, and only there."""

import cv2
import numpy as np
import pytest
import simplejpeg

from data_pipeline import canvas, jpeg_planes
from data_pipeline.batch import empty_batch

SIZES = [(64, 64), (36, 64), (64, 36), (35, 64), (36, 63), (63, 35), (20, 24), (6, 64), (3, 5)]


@pytest.fixture(params=["libturbojpeg", "simplejpeg"])
def decoder(request, monkeypatch):
    if request.param == "simplejpeg":
        monkeypatch.setattr(jpeg_planes, "turbojpeg", lambda: None)
    elif jpeg_planes.turbojpeg() is None:
        pytest.skip("needs the system's libturbojpeg")


def picture_of(height, width, seed=0):
    """Smooth colours with noise on top."""
    rng = np.random.default_rng(seed)
    smooth = cv2.resize(rng.integers(0, 256, (3, 4, 3), np.uint8), (width, height))
    noise = rng.integers(-40, 40, (height, width, 3))
    return (smooth + noise).clip(0, 255).astype(np.uint8)


def jpeg_of(height, width, subsampling="420"):
    return simplejpeg.encode_jpeg(picture_of(height, width), 90, colorsubsampling=subsampling)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_planes_are_those_of_the_jpeg(height, width):
    jpeg = jpeg_of(height, width)
    frames = np.full((1, 2, 64 * 64 * 3 // 2), 9, np.uint8)
    geometry, pictures = canvas.open_pictures(frames, height, width)
    for slot in ((0, 0), (0, 1)):
        canvas.draw_jpeg(memoryview(jpeg), tuple(p[slot] for p in pictures))
    top, left = (64 - height) // 2, (64 - width) // 2
    assert geometry.tolist() == [top, left, height, width]
    luma, blue, red = canvas.planes_of(frames[0, 1])
    grey = simplejpeg.decode_jpeg(jpeg, "GRAY")[..., 0]
    np.testing.assert_array_equal(luma[top : top + height, left : left + width], grey)
    # libjpeg repeats chroma when it is told to hurry; Cb is what blue differs from luma by.
    hurried = simplejpeg.decode_jpeg(jpeg, fastupsample=True)[::2, ::2].astype(int)
    half = (slice(top // 2, top // 2 + len(hurried)), slice(left // 2, left // 2 + len(hurried[0])))
    for plane, channel, factor in ((blue, 2, 1.772), (red, 0, 1.402)):
        made = grey[::2, ::2] + np.rint((plane[half].astype(float) - 128) * factor)
        assert np.abs(made.clip(0, 255) - hurried[..., channel]).max() <= 1
    np.testing.assert_array_equal(frames[0, 0], frames[0, 1])
    for plane, place in ((luma, pictures[0]), (blue, pictures[1]), (red, pictures[2])):
        place[:] = 0
        assert not plane.any()


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    ("jpeg", "message"),
    [
        (jpeg_of(36, 64, "444"), "444"),
        (jpeg_of(36, 64, "422"), "422"),
        (jpeg_of(64, 64), r"\(64, 64, 'YCbCr', '420'\)"),
        (jpeg_of(36, 64)[:-200], "."),
        (b"no JPEG", "."),
    ],
)
def test_other_jpegs_are_refused(jpeg, message):
    _, pictures = canvas.open_pictures(np.zeros((1, 1, 64 * 64 * 3 // 2), np.uint8), 36, 64)
    with pytest.raises(ValueError, match=message):
        canvas.draw_jpeg(jpeg, tuple(p[0, 0] for p in pictures))


def test_both_decoders_agree(monkeypatch):
    if jpeg_planes.turbojpeg() is None:
        pytest.skip("needs the system's libturbojpeg")
    drawn = []
    for _ in range(2):
        frames = np.zeros((1, 1, 64 * 64 * 3 // 2), np.uint8)
        _, pictures = canvas.open_pictures(frames, 36, 64)
        canvas.draw_jpeg(jpeg_of(36, 64), tuple(p[0, 0] for p in pictures))
        drawn.append(frames)
        monkeypatch.setattr(jpeg_planes, "turbojpeg", lambda: None)
    np.testing.assert_array_equal(*drawn)


def test_layouts_are_told_by_their_shape():
    assert canvas.side(empty_batch(1, 8, 1, 4, 64).frames[0]) == 64
    assert canvas.side(empty_batch(1, 8, 1, 4, 64, "yuv420").frames[0]) == 64
    with pytest.raises(ValueError, match="'yuv' is not one of rgb, yuv420"):
        empty_batch(1, 8, 1, 4, 64, "yuv")
    with pytest.raises(ValueError, match="even frame_size, not 63"):
        empty_batch(1, 8, 1, 4, 63, "yuv420")
