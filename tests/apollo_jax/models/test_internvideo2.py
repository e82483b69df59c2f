# SPDX-License-Identifier: Apache-2.0
"""Distilled InternVideo2 against what the authors' code computes from the fixture's weights."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from apollo_jax.checkpoints.pretrained import from_pretrained, save_pretrained
from apollo_jax.checkpoints.rules import internvideo2 as rules
from apollo_jax.models import internvideo2

FIXTURE = Path(__file__).parents[2] / "fixtures" / "encoders" / "internvideo2-distilled-a"
SAID = dict(img_size=26, num_heads=2, attn_pool_num_heads=4)  # what no shape tells


@pytest.fixture(scope="module")
def io() -> dict:
    with np.load(FIXTURE / "io.npz") as z:
        arrays = dict(z)
    return arrays | dict(pixels=jnp.asarray(arrays["pixel_values"].transpose(0, 2, 3, 4, 1)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The fixture with the JSON files that its tensors tell."""
    path = tmp_path_factory.mktemp("distilled") / "folder"
    shutil.copytree(FIXTURE, path)
    tensors = load_file(path / "model.safetensors")
    files = rules.recognise({name: t.shape for name, t in tensors.items()}, SAID)
    assert files is not None
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.fixture
def tower_at(monkeypatch, folder):
    """tower_at(layer): the fixture built up to another hidden state."""

    def build(layer: int):
        def config(files, where, published=rules.config):
            return dataclasses.replace(published(files, where), feature_layer=layer)

        monkeypatch.setattr(rules, "config", config)
        return from_pretrained(folder)

    return build


def call(tower, x):
    return tower(x)


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_every_block(layer, tower_at, io, run, close):
    features = run(call, tower_at(layer), io["pixels"])
    assert features.shape == (2, 4, 3, 3, 32)
    close(features.reshape(2, 36, 32), io["blocks"][layer][:, 1:])


def test_a_folder_survives_to_the_last_bit(folder, tmp_path):
    save_pretrained(from_pretrained(folder), tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name].view(np.uint8), tensor.view(np.uint8))


@pytest.mark.parametrize("frames", [2, 8])
def test_other_clip_lengths_are_resampled_in_time(frames, folder, io, run, close, tmp_path):
    tower = from_pretrained(folder)
    other = internvideo2.with_frames(tower, frames)
    assert other.config == dataclasses.replace(tower.config, num_frames=frames)
    close(other.positions[...], io[f"pos_embed_{frames}"][0])
    np.testing.assert_array_equal(other.layers.fc1.kernel[...], tower.layers.fc1.kernel[...])
    save_pretrained(other, tmp_path / "out")
    assert from_pretrained(tmp_path / "out").config == other.config
    same = internvideo2.with_frames(tower, 4)
    np.testing.assert_array_equal(same.positions[...], tower.positions[...])
