# SPDX-License-Identifier: Apache-2.0
"""SigLIP 2 NaFlex against what transformers computes from the fixture's weights."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apollo_jax.checkpoints.pretrained import from_pretrained
from apollo_jax.checkpoints.rules import siglip2 as rules
from apollo_jax.models import apollo, siglip, siglip2

FIXTURE = Path(__file__).parents[2] / "fixtures" / "encoders" / "siglip2-naflex-a"
TINY = siglip2.Config(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    patch_size=4,
    num_patches=9,
    max_num_patches=20,  # a square of 16
)


@pytest.fixture(scope="module")
def io() -> dict:
    with np.load(FIXTURE / "io.npz") as z:
        return {name: z[name] for name in z.files}


@pytest.fixture
def tower_at(monkeypatch):
    """tower_at(layer): the fixture built up to another hidden state."""

    def build(layer: int):
        def config(files, where, published=rules.config):
            return dataclasses.replace(published(files, where), feature_layer=layer)

        monkeypatch.setattr(rules, "config", config)
        return from_pretrained(FIXTURE)

    return build


def encode(tower, patches, mask, spatial_shapes):
    return tower.encode(patches, mask, spatial_shapes)


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_every_hidden_state(layer, tower_at, io, run, close):
    tower = tower_at(layer)
    mask, shapes = io["pixel_attention_mask"] > 0, io["spatial_shapes"].astype(np.int32)
    close(run(encode, tower, io["pixel_values"], mask, shapes), io["hidden_states"][layer])
    if layer == -3:  # below the first layer
        weights = siglip2.position_weights(jnp.asarray(shapes), 24, tower.table_side)
        x = tower.patch_embed(jnp.asarray(io["pixel_values"])) + weights @ tower.positions[...]
        close(x, io["hidden_states"][0])


def test_padding_is_not_seen(build, run):
    tower = build(lambda: siglip2.SigLIP2(TINY, rngs=nnx.Rngs(0)))
    shapes, k = np.array([[2, 3], [4, 1]], np.int32), 48
    patches = np.random.default_rng(0).standard_normal((2, 8, k)).astype(np.float32)
    mask = np.arange(8) < shapes.prod(axis=1, keepdims=True)
    plain = run(encode, tower, patches, mask, shapes)
    patches[~mask] = 9.0
    changed = run(encode, tower, patches, mask, shapes)
    np.testing.assert_array_equal(plain[mask], changed[mask])
    alone = run(encode, tower, patches[:1, :6], mask[:1, :6], shapes[:1])
    np.testing.assert_allclose(alone[0], plain[0, :6], atol=1e-5)


def test_squares_are_images_without_padding(build, run):
    tower = build(lambda: siglip2.SigLIP2(TINY, rngs=nnx.Rngs(0)))
    assert (TINY.image_size, TINY.grid) == (16, (1, 4, 4))
    x = jax.random.normal(jax.random.key(0), (1, 2, 16, 16, 3))
    features = run(lambda tower, x: tower(x), tower, x)
    patches = siglip.patchify(x, 4).reshape(2, 16, 48)
    expected = run(encode, tower, patches, np.ones((2, 16), bool), np.full((2, 2), 4, np.int32))
    assert features.shape == (1, 2, 4, 4, 16)
    np.testing.assert_allclose(features.reshape(2, 16, 16), expected, atol=1e-5)


def test_its_own_grid_leaves_the_table_as_it_is():
    weights = siglip2.position_weights(jnp.array([[3, 3]]), 12, 3)[0]
    np.testing.assert_array_equal(weights[:9], np.eye(9))
    np.testing.assert_array_equal(weights[9:], np.eye(9)[[0, 0, 0]])  # padding


# ---- in any Apollo


SIGLIP = apollo.Config.debug().towers["siglip"]


def test_clips_become_visual_tokens(check_in_apollo):
    check_in_apollo({"naflex": TINY}, shapes_only=True)
    check_in_apollo({"naflex": TINY, "siglip": SIGLIP})


def test_a_fresh_tower_learns():
    graphdef, state = nnx.split(siglip2.SigLIP2(TINY, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (2, 1, 16, 16, 3))
    target = jax.random.normal(jax.random.key(1), (2, 1, 4, 4, 16))

    def loss(state):
        return jnp.mean(nnx.merge(graphdef, state)(x, remat="full") * target)

    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(state)):
        flat = "k.bias" in jax.tree_util.keystr(path, simple=True, separator=".")
        assert flat or np.abs(gradient).max() > 1e-6, path  # softmax does not see a key's bias


def test_a_table_is_a_square():
    with pytest.raises(ValueError, match="num_patches 10 is not the square"):
        siglip2.Config(num_patches=10)
