# SPDX-License-Identifier: Apache-2.0
"""DINOv2 against transformers on random weights: MLP, SwiGLU and registers, both ways."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import apollo_jax
from apollo_jax.models import dinov2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5
SIZE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, patch_size=7)
MODELS = {
    "mlp": (transformers.Dinov2Config, transformers.Dinov2Model, dict(mlp_ratio=3)),
    "swiglu": (transformers.Dinov2Config, transformers.Dinov2Model, dict(use_swiglu_ffn=True)),
    "registers": (
        transformers.Dinov2WithRegistersConfig,
        transformers.Dinov2WithRegistersModel,
        dict(num_register_tokens=3),
    ),
}
SHAPES = [(21, 21), (30, 44), (35, 35), (49, 49), (7, 175)]  # fewer, more, as many patches; odd


@pytest.fixture(params=MODELS)
def theirs(request):
    config, model, fields = MODELS[request.param]
    torch.manual_seed(0)
    model = model(config(**SIZE, **fields, image_size=35)).eval()
    for parameter in model.parameters():  # zero biases and unit gains would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def their_features(model, pixels: np.ndarray) -> np.ndarray:
    """[N, I, J, 3] -> [N, S, D] patches of hidden_states[-2]."""
    with torch.no_grad():
        output = model(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    skipped = 1 + getattr(model.config, "num_register_tokens", 0)
    assert len(output.hidden_states) == 4
    return output.hidden_states[-2][:, skipped:].numpy()


def our_features(model, pixels: np.ndarray) -> np.ndarray:
    graphdef, state = nnx.split(model)
    features = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, pixels[:, None])
    return np.asarray(features).reshape(len(pixels), -1, 32)


def compare(theirs, ours, shapes) -> None:
    for shape in shapes:
        pixels = np.random.default_rng(0).standard_normal((2, *shape, 3)).astype(np.float32)
        expected, features = their_features(theirs, pixels), our_features(ours, pixels)
        error = np.abs(features - expected) / np.maximum(1, np.abs(expected))
        assert error.max() <= TOLERANCE, shape


def test_features_and_the_way_back(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    fields = json.loads(config.read_text())
    if fields["model_type"] == "dinov2":  # what this version of transformers computes
        config.write_text(json.dumps(fields | dict(interpolation="size")))
    ours = apollo_jax.from_pretrained(tmp_path / "theirs")
    compare(theirs, ours, SHAPES)

    apollo_jax.save_pretrained(ours, tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", MODELS)
def test_a_fresh_tower_loads_in_transformers(kind, tmp_path):
    rule = "antialias" if kind == "registers" else "size"
    config = dinov2.Config(**SIZE, **MODELS[kind][2], table_size=35, interpolation=rule)
    fresh = dinov2.DINOv2(config, rngs=nnx.Rngs(0))
    apollo_jax.save_pretrained(fresh, tmp_path / "out")
    theirs, info = MODELS[kind][1].from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    compare(theirs.eval(), fresh, SHAPES[:2])
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.size["shortest_edge"], processor.crop_size["height"]) == (256, 224)
