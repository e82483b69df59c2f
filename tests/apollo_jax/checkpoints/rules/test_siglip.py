# SPDX-License-Identifier: Apache-2.0
"""SigLIP's and SigLIP 2's published folders: fields and the way back."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from apollo_jax.checkpoints.pretrained import from_pretrained, save_pretrained
from apollo_jax.checkpoints.rules import siglip, siglip2

FIXTURES = Path(__file__).parents[3] / "fixtures" / "encoders"


@pytest.mark.parametrize("name", ["bigvision-siglip-a", "siglip2-naflex-a"])
def test_a_folder_survives_to_the_last_bit(name, tmp_path):
    folder = FIXTURES / name
    save_pretrained(from_pretrained(folder), tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key].view(np.uint8), tensor.view(np.uint8))
    assert (tmp_path / "out/config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_the_text_half_may_have_another_width(tmp_path):
    """As in google/siglip2-giant-opt-patch16-384."""
    text = dict(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4,
        model_type="siglip_text_model",
        projection_size=32,
        vocab_size=256_000,
        pad_token_id=1,
    )
    vision = json.loads((FIXTURES / "bigvision-siglip-a/config.json").read_text())
    both = dict(architectures=["SiglipModel"], model_type="siglip", initializer_factor=1.0)
    both |= dict(text_config=text, vision_config=vision)
    tensors = load_file(FIXTURES / "bigvision-siglip-a/model.safetensors")
    shapes = siglip.text_shapes(**siglip.text_fields(text))
    assert shapes["text_model.head.weight"] == (32, 8)
    assert shapes["text_model.embeddings.token_embedding.weight"] == (256_000, 8)
    rng = np.random.default_rng(0)
    tensors |= {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(both))
    save_pretrained(from_pretrained(tmp_path), tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(after[name], tensor)


def test_absent_and_null_text_fields():
    base = siglip.text_fields({})
    assert (base["hidden_size"], base["projection_size"]) == (768, 768)
    assert siglip.text_fields(dict(hidden_size=24, projection_size=None))["projection_size"] == 24


def test_resampling_follows_the_preprocessor():
    def spec(**preprocessor):
        files = {"config.json": {}, "preprocessor_config.json": preprocessor}
        return siglip.config(files, "f").frame_spec.resample

    assert spec() == spec(resample=3) == "pil_bicubic"
    assert spec(resample=2) == "pil_bilinear"
    with pytest.raises(ValueError, match=r"f/preprocessor_config.json: resample is 0, only 3 "):
        spec(resample=0)


def test_naflex_fields():
    c = siglip2.Config.base()
    assert siglip2.config(siglip2.published(c), "f") == c
    assert siglip2.config({"config.json": {}}, "f") == c  # the published class defaults
    files = {"config.json": {}, "preprocessor_config.json": dict(max_num_patches=600)}
    assert siglip2.config(files, "f").frame_spec.size == 24 * 16
    files["preprocessor_config.json"] |= dict(patch_size=14)
    with pytest.raises(ValueError, match="patch_size is 14, only 16 is supported"):
        siglip2.config(files, "f")
    with pytest.raises(ValueError, match=r"f/config.json: num_patches 10 is not the square"):
        siglip2.config({"config.json": dict(num_patches=10)}, "f")
