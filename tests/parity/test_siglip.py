# SPDX-License-Identifier: Apache-2.0
"""SigLIP against transformers on random weights: the tower alone and inside a SiglipModel."""

import jax
import numpy as np
import pytest
from flax import nnx

import apollo_jax
from apollo_jax.checkpoints.rules import siglip as rules
from apollo_jax.checkpoints.rules import table as tables
from apollo_jax.models import apollo, siglip

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5
VISION = dict(
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
    projection_size=32,  # to the width of the tower, as in SigLIP 2's giant
)


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():  # zero biases and unit gains would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


RELEASED = {
    "base": siglip.Config.base(512),
    "large": siglip.Config.large(384),
    "so400m": siglip.Config.so400m_384(),
    "siglip2 so400m": siglip.Config.siglip2_so400m(512, 16),
    "siglip2 giant": siglip.Config.siglip2_giant(),
}


def tower():
    config = transformers.SiglipVisionConfig(**VISION)
    return randomised(transformers.SiglipVisionModel(config))


def both_halves():
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    return randomised(transformers.SiglipModel(config))


def test_a_fresh_tower_loads_in_transformers(tmp_path):
    config = apollo.Config.debug().towers["siglip"]
    assert isinstance(config, siglip.Config)
    fresh = nnx.eval_shape(lambda: siglip.SigLIP(config, rngs=nnx.Rngs(0)))
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), nnx.state(fresh))
    apollo_jax.save_pretrained(nnx.merge(nnx.graphdef(fresh), ones), tmp_path / "out")
    _, info = transformers.SiglipVisionModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    processor = transformers.SiglipImageProcessor.from_pretrained(tmp_path / "out")
    assert dict(processor.size) == {"height": 32, "width": 32}


@pytest.mark.parametrize("make", [tower, both_halves])
def test_features_and_the_way_back(make, tmp_path):
    theirs = make()
    pixels = np.random.default_rng(0).standard_normal((3, 30, 30, 3)).astype(np.float32)
    with torch.no_grad():
        vision = getattr(theirs, "vision_model", theirs)
        states = vision(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
        expected = states.hidden_states[-2].numpy()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = apollo_jax.from_pretrained(tmp_path / "theirs")
    graphdef, state = nnx.split(ours)
    features = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, pixels[None])
    error = np.abs(np.asarray(features).reshape(expected.shape) - expected)
    assert (error / np.maximum(1, np.abs(expected))).max() <= TOLERANCE

    apollo_jax.save_pretrained(ours, tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_to_the_last_name(name):
    json = rules.published(RELEASED[name])["config.json"]
    with torch.device("meta"):
        theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**json))
    expected = {
        n.removeprefix("vision_model."): tuple(t.shape) for n, t in theirs.state_dict().items()
    }
    abstract = nnx.eval_shape(lambda: siglip.SigLIP(RELEASED[name], rngs=nnx.Rngs(0)))
    slots = tables.slots(rules.table(RELEASED[name], json), tables.parameters(abstract))
    assert {n.removeprefix("vision_model."): slot.shape for n, slot in slots.items()} == expected
