# SPDX-License-Identifier: Apache-2.0
"""The device pixel path against the exact host path, for every resize filter and with a crop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apollo_jax.models import internvideo2, pixels, siglip
from apollo_jax.models.vision_tower import VisionTower
from data_pipeline import canvas
from data_pipeline.transforms import FrameSpec, preprocess

STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Filter -> largest difference in grey levels, and the largest share of pixels off by one level.
ALLOWED = {
    "pil_bicubic": (1.01, 0.001),
    "pil_bilinear": (1.01, 0.02),  # 52 to 24 gives many exact halves, which float32 misses
    "cv2_bilinear": (1.01, 0.002),  # but for weights between two steps of OpenCV's 11 bits, none
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


def natural(height, width):
    """u8[1, h, w, 3] with the spectrum of photographs."""
    rng = np.random.default_rng(height * width)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    scale = 1 / np.maximum(np.hypot(y, x), 1 / max(height, width))
    light, *tints = np.fft.irfft2(
        scale * np.exp(2j * np.pi * rng.random((3, *scale.shape))), (height, width)
    )
    frame = np.stack([light + 0.3 * tints[0], light, light + 0.3 * tints[1]], axis=-1)
    return (120 + 50 * frame / frame.std()).clip(0, 255).astype(np.uint8)[None]


@pytest.fixture(scope="module")
def encoders():
    """Tiny encoders of random but fixed weights, shaped and fed as the released ones."""
    towers = {
        "siglip": siglip.Config(
            hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            image_size=384, patch_size=32,
        ),
        "internvideo2": internvideo2.Config(
            d_model=64, depth=2, num_heads=4, mlp_ratio=2.0, img_size=224, patch_size=28,
            init_values=1.0,
        ),
    }  # fmt: skip
    graphdef, weights = nnx.split(VisionTower(towers, rngs=nnx.Rngs(0)))
    features = jax.jit(lambda weights, x: nnx.merge(graphdef, weights).features(x))
    return towers, partial(features, weights)


# Largest difference in grey levels, share of values that differ, features' relative distance.
RELEASED = {"siglip": (1.01, 1e-4, 2e-4), "internvideo2": (0.01, 0.0, 1e-5)}


@pytest.mark.parametrize("size", [(216, 384), (384, 384), (384, 215), (287, 383), (100, 150)])
def test_the_released_encoders_see_what_the_host_prepares(encoders, size):
    towers, features_of = encoders
    frames = natural(*size)
    canvases = np.zeros((1, 4, 384, 384, 3), np.uint8)
    geometry, (views,) = canvas.open_pictures(canvases, *size)
    views[:] = frames
    prepare = jax.jit(pixels.prepare, static_argnums=2)
    ours, theirs = {}, {}
    for name, tower in towers.items():
        spec = tower.frame_spec
        ours[name] = prepare(jnp.asarray(canvases), jnp.asarray(geometry[None]), spec)
        theirs[name] = jnp.asarray(preprocess(frames, spec).repeat(4, 0)[None])
        levels = np.abs(ours[name] - theirs[name]) * np.asarray(spec.std) * 255
        largest, share, _ = RELEASED[name]
        assert levels.max() < largest, name
        assert (levels > 0.5).mean() <= share, name
    ours, theirs = features_of(ours), features_of(theirs)
    for name, features in theirs.items():
        apart = np.linalg.norm(ours[name] - features) / np.linalg.norm(features)
        assert apart < RELEASED[name][2], name


def test_a_slot_without_a_picture_is_of_the_padding_colour():
    spec = FrameSpec(16, *STATISTICS)
    ours = pixels.prepare(jnp.ones((1, 1, 24, 24, 3), jnp.uint8), jnp.zeros((1, 4), int), spec)
    empty = (np.array(spec.pad_colour) / 255 - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(ours, np.broadcast_to(empty, ours.shape), atol=1e-6)
