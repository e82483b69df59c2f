# SPDX-License-Identifier: Apache-2.0
"""Files made to break a decoder, and disks that fail: each is bounded, named, and others go on."""

import errno
import io
import json
import os
import pathlib
import struct
import tempfile
import zlib

import pytest
from PIL import Image

from data_pipeline import frame_shard_writer, predecode_shards
from data_pipeline.frame_records import ShardSpec
from data_pipeline.frame_shards import FrameShards
from data_pipeline.media_encoding import MediaLimits, encode_video
from data_pipeline.media_files import Medium, find_media
from data_pipeline.predecode import main, predecode
from data_pipeline.predecode_plan import PredecodeConfig, begin_plan
from data_pipeline.predecode_shards import make_shards
from data_pipeline.video import VideoError

CONFIG = PredecodeConfig(
    size=64, workers=2, file_seconds=6.0, file_memory=500 << 20, max_rejected=1.0
)
HOUR = 3_600_000  # milliseconds


def png_bomb(path):
    """A small file that says it is a picture of a billion pixels."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 25_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))


def patch_mkv(path, element, value):
    """Overwrites the value of an EBML element of 8 bytes."""
    data = bytearray(path.read_bytes())
    at = data.index(element + b"\x88") + len(element) + 1
    data[at : at + 8] = value
    path.write_bytes(data)


def patch_stated_size(path, width, height):
    """Of the codec's entry in an mp4's table."""
    data = bytearray(path.read_bytes())
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    data[at : at + 4] = struct.pack(">HH", width, height)
    path.write_bytes(data)


def test_poison(videos, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    videos.write(root / "good.mp4", count=20)
    png_bomb(root / "bomb.png")
    Image.new("1", (12_000, 12_000)).save(root / "memory.png")
    with (root / "endless.mp4").open("wb") as file:
        file.truncate(1 << 36)  # sparse: takes no space
    videos.write(root / "ten_hours.mkv", count=37, pts=[1_000_000 * k for k in range(37)])
    videos.write(root / "hidden.mkv", count=37, pts=[1_000_000 * k for k in range(37)])
    patch_mkv(root / "hidden.mkv", b"\x44\x89", struct.pack(">d", 4000.0))
    videos.write(root / "modest.mkv", count=20)
    patch_mkv(root / "modest.mkv", b"\x44\x89", struct.pack(">d", 1000.0 * HOUR))
    videos.write(root / "backwards.mkv", count=20)
    patch_mkv(root / "backwards.mkv", b"\x44\x89", struct.pack(">d", -1e300))
    videos.write(root / "larger.mp4", count=20)
    patch_stated_size(root / "larger.mp4", 65535, 65535)

    report = predecode(root, tmp_path / "out", CONFIG, progress=False)
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    reasons = {q["id"]: (q["reason"], q["detail"]) for q in map(json.loads, lines)}
    assert {name: reason for name, (reason, _) in reasons.items()} == {
        "bomb.png": "too_large",
        "memory.png": "memory",
        "endless.mp4": "timeout",
        "ten_hours.mkv": "too_long",
        "hidden.mkv": "too_long",
    }
    assert reasons["endless.mp4"][1] == "not done after 6 s"
    shards = FrameShards(tmp_path / "out")
    # A header's lie about the length or the size alone is no reason: the frames decide.
    assert set(shards.ids()) == {"good.mp4", "modest.mkv", "backwards.mkv", "larger.mp4"}
    assert {shards.info(name).num_frames for name in shards.ids()} == {20}
    assert "1 timeout, such as endless.mp4 (not done after 6 s)" in report.text()


@pytest.mark.parametrize(
    ("pixels", "reason"), [(65_535, "too_large"), (10_000, "corrupt"), (65_536, None)]
)
def test_frames_that_grow(videos, tmp_path, pixels, reason):
    """The second half is of 256 x 256 pixels; far more than allowed is not even decoded."""
    small = videos.write(tmp_path / "small.ts", count=20, codec="mpeg2video")
    large = videos.write(tmp_path / "large.ts", count=20, codec="mpeg2video", size=(256, 256))
    path = tmp_path / "grows.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    encode = (path, "v", ShardSpec(size=64), lambda frames: None, MediaLimits(pixels=pixels))
    if reason is None:
        assert encode_video(*encode).info.height == 48  # all frames as the first one
        return
    with pytest.raises(VideoError) as error:
        encode_video(*encode)
    assert error.value.reason == reason


@pytest.mark.parametrize("nanoseconds", [5e14, 4e9, 10])
def test_a_still_that_lies_about_its_length(videos, tmp_path, nanoseconds):
    path = videos.write(tmp_path / "v.mkv", count=1)
    data = path.read_bytes()
    at = data.index(b"\x23\xe3\x83\x84") + 4  # the default duration of a frame
    lie = (int(nanoseconds) & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(data[:at] + lie + data[at + 4 :])
    info = encode_video(path, "v", ShardSpec(size=64)).info
    assert 1 <= info.stored_frames <= 10


class Failing(io.FileIO):
    """A file of which no more than the first bytes can be read, as often as `times` says."""

    times = 0

    def readinto(self, buffer):
        if Failing.times > 0 and self.tell() + len(buffer) > 2000:
            Failing.times -= 1
            raise OSError(errno.EIO, "Input/output error")
        return super().readinto(buffer)

    def read(self, size=-1):
        buffer = bytearray(max(0, os.fstat(self.fileno()).st_size) if size < 0 else size)
        return bytes(buffer[: self.readinto(buffer)])


@pytest.mark.parametrize(("times", "stored"), [(2, True), (9, False)])
@pytest.mark.parametrize("skip", [0, 1], ids=["while hashing", "while decoding"])
def test_a_disk_that_fails_now_and_then(videos, tmp_path, monkeypatch, times, stored, skip):
    path = videos.write(tmp_path / "v.mp4")
    usual, opened = pathlib.Path.open, 0

    def flaky(self, *args):
        nonlocal opened
        if self != path:
            return usual(self, *args)
        opened += 1
        return Failing(self) if opened > skip else usual(self, *args)

    monkeypatch.setattr(pathlib.Path, "open", flaky)
    monkeypatch.setattr(predecode_shards, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(Failing, "times", times)
    medium = Medium("v.mp4", "video", str(path), path.stat().st_size)
    task = predecode_shards._Task(medium, ShardSpec(size=64), MediaLimits(), str(tmp_path / "s"))
    result = predecode_shards._encode(task, lambda frames: None)
    if stored:
        assert isinstance(result, predecode_shards._Stored)
        assert (result.info.num_frames, result.facts["notes"]) == (40, {})
    else:
        assert isinstance(result, predecode_shards.Casualty)
        assert (result.reason, "Input/output error" in result.detail) == ("io", True)


def test_an_input_that_is_gone_is_no_quarantine(videos, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for k in range(3):
        videos.write(root / f"{k}.mp4", count=3)
    plan = begin_plan(tmp_path / "out", CONFIG, find_media(root))
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"none of the 3 media .* is the input mounted"):
        make_shards(plan, [0], CONFIG)
    assert os.listdir(tmp_path / "out") == ["plan.jsonl"]
    (tmp_path / "elsewhere").rename(root)
    make_shards(plan, [0], CONFIG)
    assert plan.unfinished() == []


class Full:
    """An ArrayRecord writer on a full disk."""

    def __init__(self, path, options):
        open(path, "wb").close()

    def write(self, record):
        pass

    def close(self):
        raise RuntimeError("write() failed: No space left on device")

    def is_open(self):
        return True


def test_a_full_disk_stops_the_job_and_leaves_nothing(videos, tmp_path, monkeypatch):
    path = videos.write(tmp_path / "v.mp4", count=3)
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(frame_shard_writer, "ArrayRecordWriter", Full)
        with pytest.raises(ValueError, match=r"frames-00000.* cannot be written: .*No space"):
            predecode([path], output, CONFIG, progress=False)
    assert os.listdir(output) == ["plan.jsonl"]
    assert predecode([path], output, CONFIG, progress=False).stored == 1


def test_a_full_scratch_folder_is_no_fault_of_the_file(videos, tmp_path, monkeypatch):
    path = videos.write(tmp_path / "v.mp4", count=3)

    def append(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(predecode_shards.RecordSpool, "append", append)
    medium = Medium("v.mp4", "video", str(path), path.stat().st_size)
    task = predecode_shards._Task(medium, ShardSpec(size=64), MediaLimits(), str(tmp_path / "s"))
    result = predecode_shards._encode(task, lambda frames: None)
    plan = begin_plan(tmp_path / "out", CONFIG, [medium])
    with pytest.raises(ValueError, match=r"No space left on device: TMPDIR"):
        predecode_shards._make_shard(plan, 0, [task], iter([result]), None)
    assert plan.unfinished() == [0]


def test_scratch_of_a_killed_process_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with predecode_shards._scratch_folder() as mine:
        killed = pathlib.Path(mine.replace(f"-{os.getpid()}-", "-999999999-"))
        killed.mkdir()
        (killed / "records").write_bytes(b"x")
        with predecode_shards._scratch_folder() as second:
            assert {path.name for path in tmp_path.iterdir()} == {
                os.path.basename(mine),
                os.path.basename(second),
            }
    assert os.listdir(tmp_path) == []


def test_too_many_rejected_media_are_an_error(videos, tmp_path, capsys):
    root, output = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    videos.write(root / "good.mp4", count=3)
    for k in range(2):
        videos.damaged(root / f"{k}.mp4", "empty")
    arguments = ["--input", str(root), "--output", str(output), "--size", "64", "--workers", "1"]
    with pytest.raises(ValueError, match=r"2 of 3 media were rejected.*'empty': 2.*max-rejected"):
        main(arguments)
    assert len((output / "quarantine.jsonl").read_text().splitlines()) == 2
    assert not (output / "manifest.json").exists()
    main([*arguments, "--max-rejected", "0.7"])
    assert "2 empty, such as 0.mp4 (the file has 0 bytes); 1.mp4" in capsys.readouterr().out
    assert FrameShards(output).ids() == ["good.mp4"]


def test_limits_that_make_no_sense():
    for wrong in ({"max_hours": 0}, {"file_seconds": -1}, {"max_rejected": 2}, {"shards": -1}):
        with pytest.raises(ValueError, match=r"needed|positive"):
            PredecodeConfig(**wrong)  # pyright: ignore[reportArgumentType]
