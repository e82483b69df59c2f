# SPDX-License-Identifier: Apache-2.0
"""Every name finds its row, whatever the names are, and a damaged index says so."""

import io

import numpy as np
import pytest

from data_pipeline import media_index
from data_pipeline.media_index import INDEX_DTYPES, MediaIndex


def write(path, names, **changes):
    rows = np.arange(len(names))
    columns = {k: rows.astype(t) for k, t in INDEX_DTYPES.items()} | {"is_video": rows % 2 == 0}
    columns["ids"] = np.frombuffer("\0".join(names).encode(), np.uint8)
    np.savez(path, allow_pickle=False, **(columns | changes))
    return path


def test_every_name_is_found_in_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(media_index, "_BLOCK", 100)  # several blocks and a part of one
    rng = np.random.default_rng(0)
    names = [f"{k * 7919 % 1009:x}/" + "é\u6f22 a"[: k % 5] * (k % 7) for k in range(1009)]
    names += ["a", "b", "ab", "ba", "aa", "x" * 5000]
    rng.shuffle(names)
    index = MediaIndex(write(tmp_path / "index.npz", names))
    assert len(index) == len(names)
    assert index.names() == names
    assert [index.find(name) for name in names] == list(range(len(names)))
    assert [index.name(row) for row in (0, 7, len(names) - 1)] == [names[0], names[7], names[-1]]
    for unknown in ("", "nothing", "a\0", "x" * 4999, "x" * 6000, "\udc80"):
        assert index.find(unknown) == -1
    assert index.doubles() == []
    rows = list(index.rows())
    assert [row["id"] for row in rows] == names
    assert (rows[-1]["shard"], rows[-2]["is_video"], rows[-1]["is_video"]) == (
        len(names) - 1, len(names) % 2 == 0, len(names) % 2 == 1
    )  # fmt: skip


def test_equal_hashes_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(media_index, "_weights", lambda count: np.ones(count, np.uint64))
    index = MediaIndex(write(tmp_path / "index.npz", ["abc", "cab", "x", "bca", "x"]))
    assert [index.find(name) for name in ("abc", "cab", "bca", "acb")] == [0, 1, 3, -1]
    assert index.doubles() == ["x"]


def test_a_name_that_may_have_been_meant(tmp_path, monkeypatch):
    names = ["a/0001.mp4", "b/0002.mp4", "c/0003.webm"]
    index = MediaIndex(write(tmp_path / "index.npz", names))
    assert index.near("b/0002.mov") == "b/0002.mp4"
    assert index.near("something else") is None
    monkeypatch.setattr(media_index, "_FEW", 2)  # as among a million
    assert index.near("elsewhere/0003.mp4") == "c/0003.webm"
    assert index.near("elsewhere/0004.mp4") is None
    assert index.near("") is None


def test_a_damaged_index_says_so(tmp_path):
    path = write(tmp_path / "index.npz", ["a", "b"])
    whole = path.read_bytes()
    with np.load(path) as index:
        columns = dict(index)
    for data in (b"", b"no zip", whole[:-200], whole.replace(b"NUMPY", b"RUMPY")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"index.npz is damaged"):
            MediaIndex(path)
    flipped = bytearray(whole)
    flipped[whole.index(b"\x93NUMPY") + 130] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"index.npz is damaged"):
        MediaIndex(path)
    with pytest.raises(ValueError, match=r"2 names, but columns of .*'fps': 1"):
        MediaIndex(write(tmp_path / "short.npz", ["a", "b"], fps=columns["fps"][:1]))
    del columns["shard"]
    lacking = io.BytesIO()
    np.savez(lacking, allow_pickle=False, **columns)
    path.write_bytes(lacking.getvalue())
    with pytest.raises(ValueError, match=r"index.npz is damaged: .*shard"):
        MediaIndex(path)
    with pytest.raises(FileNotFoundError):
        MediaIndex(tmp_path / "nowhere.npz")
