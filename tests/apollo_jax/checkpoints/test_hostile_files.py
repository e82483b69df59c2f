# SPDX-License-Identifier: Apache-2.0
"""Damaged files that look whole: a flipped bit, wrong headers, odd indices, broken Orbax data."""

import json
import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from apollo_jax.checkpoints import convert

INDEX = "model.safetensors.index.json"


@pytest.fixture
def refuse(tmp_path):
    """refuse(match, *args): the conversion to tmp_path/out fails so, and leaves no file."""

    def refuse(match, *args):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises((ValueError, OSError), match=match) as caught:
            convert.main([*map(str, args), str(tmp_path / "out")])
        assert "\n" not in str(caught.value) or "do not fit the config" in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before

    return refuse


@pytest.fixture
def clip(encoders, tmp_path):
    """A folder to be damaged."""
    shutil.copytree(encoders / "clip-a", tmp_path / "clip")
    return tmp_path / "clip"


@pytest.fixture
def orbax(encoders, tmp_path):
    convert.main(["--to", "orbax", str(encoders / "clip-a"), str(tmp_path / "orbax")])
    return tmp_path / "orbax"


def sharded(folder):
    """Two shards and their index, of which the second file's names are returned."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in halves.items() for name in own}
    (folder / INDEX).write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))
    return tensors, halves


# ---- safetensors


def header(file, change):
    """Rewrite the header of a file; its data stay."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + size])
    change(fields)
    text = json.dumps(fields).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def overlap(fields):
    first, second = sorted(n for n in fields if n.endswith("layer_norm1.bias"))[:2]
    fields[second]["data_offsets"] = fields[first]["data_offsets"]


def beyond(fields):
    name = next(n for n in fields if n.endswith("layer_norm1.bias"))
    fields[name]["data_offsets"] = [2**40, 2**40 + 128]


def longer(fields):
    name = next(n for n in fields if n.endswith("layer_norm1.bias"))
    fields[name]["shape"] = [2**62, 2**62]


def unheard(fields):
    next(f for n, f in fields.items() if n.endswith("layer_norm1.bias"))["dtype"] = "F13"


@pytest.mark.parametrize("change", [overlap, beyond, longer, unheard])
def test_a_header_that_lies(clip, refuse, change):
    header(clip / "model.safetensors", change)
    refuse("model.safetensors is truncated or corrupt", clip)


@pytest.mark.parametrize("length", [2**63, 2**40, 2**20])
def test_an_absurd_header_length(clip, refuse, length):
    file = clip / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    refuse("model.safetensors is truncated or corrupt", clip)


def test_a_tensor_of_no_elements(clip, refuse):
    tensors = load_file(clip / "model.safetensors")
    save_file(tensors | {"odd": np.zeros((0, 3), np.float32)}, clip / "model.safetensors")
    refuse(r"unknown \(1\):\s+odd", clip)
    name = "vision_model.pre_layrnorm.bias"
    save_file(tensors | {name: np.zeros((0,), np.float32)}, clip / "model.safetensors")
    refuse(rf"mis-shaped \(1\):\s+{name} \(0,\), the config gives \(32,\)", clip)


def test_a_key_in_two_shards(clip, refuse):
    tensors, halves = sharded(clip)
    again = halves["b.safetensors"][0]
    own = {name: tensors[name] for name in [*halves["a.safetensors"], again]}
    save_file(own, clip / "a.safetensors")
    refuse(f"{again} is in both a.safetensors and b.safetensors", clip)


def test_an_index_of_absent_shards(clip, refuse):
    sharded(clip)
    (clip / "b.safetensors").unlink()
    refuse(f"{INDEX} lists b.safetensors: not in the folder", clip)
    (clip / "b.safetensors").symlink_to(clip / "nowhere")
    refuse(f"{INDEX} lists b.safetensors: not in the folder", clip)
    (clip / "b.safetensors").unlink()
    (clip / "b.safetensors").symlink_to("b.safetensors")
    refuse(f"{INDEX} lists b.safetensors: not in the folder", clip)


def test_an_index_of_other_names(clip, refuse):
    sharded(clip)
    index = json.loads((clip / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"]["odd"] = index["weight_map"].pop(name)
    (clip / INDEX).write_text(json.dumps(index))
    refuse(rf"disagrees with its shards: odd \(not in a.safetensors\), {name} \(in a", clip)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_files_as_the_cache_of_the_hub_has_them(clip, tmp_path, contents, link):
    """They are read; what is written is files of its own."""
    sharded(clip)
    expected, blobs = contents(clip), tmp_path / "blobs"
    blobs.mkdir()
    for file in [*clip.iterdir()]:
        link(file.rename(blobs / file.name), file)
    convert.main([str(clip), str(tmp_path / "out")])
    written = [*(tmp_path / "out").iterdir()]
    assert not any(file.is_symlink() or file.stat().st_nlink > 1 for file in written)
    assert {n: load_file(tmp_path / "out" / n) for n in expected if n.endswith("tensors")}.keys()
    assert contents(tmp_path / "out")["config.json"] == expected["config.json"]


# ---- .npz


@pytest.mark.parametrize("to", ["hf", "orbax"])
@pytest.mark.parametrize("array", ["MlpBlock_0/Dense_1/kernel", "probe"])
def test_a_flipped_bit_of_an_npz(encoders, tmp_path, refuse, to, array):
    source, name = tmp_path / "x.npz", f"params/img/MAPHead_0/{array}.npy"
    content = bytearray((encoders / "bigvision-siglip-a" / "loop.npz").read_bytes())
    with zipfile.ZipFile(encoders / "bigvision-siglip-a" / "loop.npz") as archive:
        raw = archive.read(name)
    content[content.index(raw) + len(raw) - 1] ^= 1
    source.write_bytes(content)
    said = "its checksum differs" if "kernel" in array else "Bad CRC-32"
    refuse(rf"x.npz.*{said}", "--to", to, source)
    refuse(rf"x.npz.*{name}.*; copy it again", "--to", to, source)


def test_an_npz_that_is_no_tower_is_named(encoders, tmp_path, refuse):
    with np.load(encoders / "bigvision-siglip-a" / "loop.npz") as arrays:
        content = dict(arrays)
    content["params/img/pos_embedding"] = content["params/img/pos_embedding"][0]
    np.savez(tmp_path / "x.npz", **content)
    refuse(r"x.npz: params/img/pos_embedding is \(\d+, \d+\), expected 3", tmp_path / "x.npz")


# ---- Orbax


def test_a_flipped_bit_of_orbax(orbax, refuse):
    file = max((orbax / "weights").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refuse(r"orbax/weights: \S+ is damaged or missing, copy it again", orbax)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"tree_metadata": {"a": {}}}'])
def test_broken_metadata_of_orbax(orbax, refuse, text):
    (orbax / "weights" / "_METADATA").write_text(text)
    refuse("weights/_METADATA is damaged, copy it again", orbax)


def test_missing_files_of_orbax(orbax, tmp_path, refuse):
    (orbax / "weights" / "_METADATA").rename(tmp_path / "metadata")
    refuse("weights/_METADATA is missing", orbax)
    (tmp_path / "metadata").rename(orbax / "weights" / "_METADATA")
    for file in (orbax / "weights" / "d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refuse("weights: .* is damaged or missing", orbax)
    (orbax / "weights" / "manifest.ocdbt").write_bytes(b"nonsense")
    refuse("weights: .* is damaged or missing", orbax)
    (orbax / "weights" / "manifest.ocdbt").unlink()
    refuse("weights: .* is damaged or missing", orbax)


def test_the_command_says_it_in_one_line(orbax, tmp_path):
    (orbax / "weights" / "manifest.ocdbt").write_bytes(b"nonsense")
    command = [sys.executable, "-m", "apollo_jax", "convert", orbax, tmp_path / "out"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "is damaged or missing, copy it again" in line
    assert not (tmp_path / "out").exists()


# ---- configs


def test_features_before_the_first_layer(clip, tiny, tmp_path, refuse):
    config = json.loads((clip / "config.json").read_text())
    (clip / "config.json").write_text(json.dumps(config | dict(num_hidden_layers=1)))
    refuse("clip: features at layer -2 of 1 come before its first layer", clip)
    shutil.copytree(tiny / "checkpoint", tmp_path / "apollo")
    file = tmp_path / "apollo" / "config.json"
    root = json.loads(file.read_text())
    file.write_text(json.dumps(root | dict(mm_vision_select_layer=-9)))
    refuse("features at layer -9 of .* come before its first layer", tmp_path / "apollo")
