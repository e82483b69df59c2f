# SPDX-License-Identifier: Apache-2.0
"""docs/data.md: its commands and code run, and its format can be read by what it says of it alone.

n frames of a record; a reader gets u8[h, w, 3] pictures by numbers of the source's frames.
"""

import importlib.util
import io
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgpack
import numpy as np
import pytest
from PIL import Image

from apollo_jax.__main__ import run
from data_pipeline.frame_records import decode_segment
from data_pipeline.frame_shards import FrameShards
from data_pipeline.predecode import PredecodeConfig, predecode

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/data.md").read_text()
COMMANDS = re.findall(r"^ +apollo-jax (\w+ (?:\\\n|[^\\\n])*)", GUIDE, re.M)


def block(language: str, number: int = 0) -> str:
    """A fenced block of the guide, without the indentation of its list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", GUIDE, re.M | re.S)
    indent, text = found[number]
    return re.sub(f"^{indent}", "", text, flags=re.M)


def exit_code(command: str, arguments: list[str]) -> int:
    try:
        run(command, arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def home(tmp_path, monkeypatch, videos) -> Path:
    """The folder of someone who follows the guide."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos/cats").mkdir(parents=True)
    videos.write(tmp_path / "videos/cats/one.mp4", count=50)
    videos.write(tmp_path / "videos/cats/two.mp4", count=30)
    Image.new("RGB", (60, 40)).save(tmp_path / "videos/dog.jpg")
    (tmp_path / "train.jsonl").write_text(block("json"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    tokenizer = ROOT / "tests/fixtures/apollo-tiny-a/checkpoint/llm"
    (tmp_path / "Qwen2.5-3B-Instruct").symlink_to(tokenizer)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/frames").symlink_to(tmp_path / "frames")
    (tmp_path / "data/train.jsonl").symlink_to(tmp_path / "train.jsonl")
    return tmp_path


def test_the_commands_and_the_code_run_in_their_order(home):
    assert len(COMMANDS) > 10
    for text in COMMANDS:
        command, *arguments = shlex.split(text.replace("\\\n", " "))
        if "--runner" not in arguments:
            assert exit_code(command, arguments) == 0, text
        elif importlib.util.find_spec("apache_beam"):  # has warnings of its own: a process, too
            line = [sys.executable, "-m", "apollo_jax", command, *arguments]
            subprocess.run(line, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    for picture in ("sheet.png", "one.png", "sample.png"):
        with Image.open(home / picture) as image:
            assert min(image.size) > 40
    for other in ("frames-tasks", *(["frames-beam"] if (home / "frames-beam").exists() else [])):
        assert FrameShards(home / other).ids() == FrameShards(home / "frames").ids()
    assert FrameShards(home / "frames").ids() == ["cats/one.mp4", "cats/two.mp4", "dog.jpg"]

    names: dict = {}
    exec(block("python"), names)
    names["loader"].close()
    assert names["stats"].samples > 0
    assert names["stats"].bad == ()
    assert names["batch"].frames.shape == (2, 28, 4, 384 * 384 * 3 // 2)


def test_every_reason_to_quarantine_is_in_the_table():
    sources = "".join(p.read_text() for p in (ROOT / "data_pipeline").glob("*.py"))
    reasons = set(re.findall(r"VideoError\([\w.]+, \"(\w+)\"", sources))
    reasons |= set(re.findall(r"Casualty\(\"(\w+)\"", sources))
    assert len(reasons) > 10
    for reason in reasons:
        assert f"`{reason}`" in GUIDE, reason


# ---- a reader by the specification alone


class Reader:
    """Written from the section on AFS1; a medium's frames by the source's frame numbers."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_bytes())
        assert (self.manifest["format"], self.manifest["version"]) == ("AFS1", 1)
        spec = self.manifest["spec"]
        self.per_segment = round(spec["fps"] * spec["segment_seconds"])
        with np.load(folder / "index.npz") as arrays:
            self.index = dict(arrays)
        self.ids = self.index["ids"].tobytes().decode("utf-8").split("\0")

    def frames(self, media_id: str, numbers: list[int]) -> Iterator[np.ndarray]:
        row = self.ids.index(media_id)
        at = {name: column[row] for name, column in self.index.items() if name != "ids"}
        records = self.records(self.manifest["shards"][at["shard"]])
        for number in numbers:
            frame = int(np.floor(number / at["fps"] * at["stored_fps"] + 0.5))
            frame = min(frame, at["stored_frames"] - 1)
            header, jpegs = segment(records[at["record"] + frame // self.per_segment])
            assert (header["v"], header["id"], header["layer"]) == (1, media_id, 0)
            assert header["seg"] == frame // self.per_segment
            place = frame % self.per_segment
            assert header["t_us"][place] == round(1e6 * frame / header["fps"])
            assert zlib.crc32(jpegs[place]) == header["crc"][place]
            picture = np.asarray(Image.open(io.BytesIO(jpegs[place])))
            assert [*picture.shape[:2]] == header["hw"] == [at["height"], at["width"]]
            yield picture

    def records(self, shard: dict) -> list[bytes]:
        data = (self.folder / shard["file"]).read_bytes()
        assert len(data) == shard["bytes"]
        footer, _ = varint(chunk(data, len(data) - 65536)[0], 1)
        places = [varint(entry, 1)[0] for entry in chunk(data, footer)[1:]]
        assert len(places) == shard["records"]
        return [chunk(data, place)[0] for place in places]


def segment(record: bytes) -> tuple[dict, list[bytes]]:
    magic, header_bytes, n = struct.unpack_from("<4sII", record)
    assert magic == b"AFS1"
    at = 12 + header_bytes
    offsets = np.frombuffer(record, "<u4", n + 1, at)
    payload = record[at + 4 * (n + 1) :]
    frames = [payload[a:b] for a, b in pairwise(offsets.tolist())]
    return msgpack.unpackb(record[12:at]), frames


def chunk(data: bytes, at: int) -> list[bytes]:
    """The records of the chunk at a place of the file."""

    def take(size: int) -> bytes:
        nonlocal at
        taken = b""
        while size:
            at += 24 if at % 65536 == 0 else 0
            part = data[at : at + min(size, 65536 - at % 65536)]
            taken, at, size = taken + part, at + len(part), size - len(part)
        return taken

    size, _, kind_and_records = struct.unpack_from("<QQQ", take(40), 8)
    assert kind_and_records & 255 == ord("r")
    body = take(size)
    assert body[0] == 0
    lengths_bytes, at = varint(body, 1)
    end, records, lengths = at + lengths_bytes, [], []
    while at < end:
        length, at = varint(body, at)
        lengths.append(length)
    for length in lengths:
        records.append(body[end : end + length])
        end += length
    assert len(records) == kind_and_records >> 8
    return records


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def test_the_format_can_be_read_with_what_its_specification_says(tmp_path, videos):
    folder = tmp_path / "videos"
    folder.mkdir()
    for number, count in enumerate((200, 3, 95)):
        videos.write(folder / f"v{number}.mp4", count=count, size=(48 + 2 * number, 64))
    noise = np.random.default_rng(0).integers(0, 256, (300, 384, 3), np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")  # crosses the container's blocks
    config = PredecodeConfig(fps=4.0, shard_bytes=200_000, workers=1)
    predecode(folder, tmp_path / "frames", config, progress=False)
    reader, ours = Reader(tmp_path / "frames"), FrameShards(tmp_path / "frames")
    assert len(reader.manifest["shards"]) > 1
    assert reader.ids == ours.ids()
    for media_id in reader.ids:
        info = ours.info(media_id)
        numbers = sorted({0, info.num_frames // 2, info.num_frames - 1})
        canvas = np.empty((1, len(numbers), 384, 384, 3), np.uint8)
        top, left, height, width = ours.read_clips(media_id, np.array([numbers]), canvas)
        for picture, drawn in zip(reader.frames(media_id, numbers), canvas[0], strict=True):
            inside = drawn[top : top + height, left : left + width]
            np.testing.assert_array_equal(picture, inside)


def test_records_of_another_version_are_refused():
    header: bytes = msgpack.packb({"v": 2, "id": "a", "seg": 0, "n": 1})  # pyright: ignore[reportAssignmentType]
    record = struct.pack("<4sII", b"AFS1", len(header), 1) + header + struct.pack("<2I", 0, 0)
    with pytest.raises(ValueError, match="a record of version 2, not 1"):
        decode_segment(record)
