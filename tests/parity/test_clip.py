# SPDX-License-Identifier: Apache-2.0
"""CLIP against transformers on random weights: the tower alone and inside a CLIPModel.

LanguageBind has no class in transformers: its image half is a CLIPVisionModel with its own
resampling, and a video tower whose attention over time adds nothing is one on every frame.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import apollo_jax
from apollo_jax.models import clip, languagebind

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5
VISION: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=30,  # leaves a remainder of 2 pixels
    patch_size=7,
)
TEXT = dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=8,
)
KINDS = {
    "openai": clip.Config(**VISION),
    "laion": clip.Config(**VISION, hidden_act="gelu"),
    "other crop": clip.Config(**VISION, resize=34),
}


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():  # zero biases and unit gains would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tower(act):
    config = transformers.CLIPVisionConfig(**VISION, hidden_act=act)
    return randomised(transformers.CLIPVisionModel(config))


def with_projection(act):
    config = transformers.CLIPVisionConfig(**VISION, hidden_act=act, projection_dim=11)
    return randomised(transformers.CLIPVisionModelWithProjection(config))


def both_halves(act):
    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config=VISION | dict(hidden_act=act), projection_dim=11
    )
    return randomised(transformers.CLIPModel(config))


def hidden_state(model, pixels):
    """transformers' hidden_states[-2] of [N, I, I, 3] pixels, without the CLS token."""
    vision = getattr(model, "vision_model", model)
    with torch.no_grad():
        states = vision(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    return states.hidden_states[-2][:, 1:].numpy()


def features(model, pixels):
    """Ours of [N, F, I, I, 3] pixels."""
    graphdef, state = nnx.split(model)
    return np.asarray(jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))(state, pixels))


def check_close(actual, expected):
    error = np.abs(actual.reshape(expected.shape) - expected) / np.maximum(1, np.abs(expected))
    assert error.max() <= TOLERANCE


def drawn(make):
    """The module that `make()` gives, its weights normal."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    return nnx.merge(
        graphdef, jax.tree.map(lambda x: jnp.float32(0.3 * rng.standard_normal(x.shape)), state)
    )


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("make", [tower, with_projection, both_halves])
def test_features_and_the_way_back(make, act, tmp_path):
    theirs = make(act)
    pixels = np.random.default_rng(0).standard_normal((3, 30, 30, 3)).astype(np.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = apollo_jax.from_pretrained(tmp_path / "theirs")
    check_close(features(ours, pixels[None]), hidden_state(theirs, pixels))

    apollo_jax.save_pretrained(ours, tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_tower_loads_in_transformers(kind, tmp_path):
    ours = drawn(lambda: clip.CLIP(KINDS[kind], rngs=nnx.Rngs(0)))
    apollo_jax.save_pretrained(ours, tmp_path / "out")
    theirs, info = transformers.CLIPVisionModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    pixels = np.random.default_rng(0).standard_normal((2, 30, 30, 3)).astype(np.float32)
    check_close(features(ours, pixels[None]), hidden_state(theirs.eval(), pixels))
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "out")
    assert dict(processor.size) == {"shortest_edge": KINDS[kind].frame_spec.side}
    assert dict(processor.crop_size) == {"height": 30, "width": 30}


def as_a_clip(folder):
    """A published LanguageBind folder in transformers' CLIP, and the tensors that had no place."""
    config = transformers.CLIPVisionConfig(**VISION, hidden_act="gelu")
    theirs, info = transformers.CLIPVisionModel.from_pretrained(
        folder, config=config, output_loading_info=True
    )
    unexpected = info.pop("unexpected_keys")
    assert not any(info.values())
    return theirs.eval(), unexpected


def test_languagebind_image_is_a_clip(tmp_path):
    config = dataclasses.replace(KINDS["laion"], resample="torch_bicubic")
    ours = drawn(lambda: clip.CLIP(config, rngs=nnx.Rngs(0)))
    apollo_jax.save_pretrained(ours, tmp_path / "out")
    assert apollo_jax.config_from_pretrained(tmp_path / "out") == config
    theirs, unexpected = as_a_clip(tmp_path / "out")
    assert not unexpected
    pixels = np.random.default_rng(0).standard_normal((2, 30, 30, 3)).astype(np.float32)
    check_close(features(ours, pixels[None]), hidden_state(theirs, pixels))


def test_without_attention_over_time_each_frame_goes_through_a_clip(tmp_path):
    config = languagebind.Config(**VISION, num_frames=3, clip_type="vl")
    ours = drawn(lambda: languagebind.LanguageBindVideo(config, rngs=nnx.Rngs(0)))
    out = ours.layers.time_attention.out
    for silent in (ours.layers.time_embedding, out.kernel, out.bias):
        silent[...] = jnp.zeros_like(silent[...])
    apollo_jax.save_pretrained(ours, tmp_path / "out")
    theirs, unexpected = as_a_clip(tmp_path / "out")
    assert len(unexpected) == VISION["num_hidden_layers"] * (8 + 2 + 1)
    assert all("temporal" in name for name in unexpected)
    pixels = np.random.default_rng(0).standard_normal((3, 30, 30, 3)).astype(np.float32)
    check_close(features(ours, pixels[None]), hidden_state(theirs, pixels))
