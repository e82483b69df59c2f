# SPDX-License-Identifier: Apache-2.0
"""SigLIP, InternVideo2 and their fusion against the official code's features."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from apollo_jax.checkpoints.pretrained import from_pretrained
from apollo_jax.models import apollo, internvideo2, pixels, siglip
from apollo_jax.models.vision_tower import match_frames
from data_pipeline.transforms import preprocess

SIGLIP, INTERNVIDEO2 = "siglip-so400m-patch14-384", "internvideo2"


@pytest.fixture(scope="module")
def model_at(tiny, model, tmp_path_factory):
    """model_at(layer): the fixture with its towers built up to another hidden state."""

    def build(layer: int):
        if layer == -2:
            return model
        folder = tmp_path_factory.mktemp("layer") / "checkpoint"
        shutil.copytree(tiny / "checkpoint", folder)
        root = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(root | {"mm_vision_select_layer": layer}))
        return from_pretrained(folder)

    return build


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_every_layer_of_both_towers(layer, model_at, load, run, close):
    towers = model_at(layer).vision_tower.towers
    z = load("towers/siglip.npz")
    x = jnp.asarray(z["pixel_values"].transpose(0, 2, 3, 1)[None])  # [1, F, I, I, 3]
    features = run(lambda tower, x: tower(x), towers[0], x)
    close(features.reshape(4, 16, -1), z["hidden_states"][layer])
    z = load("towers/internvideo2.npz")
    x = jnp.asarray(z["pixel_values"].transpose(0, 2, 3, 4, 1))
    features = run(lambda tower, x: tower(x), towers[1], x)
    close(features.reshape(1, 36, -1), z["blocks"][layer][:, 1:])
    if layer == -2:
        close(features.reshape(1, 36, -1), z["x_vis_m2"][:, 1:])


def test_patch_embeddings(model, load, close):
    z = load("towers/siglip.npz")
    tower = model.vision_tower.towers[0]
    x = tower.patch_embed(siglip.patchify(jnp.asarray(z["pixel_values"].transpose(0, 2, 3, 1)), 7))
    close(x.reshape(4, 16, -1) + tower.positions[...], z["hidden_states"][0])
    z = load("towers/internvideo2.npz")
    x = internvideo2.tubelets(jnp.asarray(z["pixel_values"].transpose(0, 2, 3, 4, 1)), 1, 8)
    close(model.vision_tower.towers[1].patch_embed(x).reshape(1, 4, 9, -1), z["patch_embed"])


def test_features_and_fusion(model, official, run, close):
    tower, x = model.vision_tower, official["pixels"]
    features = run(lambda tower, x: tower.features(x), tower, x)
    close(features[SIGLIP], official["features_siglip"])
    close(features[INTERNVIDEO2], official["features_internvideo2"])
    for name, aligned in ((SIGLIP, "siglip"), (INTERNVIDEO2, "internvideo2")):
        close(tower.align(features[name]), official[f"features_{aligned}_interp"])
    close(run(lambda tower, x: tower(x), tower, x), official["concat_features"])


def test_remat_changes_nothing(model, official, run):
    outputs = [
        run(lambda tower, x, r=remat: tower(x, remat=r), model.vision_tower, official["pixels"])
        for remat in ("none", "dots", "full")
    ]
    np.testing.assert_array_equal(outputs[1], outputs[0])
    np.testing.assert_array_equal(outputs[2], outputs[0])


def test_pixels_without_a_tower_are_refused(model, official):
    with pytest.raises(ValueError, match=r"lack towers \['internvideo2'\]"):
        model.vision_tower({SIGLIP: official["pixels"][SIGLIP]})


def test_match_frames_follows_the_official_rule():
    x = jnp.arange(8.0).reshape(1, 8)
    np.testing.assert_array_equal(match_frames(x, 8), x)
    np.testing.assert_array_equal(match_frames(x, 4), [[0, 2, 4, 6]])
    np.testing.assert_array_equal(match_frames(x[:, 3:4], 4), [[3, 3, 3, 3]])
    with pytest.raises(ValueError, match="8 frames but the tower takes 3"):
        match_frames(x, 3)


def test_device_pixels_match_the_exact_host_path_within_a_grey_level():
    frames = np.random.default_rng(0).integers(0, 256, (4, 36, 52, 3), np.uint8)
    canvas = np.zeros((1, 4, 52, 52, 3), np.uint8)  # square at the picture's long side
    canvas[0, :, 8:44] = frames
    geometry = jnp.array([[8, 0, 36, 52]])
    for tower in apollo.Config.debug().towers.values():
        spec = tower.frame_spec
        ours = np.asarray(pixels.prepare(jnp.asarray(canvas), geometry, spec))[0]
        exact = preprocess(frames, spec)
        levels = np.abs(ours - exact) * np.asarray(spec.std) * 255
        assert levels.max() < 1.01
        assert (levels > 0.5).mean() < (0.01 if spec.resample == "pil_bicubic" else 0.15)


def test_fresh_positions_tell_patches_apart():
    for table in (siglip.sincos_2d(4, 64), internvideo2.sincos_3d((4, 3, 3), 48)[1:]):
        distances = np.linalg.norm(table[:, None] - table[None], axis=-1)
        assert distances[~np.eye(len(table), dtype=bool)].min() > 0.1
