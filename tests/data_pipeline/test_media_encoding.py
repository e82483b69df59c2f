# SPDX-License-Identifier: Apache-2.0
"""Frames at wanted times: never further than half a stored interval, whatever the frame rate."""

import hashlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import media_encoding
from data_pipeline.frame_records import ShardSpec, decode_segment
from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.frame_shards import FrameShards
from data_pipeline.media_encoding import (
    MediaLimits,
    RecordSpool,
    encode_image,
    encode_video,
    source_facts,
)
from data_pipeline.video import VideoError

ROUNDING = 2e-3  # seconds: times in a file are rounded to ticks, here of a millisecond


def shown(path, folder, spec):
    """(MediaInfo, for every source frame number the number of the frame that stands for it)."""
    writer = FrameShardWriter(folder, spec)
    writer.add(*encode_video(path, "v", spec))
    writer.close()
    shards = FrameShards(folder)
    info = shards.info("v")
    canvas = np.zeros((info.num_frames, 1, 64, 64, 3), np.uint8)
    shards.read_clips("v", np.arange(info.num_frames)[:, None], canvas)
    return info, canvas[:, 0, 8:56]


@pytest.fixture
def check(videos, tmp_path):
    """Writes a video with frames at `pts` (ms) and checks all its frame numbers."""
    count = 0

    def check(pts, stored_fps):
        nonlocal count
        count += 1
        path = videos.write(tmp_path / f"{count}.mkv", count=len(pts), pts=pts)
        spec = ShardSpec(stored_fps, 64, 95, "444", segment_seconds=2.0)
        info, pictures = shown(path, tmp_path / str(count), spec)
        assert info.num_frames == len(pts)
        ends = [*(np.array(pts[1:]) / 1e3), np.inf]  # frame k is on screen from pts[k] to ends[k]
        bound = 0.5 / stored_fps + ROUNDING
        for frame, picture in enumerate(pictures):
            wanted, number = frame / info.fps, videos.number_of(picture)
            assert pts[number] / 1e3 <= wanted + bound, (frame, number, info)
            assert ends[number] >= wanted - bound, (frame, number, info)
        return info

    return check


@pytest.mark.parametrize("fps", [10.0, 23.976, 29.97, 60.0])
@pytest.mark.parametrize("stored_fps", [1.0, 2.0, 7.0])
def test_constant_frame_rates(check, fps, stored_fps):
    info = check([round(1000 * k / fps) for k in range(53)], stored_fps)
    assert info.fps == pytest.approx(fps, rel=1e-3)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(st.integers(5, 1500), min_size=1, max_size=30),
    stored_fps=st.sampled_from([0.5, 2.0, 3.0, 8.0]),
)
def test_variable_frame_rates(check, steps, stored_fps):
    check([0, *np.cumsum(steps).tolist()], stored_fps)


def test_frame_numbers_do_not_drift_where_the_header_is_a_little_wrong(videos, tmp_path):
    """1 % off would be a second after 100; half a stored interval is less."""
    path = videos.write(tmp_path / "v.mkv", count=120, pts=[101 * k for k in range(120)])
    info = encode_video(path, "v", ShardSpec(size=64)).info
    assert 119 / info.fps == pytest.approx(119 * 0.101, abs=0.05)


@pytest.mark.parametrize("fps", [1, 1000])
def test_a_video_of_one_frame_is_stored(videos, tmp_path, fps):
    path = videos.write(tmp_path / "v.mp4", count=1, fps=fps)
    assert encode_video(path, "v", ShardSpec(size=64)).info.stored_frames >= 1


def test_records_of_a_long_video_do_not_stay_in_memory(videos, tmp_path, monkeypatch):
    path = videos.write(tmp_path / "v.mp4", count=100)
    spec = ShardSpec(fps=10.0, size=64, segment_seconds=1.0)
    whole = encode_video(path, "v", spec).records
    monkeypatch.setattr(media_encoding, "_MEMORY_BYTES", 2 * len(whole[0]))
    spool = RecordSpool(tmp_path / "spool")
    encode_video(path, "v", spec, sink=spool)
    spool.close()
    assert list(spool) == whole == list(spool)
    assert (tmp_path / "spool").stat().st_size > sum(map(len, whole)) / 2
    assert [decode_segment(record)[0]["seg"] for record in spool] == list(range(10))


@pytest.mark.parametrize(
    ("limits", "reason"),
    [(MediaLimits(hours=3.9 / 3600), "too_long"), (MediaLimits(pixels=64 * 48 - 1), "too_large")],
)
def test_what_is_too_long_or_too_large_is_refused(videos, tmp_path, limits, reason):
    path = videos.write(tmp_path / "v.mp4", count=41)  # the last frame at 4.0 s
    with pytest.raises(VideoError) as error:
        encode_video(path, "v", ShardSpec(size=64), limits=limits)
    assert error.value.reason == reason
    exact = MediaLimits(4.2 / 3600, 64 * 48)
    assert encode_video(path, "v", ShardSpec(size=64), limits=exact).info.num_frames == 41


def test_an_image_too_large_is_not_decoded(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 10)).save(path)
    with pytest.raises(VideoError, match=r"20 x 10 pixels, more than 199 \(too_large"):
        encode_image(path, "a", ShardSpec(size=64), MediaLimits(pixels=199))
    assert encode_image(path, "a", ShardSpec(size=64), MediaLimits(pixels=200)).info.width == 20


def test_source_facts(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10_000_000)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert source_facts(path) == {"source_bytes": 10_000_000, "source_sha256": digest}
