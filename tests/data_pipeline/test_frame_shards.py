# SPDX-License-Identifier: Apache-2.0
"""Frame shards: what is written comes back, and damage is named instead of passed on."""

import pickle
import threading

import cv2
import numpy as np
import pytest

from data_pipeline.frame_records import MediaInfo, ShardSpec, decode_segment, encode_segments
from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.frame_shards import FrameShardError, FrameShards

SPEC = ShardSpec(fps=2.0, size=64, quality=95, subsampling="444", segment_seconds=3.0)


def frames_of(count, height, width, seed=0):
    """Smooth pictures, each of its own mean grey, so that JPEG loss stays small."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 120, (count, 4, 4, 3), np.uint8)
    smooth = [cv2.resize(c, (width, height), interpolation=cv2.INTER_CUBIC) for c in coarse]
    return np.stack([s // 2 + 10 * k % 130 for k, s in enumerate(smooth)]).astype(np.uint8)


def add(writer, media_id, frames, fps=30.0, kind="video"):
    height, width = frames.shape[1:3]
    spec, count = writer.spec, len(frames)
    info = MediaInfo(
        media_id, kind, num_frames=round(count / spec.fps * fps), fps=fps,
        duration=count / spec.fps, stored_frames=count, stored_fps=spec.fps,
        height=height, width=width,
    )  # fmt: skip
    pts = [k / spec.fps for k in range(count)]
    jpegs = [spec.encode(f) for f in frames]
    writer.add(info, encode_segments(media_id, jpegs, pts, (height, width), spec))
    return info


@pytest.fixture
def shards(tmp_path):
    writer = FrameShardWriter(tmp_path / "shards", SPEC)
    add(writer, "wide.mp4", frames_of(14, 36, 64))
    add(writer, "sub dir/tall é.mp4", frames_of(5, 64, 36, seed=1))
    add(writer, "small.jpg", frames_of(1, 20, 24, seed=2), kind="image")
    writer.close()
    return FrameShards(tmp_path / "shards")


def test_info_and_ids(shards):
    assert shards.ids() == ["wide.mp4", "sub dir/tall é.mp4", "small.jpg"]
    assert len(shards) == 3
    assert "wide.mp4" in shards
    assert "nothing.mp4" not in shards
    assert shards.info("wide.mp4") == MediaInfo(
        "wide.mp4", "video", 210, 30.0, 7.0, 14, 2.0, 36, 64
    )
    assert shards.info("small.jpg").kind == "image"
    with pytest.raises(ValueError, match=r"did you mean 'wide.mp4'"):
        shards.info("wide.mp3")


@pytest.mark.parametrize(
    ("media_id", "frames", "geometry"),
    [
        ("wide.mp4", frames_of(14, 36, 64), (14, 0, 36, 64)),
        ("sub dir/tall é.mp4", frames_of(5, 64, 36, seed=1), (0, 14, 64, 36)),
    ],
)
def test_clips_show_the_nearest_grid_frame(shards, media_id, frames, geometry):
    # 30 source frames a second, 2 stored: frame 7 is nearer to grid frame 0, frame 8 to 1.
    indices = np.array([[0, 7, 8, 15], [60, 60, 75, 10_000]])
    expected = [[0, 0, 1, 1], [4, 4, 5, 13]] if len(frames) == 14 else [[0, 0, 1, 1], [4, 4, 4, 4]]
    canvas = np.full((2, 4, 64, 64, 3), 77, np.uint8)
    assert shards.read_clips(media_id, indices, canvas).tolist() == list(geometry)
    top, left, height, width = geometry
    picture = canvas[:, :, top : top + height, left : left + width]
    assert np.abs(picture.astype(int) - frames[np.array(expected)]).mean() < 2
    canvas[:, :, top : top + height, left : left + width] = 0
    assert (canvas == 0).all()


def test_an_image_fills_its_clip(shards):
    canvas = np.zeros((1, 4, 64, 64, 3), np.uint8)
    assert shards.read_clips("small.jpg", np.zeros((1, 4), int), canvas).tolist() == [
        22,
        20,
        20,
        24,
    ]
    assert (canvas == canvas[:, :1]).all()
    assert canvas.any()


def test_a_canvas_too_small_is_an_error(shards):
    with pytest.raises(ValueError, match=r"wide.mp4.*36x64.*frame_size=64"):
        shards.read_clips("wide.mp4", np.zeros((1, 4), int), np.zeros((1, 4, 48, 48, 3), np.uint8))


def test_a_set_is_refused_at_once_if_its_frames_are_too_large(shards):
    largest = max(max(row["height"], row["width"]) for row in shards.index.rows())
    shards.check_size(largest)
    with pytest.raises(ValueError, match=f"up to {largest} pixels.*predecode with --size"):
        shards.check_size(largest - 1)


def test_the_header_describes_its_segment():
    jpegs, pts = [b"a", b"bc", b"def", b"g", b"hi", b"j", b"kl"], [0.0, 0.49, 1, 1.5, 2, 2.5, 3]
    first, second = encode_segments("x", jpegs, pts, (36, 64), SPEC)
    header, payloads = decode_segment(first)
    assert [bytes(p) for p in payloads] == jpegs[:6]
    assert header["t_us"][1] == 500_000
    assert header["pts_us"][1] == 490_000
    header, payloads = decode_segment(second)
    assert (header["seg"], header["n"], bytes(payloads[0])) == (1, 1, b"kl")


def test_shared_by_threads_and_pickled(shards):
    shards = pickle.loads(pickle.dumps(shards))
    indices = np.arange(0, 210, 15)[:12].reshape(3, 4)
    canvases = np.zeros((8, 3, 4, 64, 64, 3), np.uint8)
    threads = [
        threading.Thread(target=shards.read_clips, args=("wide.mp4", indices, c)) for c in canvases
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert canvases.any()
    assert (canvases == canvases[0]).all()


def test_a_damaged_record_is_named_and_the_others_still_read(tmp_path):
    writer = FrameShardWriter(tmp_path, SPEC)
    rng = np.random.default_rng(0)
    for k in range(3):
        add(writer, f"{k}.mp4", rng.integers(0, 256, (6, 64, 64, 3), np.uint8))
    writer.close()
    path = tmp_path / "frames-00000.array_record"
    data = bytearray(path.read_bytes())
    data[data.index(b"1.mp4") + 20_000] ^= 1
    path.write_bytes(data)
    shards = FrameShards(tmp_path)
    canvas, indices = np.zeros((1, 4, 64, 64, 3), np.uint8), np.zeros((1, 4), int)
    for good in ("0.mp4", "2.mp4"):
        shards.read_clips(good, indices, canvas)
    with pytest.raises(FrameShardError, match=r"frames-00000.array_record: '1.mp4'"):
        shards.read_clips("1.mp4", indices, canvas)
    assert [bad.split(": ")[1] for bad in shards.verify()] == ["'1.mp4'"]


@pytest.mark.parametrize("keep", [0, 1000])
def test_a_truncated_shard_fails_only_where_it_is_read(tmp_path, keep):
    writer = FrameShardWriter(tmp_path, SPEC, shard_bytes=1)
    for k in range(2):
        add(writer, f"{k}.mp4", frames_of(2, 64, 64))
    writer.close()
    path = tmp_path / "frames-00000.array_record"
    path.write_bytes(path.read_bytes()[:keep])
    shards = FrameShards(tmp_path)
    canvas, indices = np.zeros((1, 4, 64, 64, 3), np.uint8), np.zeros((1, 4), int)
    shards.read_clips("1.mp4", indices, canvas)
    with pytest.raises(FrameShardError, match=r"frames-00000"):
        shards.read_clips("0.mp4", indices, canvas)


def test_an_unfinished_set_is_refused_then_continued(tmp_path):
    writer = FrameShardWriter(tmp_path, SPEC, shard_bytes=1)  # every medium closes its shard
    add(writer, "a", frames_of(2, 64, 64))
    writer.reject("b", "empty", "0 bytes")
    with pytest.raises(FileNotFoundError, match=r"apollo-jax predecode"):
        FrameShards(tmp_path)
    writer = FrameShardWriter(tmp_path, SPEC, shard_bytes=1)
    assert writer.finished == 1  # "b" was in no finished shard yet
    writer.reject("b", "empty", "0 bytes")
    add(writer, "c", frames_of(2, 64, 64))
    manifest = writer.close()
    assert [s["records"] for s in manifest["shards"]] == [1, 1]
    assert (manifest["media"], manifest["rejected"], manifest["frames"]) == (2, {"empty": 1}, 4)
    assert FrameShards(tmp_path).ids() == ["a", "c"]
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(FileExistsError):
        FrameShardWriter(tmp_path, SPEC)


def test_a_missing_shard_is_named(shards):
    (shards.path / "frames-00000.array_record").unlink()
    with pytest.raises(FileNotFoundError, match=r"00000.array_record does not exist.*repair"):
        FrameShards(shards.path)


def test_the_same_id_twice_is_an_error(tmp_path):
    writer = FrameShardWriter(tmp_path, SPEC)
    add(writer, "a", frames_of(1, 64, 64))
    with pytest.raises(ValueError, match="'a' was added twice"):
        add(writer, "a", frames_of(1, 64, 64))
    writer.close()


def test_planes_are_read_where_colours_are_stored_at_half_the_size(tmp_path, shards):
    indices, planes = np.array([[0, 7, 8, 15]]), np.full((1, 4, 64 * 64 * 3 // 2), 7, np.uint8)
    with pytest.raises(ValueError, match=r"subsampling 444.*layout='rgb'"):
        shards.read_clips("wide.mp4", indices, planes)
    writer = FrameShardWriter(tmp_path / "420", ShardSpec(size=64, segment_seconds=3.0))
    add(writer, "wide.mp4", frames_of(14, 36, 64))
    writer.close()
    shards = FrameShards(tmp_path / "420")
    rgb = np.zeros((1, 4, 64, 64, 3), np.uint8)
    geometry = shards.read_clips("wide.mp4", indices, planes)
    assert geometry.tolist() == shards.read_clips("wide.mp4", indices, rgb).tolist()
    luma = planes[..., : 64 * 64].reshape(1, 4, 64, 64)
    assert np.abs(luma - rgb @ np.array([0.299, 0.587, 0.114])).max() < 2
    assert (planes[0, 0] == planes[0, 1]).all()  # both show the first stored frame
    assert (planes[0, 1] != planes[0, 2]).any()
