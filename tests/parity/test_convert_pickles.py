# SPDX-License-Identifier: Apache-2.0
"""Conversion of PyTorch's pickles: authors' files of every kind, and hostile ones."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from apollo_jax.checkpoints import convert
from apollo_jax.checkpoints.opening import open_checkpoint
from apollo_jax.checkpoints.rules import clip, dinov2, lora, videomae, vjepa, vjepa2
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


def cli(*args) -> None:
    """As a user runs it."""
    command = [sys.executable, "-m", "apollo_jax", "convert", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def loads(folder: Path, name: str, but: str = ""):
    """transformers' class of that name, to the last tensor, `but` for some kind of misfit."""
    transformers = pytest.importorskip("transformers")
    own = getattr(transformers, name)
    model, info = own.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(keys for kind, keys in info.items() if kind != but), info
    return model.eval()


def test_videomae(tmp_path):
    """The file alone, as the authors publish it: encoder and decoder below "model"."""
    expected, said = published("videomae-a"), ("num_attention_heads", "num_frames", "image_size")
    torch.save({"model": authors("videomae-a", videomae), "epoch": 1600}, tmp_path / "vitl.pth")
    config = json.loads((ENCODERS / "videomae-a" / "config.json").read_text())
    options = ["--config", json.dumps({name: config[name] for name in said})]
    cli(
        "--from", "torch", "--to", "hf", "--verify", *options, tmp_path / "vitl.pth", tmp_path / "o"
    )
    holds(tmp_path / "o", expected)
    loads(tmp_path / "o", "VideoMAEForPreTraining")
    model = loads(tmp_path / "o", "VideoMAEModel", but="unexpected_keys")
    with np.load(ENCODERS / "videomae-a" / "io.npz") as io, torch.no_grad():
        features, pixels = io["features"], torch.from_numpy(io["pixel_values"])
        out = model(pixels, output_hidden_states=True).hidden_states[-2]
    np.testing.assert_allclose(out.numpy().reshape(features.shape), features, rtol=0, atol=2e-5)


def test_videomae_of_a_classifier(tmp_path):
    """Fine-tuned files leave out "encoder." and hold a head."""
    state = {
        name.removeprefix("encoder."): tensor
        for name, tensor in authors("videomae-a", videomae).items()
        if name.startswith("encoder.") and "encoder.norm" not in name
    }
    head = {"head.weight": torch.ones(5, 32), "head.bias": torch.ones(5)}
    norm = {"fc_norm.weight": torch.ones(32), "fc_norm.bias": torch.ones(32)}
    torch.save({"module": state | head | norm}, tmp_path / "x.pth")
    said = {"num_attention_heads": 4, "num_frames": 4, "image_size": 24}
    run("--verify", "--config", json.dumps(said), tmp_path / "x.pth", tmp_path / "o")
    found, expected = load_file(tmp_path / "o" / "model.safetensors"), published("videomae-a")
    assert all(np.array_equal(found[name], expected[f"videomae.{name}"]) for name in found)
    loads(tmp_path / "o", "VideoMAEModel")


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("key", ["target_encoder", "encoder"])
def test_v_jepa_2(tmp_path, table, key):
    """Its authors' file: two encoders, the predictor that is published with either, old tables."""
    state = authors("vjepa2-a", vjepa2)
    predictor = {n: state.pop(n) for n in [*state] if "predictor" in n or "mask_tokens" in n}
    assert predictor.keys() >= {
        "module.backbone.mask_tokens.1",
        "module.backbone.predictor_proj.bias",
    }
    if table:
        state["module.backbone.pos_embed"] = torch.ones(1, 18, 48)
        predictor["module.backbone.predictor_pos_embed"] = torch.ones(1, 18, 24)
    other = {name: tensor + 1 for name, tensor in state.items()}
    pair = {"target_encoder": other, "encoder": other} | {key: state}
    content = {**pair, "predictor": predictor, "opt": {"state": {}}, "epoch": 10}
    torch.save(content, tmp_path / "vitl.pt")
    said = {"num_attention_heads": 3, "crop_size": 24, "frames_per_clip": 4}
    said |= {"pred_num_attention_heads": 2}
    if table:
        with pytest.raises(ValueError, match=r"vitl.pt: a table of 18 positions.*vjepa2"):
            run("--config", json.dumps(said), tmp_path / "vitl.pt", tmp_path / "o")
        said |= {"model_type": "vjepa2"}
    options = ["--key", key, "--config", json.dumps(said)]
    cli("--from", "torch", "--to", "hf", "--verify", *options, tmp_path / "vitl.pt", tmp_path / "o")
    holds(tmp_path / "o", published("vjepa2-a"))
    report = json.loads((tmp_path / "o" / "conversion_report.json").read_text())
    assert not report["parts"]["vjepa2"]["made_up"]
    model = loads(tmp_path / "o", "VJEPA2Model")
    with np.load(ENCODERS / "vjepa2-a" / "io.npz") as io, torch.no_grad():
        features = io["features"]
        out = model(
            torch.from_numpy(io["pixel_values_videos"]), skip_predictor=True
        ).last_hidden_state
    np.testing.assert_allclose(out.numpy().reshape(features.shape), features, rtol=0, atol=2e-5)


def test_v_jepa_2_with_another_predictor(tmp_path):
    """The encoder of an action-conditioned one; the hub's predictor is made up and said to be."""
    state = authors("vjepa2-a", vjepa2)
    encoder = {n: t for n, t in state.items() if "predictor" not in n and "mask_tokens" not in n}
    predictor = {"module.backbone.action_encoder.weight": torch.ones(4, 7)}
    torch.save({"encoder": encoder, "predictor": predictor}, tmp_path / "ac.pt")
    said = {"num_attention_heads": 3, "crop_size": 24, "frames_per_clip": 4}
    run("--verify", "--config", json.dumps(said), tmp_path / "ac.pt", tmp_path / "o")
    part = json.loads((tmp_path / "o" / "conversion_report.json").read_text())["parts"]["vjepa2"]
    assert "predictor.proj.weight" in part["made_up"]
    found, expected = load_file(tmp_path / "o" / "model.safetensors"), published("vjepa2-a")
    assert all(np.array_equal(found[n], expected[n]) for n in expected if n.startswith("encoder"))


def openai(tmp_path) -> tuple[dict, dict[str, np.ndarray]]:
    """A state dict of OpenAI's class with random numbers, and the same as the hub has it."""
    rng = np.random.default_rng(0)
    config = json.loads((ENCODERS / "clip-a" / "config.json").read_text())
    text = dict(hidden_size=12, intermediate_size=20, num_hidden_layers=2, vocab_size=30)
    text |= dict(max_position_embeddings=9, num_attention_heads=1)
    whole = dict(model_type="clip", projection_dim=20, vision_config=config, text_config=text)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text(json.dumps(whole))
    arrays = published("clip-a")
    arrays.pop("vision_model.embeddings.position_ids")
    shapes = clip.text_shapes(**{k: v for k, v in text.items() if k in clip.TEXT})
    shapes |= {"visual_projection.weight": (20, 32), "text_projection.weight": (20, 12)}
    shapes |= {"logit_scale": ()}
    arrays |= {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    save_file({n: np.array(a) for n, a in arrays.items()}, tmp_path / "hub" / "model.safetensors")
    part = open_checkpoint(tmp_path / "hub").parts[""]
    assert isinstance(part.config, clip.Config)
    [dialect] = clip.dialects(part.config, part.published_config)
    view = to_dialect(part.tensors, dialect)
    return tensors({name: view.read(name) for name in view.stored}), arrays


@pytest.mark.parametrize("whole", [True, False])
def test_openai_clip(tmp_path, whole):
    state, expected = openai(tmp_path)
    query = expected["vision_model.encoder.layers.1.self_attn.q_proj.weight"]
    fused = state["visual.transformer.resblocks.1.attn.in_proj_weight"]
    assert np.array_equal(fused[:32], query)
    assert np.array_equal(state["visual.proj"], expected["visual_projection.weight"].T)
    if not whole:
        state = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
        expected = {n: a for n, a in expected.items() if n.startswith("vis")}
    numbers = {"input_resolution": torch.tensor(28), "context_length": torch.tensor(9)}
    torch.save(state | numbers, tmp_path / "clip.pt")
    said = json.dumps({"num_attention_heads": 4, "image_size": 30})
    cli("--from", "torch", "--verify", "--config", said, tmp_path / "clip.pt", tmp_path / "o")
    holds(tmp_path / "o", expected)
    model = loads(tmp_path / "o", "CLIPModel" if whole else "CLIPVisionModelWithProjection")
    assert model.config.projection_dim == 20
    with (
        np.load(ENCODERS / "clip-a" / "pixels.npz") as file,
        np.load(ENCODERS / "clip-a" / "io.npz") as io,
    ):
        pixels, features = torch.from_numpy(file["pixel_values"][0]), io["features"]
    with torch.no_grad():
        out = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    np.testing.assert_allclose(out.numpy().reshape(features.shape), features, rtol=0, atol=2e-5)


def test_torchscript_is_refused(tmp_path):
    """As OpenAI publishes its CLIP."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "ViT-L-14-336px.pt")
    refuse(
        r"ViT-L-14-336px.pt: it is a TorchScript archive.*torch.save\(torch.jit.load",
        tmp_path / "ViT-L-14-336px.pt",
        tmp_path / "out",
    )


@pytest.mark.parametrize("stem", ["model.", ""])
def test_an_apollo_as_its_training_code_pickles_it(tmp_path, stem):
    """Flat names in a pytorch_model.bin beside a root config.json that says all."""
    official, flat = ENCODERS.parent / "apollo-tiny-a" / "checkpoint", tmp_path / "checkpoint-1000"
    flat.mkdir()
    towers = [path.name for path in (official / "vision_tower").iterdir() if path.is_dir()]
    stems = {f"vision_tower/{name}": f"vision_tower.{name}.vision_tower." for name in towers}
    stems |= {"mm_connector": "mm_connector.", "llm": "llm."}
    own = {at: load_file(official / at / "model.safetensors") for at in stems}
    named = {f"{stem}{stems[at]}{n}": a for at, arrays in own.items() for n, a in arrays.items()}
    torch.save(tensors(named), flat / "pytorch_model.bin")
    root = json.loads((official / "config.json").read_text())
    for name in towers:
        config = json.loads((official / "vision_tower" / name / "config.json").read_text())
        root["vision_tower_cfg"]["configs"][name] = config
    (flat / "config.json").write_text(json.dumps(root))
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(official / "llm" / file, flat)
    cli("--to", "apollo", flat, tmp_path / "out")
    for at, arrays in own.items():
        holds(tmp_path / "out" / at, arrays)


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
