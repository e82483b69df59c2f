# SPDX-License-Identifier: Apache-2.0
"""The device pixel path against the exact host path, for every resize filter and with a crop."""

import jax.numpy as jnp
import numpy as np
import pytest

from apollo_jax.models import pixels
from data_pipeline.transforms import FrameSpec, preprocess

STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Filter -> largest difference in grey levels, and the largest share of pixels off by one level.
ALLOWED = {
    "pil_bicubic": (1.01, 0.01),
    "pil_bilinear": (1.01, 0.02),  # 52 to 24 gives many exact halves, which float32 misses
    "cv2_bilinear": (1.01, 0.15),
    "torch_bicubic": (1e-3, 0.0),
}


@pytest.mark.parametrize("resample", ALLOWED)
@pytest.mark.parametrize("sides", [(24, 24), (21, 24), (30, 64)])
def test_the_device_follows_the_host(resample, sides):
    size, side = sides
    frames = np.random.default_rng(0).integers(0, 256, (2, 36, 52, 3), np.uint8)
    canvas = np.zeros((1, 2, 52, 52, 3), np.uint8)  # square at the picture's long side
    canvas[0, :, 8:44] = frames
    spec = FrameSpec(size, *STATISTICS, resample, resize=side)
    geometry = jnp.array([[8, 0, 36, 52]])
    ours = np.asarray(pixels.prepare(jnp.asarray(canvas), geometry, spec))[0]
    levels = np.abs(ours - preprocess(frames, spec)) * np.asarray(spec.std) * 255
    largest, share = ALLOWED[resample]
    assert levels.max() < largest
    assert (levels > 0.5).mean() <= share


def test_a_canvas_of_the_right_side_is_only_cut():
    canvas = np.random.default_rng(0).integers(0, 256, (1, 2, 24, 24, 3), np.uint8)
    spec = FrameSpec(21, *STATISTICS, resize=24)
    ours = np.asarray(pixels.prepare(jnp.asarray(canvas), jnp.array([[0, 0, 24, 24]]), spec))[0]
    np.testing.assert_allclose(ours, preprocess(canvas[0], spec), atol=1e-6)
