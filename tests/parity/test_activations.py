# SPDX-License-Identifier: Apache-2.0
"""--verify's comparison with transformers: small where all is right, and nothing slips through."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from apollo_jax.checkpoints import activations, convert, oracle

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

FIXTURES = Path(__file__).parents[1] / "fixtures"
ENCODERS, OFFICIAL = FIXTURES / "encoders", FIXTURES / "apollo-tiny-a" / "checkpoint"
SIGLIP = OFFICIAL / "vision_tower" / "siglip-so400m-patch14-384"
TOLERANCE = 2e-5
PARTS = {  # folder -> its class, layers that ours has
    SIGLIP: ("SiglipVisionModel", 2),
    ENCODERS / "siglip2-naflex-a": ("Siglip2VisionModel", 2),
    ENCODERS / "clip-a": ("CLIPVisionModel", 2),
    ENCODERS / "dinov2-a": ("Dinov2Model", 2),
    ENCODERS / "dinov2reg-a": ("Dinov2WithRegistersModel", 2),
    ENCODERS / "videomae-a": ("VideoMAEForPreTraining", 2),
    ENCODERS / "vjepa2-a": ("VJEPA2Model", 3),
    OFFICIAL / "llm": ("Qwen2ForCausalLM", 2),
}


def compared(source: Path, target: Path, to: str = "hf", dtype: str | None = None) -> dict:
    """The activations of the only part of a conversion."""
    _, report = convert.convert(source, target, to=to, dtype=dtype, verify=True)
    [found] = report["activations"].values()
    return found


@pytest.mark.parametrize("folder", PARTS, ids=lambda folder: folder.name)
def test_every_layer_agrees(folder, tmp_path):
    found = compared(folder, tmp_path / "out")
    name, depth = PARTS[folder]
    assert found["class"] == name
    assert len(found["layers"]) == 1 + depth
    differences = [*found["layers"], *filter(None, [found["output"]])]
    assert all(d["relative"] <= TOLERANCE for d in differences)
    assert any(d["max_abs"] > 0 for d in differences)  # two computations, not one
    if name == "Qwen2ForCausalLM":
        assert 0 <= found["kl"] < 1e-9
        assert activations.said(found).startswith("2 layers within ")
        assert ", logits KL " in activations.said(found)
    report = json.loads((tmp_path / "out" / convert.REPORT).read_text())
    assert [*report["activations"].values()] == [found]


def test_what_transformers_cannot_read_is_exported_for_it(tmp_path):
    for to, name in [("orbax", "weights"), ("big_vision", "weights.npz")]:
        found = compared(SIGLIP, tmp_path / to / name, to=to)
        assert max(d["relative"] for d in found["layers"]) <= TOLERANCE
        assert not [p for p in (tmp_path / to).iterdir() if "tmp" in p.name]


def test_a_whole_apollo_part_by_part(tmp_path):
    _, report = convert.convert(OFFICIAL, tmp_path / "out", verify=True)
    found = report["activations"]
    assert list(found) == [SIGLIP.name, "internvideo2", "connector", "llm"]
    assert found["llm"]["kl"] < 1e-9
    assert "no class for internvideo2" in activations.said(found["internvideo2"])
    assert "no class for the connector" in activations.said(found["connector"])


def test_what_rounding_costs_is_said(tmp_path):
    found = compared(OFFICIAL / "llm", tmp_path / "out", dtype="bfloat16")
    assert found["rounded"] == ["float32 to bfloat16"]
    assert 1e-7 < found["kl"] < 1
    assert activations.said(found).endswith("; rounded from float32 to bfloat16")


def test_a_model_that_computes_something_else_fails(monkeypatch, tmp_path):
    run = oracle.run

    def other(name, folder, config, x):
        return run(name, folder, config, x[..., ::-1].copy())  # blue, green, red

    monkeypatch.setattr(oracle, "run", other)
    with pytest.raises(ValueError, match=r"siglip: hidden state 0 is .* away from SiglipVisionMod"):
        convert.convert(SIGLIP, tmp_path / "out", to="hf", verify=True)
    assert not list(tmp_path.iterdir())


def test_only_a_strict_load_counts(tmp_path):
    folder = shutil.copytree(SIGLIP, tmp_path / "siglip")
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "layers.0.mlp.fc1.bias" not in n}
    save_file(kept | dict(stray=np.zeros(3, np.float32)), folder / "model.safetensors")
    config = dataclasses.make_dataclass("Config", [("num_hidden_layers", int)])(3)
    with oracle.quiet(), pytest.raises(ValueError, match="not load all of it") as error:
        oracle.run("SiglipVisionModel", folder, config, np.zeros((1, 1, 30, 30, 3), np.float32))
    assert "missing_keys: " in str(error.value)
    assert "fc1.bias" in str(error.value)
    assert "unexpected_keys: stray" in str(error.value)


def test_a_part_that_does_not_fit_in_memory_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(activations, "free_memory", lambda: 1e3)
    found = compared(SIGLIP, tmp_path / "out")
    assert "GB of memory" in activations.said(found)


def test_without_torch_the_rest_is_proven(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = compared(SIGLIP, tmp_path / "out")
    assert found == dict(skipped=activations.NO_TORCH)


def test_a_class_that_fails_is_named(tmp_path, monkeypatch):
    import transformers  # pyright: ignore[reportMissingImports]

    def fail(*_, **__):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(transformers.Dinov2Model, "forward", fail)
    with pytest.raises(ValueError, match=r"dinov2: Dinov2Model.* fails on .*: no such kernel$"):
        convert.convert(ENCODERS / "dinov2-a", tmp_path / "out", to="hf", verify=True)
    assert not list(tmp_path.iterdir())
