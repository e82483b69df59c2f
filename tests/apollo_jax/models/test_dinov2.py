# SPDX-License-Identifier: Apache-2.0
"""DINOv2, plain and with registers, against what the published code computes from the fixtures."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from apollo_jax.checkpoints.pretrained import from_pretrained
from apollo_jax.checkpoints.rules import dinov2 as rules
from apollo_jax.models import apollo, dinov2
from apollo_jax.models.vision_tower import VisionTower
from data_pipeline.transforms import preprocess

FIXTURES = Path(__file__).parents[2] / "fixtures" / "encoders"
PLAIN, REGISTERS = "dinov2-a", "dinov2reg-a"


def arrays(name: str) -> dict:
    """The fixture's arrays, pixels channels last."""
    out = {}
    for file in sorted((FIXTURES / name).glob("*.npz")):
        with np.load(file) as z:
            out |= dict(z)
    return {k: np.moveaxis(v, -3, -1) if k.startswith("pixel") else v for k, v in out.items()}


def clips(name: str, z: dict) -> jax.Array:
    """[N, F, I, I, 3]: two frames of a clip, or two images."""
    return jnp.asarray(z["pixel_values"] if name == PLAIN else z["pixel_values"][:, None])


@pytest.fixture
def whole(monkeypatch):
    """whole(name): the fixture with all its layers."""

    def build(name: str):
        def config(files, where, published=rules.config):
            return dataclasses.replace(published(files, where), feature_layer=-1)

        monkeypatch.setattr(rules, "config", config)
        return from_pretrained(FIXTURES / name)

    return build


def hidden_states(tower, x: jax.Array) -> list[jax.Array]:
    states = [tower.embed(x)]
    graphdef, stacked = nnx.split(tower.layers)
    for i in range(tower.config.num_hidden_layers):
        layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
        states.append(layer(states[-1])[0])
    return states


@pytest.mark.parametrize("name", [PLAIN, REGISTERS])
def test_every_hidden_state(name, whole, run, close):
    z = arrays(name)
    states = run(hidden_states, whole(name), jnp.concatenate(clips(name, z)))
    for state, expected in zip(states, z["hidden_states"], strict=True):
        close(state, expected)  # CLS and the registers too


@pytest.mark.parametrize(
    ("name", "rule", "suffix"),
    [(PLAIN, "", ""), (PLAIN, "scale_offset", ""), (PLAIN, "size", "_v457"), (REGISTERS, "", "")],
)
def test_features_by_either_interpolation_rule(name, rule, suffix, tmp_path, run, close):
    folder = shutil.copytree(FIXTURES / name, tmp_path / name)
    if rule:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | dict(interpolation=rule)))
    z, tower = arrays(name), from_pretrained(folder)
    close(tower.table(21, 21)[None], z[f"position_embeddings_interp{suffix}"])
    close(run(lambda tower, x: tower(x), tower, clips(name, z)), z[f"features{suffix}"])


def test_the_native_size_takes_the_table_as_it_is(whole, run, close):
    z, tower = arrays(PLAIN), whole(PLAIN)
    np.testing.assert_array_equal(tower.table(35, 35), tower.positions[...])
    # As many patches, but not square: interpolated, as published.
    assert np.abs(tower.table(35, 36) - tower.positions[...]).max() > 0.01
    x = jnp.asarray(z["pixel_values_native"])[:, None]
    x = np.asarray(run(lambda tower, x: tower(x), tower, x)).reshape(1, 25, -1)
    norm = load_file(FIXTURES / PLAIN / "model.safetensors")
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * norm["layernorm.weight"] + norm["layernorm.bias"]
    close(x, z["last_hidden_state_native"][:, 1:])


def test_frames_as_beside_a_video_tower(run, close):
    z, tower = arrays(PLAIN), from_pretrained(FIXTURES / PLAIN)
    alone = nnx.eval_shape(lambda: VisionTower({"it": tower.config}, rngs=nnx.Rngs(0)))
    alone.towers = nnx.List([tower])
    assert alone.grid == (1, 3, 3)
    x = jnp.repeat(clips(PLAIN, z), 2, axis=1)  # each frame twice: a stride of two undoes it
    first = run(lambda tower, x: tower.features(x)["it"], alone, {"it": x})
    close(first, z["features"][:, :1])
    video = nnx.clone(alone)
    video.grid = (2, 3, 3)
    both = run(lambda tower, x: tower.features(x)["it"], video, {"it": x})
    close(both, z["features"])


def test_a_weight_lands_where_it_belongs():
    tower = from_pretrained(FIXTURES / REGISTERS)
    tensors = load_file(FIXTURES / REGISTERS / "model.safetensors")
    layer = "encoder.layer.1"
    for ours, theirs in (("k", "attention.attention.key"), ("fc2", "mlp.fc2")):
        kernel = getattr(tower.layers, ours).kernel[1]
        np.testing.assert_array_equal(kernel, tensors[f"{layer}.{theirs}.weight"].T)
    np.testing.assert_array_equal(tower.layers.ls2[1], tensors[f"{layer}.layer_scale2.lambda1"])
    np.testing.assert_array_equal(tower.registers, tensors["embeddings.register_tokens"][0])


def test_pixels():
    z, spec = arrays(PLAIN), from_pretrained(FIXTURES / PLAIN).config.frame_spec
    np.testing.assert_array_equal(preprocess(z["video"], spec), z["pixel_values"][0])
    spec = dinov2.Config.large().frame_spec
    assert (spec.size, spec.side, spec.pad_colour) == (224, 256, (123, 116, 103))


@pytest.mark.parametrize("rule", ["scale_offset", "size"])
@pytest.mark.parametrize(("before", "after"), [(37, 16), (3, 4), (2, 7)])
def test_axis_weights(before, after, rule):
    """Constants stay, and away from the borders so do straight lines: each patch at its place."""
    weights = dinov2.axis_weights(before, after, rule)
    np.testing.assert_allclose(weights.sum(1), 1)
    step = before / (after + (0.1 if rule == "scale_offset" else 0))
    where = (np.arange(after) + 0.5) * step - 0.5
    inner = (where >= 1) & (where <= before - 2)
    # a = -0.75 keeps lines only where it samples symmetrically; elsewhere it is this close
    np.testing.assert_allclose((weights @ np.arange(before))[inner], where[inner], atol=0.06)


def test_swiglu_halves(build):
    config = tiny(use_swiglu_ffn=True)
    assert config.mlp_dim == 48  # two thirds of 64 are 42, in eights
    block = build(lambda: dinov2.Block(config, rngs=nnx.Rngs(0), dtype="f4", param_dtype="f4"))
    block.ls1[...] = jnp.zeros(16)
    x = jax.random.normal(jax.random.key(0), (1, 3, 16))
    h = np.asarray(block.fc1(block.norm2(x)))
    gate, value = h[..., :48], h[..., 48:]
    expected = x + block.fc2(jnp.asarray(gate / (1 + np.exp(-gate)) * value)) * block.ls2[...]
    np.testing.assert_allclose(block(x)[0], expected, rtol=1e-5, atol=1e-6)


# ---- in any Apollo


def tiny(**kw) -> dinov2.Config:
    return dinov2.Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        table_size=40,
        patch_size=8,
        image_size=24,
        resize=28,
        **kw,
    )


SIGLIP = apollo.Config.debug().towers["siglip"]
GIANT = tiny(use_swiglu_ffn=True, num_register_tokens=2, interpolation="antialias")


@pytest.mark.parametrize(
    ("towers", "side"),
    [({"dinov2": tiny()}, 28), ({"dinov2": GIANT, "siglip": SIGLIP}, 32)],
    ids=["alone", "giant's kind beside siglip"],
)
def test_clips_become_visual_tokens(towers, side, check_in_apollo):
    config = check_in_apollo(towers)
    assert config.frame_size == side  # the square before its middle is cut out


def test_a_fresh_tower_learns():
    """Gradients reach every parameter."""
    config = tiny(use_swiglu_ffn=True, num_register_tokens=2)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: dinov2.DINOv2(config, rngs=nnx.Rngs(0))))
    state = jax.jit(lambda: nnx.state(dinov2.DINOv2(config, rngs=nnx.Rngs(0))))()
    x = jax.random.normal(jax.random.key(0), (1, 2, 24, 24, 3))
    target = jax.random.normal(jax.random.key(1), (1, 2, 3, 3, 16))

    @jax.jit
    @jax.grad
    def gradients(state):
        return jnp.mean(nnx.merge(graphdef, state)(x, remat="full") * target)

    for path, gradient in jax.tree.leaves_with_path(gradients(state)):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        unseen = "layers.k.bias" in name  # softmax does not see a key's bias
        assert unseen or np.abs(gradient).max() > 1e-6, name
