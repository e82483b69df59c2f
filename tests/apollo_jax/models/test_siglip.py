# SPDX-License-Identifier: Apache-2.0
"""SigLIP against what big_vision computes from the fixture's weights; other sizes of it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from apollo_jax.checkpoints.pretrained import from_pretrained, save_pretrained
from apollo_jax.checkpoints.rules import siglip as rules
from apollo_jax.models import siglip

FIXTURE = Path(__file__).parents[2] / "fixtures" / "encoders" / "bigvision-siglip-a"
# Tensor elements of the towers with all layers, the last norm and the pooling head.
RELEASED = {
    "base": (siglip.Config.base(224), 92_884_224),
    "large": (siglip.Config.large(256), 315_956_224),
    "so400m": (siglip.Config.so400m_384(), 428_225_600),
}


@pytest.fixture(scope="module")
def io() -> dict:
    with np.load(FIXTURE / "io.npz") as z:
        return dict(z)


@pytest.fixture
def tower_at(monkeypatch):
    """tower_at(layer): the fixture built up to another hidden state."""

    def build(layer: int):
        def config(files, where, published=rules.config):
            return dataclasses.replace(published(files, where), feature_layer=layer)

        monkeypatch.setattr(rules, "config", config)
        return from_pretrained(FIXTURE)

    return build


def call(tower, x):
    return tower(x)


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_every_block(layer, tower_at, io, run, close):
    features = run(call, tower_at(layer), jnp.asarray(io["image"][None]))
    assert features.shape == (1, 2, 4, 4, 32)
    close(features.reshape(2, 16, 32), io["blocks"][layer])
    if layer == -2:
        close(features.reshape(2, 16, 32), io["penultimate_block"])


def test_a_weight_and_the_stem(io, close):
    tower = from_pretrained(FIXTURE)
    name = "vision_model.encoder.layers.1.self_attn.k_proj.weight"
    weight = load_file(FIXTURE / "model.safetensors")[name]
    np.testing.assert_array_equal(tower.layers.k.kernel[1], weight.T)
    x = tower.patch_embed(siglip.patchify(jnp.asarray(io["image"]), 7))
    close(x.reshape(2, 16, 32) + tower.positions[...], io["with_posemb"])


def test_another_grid_is_resampled_as_big_vision_does(io, run, close, tmp_path):
    tower = from_pretrained(FIXTURE)
    table = np.asarray(tower.positions[...])
    close(siglip.resampled(table, 6), io["posemb_resampled"][0])
    np.testing.assert_array_equal(siglip.resampled(table, 4), table)
    larger = siglip.with_image_size(tower, 44)
    assert larger.config == dataclasses.replace(tower.config, image_size=44)
    close(larger.positions[...], io["posemb_resampled"][0])
    np.testing.assert_array_equal(larger.layers.fc1.kernel[...], tower.layers.fc1.kernel[...])
    save_pretrained(larger, tmp_path / "out")
    x = jnp.ones((1, 1, 44, 44, 3))
    again = run(call, from_pretrained(tmp_path / "out"), x)
    assert again.shape == (1, 1, 6, 6, 32)
    np.testing.assert_array_equal(again, run(call, larger, x))


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name):
    config, elements = RELEASED[name]
    whole = dataclasses.replace(config, feature_layer=-1)
    tower = nnx.eval_shape(lambda: siglip.SigLIP(whole, rngs=nnx.Rngs(0)))
    d, m = config.hidden_size, config.intermediate_size
    built = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(tower)))
    unused = sum(
        int(np.prod(shape)) for g in rules.unused_groups(d, m, {}) for shape in g.shapes.values()
    )
    assert built + unused == elements
    assert rules.config(rules.published(config), "f") == config
