# SPDX-License-Identifier: Apache-2.0
"""VideoMAE, V-JEPA and V-JEPA 2 against what the published code computes from the fixtures."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from apollo_jax.checkpoints.pretrained import from_pretrained
from apollo_jax.checkpoints.rules import videomae as videomae_rules
from apollo_jax.models import apollo, videomae, vjepa, vjepa2
from apollo_jax.models.vision_tower import TOWERS, VisionTower
from data_pipeline.transforms import preprocess

FIXTURES = Path(__file__).parents[2] / "fixtures" / "encoders"
VIDEOMAE, VJEPA, VJEPA2 = "videomae-a", "vjepa-a", "vjepa2-a"


def arrays(name: str) -> dict:
    """The fixture's arrays, pixels as [N, F, I, I, 3]."""
    axes = (0, 2, 3, 4, 1) if name == VJEPA else (0, 1, 3, 4, 2)
    with np.load(FIXTURES / name / "io.npz") as z:
        return {k: v.transpose(axes) if k.startswith("pixel") else v for k, v in z.items()}


def forward(tower, x):
    return tower(x)


@pytest.fixture(scope="module")
def tower():
    """tower(name): the fixture, loaded once."""
    loaded = {name: from_pretrained(FIXTURES / name) for name in (VIDEOMAE, VJEPA, VJEPA2)}
    return loaded.__getitem__


def cut(tower, depth: int):
    """The tower's first layers alone."""
    graphdef, state = nnx.split(tower)
    state["layers"] = jax.tree.map(lambda leaf: leaf[:depth], state["layers"])
    return nnx.merge(graphdef, state)


def before_norm(tower, x):
    tower.norm = lambda x: x
    return tower(x)


# ---- layer by layer


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_every_hidden_state_of_videomae(depth, monkeypatch, run, close):
    def config(files, where, published=videomae_rules.config):
        return dataclasses.replace(published(files, where), feature_layer=-1)

    monkeypatch.setattr(videomae_rules, "config", config)
    z, tower = arrays(VIDEOMAE), from_pretrained(FIXTURES / VIDEOMAE)
    expected = z["hidden_states"][depth]
    close(run(forward, cut(tower, depth), z["pixel_values"]).reshape(expected.shape), expected)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_every_hidden_state_of_vjepa(depth, tower, run, close):
    z = arrays(VJEPA)
    expected = z["embeddings"] if depth == 0 else z["blocks"][depth - 1]
    states = run(before_norm, cut(tower(VJEPA), depth), z["pixel_values"])
    close(states.reshape(expected.shape), expected)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_every_hidden_state_of_vjepa2(depth, tower, run, close):
    z = arrays(VJEPA2)
    expected = z["hidden_states"][depth]  # the last one is normed: the features
    states = run(before_norm, cut(tower(VJEPA2), depth), z["pixel_values_videos"])
    close(states.reshape(expected.shape), expected)


# ---- features and positions


@pytest.mark.parametrize("name", [VIDEOMAE, VJEPA, VJEPA2])
def test_features_of_clips_images_and_long_clips(name, tower, run, close):
    z, alone = arrays(name), nnx.eval_shape(lambda: one_tower(tower(name).config))
    alone.towers = nnx.List([tower(name)])
    pixels = {"features": z.get("pixel_values", z.get("pixel_values_videos"))}
    for kind in ("image", "long"):
        if f"features_{kind}" in z:
            pixels[f"features_{kind}"] = z[f"pixel_values_{kind}"]
    for key, x in pixels.items():
        close(run(lambda tower, x: tower.features(x)["it"], alone, {"it": x}), z[key])


def one_tower(config) -> VisionTower:
    return VisionTower({"it": config}, rngs=nnx.Rngs(0))


def test_videomae_positions(close):
    close(videomae.positions(18, 32)[None], arrays(VIDEOMAE)["position_embeddings"])


def test_vjepa_positions_of_a_fresh_tower(close):
    close(vjepa.sincos_3d((2, 3, 3), 36, True)[None], arrays(VJEPA)["sincos_uniform"])
    # 16 does not divide by six: 6 channels each, of which the last axis loses two
    uniform, halved = (vjepa.sincos_3d((2, 3, 4), 16, power) for power in (True, False))
    time, row, column = np.indices((2, 3, 4)).reshape(3, -1)
    close(uniform[:, 5], np.cos(time / 10_000 ** (2 / 3)))
    close(uniform[:, 6], np.sin(row))
    close(uniform[:, 12:], vjepa.sincos(column, 6)[:, :4])
    close(halved[:, 4], np.cos(time))
    close(halved[:, 8], np.sin(row))
    close(halved[:, 12:], vjepa.sincos(column, 4))


def test_vjepa_positions_follow_other_clips(tower, run, close):
    z = arrays(VJEPA)
    close(tower(VJEPA).positions_at((3, 4, 5)).reshape(1, 60, 36), z["pos_embed_interp"])
    features = run(forward, tower(VJEPA), z["pixel_values_interp"])
    close(features.reshape(1, 60, 36), z["last_norm_interp"])


def test_vjepa_for_clips_of_another_length_and_size(tower, run, close):
    x = jnp.asarray(arrays(VJEPA)["pixel_values_interp"])[:, :, :, :32]
    other = vjepa.with_clips(tower(VJEPA), num_frames=6, crop_size=32)
    assert other.config.grid == (3, 4, 4)
    assert other.positions.shape == (48, 36)
    close(run(forward, other, x), run(forward, tower(VJEPA), x))
    assert tower(VJEPA).positions.shape == (18, 36)


def test_vjepa2_takes_any_number_of_frames(tower, run):
    """Time is an axis of its own: tokens of the first frames do not move when frames follow."""
    angles = vjepa2.rotations((3, 2, 2), 16)
    np.testing.assert_array_equal(vjepa2.rotations((1, 2, 2), 16), angles[:4])
    x = jnp.asarray(arrays(VJEPA2)["pixel_values_videos"])
    shape = jax.eval_shape(tower(VJEPA2), jnp.concatenate([x, x[:, :2]], axis=1)).shape
    assert shape == (2, 3, 3, 3, 48)
    still, twice = (run(forward, tower(VJEPA2), x[:, i]) for i in ([0], [0, 0]))
    np.testing.assert_array_equal(still, twice)


def test_vjepa2_rotates_neighbours_by_tiled_frequencies():
    x = np.random.default_rng(0).standard_normal((1, 5, 1, 14)).astype(np.float32)
    angles = vjepa2.rotations((5, 1, 1), 14)  # four channels for each axis, two unrotated
    assert angles.shape == (5, 12)
    np.testing.assert_allclose(angles[3], [3, 0.03, 3, 0.03, *[0] * 8], rtol=1e-6)
    turned = vjepa2.rotate(jnp.asarray(x), angles)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    t = np.arange(5)
    expected = x[0, :, 0, 0] * np.cos(t) - x[0, :, 0, 1] * np.sin(t)
    np.testing.assert_allclose(turned[0, :, 0, 0], expected, rtol=1e-5, atol=1e-6)
    expected = x[0, :, 0, 1] * np.cos(t / 100) + x[0, :, 0, 0] * np.sin(t / 100)
    np.testing.assert_allclose(turned[0, :, 0, 1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [VIDEOMAE, VJEPA, VJEPA2])
def test_other_frame_counts_than_multiples_are_refused(name, tower):
    x = jnp.zeros((1, 3, 24, 24, 3))
    with pytest.raises(ValueError, match="clips have 3 frames but the tower takes 4"):
        nnx.eval_shape(lambda: one_tower(tower(name).config).features({"it": x}))


# ---- weights and pixels


def test_a_weight_lands_where_it_belongs(tower):
    tensors = load_file(FIXTURES / VIDEOMAE / "model.safetensors")
    attention = "videomae.encoder.layer.1.attention.attention"
    ours = tower(VIDEOMAE).layers
    np.testing.assert_array_equal(ours.k.kernel[1], tensors[f"{attention}.key.weight"].T)
    np.testing.assert_array_equal(ours.v.bias[1], tensors[f"{attention}.v_bias"])

    tensors = load_file(FIXTURES / VJEPA / "model.safetensors")
    ours = tower(VJEPA)
    np.testing.assert_array_equal(ours.positions, tensors["module.backbone.pos_embed"][0])
    kernel = tensors["module.backbone.blocks.2.attn.qkv.weight"].T
    np.testing.assert_array_equal(ours.layers.qkv.kernel[2], kernel)

    tensors = load_file(FIXTURES / VJEPA2 / "model.safetensors")
    ours = tower(VJEPA2)
    np.testing.assert_array_equal(ours.norm.scale, tensors["encoder.layernorm.weight"])
    kernel = tensors["encoder.layer.2.attention.query.weight"].T
    np.testing.assert_array_equal(ours.layers.q.kernel[2], kernel)


@pytest.mark.parametrize("name", [VIDEOMAE, VJEPA])
def test_pixels(name, tower, close):
    z, spec = arrays(name), tower(name).config.frame_spec
    close(preprocess(z["video"], spec), z["pixel_values"][0])
    assert spec.pad_colour == (123, 116, 103)


def test_vjepa2_pixels_are_the_centre():
    spec = vjepa2.Config.vitl_256().frame_spec
    assert (spec.size, spec.side, spec.resample) == (256, 292, "pil_bilinear")


# ---- in any Apollo


TINY = {
    "videomae": videomae.Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        num_frames=4,
    ),
    "vjepa": vjepa.Config(
        embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0, crop_size=24, patch_size=8, num_frames=4
    ),
    "vjepa2": vjepa2.Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2.0,
        crop_size=16,
        patch_size=8,
        frames_per_clip=4,
    ),
}


SIGLIP = apollo.Config.debug().towers["siglip"]


@pytest.mark.parametrize("name", TINY)
def test_clips_become_visual_tokens(name, check_in_apollo):
    check_in_apollo({"it": TINY[name]}, shapes_only=True)
    check_in_apollo({"it": TINY[name], "siglip": SIGLIP})


@pytest.mark.parametrize("name", TINY)
def test_gradients_reach_every_parameter(name, build):
    c = TINY[name]
    graphdef, state = nnx.split(build(lambda: TOWERS[c.kind](c, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, c.image_size, c.image_size, 3), np.float32)
    target = rng.standard_normal((2, *c.grid, c.hidden_size), np.float32)

    def loss(state):
        return jnp.mean(nnx.merge(graphdef, state)(x, remat="full") * target)

    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(state)):
        flat = "k.bias" in jax.tree_util.keystr(path, simple=True, separator=".")
        assert flat or np.abs(gradient).max() > 1e-6, path  # softmax does not see a key's bias
