# SPDX-License-Identifier: Apache-2.0
"""CLIP and LanguageBind against what the published code computes from the fixtures' weights."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from apollo_jax.checkpoints.pretrained import from_pretrained, save_pretrained
from apollo_jax.checkpoints.rules import clip as clip_rules
from apollo_jax.checkpoints.rules import languagebind as languagebind_rules
from apollo_jax.checkpoints.rules.table import parameters
from apollo_jax.models import apollo, clip, languagebind
from apollo_jax.models.vision_tower import TOWERS, VisionTower
from data_pipeline.transforms import preprocess

FIXTURES = Path(__file__).parents[2] / "fixtures" / "encoders"
IMAGE = ("clip-a", "languagebind-image-a")
VIDEO = ("languagebind-video-a", "languagebind-video-v1-a")


def arrays(name: str) -> dict:
    """The fixture's arrays, pixels as [N, F, I, I, 3]."""
    out = {}
    for file in sorted((FIXTURES / name).glob("*.npz")):
        with np.load(file) as z:
            out |= dict(z)
    axes = (0, 2, 3, 4, 1) if name in VIDEO else (0, 1, 3, 4, 2)
    return {k: v.transpose(axes) if k.startswith("pixel") else v for k, v in out.items()}


@pytest.fixture
def tower_at(monkeypatch):
    """tower_at("clip-a", layer): the fixture built up to another hidden state."""

    def build(name: str, layer: int):
        for rules in (clip_rules, languagebind_rules):

            def config(files, where, published=rules.config):
                return dataclasses.replace(published(files, where), feature_layer=layer)

            monkeypatch.setattr(rules, "config", config)
        return from_pretrained(FIXTURES / name)

    return build


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("name", [*IMAGE, *VIDEO])
def test_every_hidden_state(name, layer, tower_at, run, close):
    z, tower = arrays(name), tower_at(name, layer)
    x = jnp.asarray(z["pixel_values"])
    expected = z["hidden_states"][:, :, 1:]
    close(run(lambda tower, x: tower(x), tower, x).reshape(expected[0].shape), expected[layer])
    if layer == -3:  # below the first layer
        graphdef, state = nnx.split(tower)
        state["layers"] = jax.tree.map(lambda leaf: leaf[:0], state["layers"])
        none = run(lambda tower, x: tower(x), nnx.merge(graphdef, state), x)
        close(none.reshape(expected[0].shape), expected[0])


@pytest.mark.parametrize("name", [*IMAGE, *VIDEO])
def test_features_of_clips_images_and_long_clips(name, run, close):
    z, tower = arrays(name), from_pretrained(FIXTURES / name)
    alone = nnx.eval_shape(lambda: VisionTower({"it": tower.config}, rngs=nnx.Rngs(0)))
    alone.towers = nnx.List([tower])
    alone.grid = z["features"].shape[1:4]  # as beside a video tower
    pixels = {k: {"it": jnp.asarray(v)} for k, v in z.items() if k.startswith("pixel_values")}
    assert len(pixels) == (3 if name in VIDEO else 1)
    features = run(
        lambda tower, pixels: {k: tower.features(x)["it"] for k, x in pixels.items()}, alone, pixels
    )
    for kind, value in features.items():
        close(value, z[kind.replace("pixel_values", "features")])


def test_video_towers_refuse_other_frame_counts():
    def features(x):
        return VisionTower({"it": tiny_video()}, rngs=nnx.Rngs(0))({"it": x})

    with pytest.raises(ValueError, match="clips have 3 frames but the tower takes 4"):
        jax.eval_shape(features, jnp.zeros((1, 3, 16, 16, 3)))


def test_a_weight_lands_where_it_belongs():
    tower = from_pretrained(FIXTURES / "languagebind-video-a")
    tensors = load_file(FIXTURES / "languagebind-video-a" / "model.safetensors")
    layer = "vision_model.encoder.layers.1"
    np.testing.assert_array_equal(
        tower.layers.time_attention.k.kernel[1], tensors[f"{layer}.temporal_attn.k_proj.weight"].T
    )
    np.testing.assert_array_equal(
        tower.layers.time_embedding[1], tensors[f"{layer}.temporal_embedding"][0]
    )
    np.testing.assert_array_equal(
        tower.layers.frame.attention.k.bias[1], tensors[f"{layer}.self_attn.k_proj.bias"]
    )


@pytest.mark.parametrize(("name", "levels"), [("clip-a", 0), ("languagebind-image-a", 0.01)])
@pytest.mark.parametrize("video", [False, True])
def test_pixels(name, levels, video):
    name = {"clip-a": VIDEO[0], "languagebind-image-a": VIDEO[1]}[name] if video else name
    z, spec = arrays(name), from_pretrained(FIXTURES / name).config.frame_spec
    difference = np.abs(preprocess(z["video"], spec) - z["pixel_values"][0])
    assert (difference * np.asarray(spec.std) * 255).max() <= (1e-3 if video else levels)


# ---- in any Apollo

SIZE: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)


def tiny_image(**kw) -> clip.Config:
    return clip.Config(**SIZE, **kw)


def tiny_video(**kw) -> languagebind.Config:
    return languagebind.Config(**SIZE, num_frames=4, **kw)


SIGLIP = apollo.Config.debug().towers["siglip"]
BOTH = {
    "image": tiny_image(hidden_act="gelu", resample="torch_bicubic"),
    "video": tiny_video(),
}


@pytest.mark.parametrize(
    ("towers", "shapes_only"),
    [
        ({"clip": tiny_image()}, True),
        ({"languagebind": tiny_video()}, True),
        (BOTH, False),
        ({"video": tiny_video(clip_type="vl"), "siglip": SIGLIP}, False),
    ],
    ids=["clip", "languagebind", "languagebind-image, languagebind", "older languagebind, siglip"],
)
def test_clips_become_visual_tokens(towers, shapes_only, check_in_apollo):
    check_in_apollo(towers, shapes_only)


def test_a_whole_apollo_comes_back(with_towers, build, tmp_path):
    config = with_towers(**BOTH)
    model = build(lambda: apollo.Apollo(config, rngs=nnx.Rngs(0)))
    save_pretrained(model, tmp_path / "out")
    loaded = from_pretrained(tmp_path / "out")
    assert loaded.config == config
    before, after = parameters(model), parameters(loaded)
    assert before.keys() == after.keys()
    assert all(np.array_equal(after[name], value) for name, value in before.items())


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="hidden_act is 'relu', supported are quick_gelu, gelu"):
        clip.Config(hidden_act="relu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="clip_type is 'new', supported are vl_new, vl"):
        languagebind.Config(clip_type="new")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("tower", [tiny_image(), tiny_video(), tiny_video(clip_type="vl")])
def test_a_fresh_tower_learns(tower):
    """Gradients reach every parameter."""
    graphdef, state = nnx.split(TOWERS[tower.kind](tower, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (2, 4, 16, 16, 3))
    target = jax.random.normal(jax.random.key(1), (2, 4, 2, 2, 16))

    def loss(state):
        return jnp.mean(nnx.merge(graphdef, state)(x, remat="full") * target)

    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(state)):
        flat = "k.bias" in jax.tree_util.keystr(path, simple=True, separator=".")
        assert flat or np.abs(gradient).max() > 1e-6, path  # softmax does not see a key's bias
