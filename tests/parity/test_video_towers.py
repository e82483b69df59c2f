# SPDX-License-Identifier: Apache-2.0
"""VideoMAE and V-JEPA 2 against transformers on random weights, both ways."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import apollo_jax
from apollo_jax.checkpoints.rules import table as tables
from apollo_jax.checkpoints.rules import videomae as videomae_rules
from apollo_jax.checkpoints.rules import vjepa2 as vjepa2_rules
from apollo_jax.models import videomae, vjepa2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5
VIDEOMAE = dict(
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=28,  # leaves a remainder of 4 pixels
    patch_size=8,
    num_frames=6,
    tubelet_size=3,
)
DECODER = dict(
    decoder_hidden_size=16,
    decoder_intermediate_size=20,
    decoder_num_attention_heads=2,
    decoder_num_hidden_layers=2,
)
VJEPA2 = dict(
    hidden_size=66,
    num_hidden_layers=2,
    num_attention_heads=3,  # heads of 22: six channels for each axis, four unrotated
    crop_size=24,
    patch_size=8,
    frames_per_clip=4,
    mlp_ratio=48 / 11,
    pred_hidden_size=24,
    pred_num_attention_heads=2,
    pred_num_hidden_layers=1,
    pred_num_mask_tokens=2,
)


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():  # zero biases and unit gains would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def videomae_model(name="VideoMAEModel", **kw):
    config = transformers.VideoMAEConfig(**VIDEOMAE, **DECODER, **kw)
    return randomised(getattr(transformers, name)(config))


def vjepa2_model(**kw):
    config = transformers.VJEPA2Config(**(VJEPA2 | kw))
    return randomised(transformers.VJEPA2Model(config))


def noise(frames: int, side: int) -> np.ndarray:
    """Pixels [N, F, I, I, 3]."""
    shape = (2, frames, side, side, 3)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def channels_first(pixels: np.ndarray):
    return torch.tensor(pixels.transpose(0, 1, 4, 2, 3))


def features(tower, pixels: np.ndarray):
    graphdef, state = nnx.split(tower)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, pixels)


def random_tower(module, config):
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), state)
    return nnx.merge(graphdef, drawn)


def agrees(ours, expected) -> bool:
    ours, expected = np.asarray(ours), expected.numpy()
    error = np.abs(ours.reshape(expected.shape) - expected)
    return (error / np.maximum(1, np.abs(expected))).max() <= TOLERANCE


def survives(theirs, ours, folder) -> None:
    """What we write loads strictly as what we read."""
    apollo_jax.save_pretrained(ours, folder)
    back, info = type(theirs).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("name", "kw"),
    [
        ("VideoMAEModel", {}),
        ("VideoMAEModel", dict(use_mean_pooling=False, qkv_bias=False)),
        ("VideoMAEForPreTraining", dict(use_mean_pooling=False)),
        ("VideoMAEForVideoClassification", dict(num_labels=5)),
    ],
)
@pytest.mark.parametrize("layer", [-1, -2])
def test_videomae_and_the_way_back(name, kw, layer, monkeypatch, tmp_path):
    monkeypatch.setitem(videomae_rules.KNOWN, "feature_layer", layer)
    theirs, pixels = videomae_model(name, **kw), noise(6, 28)
    encoder = getattr(theirs, "videomae", theirs)
    with torch.no_grad():
        states = encoder(channels_first(pixels), output_hidden_states=True).hidden_states
    theirs.save_pretrained(tmp_path / "theirs")
    ours = apollo_jax.from_pretrained(tmp_path / "theirs")
    assert agrees(features(ours, pixels), states[layer])
    survives(theirs, ours, tmp_path / "ours")


@pytest.mark.parametrize("frames", [1, 4, 6])
def test_vjepa2_and_the_way_back(frames, tmp_path):
    theirs, pixels = vjepa2_model(), noise(frames, 24)
    with torch.no_grad():
        expected = theirs(channels_first(pixels), skip_predictor=True).last_hidden_state
    theirs.save_pretrained(tmp_path / "theirs")
    ours = apollo_jax.from_pretrained(tmp_path / "theirs")
    assert agrees(features(ours, pixels), expected)
    survives(theirs, ours, tmp_path / "ours")


def test_vjepa2_without_biases(tmp_path):
    theirs, pixels = vjepa2_model(qkv_bias=False, num_attention_heads=2), noise(4, 24)
    with torch.no_grad():  # heads of 33: thirty channels rotated, and an odd rest
        expected = theirs(channels_first(pixels), skip_predictor=True).last_hidden_state
    theirs.save_pretrained(tmp_path / "theirs")
    ours = apollo_jax.from_pretrained(tmp_path / "theirs")
    assert agrees(features(ours, pixels), expected)


def test_a_fresh_videomae_loads_in_transformers(tmp_path):
    config = videomae.Config(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        num_frames=4,
        feature_layer=-1,
    )
    ours, pixels = random_tower(videomae.VideoMAE, config), noise(4, 16)
    apollo_jax.save_pretrained(ours, tmp_path / "out")
    theirs, info = transformers.VideoMAEModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    with torch.no_grad():
        states = theirs(channels_first(pixels), output_hidden_states=True).hidden_states
    assert agrees(features(ours, pixels), states[-1])


def test_a_fresh_vjepa2_loads_in_transformers(tmp_path):
    config = vjepa2.Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2.0,
        crop_size=16,
        patch_size=8,
        frames_per_clip=4,
    )
    ours, pixels = random_tower(vjepa2.VJEPA2, config), noise(4, 16)
    apollo_jax.save_pretrained(ours, tmp_path / "out")
    theirs, info = transformers.VJEPA2Model.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    with torch.no_grad():
        expected = theirs(channels_first(pixels), skip_predictor=True).last_hidden_state
    assert agrees(features(ours, pixels), expected)


@pytest.mark.parametrize(
    ("rules", "config", "name"),
    [
        (videomae_rules, videomae.Config.large(), "VideoMAE"),
        (vjepa2_rules, vjepa2.Config.vitg_384(), "VJEPA2"),
    ],
)
def test_released_sizes_to_the_last_name(rules, config, name):
    published = rules.published(config)["config.json"]
    with torch.device("meta"):
        theirs = getattr(transformers, f"{name}Config")(**published)
        theirs = getattr(transformers, f"{name}Model")(theirs).state_dict()
    ours = nnx.eval_shape(lambda: rules.MODEL(config, rngs=nnx.Rngs(0)))
    slots = tables.slots(rules.table(config, published), tables.parameters(ours))
    # transformers 5 renames the two biases on load, and back when it saves
    expected = {
        re.sub(r"attention\.attention\.(q|v)\w+\.bias", r"attention.attention.\1_bias", n): t.shape
        for n, t in theirs.items()
    }
    assert {n: slot.shape for n, slot in slots.items()} == expected
