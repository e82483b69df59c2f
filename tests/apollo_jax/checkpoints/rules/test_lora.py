# SPDX-License-Identifier: Apache-2.0
"""LoRA in a file's tensors: told from the names, merged, and what does not fit is refused."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from apollo_jax.checkpoints.rules import lora

FIXTURE = Path(__file__).parents[3] / "fixtures" / "encoders" / "languagebind-video-v1-a"
RANK, ALPHA = 4, 16


@pytest.fixture(scope="module")
def plain():
    return load_file(FIXTURE / "model.safetensors")


def wrapped(tensors: dict, base_layer: str) -> dict:
    """The file as peft saves it: every attention over time has an update."""
    rng, out = np.random.default_rng(0), {}
    for name, tensor in tensors.items():
        found = name.replace("encoder.", "encoder.base_model.model.")
        match = re.fullmatch(r"(.*temporal_attn\.\w+_proj)\.(weight|bias)", found)
        out[f"{match[1]}.{base_layer}{match[2]}" if match else found] = tensor
        if match and match[2] == "weight":
            rows, columns = tensor.shape
            a, b = rng.standard_normal((RANK, columns)), rng.standard_normal((rows, RANK))
            out[f"{match[1]}.lora_A.default.weight"] = a.astype(np.float32)
            out[f"{match[1]}.lora_B.default.weight"] = b.astype(np.float32)
    return out


def shapes(tensors: dict) -> dict:
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("base_layer", ["", "base_layer."])
def test_every_tensor_is_found_once_under_its_plain_name(base_layer, plain):
    found = wrapped(plain, base_layer)
    merged, renamed = lora.merged(shapes(found)), lora.renamed(shapes(found))
    assert {*merged, *renamed} == plain.keys()
    assert len(merged) == 3 * 4
    used = [*renamed.values(), *(name for names in merged.values() for name in names)]
    assert sorted(used) == sorted(found)
    for name, at in renamed.items():
        assert found[at] is plain[name]


@pytest.mark.parametrize("base_layer", ["", "base_layer."])
def test_merged_weights_compute_what_peft_computes(base_layer, plain):
    found = wrapped(plain, base_layer)
    x = np.random.default_rng(1).standard_normal((5, 32)).astype(np.float32)
    for name, (base, a, b) in lora.merged(shapes(found)).items():
        w, a, b = found[base], found[a], found[b]
        assert w is plain[name]
        weight = lora.merge(w, a, b, ALPHA / RANK)
        apart = x @ w.T + ((x @ a.T) @ b.T) * (ALPHA / RANK)
        np.testing.assert_allclose(x @ weight.T, apart, rtol=1e-4, atol=1e-3)
        part = lora.merge(w[3:5, 1:9], a[:, 1:9], b[3:5], ALPHA / RANK)
        np.testing.assert_allclose(part, weight[3:5, 1:9], rtol=1e-6)


def test_sums_in_float32_and_keeps_the_dtype():
    small = np.full((1, 1), 2**-6, ml_dtypes.bfloat16)
    ones = np.ones((1, 1), ml_dtypes.bfloat16)
    weight = lora.merge(ones, small, ones, 0.5)
    assert weight.dtype == ml_dtypes.bfloat16
    assert float(weight[0, 0]) == 1 + 2**-7
    wide = lora.merge(ones.astype(np.float32), small, small, 1.0)
    assert wide[0, 0] == 1 + 2**-12


def test_plain_tensors_stay(plain):
    assert lora.merged(shapes(plain)) == {}
    assert lora.renamed(shapes(plain)) == {name: name for name in plain}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, m: f.pop(f"{m}.lora_B.default.weight"), "needs one weight, one A and one B"),
        (lambda f, m: f.pop(f"{m}.weight"), "needs one weight, one A and one B"),
        (lambda f, m: f.update({f"{m}.base_layer.weight": (32, 32)}), "needs one weight"),
        (lambda f, m: f.update({f"{m}.lora_A.default.weight": (5, 32)}), "has weight .32, 32., A"),
        (lambda f, m: f.update({f"{m}.lora_A.other.weight": (4, 32)}), "lora_A.other.weight is"),
        (lambda f, m: f.update({f"{m}.lora_magnitude_vector": (32,)}), "vector is not an update"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message, plain):
    found = shapes(wrapped(plain, ""))
    module = "vision_model.encoder.base_model.model.layers.1.temporal_attn.q_proj"
    change(found, module)
    with pytest.raises(ValueError, match=message) as error:
        lora.merged(found)
    assert module in str(error.value)
    assert "layers.0" not in str(error.value)


def test_one_tensor_under_two_names_is_refused():
    with pytest.raises(ValueError, match=r"q\.base_layer\.bias and q.bias are the same tensor"):
        lora.renamed({"q.base_layer.bias": (3,), "q.bias": (3,)})


def test_scale_and_the_config_of_the_merged_file():
    config = json.loads((FIXTURE / "config.json").read_text())
    config["vision_config"] |= dict(lora_r=64, lora_alpha=16)
    assert lora.scale(config, 64) == 0.25
    assert lora.scale(config["vision_config"], 64) == 0.25
    assert lora.scale({"vision_config": {}}, 2) == 8
    with pytest.raises(ValueError, match="lora_r is 64, but the LoRA tensors have rank 16"):
        lora.scale(config, 16)
    overruled = config | {"vision_config_dict": dict(lora_r=8, add_time_attn=True)}
    assert lora.scale(overruled, 8) == 2
    for published in (config, overruled, config["vision_config"]):
        merged = lora.without(published)
        assert merged != published
        with pytest.raises(ValueError, match="lora_r is 0"):
            lora.scale(merged, 64)
