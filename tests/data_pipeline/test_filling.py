# SPDX-License-Identifier: Apache-2.0
"""Filling: what becomes of samples is counted; storage is asked again; memory is used again."""

import contextlib
import errno
import gc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import filling
from data_pipeline.filling import Canvases, Counts, patiently
from data_pipeline.frame_shards import FrameShards
from data_pipeline.loader import Loader


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """The seconds that were waited for, which nobody waits."""
    waited = []
    monkeypatch.setattr(filling.time, "sleep", waited.append)
    return waited


def load(config, steps: int) -> list:
    with contextlib.closing(Loader(config, num_steps=steps)) as loader:
        return list(loader)


def totals(batches: list) -> dict[str, Counts]:
    summed = {}
    for _, stats in batches:
        for name, counts in stats.sources.items():
            summed[name] = Counts(*np.add(summed.get(name, Counts()), counts).tolist())
    return summed


def test_counts_tell_the_fates_by_source(tiny_data, monkeypatch):
    read = FrameShards.read_clips

    def damaged(self, media_id, frames, canvas):
        if media_id == "v2":
            canvas[:] = 77
            raise ValueError("damaged")
        return read(self, media_id, frames, canvas)

    monkeypatch.setattr(FrameShards, "read_clips", damaged)
    long = {"id": "long", "question": "a " * 300, "answer": "a"}
    sources = {"v": tiny_data.records("video", 8), "t": [*tiny_data.records("text", 7), long]}
    config = tiny_data.config(sources, clips=3, max_bad_share=1.0)
    batches = load(config, 9)
    found = totals(batches)
    names = Counter(name for _, stats in batches for name, _ in stats.bad)
    assert found["t"].dropped == names["long"] > 2
    assert found["t"].trimmed == found["t"].corrupt == 0
    assert found["v"].corrupt == names["video2"] > 2
    assert 0.2 < found["v"].trimmed / found["v"].seen < 0.3  # those of 7 and 8 seconds
    samples = sum(stats.samples for _, stats in batches)
    assert sum(c.seen for c in found.values()) == samples + sum(names.values())
    for batch, _ in batches:
        assert not batch.frames[~batch.clip_mask].any()
        assert not batch.frame_geometry[~batch.clip_mask].any()


def test_storage_that_fails_for_a_moment_is_asked_again(tiny_data, monkeypatch, waits):
    read, failures = FrameShards.read_clips, Counter()

    def flaky(self, media_id, frames, canvas):
        failures[media_id] += 1
        if failures[media_id] < 3:
            raise OSError(errno.EIO, "the network is slow today")
        return read(self, media_id, frames, canvas)

    config = tiny_data.config({"v": tiny_data.records("video", 8)})
    whole = load(config, 4)
    monkeypatch.setattr(FrameShards, "read_clips", flaky)
    for (batch, stats), (other, _) in zip(load(config, 4), whole, strict=True):
        assert stats.bad == ()
        np.testing.assert_array_equal(batch.frames, other.frames)
    assert len(waits) == 2 * 8
    assert set(waits) == {0.1, 0.5}


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (OSError(errno.EIO, "gone"), 4),
        (TimeoutError(), 4),
        (FileNotFoundError("none"), 1),
        (PermissionError("no"), 1),
        (ValueError("not a JPEG"), 1),
    ],
)
def test_how_often_is_tried(error, tries):
    calls = []

    def fail(number: int):
        calls.append(number)
        raise error

    with pytest.raises(type(error)):
        patiently(fail, 7)
    assert calls == [7] * tries


def test_what_array_record_says_of_failed_reads_is_known():
    calls = []

    def fail():
        calls.append(1)
        try:
            raise RuntimeError("pread() failed: Input/output error; reading x.array_record")
        except RuntimeError as error:
            raise ValueError("x.array_record: 'v1'") from error

    with pytest.raises(ValueError, match="'v1'"):
        patiently(fail)
    assert len(calls) == 4


def test_a_source_that_changes_is_masked_and_named(tiny_data):
    records = tiny_data.records("text", 20)
    config = tiny_data.config({"t": records}, max_bad_share=1.0, batch_size=1, prefetch=0)
    with contextlib.closing(Loader(config, num_steps=40)) as loader:
        before = [next(loader)]
        path = Path(config.sources["t"].path)
        content = path.read_bytes()
        first = content.index(b"\n")
        content = b" " * first + content[first:].replace(b'"text 5 so', b'"~^`@#%&*<')
        with open(path, "r+b") as file:
            file.write(content)
        after = [next(loader) for _ in range(9)]
    assert before[0][1].bad == ()
    bad = {name: reason for _, stats in after for name, reason in stats.bad}
    assert "t.jsonl was changed while it was in use" in bad["t[0]"]
    assert "when it was measured" in bad["text5"]
    assert set(bad) == {"t[0]", "text5"}
    assert totals(after)["t"].corrupt == sum(len(stats.bad) for _, stats in after)


def test_memory_comes_back_when_no_view_is_left():
    canvases = Canvases(keep=2)
    first = canvases.take((2, 3, 5))
    address = first.ctypes.data
    row = first[1][None].reshape(-1)[:4]
    row[:] = 9
    del first
    gc.collect()
    other = canvases.take((2, 3, 5))
    assert other.ctypes.data != address  # `row` still looks at it
    other[:] = 0
    assert (row == 9).all()
    del row
    gc.collect()
    assert canvases.take((2, 3, 5)).ctypes.data == address


def test_batches_that_are_kept_stay_as_they_are(tiny_data):
    config = tiny_data.config({"v": tiny_data.records("video", 8)}, prefetch=1)
    kept = load(config, 8)
    with contextlib.closing(Loader(config, num_steps=8)) as loader:
        for batch, _ in kept:
            again, _ = next(loader)  # its memory is free when the next one comes
            np.testing.assert_array_equal(again.frames, batch.frames)
            del again
