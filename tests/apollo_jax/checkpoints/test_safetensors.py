# SPDX-License-Identifier: Apache-2.0
"""Folders of safetensors: shards, indices, and what is wrong with them."""

import dataclasses
import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from apollo_jax.checkpoints import safetensors
from apollo_jax.checkpoints.safetensors import TensorFolder
from apollo_jax.checkpoints.sources import Stored
from apollo_jax.checkpoints.translate import Arrays, Renamed


def describe(arrays):
    return {n: Stored(safetensors.SINGLE, a.shape, a.dtype.name) for n, a in arrays.items()}


def write(path, arrays, max_size):
    tensors = safetensors.shard(describe(arrays), max_size)
    safetensors.write(path, Renamed(Arrays(arrays), {n: n for n in arrays}, tensors))
    if len({t.file for t in tensors.values()}) > 1:
        (path / safetensors.INDEX).write_bytes(safetensors.index(tensors))
    return tensors


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((4, 8)).astype(np.float32),
        "b": rng.standard_normal((8, 4)).astype(np.float32).T,  # not contiguous
        "c": rng.standard_normal((3, 5)).astype(ml_dtypes.bfloat16),
        "d": np.array(7, np.int64),
        "e": np.zeros((0, 3), np.float16),
    }


@pytest.mark.parametrize(("max_size", "files"), [("5GB", 1), ("256", 2), (128, 3), (1, 5)])
def test_what_is_written_is_read(arrays, max_size, files, tmp_path):
    write(tmp_path, arrays, max_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    folder = TensorFolder(tmp_path)
    assert folder.stored.keys() == arrays.keys()
    for name, array in arrays.items():
        assert folder.read(name).dtype == array.dtype
        np.testing.assert_array_equal(folder.read(name), array)


def test_index_counts_bytes_and_maps_names(arrays, tmp_path):
    tensors = write(tmp_path, arrays, "200")
    index = json.loads((tmp_path / safetensors.INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(a.nbytes for a in arrays.values())}
    assert index["weight_map"] == {name: stored.file for name, stored in tensors.items()}
    assert tensors["a"].file == "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("200 MB", 2 * 10**8), ("1GiB", 2**30), (7, 7)]
)
def test_sizes(size, expected):
    assert safetensors.parse_size(size) == expected


@pytest.mark.parametrize("size", ["five", "5XB", "-1GB", ""])
def test_bad_sizes_are_refused(size):
    with pytest.raises(ValueError, match="is not like '5GB'"):
        safetensors.parse_size(size)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_named(arrays, keep, tmp_path):
    write(tmp_path, arrays, "5GB")
    file = tmp_path / safetensors.SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt"):
        TensorFolder(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"holds neither .* \(it holds pytorch_model.bin\)"):
        TensorFolder(tmp_path)


def test_a_missing_shard_is_named(arrays, tmp_path):
    write(tmp_path, arrays, "256")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lists model-00002-of-00002\.safetensors"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("change", ["unlisted", "absent", "elsewhere"])
def test_an_index_that_disagrees_is_refused(arrays, change, tmp_path):
    write(tmp_path, arrays, "256")
    path = tmp_path / safetensors.INDEX
    index = json.loads(path.read_text())
    names = index["weight_map"]
    if change == "unlisted":
        del names["a"]
    elif change == "absent":
        names["z"] = names["a"]
    else:
        names["a"] = names["c"]
        assert names["a"] != names["b"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"disagrees .*: {'z' if change == 'absent' else 'a'} "):
        TensorFolder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(arrays, tmp_path):
    write(tmp_path, arrays, "256")
    second = tmp_path / "model-00002-of-00002.safetensors"
    save_file({"a": arrays["a"], "c": arrays["c"]}, second)
    with pytest.raises(ValueError, match="a is in both model-00001"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("content", ["not json", "{}", "[]"])
def test_a_broken_index_is_named(arrays, content, tmp_path):
    write(tmp_path, arrays, "256")
    (tmp_path / safetensors.INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is not a safetensors index"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("code", [None, errno.EXDEV])
def test_bytes_are_copied_by_the_kernel_or_not(tmp_path, monkeypatch, code):
    """Between other tensors, from the middle of a file; where the file system refuses, by us."""

    def refuse(*_):
        raise OSError(code, os.strerror(code or 0))

    if code:
        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    arrays = {name: np.arange(n, dtype=np.float32) for name, n in dict(a=3, b=70_000, c=5).items()}
    (tmp_path / "in").mkdir()
    save_file(arrays, tmp_path / "in/model.safetensors")
    found = TensorFolder(tmp_path / "in")
    stored = {**found.stored, "c": dataclasses.replace(found.stored["c"], dtype="float64")}
    changed = Renamed(found, {name: name for name in found.stored}, stored)
    (tmp_path / "out").mkdir()
    safetensors.write(tmp_path / "out", changed)
    back = load_file(tmp_path / "out/model.safetensors")
    assert {n: a.dtype for n, a in back.items()} == {n: s.dtype for n, s in stored.items()}
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)
