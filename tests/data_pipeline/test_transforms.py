# SPDX-License-Identifier: Apache-2.0
"""Host preprocessing, bit for bit against the published pixels."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.transforms import (
    FrameSpec,
    cubic_weights,
    fit_canvas,
    fit_size,
    pad_to_square,
    preprocess,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
FIXTURE = FIXTURES / "apollo-tiny-a"
SIGLIP = FrameSpec(30, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
INTERNVIDEO2 = FrameSpec(24, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "cv2_bilinear")
IMAGENET = (INTERNVIDEO2.mean, INTERNVIDEO2.std)
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
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


def published(name: str) -> tuple[np.ndarray, np.ndarray]:
    """An encoder's video [T, h, w, 3] and what its own preprocessing makes of it [T, S, S, 3]."""
    z = np.load(FIXTURES / "encoders" / name / "pixels.npz")
    return z["video"], z["pixel_values"][0].transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("name", "spec"),
    [("dinov2-a", FrameSpec(21, *IMAGENET, resize=24)), ("clip-a", FrameSpec(30, *OPENAI))],
)
def test_pixels_of_other_encoders_equal_the_published_ones(name, spec):
    video, expected = published(name)
    np.testing.assert_array_equal(preprocess(video, spec), expected)


def test_the_float_bicubic_is_neither_rounded_nor_clipped():
    video, expected = published("languagebind-image-a")
    ours = preprocess(video, FrameSpec(24, *OPENAI, "torch_bicubic"))
    assert ours.dtype == np.float32
    assert np.abs(ours - expected).max() <= 2e-6 * np.ptp(expected)
    mean, std = (np.array(values) for values in OPENAI)
    grey = (ours * std + mean) * 255
    assert np.abs(grey - np.round(grey)).max() > 0.4
    step = np.zeros((1, 40, 40, 3), np.uint8)
    step[:, :, 20:] = 255
    overshoot = preprocess(step, FrameSpec(16, (0, 0, 0), (1, 1, 1), "torch_bicubic"))
    assert overshoot.min() < -0.01
    assert overshoot.max() > 1.01


@pytest.mark.parametrize(("before", "after"), [(52, 24), (24, 52), (5, 3), (7, 7)])
def test_cubic_weights_interpolate(before, after):
    weights = cubic_weights(before, after)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-12)
    if before == after:
        np.testing.assert_array_equal(weights, np.eye(before))


def test_the_middle_is_cut_out_of_the_resized_square():
    frames = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
    whole, middle = (preprocess(frames, FrameSpec(s, *OPENAI, resize=24)) for s in (24, 21))
    np.testing.assert_array_equal(middle, whole[:, 1:22, 1:22])  # the odd pixel goes below
    with pytest.raises(ValueError, match="square of 24 pixels has no middle of 25"):
        FrameSpec(25, *OPENAI, resize=24)


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
