# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax convert` as a user runs it: every layout there and back, bit for bit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import apollo_jax
from apollo_jax.checkpoints import convert
from apollo_jax.checkpoints.rules import vjepa

KINDS = (
    "bigvision-siglip-a",
    "clip-a",
    "dinov2-a",
    "dinov2reg-a",
    "languagebind-image-a",
    "languagebind-video-a",
    "languagebind-video-v1-a",
    "siglip2-naflex-a",
    "videomae-a",
    "vjepa-a",
    "vjepa2-a",
)
SIGLIP = "siglip-so400m-patch14-384"
LOOP, SCAN = "loop.npz", "scan.npz"


def run(*args) -> None:
    convert.main([*map(str, args)])


def cli(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "apollo_jax", "convert", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape) and a[n].tobytes() == b[n].tobytes()
        for n in a
    )


# ---- the command


def test_the_command_converts_and_proves(encoders, tmp_path):
    done = cli("--verify", encoders / "bigvision-siglip-a" / LOOP, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "siglip, " in done.stdout
    assert "tensors equal" in done.stdout
    assert (tmp_path / "out" / "conversion_report.json").is_file()


def test_the_command_fails_in_one_line(encoders, tmp_path):
    (tmp_path / "x.npz").write_bytes((encoders / "bigvision-siglip-a" / LOOP).read_bytes()[:-9])
    done = cli(tmp_path / "x.npz", tmp_path / "out")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"apollo-jax convert: {tmp_path / 'x.npz'} is not a readable .npz")
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]


def test_a_pickle_without_pytorch_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.pth").touch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"pip install 'apollo_jax\[torch\]'"):
        run(tmp_path / "x.pth", tmp_path / "out")


# ---- towers


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_tower_comes_back(encoders, contents, tmp_path, kind):
    source = encoders / kind
    was = {n: c for n, c in contents(source).items() if not n.endswith(".npz")}
    run("--to", "orbax", source, tmp_path / "orbax")
    run(tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == was


@pytest.mark.parametrize("layout", [LOOP, SCAN])
def test_big_vision_both_ways(encoders, tmp_path, layout):
    source = encoders / "bigvision-siglip-a"
    run("--from", "big_vision", "--to", "hf", source / layout, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    expected = load_file(source / "model.safetensors")  # the vision half
    assert same({name: found[name] for name in expected}, expected)
    run("--to", "big_vision", tmp_path / "hf", tmp_path / LOOP)
    run("--to", "big_vision", "--scan", tmp_path / "hf", tmp_path / SCAN)
    for back in (LOOP, SCAN):
        assert same(arrays(tmp_path / back), arrays(source / back))


def test_bfloat16_as_big_vision_stores_it(encoders, tmp_path):
    wide = arrays(encoders / "bigvision-siglip-a" / LOOP)
    half: dict[str, Any] = {name: array.astype(ml_dtypes.bfloat16) for name, array in wide.items()}
    np.savez(tmp_path / "half.npz", **half)
    assert {a.dtype.str for a in arrays(tmp_path / "half.npz").values()} == {"|V2"}
    run("--verify", tmp_path / "half.npz", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert {t.dtype.name for t in tensors.values()} == {"bfloat16"}
    run("--to", "big_vision", tmp_path / "hf", tmp_path / "back.npz")
    assert same(arrays(tmp_path / "back.npz"), arrays(tmp_path / "half.npz"))
    run("--dtype", "float32", tmp_path / "half.npz", tmp_path / "wide")
    tensors = load_file(tmp_path / "wide" / "model.safetensors")
    assert {t.dtype.name for t in tensors.values()} == {"float32"}


def test_siglip_2_for_any_size_as_big_vision_has_it(encoders, tmp_path):
    source, npz = encoders / "siglip2-naflex-a", tmp_path / "siglip2_naflex.npz"
    run("--to", "big_vision", "--scan", source, npz)
    patches = arrays(npz)["params/img/embedding/kernel"]
    assert patches.ndim == 2
    done = cli("--verify", "--from", "big_vision", "--to", "hf", npz, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    expected = load_file(source / "model.safetensors")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), expected)


def test_another_dtype_is_that_of_every_tensor(tiny, tmp_path):
    source = tiny / "checkpoint" / "vision_tower" / SIGLIP
    run("--to", "orbax", "--dtype", "bfloat16", "--verify", source, tmp_path / "orbax")
    run(tmp_path / "orbax", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert {t.dtype.name for t in found.values()} == {"bfloat16"}
    expected = load_file(source / "model.safetensors")
    assert same(found, {n: t.astype(ml_dtypes.bfloat16) for n, t in expected.items()})


def test_other_names_in_a_safetensors_folder(encoders, tmp_path):
    source = encoders / "vjepa-a"
    plain = {
        name.removeprefix(vjepa.PUBLISHED): tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    folder = tmp_path / "in-apollo"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    named = {vjepa.APOLLO + name: tensor for name, tensor in plain.items()}
    save_file(named, folder / "model.safetensors")
    run(folder, tmp_path / "out")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), plain)
    del named["vision_tower.norm.bias"]
    save_file(named, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing \(1\):\s+vision_tower.norm.bias"):
        run(folder, tmp_path / "out2")


# ---- a whole Apollo


@pytest.fixture
def official(tiny):
    return tiny / "checkpoint"


@pytest.fixture
def folders(official):
    """Folder of a part -> what the tensors of a training run begin with."""
    towers = [p.name for p in (official / "vision_tower").iterdir() if p.is_dir()]
    named = {f"vision_tower/{name}": f"vision_tower.{name}.vision_tower." for name in towers}
    return named | {"mm_connector": "mm_connector.", "llm": "llm."}


def test_apollo_through_orbax_comes_back(official, contents, tmp_path):
    run("--to", "orbax", official, tmp_path / "orbax")
    run("--verify", tmp_path / "orbax", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(official)


def test_split_and_assembled_again(official, folders, contents, tmp_path):
    run("--to", "hf", official, tmp_path / "parts")
    for folder in folders:
        own = tmp_path / "parts" / Path(folder).name
        assert contents(own) == contents(official / folder)
    paths = {"connector": "mm_connector", "llm": "llm"}
    paths |= {name: name for name in (SIGLIP, "internvideo2")}
    given = [f"--part={name}={tmp_path / 'parts' / at}" for name, at in paths.items()]
    run(*given, tmp_path / "whole")
    for folder in folders:
        assert contents(tmp_path / "whole" / folder) == contents(official / folder)
    assert convert.read_config(tmp_path / "whole") == convert.read_config(official)


def test_a_part_is_replaced(official, folders, contents, tmp_path):
    llm = tmp_path / "llm"
    shutil.copytree(official / "llm", llm)
    tensors = load_file(llm / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, llm / "model.safetensors", {"format": "pt"})
    run("--part", f"llm={llm}", official, tmp_path / "out")
    for folder in folders:
        expected = contents(llm if folder == "llm" else official / folder)
        assert contents(tmp_path / "out" / folder) == expected


def test_one_part(official, contents, tmp_path):
    run("--only", "connector", official, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(official / "mm_connector")


def test_vocabulary_and_head(official, tmp_path):
    was = load_file(official / "llm" / "model.safetensors")["model.embed_tokens.weight"]
    sizes = ("--vocab-size", "448", "--head", "untied", "--dtype", "bfloat16")
    run(*sizes, "--max-shard-size", "100KB", official, tmp_path / "out")
    llm = tmp_path / "out" / "llm"
    index = json.loads((llm / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({*index.values()}) > 1
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        table = load_file(llm / index[name])[name]
        assert np.array_equal(table[:404], was.astype(ml_dtypes.bfloat16))
        assert not table[404:].any()
    config = json.loads((llm / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (448, False)
    assert apollo_jax.from_pretrained(tmp_path / "out").config.llm.vocab_size == 448


# ---- the flat names of the training code


def write_flat(folder, official, folders, stem, *, beside: bool) -> None:
    """The official checkpoint as its training code saves it; `beside` keeps the parts' configs."""
    tensors, root = {}, json.loads((official / "config.json").read_text())
    folder.mkdir()
    for name, begin in folders.items():
        own = load_file(official / name / "model.safetensors")
        tensors |= {stem + begin + tensor: value for tensor, value in own.items()}
        config = json.loads((official / name / "config.json").read_text())
        if beside:
            shutil.copytree(official / name, folder / name)
            (folder / name / "model.safetensors").unlink()
        elif name.startswith("vision_tower/"):
            root["vision_tower_cfg"]["configs"][Path(name).name] = config
    if beside:
        shutil.copy(official / "vision_tower" / "config.json", folder / "vision_tower")
        shutil.copy(official / "config.json", folder)
    else:
        (folder / "config.json").write_text(json.dumps(root))
        for file in (official / "llm").glob("*[!g].json"):
            shutil.copy(file, folder)
        for name in ("merges.txt", "tokenizer_config.json"):
            shutil.copy(official / "llm" / name, folder)
    if not stem:  # a saved PreTrainedModel has a head of its own
        tensors["lm_head.weight"] = np.zeros((3, 4), np.float32)
    half = len(tensors) // 2
    shards = {"model-00001-of-00002.safetensors": [*tensors][:half]}
    shards |= {"model-00002-of-00002.safetensors": [*tensors][half:]}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = json.dumps(dict(metadata={}, weight_map=weight_map))
    (folder / "model.safetensors.index.json").write_text(index)


@pytest.mark.parametrize("stem", ["model.", ""])
def test_flat_names_with_the_folders_beside(official, folders, contents, tmp_path, stem):
    write_flat(tmp_path / "flat", official, folders, stem, beside=True)
    run("--verify", tmp_path / "flat", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(official)
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    flat = {n for part in report["parts"].values() for n in map(_tensor, part["source_keys"])}
    assert f"{stem}llm.model.norm.weight" in flat
    assert ("lm_head.weight" in flat) == (not stem)


def _tensor(use: dict) -> str:
    return use["tensor"]


@pytest.mark.parametrize("stem", ["model.", ""])
def test_flat_names_with_the_root_config_alone(official, folders, tmp_path, stem):
    write_flat(tmp_path / "flat", official, folders, stem, beside=False)
    run(tmp_path / "flat", tmp_path / "out")
    for name in folders:
        was, now = (
            load_file(at / name / "model.safetensors") for at in (official, tmp_path / "out")
        )
        assert same(was, now)
    assert (tmp_path / "out" / "llm" / "vocab.json").is_file()
    assert convert.read_config(tmp_path / "out") == convert.read_config(official)
    assert convert.read_config(tmp_path / "flat") == convert.read_config(official)


def test_flat_names_that_nobody_explains(official, folders, tmp_path):
    write_flat(tmp_path / "flat", official, folders, "", beside=True)
    shutil.rmtree(tmp_path / "flat" / "vision_tower" / "internvideo2")
    with pytest.raises(ValueError, match="does not say what vision_tower/internvideo2 is"):
        run(tmp_path / "flat", tmp_path / "out")
    shutil.rmtree(tmp_path / "flat" / "vision_tower")
    config = json.loads((tmp_path / "flat" / "config.json").read_text())
    config["vision_tower_cfg"]["configs"] = {}  # as the published folder has it
    (tmp_path / "flat" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"vision_tower_cfg.configs has nothing of it\); put its"):
        run(tmp_path / "flat", tmp_path / "out")
    root = tmp_path / "whole"
    write_flat(root, official, folders, "", beside=True)
    more = root / "model-00001-of-00002.safetensors"
    save_file(load_file(more) | {"model.llm.odd": np.zeros(2)}, more)
    index = json.loads((root / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.llm.odd"] = more.name
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"unknown \(1\):\s+(model.llm.)?odd"):
        run(root, tmp_path / "out")
