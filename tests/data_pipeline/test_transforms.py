# SPDX-License-Identifier: Apache-2.0
"""Host preprocessing, bit for bit against the published pixels."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.transforms import FrameSpec, fit_canvas, fit_size, pad_to_square, preprocess

FIXTURE = Path(__file__).parents[1] / "fixtures" / "apollo-tiny-a"
SIGLIP = FrameSpec(30, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
INTERNVIDEO2 = FrameSpec(24, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "cv2_bilinear")
# Ours is [T, H, W, 3]; the published layouts per clip are [T, 3, H, W] and [3, T, H, W].
LAYOUT = {"siglip": (0, 3, 1, 2), "internvideo2": (3, 0, 1, 2)}


@pytest.mark.parametrize(("tower", "spec"), [("siglip", SIGLIP), ("internvideo2", INTERNVIDEO2)])
def test_pixels_equal_the_published_ones(tower, spec):
    z = np.load(FIXTURE / "fixture.npz")
    clips = [preprocess(z["video"][clip], spec) for clip in z["clip_indices"]]
    ours = np.stack(clips).transpose(0, *(axis + 1 for axis in LAYOUT[tower]))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, z[f"pixel_values_{tower}"])

    z = np.load(FIXTURE / "image.npz")
    ours = preprocess(np.repeat(z["image"][None], 4, 0), spec).transpose(LAYOUT[tower])
    np.testing.assert_array_equal(ours[None], z[f"pixel_values_{tower}"])


def test_every_grey_level_is_normalised_as_published():
    """The published SigLIP code multiplies by 1/255 in float64, then rounds."""
    levels = np.arange(256, dtype=np.uint8)
    frames = np.repeat(levels, 3).reshape(1, 16, 16, 3)
    spec = FrameSpec(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    scaled = (levels.astype(np.float64) * 0.00392156862745098).astype(np.float32)
    expected = (scaled - np.float32(0.5)) / np.float32(0.5)
    np.testing.assert_array_equal(preprocess(frames, spec)[0, ..., 0].ravel(), expected)


def test_the_pad_colour_is_truncated():
    assert SIGLIP.pad_colour == (127, 127, 127)
    assert INTERNVIDEO2.pad_colour == (123, 116, 103)


def test_the_picture_is_centred_with_the_odd_pixel_below():
    square = pad_to_square(np.full((2, 5, 3), 9, np.uint8), (1, 2, 3))
    assert square.shape == (5, 5, 3)
    assert (square[1:3] == 9).all()
    assert (square[[0, 3, 4]] == (1, 2, 3)).all()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((720, 1280), (216, 384)),
        ((1280, 720), (384, 216)),
        ((100, 60), (100, 60)),  # never upscaled
        ((37, 53), (36, 52)),  # but even
        ((1000, 3), (384, 2)),
    ],
)
def test_fit_size(source, expected):
    height, width = source
    assert fit_size(height, width, 384) == expected
    frame = np.zeros((*source, 3), np.uint8)
    assert fit_canvas(frame, 384).shape == (*expected, 3)


def test_a_frame_that_fits_is_returned_as_it_is():
    frame = np.random.default_rng(0).integers(0, 256, (36, 52, 3), np.uint8)
    assert fit_canvas(frame, 52) is frame


def test_an_unknown_filter_is_named():
    with pytest.raises(ValueError, match=r"pil_bicubc.*cv2_bilinear"):
        FrameSpec(30, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "pil_bicubc")
