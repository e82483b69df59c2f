# SPDX-License-Identifier: Apache-2.0
"""SigLIP 2 NaFlex against transformers on random weights, with padding; both halves; fresh ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import apollo_jax
from apollo_jax.checkpoints.rules import siglip2 as rules
from apollo_jax.checkpoints.rules import table as tables
from apollo_jax.models import siglip2
from apollo_jax.models.siglip import patchify
from data_pipeline.transforms import preprocess

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5
VISION: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_patches=16,
    patch_size=4,
)
TEXT = dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=8,
    projection_size=32,
)
# Larger and smaller than the table, wider and higher, with padding.
SHAPES = np.array([[2, 3], [6, 4], [1, 24], [4, 4]], np.int32)
LENGTH = 24


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():  # zero biases and unit gains would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tower():
    config = transformers.Siglip2VisionConfig(**VISION)
    return randomised(transformers.Siglip2VisionModel(config))


def both_halves():
    config = transformers.Siglip2Config(text_config=TEXT, vision_config=VISION)
    return randomised(transformers.Siglip2Model(config))


def errors(ours, theirs) -> np.ndarray:
    """Ours against hidden_states[-2] of random images."""
    patches = np.random.default_rng(0).standard_normal((4, LENGTH, 48)).astype(np.float32)
    mask = np.arange(LENGTH) < SHAPES.prod(axis=1, keepdims=True)
    with torch.no_grad():
        vision = getattr(theirs, "vision_model", theirs)
        expected = vision(
            torch.tensor(patches),
            torch.tensor(mask, dtype=torch.int32),
            torch.tensor(SHAPES, dtype=torch.long),
            output_hidden_states=True,
        ).hidden_states[-2]
    graphdef, state = nnx.split(ours)
    encode = jax.jit(lambda state, *args: nnx.merge(graphdef, state).encode(*args))
    error = np.abs(np.asarray(encode(state, patches, mask, SHAPES)) - expected.numpy())
    return error / np.maximum(1, np.abs(expected.numpy()))


@pytest.mark.parametrize("make", [tower, both_halves])
def test_features_and_the_way_back(make, tmp_path):
    theirs = make()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = apollo_jax.from_pretrained(tmp_path / "theirs")
    assert errors(ours, theirs).max() <= TOLERANCE
    apollo_jax.save_pretrained(ours, tmp_path / "ours")
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_a_fresh_tower_loads_in_transformers(tmp_path):
    fresh = siglip2.SigLIP2(siglip2.Config(**VISION, max_num_patches=20), rngs=nnx.Rngs(0))
    apollo_jax.save_pretrained(fresh, tmp_path / "out")
    theirs, info = transformers.Siglip2VisionModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    assert errors(fresh, theirs).max() <= TOLERANCE


def test_squares_are_prepared_as_the_published_processor_does():
    files = rules.published(siglip2.Config(patch_size=14, max_num_patches=20))
    module = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    processor = module.Siglip2ImageProcessorPil(**files["preprocessor_config.json"])
    frame = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    expected = processor(frame, return_tensors="np")
    spec = rules.config(files, "f").frame_spec
    assert tuple(expected["spatial_shapes"][0]) == (4, 4)
    assert spec.size == 4 * 14
    ours = patchify(jnp.asarray(preprocess(frame[None], spec)), 14).reshape(16, -1)
    np.testing.assert_allclose(ours, expected["pixel_values"][0, :16], atol=1e-6)


@pytest.mark.parametrize("config", [siglip2.Config.base(), siglip2.Config.so400m()])
def test_released_sizes_to_the_last_name(config):
    json = rules.published(config)["config.json"]
    with torch.device("meta"):
        theirs = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**json))
    expected = {n.removeprefix("vision_model."): t.shape for n, t in theirs.state_dict().items()}
    abstract = nnx.eval_shape(lambda: siglip2.SigLIP2(config, rngs=nnx.Rngs(0)))
    slots = tables.slots(rules.table(config, json), tables.parameters(abstract))
    assert {n.removeprefix("vision_model."): s.shape for n, s in slots.items()} == expected
