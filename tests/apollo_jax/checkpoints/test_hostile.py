# SPDX-License-Identifier: Apache-2.0
"""Broken and hostile input of `apollo-jax convert`: one clear line each, nothing left behind."""

import io
import json
import resource
import shutil
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import apollo_jax
from apollo_jax.checkpoints import convert, proof

SIGLIP = "siglip-so400m-patch14-384"


@pytest.fixture
def refuse(tmp_path):
    """refuse(match, *args): the conversion to tmp_path/out fails so, and leaves no file."""

    def refuse(match, *args, to="out"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises((ValueError, OSError), match=match) as caught:
            convert.main([*map(str, args), str(tmp_path / to)])
        message = str(caught.value)
        assert "\n" not in message or "do not fit the config" in message
        assert sorted(tmp_path.rglob("*")) == before

    return refuse


@pytest.fixture
def clip(encoders, tmp_path):
    """A folder to be damaged."""
    folder = tmp_path / "clip"
    shutil.copytree(encoders / "clip-a", folder)
    return folder


@pytest.fixture
def apollo(tiny, tmp_path):
    folder = tmp_path / "apollo"
    shutil.copytree(tiny / "checkpoint", folder)
    return folder


@pytest.fixture
def npz(encoders):
    """big_vision's arrays by name."""
    with np.load(encoders / "bigvision-siglip-a" / "loop.npz") as arrays:
        return dict(arrays)


def part(**paths):
    return [word for name, path in paths.items() for word in ("--part", f"{name}={path}")]


# ---- safetensors


@pytest.mark.parametrize("keep", [0, 7, 200, -9])
def test_a_truncated_safetensors(clip, refuse, keep):
    file = clip / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse("model.safetensors is truncated or corrupt", clip)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        apollo_jax.from_pretrained(clip)


def test_a_wrong_beginning(clip, refuse):
    file = clip / "model.safetensors"
    file.write_bytes(b"PK\3\4" + file.read_bytes()[4:])
    refuse("model.safetensors is truncated or corrupt", clip)


@pytest.mark.parametrize("name", ["../x.safetensors", "a/../x.safetensors", "/x", "..", "", 5])
def test_an_index_leads_out_of_its_folder(clip, refuse, name):
    (clip / "model.safetensors").rename(clip.parent / "x.safetensors")
    names = load_file(clip.parent / "x.safetensors")
    if name == "/x":
        name = str(clip.parent / "x.safetensors")
    index = json.dumps(dict(weight_map=dict.fromkeys(names, name)))
    (clip / "model.safetensors.index.json").write_text(index)
    refuse("not the name of a file in its folder; refused", clip)
    with pytest.raises(ValueError, match="refused"):
        apollo_jax.from_pretrained(clip)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": null}', '{"weight_map": [1]}'])
def test_an_index_that_is_none(clip, refuse, text):
    (clip / "model.safetensors.index.json").write_text(text)
    refuse("is not a safetensors index", clip)


def test_a_tower_leads_out_of_the_folder(apollo, refuse):
    config = apollo / "vision_tower" / "config.json"
    config.write_text(config.read_text().replace('"internvideo2"', '"../../apollo/llm"'))
    refuse("'../../apollo/llm' is no name for a tower", apollo)


def test_a_part_in_another_place(apollo, refuse):
    shutil.rmtree(apollo / "llm")
    shutil.copytree(apollo / "mm_connector", apollo / "llm")
    refuse("llm holds a connector", apollo)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "unheard"}'])
def test_a_config_that_is_none(clip, refuse, text):
    (clip / "config.json").write_text(text)
    refuse("config.json", clip)


def test_heads_that_do_not_divide(encoders, refuse):
    npz = encoders / "bigvision-siglip-a" / "loop.npz"
    refuse("7 heads do not divide", "--config", '{"num_attention_heads": 7}', npz)


# ---- .npz


@pytest.mark.parametrize("keep", [0, 100, -5])
def test_a_truncated_npz(encoders, tmp_path, refuse, keep):
    content = (encoders / "bigvision-siglip-a" / "loop.npz").read_bytes()
    (tmp_path / "x.npz").write_bytes(content[:keep])
    refuse("x.npz is not a readable .npz", tmp_path / "x.npz")


def test_a_compressed_npz(npz, tmp_path, refuse):
    np.savez_compressed(tmp_path / "x.npz", **npz)
    refuse("x.npz is compressed; write it again with numpy.savez", tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: np.array([{}], object), "holds Python objects, not numbers: refused"),
        (lambda x: x.astype("U4"), "numbers, little-endian, are read"),
        (lambda x: x.astype(">f4"), "numbers, little-endian, are read"),
        (lambda x: np.asfortranarray(np.ones((3, 4))), "is in Fortran order"),
    ],
)
def test_arrays_that_are_not_plain_numbers(npz, tmp_path, refuse, change, match):
    name = "params/img/Transformer/encoder_norm/scale"
    np.savez(tmp_path / "x.npz", **{**npz, name: change(npz[name])})
    refuse(f"encoder_norm/scale.npy .*{match}", tmp_path / "x.npz")


def test_arrays_that_are_shorter_than_they_say(npz, tmp_path, refuse):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        for name, array in npz.items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{name}.npy", file.getvalue()[:-4])
    refuse("is shorter or longer than it says", tmp_path / "x.npz")


def test_no_array_at_all(tmp_path, refuse):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("params/x.npy", b"import os")
    refuse("params/x.npy is no array of numpy's", tmp_path / "x.npz")


# ---- wrong options


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--from", "torch"], "--from torch: .* looks like hf"),
        (["--key", "img"], "--key img: .* is no pickle"),
        (["--config", '{"image_size": 3}'], "has a config.json"),
        (["--only", "llm"], "there is no part 'llm'; known: none"),
        (["--to", "apollo"], "writes a whole Apollo"),
        (["--to", "big_vision"], "writes an .npz, which .*out is not"),
        (["--scan"], "--scan is of big_vision's layout"),
        (["--max-shard-size", "many"], "size 'many' is not like"),
        (["--max-shard-size", "0"], "size '0' is not like"),
        (["--max-shard-size", "1GB", "--to", "orbax"], "--max-shard-size is of safetensors"),
        (["--vocab-size", "9"], "change a decoder; there is none"),
        (["--connector", '{"ff_multi": 2}'], "--part connector=fresh"),
    ],
)
def test_an_option_that_does_not_apply(encoders, refuse, args, match):
    refuse(match, *args, encoders / "clip-a")


def test_a_misspelt_field(encoders, refuse):
    npz = encoders / "bigvision-siglip-a" / "loop.npz"
    refuse("did you mean num_attention_heads", "--config", '{"num_atention_heads": 2}', npz)
    refuse("nonsense is no field", "--config", '{"nonsense": 2}', npz)


@pytest.mark.parametrize("text", ["{bad", "[1]", "3"])
def test_a_config_option_that_is_no_object(encoders, tmp_path, capsys, text):
    with pytest.raises(SystemExit):
        convert.main(["--config", text, str(encoders / "clip-a"), str(tmp_path / "out")])
    assert "argument --config: " in capsys.readouterr().err


def test_parts_that_do_not_fit(tiny, tmp_path, refuse):
    folder = tiny / "checkpoint"
    towers = folder / "vision_tower"
    siglip, llm, connector = towers / SIGLIP, folder / "llm", folder / "mm_connector"
    refuse("an Apollo needs llm too", *part(siglip=siglip))
    refuse("an Apollo needs a tower too", *part(llm=llm))
    refuse("give a source, or the parts")
    refuse("is not like NAME=PATH", "--part", siglip)
    refuse("is not like NAME=PATH", *part(siglip=""))
    refuse("siglip is given twice", *part(siglip=siglip), *part(siglip=siglip))
    refuse("'../x' is no name for a tower", "--part", f"../x={siglip}", *part(llm=llm))
    refuse("only the connector can be fresh", *part(siglip="fresh", llm=llm))
    refuse("none does not exist", *part(siglip=tmp_path / "none", llm=llm))
    refuse("holds a qwen2", *part(siglip=llm, llm=llm))
    refuse("holds a siglip", *part(siglip=siglip, llm=siglip))
    refuse("vision_hidden_size is 80", *part(siglip=siglip, llm=llm, connector=connector))
    refuse("vision_hidden_size is 80", *part(other=siglip), folder)
    refuse("is one part; parts are replaced in a whole", *part(llm=llm), siglip)
    fresh = part(siglip=siglip, llm=llm, connector="fresh")
    refuse("did you mean ff_multi", "--connector", '{"ff_mult": 2}', *fresh)
    refuse("num_output_tokens is 'x'", "--connector", '{"num_output_tokens": "x"}', *fresh)
    refuse("there is no part 'siglip'; known: siglip-so400m", "--only", "siglip", folder)
    refuse("cuts the 404 rows", "--vocab-size", 3, folder)


# ---- targets


def test_targets_that_cannot_be(clip, apollo, tmp_path, refuse):
    (tmp_path / "file").touch()
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").touch()
    refuse("clip exists", clip, to="clip")
    refuse("lies inside", clip, to="clip/out")
    refuse("lies inside", "--overwrite", apollo / "llm", to="apollo")
    refuse("something else than a checkpoint", "--overwrite", clip, to="papers")
    refuse("file", clip, to="file/out")
    refuse("none does not exist", tmp_path / "none")


def test_a_source_may_be_overwritten(clip, contents):
    before = contents(clip)
    convert.main(["--overwrite", str(clip), str(clip)])
    assert contents(clip) == {name: before[name] for name in contents(clip)}
    assert sorted(p.name for p in clip.parent.iterdir()) == ["clip"]


@pytest.mark.parametrize(("to", "out"), [("hf", "o"), ("big_vision", "o.npz"), ("orbax", "o")])
def test_no_room_on_the_disk(encoders, refuse, to, out):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))
    try:
        refuse("disk is full|too large", "--to", to, encoders / "bigvision-siglip-a", to=out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


DIES = """
import os, signal
from apollo_jax.checkpoints import companions, convert
companions.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
convert.main({})
"""


def test_a_killed_conversion_leaves_nothing_that_looks_finished(clip, contents):
    out = clip.parent / "out"
    args = [str(clip), str(out)]
    died = subprocess.run([sys.executable, "-c", DIES.format(args)])
    assert died.returncode == -9
    [rest] = clip.parent.glob("out*")
    assert ".tmp-" in rest.name
    convert.main(args)
    assert sorted(p.name for p in clip.parent.iterdir()) == ["clip", "out"]
    assert contents(out).keys() <= contents(clip).keys()


def test_what_was_moved_away_comes_back(clip):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = clip.rename(clip.with_name(f"out.old-{socket.gethostname()}-{dead.pid}"))
    with pytest.raises(FileExistsError, match="out exists"):
        convert.main([str(old), str(clip.with_name("out"))])
    assert [p.name for p in clip.parent.iterdir()] == ["out"]


# ---- wrong numbers


def test_weights_that_are_not_finite_are_reported(clip, tmp_path, capsys):
    tensors = load_file(clip / "model.safetensors")
    tensors["vision_model.pre_layrnorm.bias"][3] = np.nan
    save_file(tensors, clip / "model.safetensors")
    convert.main(["--verify", str(clip), str(tmp_path / "out")])
    assert "vision_model.pre_layrnorm.bias" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    [found] = report["not_finite"]
    assert found.endswith(": vision_model.pre_layrnorm.bias")


def test_a_conversion_that_is_wrong_does_not_appear(clip, refuse, monkeypatch):
    right = proof.report

    def wrong(checkpoint, written, **kw):
        tensors = load_file(written / "model.safetensors")
        tensors["vision_model.pre_layrnorm.bias"] += 1
        save_file(tensors, written / "model.safetensors")
        return right(checkpoint, written, **kw)

    monkeypatch.setattr(proof, "report", wrong)
    refuse("the conversion is wrong.* vision_model.pre_layrnorm.bias", "--verify", clip)
