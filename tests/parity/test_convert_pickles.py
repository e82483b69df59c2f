# SPDX-License-Identifier: Apache-2.0
"""Conversion of PyTorch's pickles: authors' files of every kind, and hostile ones."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from apollo_jax.checkpoints import convert
from apollo_jax.checkpoints.opening import open_checkpoint
from apollo_jax.checkpoints.rules import dinov2, lora, videomae, vjepa
from apollo_jax.checkpoints.translate import to_dialect

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

ENCODERS = Path(__file__).parents[1] / "fixtures" / "encoders"
LANGUAGEBIND = ENCODERS / "languagebind-video-a"


def run(*args) -> None:
    convert.main([*map(str, args)])


def published(kind: str) -> dict[str, np.ndarray]:
    return load_file(ENCODERS / kind / "model.safetensors")


def tensors(arrays: dict) -> dict:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def authors(kind: str, rules) -> dict:
    """A fixture's tensors as its authors' files name and group them."""
    part = open_checkpoint(ENCODERS / kind).parts[""]
    dialect = rules.dialects(part.config, part.published_config)[0]
    view = to_dialect(part.tensors, dialect)
    return tensors({name: view.read(name) for name in view.stored})


def holds(folder: Path, expected: dict[str, np.ndarray], *absent: str) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        zero = any(word in name for word in absent)
        assert np.array_equal(found[name], np.zeros_like(array) if zero else array), name


# ---- authors' files


@pytest.mark.parametrize("config", [True, False])
def test_dinov2(tmp_path, config):
    state = authors("dinov2-a", dinov2)
    expected = published("dinov2-a")
    query = expected["encoder.layer.0.attention.attention.query.weight"]
    assert np.array_equal(state["blocks.0.attn.qkv.weight"][: len(query)], query)
    folder = tmp_path / "dinov2"
    folder.mkdir()
    torch.save(state, folder / "dinov2_vits14_pretrain.pth")
    said = json.loads((ENCODERS / "dinov2-a" / "config.json").read_text())
    heads = json.dumps({"num_attention_heads": said["num_attention_heads"]})
    run("--from", "torch", "--verify", "--config", heads, folder, tmp_path / "out")
    holds(tmp_path / "out", expected)


@pytest.mark.parametrize("key", ["", "target_encoder", "encoder"])
def test_v_jepa(tmp_path, key):
    state = authors("vjepa-a", vjepa)
    other = {name: value + 1 for name, value in state.items()}
    torch.save({"encoder": other, "target_encoder": state, "epoch": 3}, tmp_path / "x.pth.tar")
    said = json.loads((ENCODERS / "vjepa-a" / "config.json").read_text())
    sizes = {name: said[name] for name in ("num_frames", "num_heads")}
    options = ["--key", key] * bool(key)
    run(*options, "--config", json.dumps(sizes), "--verify", tmp_path / "x.pth.tar", tmp_path / "o")
    chosen = other if key == "encoder" else state
    plain = {name.removeprefix(vjepa.PUBLISHED): np.asarray(t) for name, t in chosen.items()}
    holds(tmp_path / "o", plain)
    report = json.loads((tmp_path / "o" / "conversion_report.json").read_text())
    [part] = report["parts"].values()
    assert any(use["tensor"] == "epoch" and "ignored" in use for use in part["source_keys"])
    with pytest.raises(ValueError, match="has no 'teacher' with tensors"):
        run("--key", "teacher", tmp_path / "x.pth.tar", tmp_path / "o2")


def test_videomae(tmp_path):
    state = authors("videomae-a", videomae)
    torch.save({"model": state}, tmp_path / "x.pth")
    shutil.copy(ENCODERS / "videomae-a" / "config.json", tmp_path)
    (tmp_path / "x.pth").rename(tmp_path / "pytorch_model.bin")
    run("--verify", tmp_path, tmp_path.with_name("videomae-out"))


@pytest.fixture
def bin_folder(tmp_path):
    """bin_folder(content): LanguageBind's folder with that pickle."""

    def bin_folder(content, **kw):
        folder = tmp_path / "languagebind"
        folder.mkdir(exist_ok=True)
        shutil.copy(LANGUAGEBIND / "config.json", folder)
        torch.save(content, folder / "pytorch_model.bin", **kw)
        return folder

    return bin_folder


@pytest.mark.parametrize("zipped", [True, False])
def test_languagebind(tmp_path, bin_folder, zipped):
    expected = published("languagebind-video-a")
    state = {n: torch.nn.Parameter(t, t.is_floating_point()) for n, t in tensors(expected).items()}
    folder = bin_folder(state, _use_new_zipfile_serialization=zipped)
    run("--from", "torch", "--to", "hf", "--verify", folder, tmp_path / "out")
    holds(tmp_path / "out", expected)
    run("--dtype", "bfloat16", "--to", "orbax", "--verify", folder, tmp_path / "orbax")


def test_languagebind_with_lora(tmp_path, bin_folder):
    expected = published("languagebind-video-a")
    rank, alpha, rng = 2, 16, np.random.default_rng(0)
    state, merged = {}, dict(expected)
    for name, array in expected.items():
        if "temporal_attn" not in name or not name.endswith(".weight"):
            state[name] = array
            continue
        module = name.removesuffix(".weight").replace(
            "encoder.layers", f"encoder.{lora.WRAPPER}layers"
        )
        a = rng.standard_normal((rank, array.shape[1])).astype(np.float32)
        b = rng.standard_normal((array.shape[0], rank)).astype(np.float32)
        state |= {f"{module}.weight": array, module + lora.A: a, module + lora.B: b}
        merged[name] = array + np.float32(alpha / rank) * (b @ a)
    folder = bin_folder(tensors(state))
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= dict(lora_r=rank, lora_alpha=alpha)
    (folder / "config.json").write_text(json.dumps(config))
    run("--verify", folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == merged.keys()
    for name, array in merged.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["lora_r"] == 0


# ---- hostile files


class Payload:
    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def refuse(match, folder, out):
    with pytest.raises(ValueError, match=match) as caught:
        run(folder, out)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(out.parent.glob("out*"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_is_refused_unread(tmp_path, bin_folder, zipped):
    state = tensors(published("languagebind-video-a")) | {"x": Payload(tmp_path / "ran")}
    folder = bin_folder(state, _use_new_zipfile_serialization=zipped)
    refuse("posix.mkdir, which is no tensor.*refused unread", folder, tmp_path / "out")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    refuse("refused unread", folder, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 100, 5000, -9])
def test_a_truncated_pickle(tmp_path, bin_folder, keep):
    folder = bin_folder(tensors(published("languagebind-video-a")))
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    refuse("pytorch_model.bin: it is truncated, corrupt", folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "holds a list, not tensors by name"),
        ({"a": 1}, "holds no tensors"),
        ({"a": torch.eye(3).to_sparse()}, "a: sparse or quantized"),
        (torch.nn.Linear(3, 3), "torch.nn.modules.linear.Linear, which is no tensor"),
    ],
)
def test_pickles_of_something_else(tmp_path, bin_folder, content, match):
    refuse(match, bin_folder(content), tmp_path / "out")
