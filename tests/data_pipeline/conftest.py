# SPDX-License-Identifier: Apache-2.0
"""Small videos of every kind, whole and damaged, made with PyAV; small shards and records."""

import json
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from data_pipeline.frame_records import MediaInfo, ShardSpec, encode_segments
from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.loader import DataConfig, SourceConfig

LLM = Path(__file__).parents[1] / "fixtures" / "apollo-tiny-a" / "checkpoint" / "llm"

_OPTIONS = {
    "libx264": {"preset": "ultrafast", "crf": "12", "bf": "2"},
    "libx265": {"preset": "ultrafast", "crf": "12", "x265-params": "log-level=0"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "12"},
    "libsvtav1": {"preset": "12", "crf": "20", "svtav1-params": "lookahead=0"},
    "mpeg4": {"b": "2M"},
}


class Videos:
    """Makers of files; frame k of a video says its number."""

    @staticmethod
    def numbered_frame(number, height=48, width=64):
        """Two grey halves that spell the frame's number in base 16; the corner is red."""
        frame = np.zeros((height, width, 3), np.uint8)
        frame[:, : width // 2] = 16 * (number // 16 % 16)
        frame[:, width // 2 :] = 16 * (number % 16)
        frame[: height // 4, : width // 4] = (255, 0, 0)
        return frame

    @staticmethod
    def number_of(frame):
        height, width = frame.shape[:2]
        left, right = frame[height // 2 :, : width // 2], frame[height // 2 :, width // 2 :]
        digits = [round(float(np.median(half)) / 16) for half in (left, right)]
        return 16 * digits[0] + digits[1]

    @staticmethod
    def write(
        path,
        count=40,
        codec="libx264",
        fps=10,
        size=(48, 64),
        pts=None,
        gop=12,
        faststart=False,
        aspect=None,
        title=None,
    ):
        """`pts` in milliseconds makes the frame rate variable."""
        movflags = {"movflags": "faststart"} if faststart else {}
        with av.open(str(path), "w", options=movflags) as container:
            stream: Any = container.add_stream(codec, rate=fps, options=_OPTIONS.get(codec, {}))
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p" if size[0] % 2 == size[1] % 2 == 0 else "yuv444p"
            stream.codec_context.gop_size = gop
            if title:
                container.metadata["title"] = title
            if aspect:
                stream.codec_context.sample_aspect_ratio = aspect
            if pts:
                stream.codec_context.time_base = Fraction(1, 1000)
            for number in range(count):
                frame = av.VideoFrame.from_ndarray(
                    Videos.numbered_frame(number, *size), format="rgb24"
                )
                if pts:
                    frame.pts, frame.time_base = pts[number], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    @staticmethod
    def rotate(path, degrees):
        """Writes a display matrix into the track header, as phones do."""
        data = bytearray(path.read_bytes())
        identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
        cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
        matrix = [cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30]
        at = data.index(identity, data.index(b"tkhd"))
        data[at : at + 36] = struct.pack(">9i", *matrix)
        path.write_bytes(data)

    @staticmethod
    def damaged(path, reason):
        """A file that is of no use, for the `reason` of a VideoError."""
        if reason == "empty":
            path.write_bytes(b"")
        elif reason == "unreadable":
            path.write_text("this is no video " * 100)
        elif reason == "no_video_stream":
            Videos.sound(path)
        elif reason == "no_moov":
            data = Videos.write(path).read_bytes()
            path.write_bytes(data[: data.index(b"moov") - 4])
        elif reason == "corrupt":
            data = bytearray(Videos.write(path).read_bytes())
            start, end = data.index(b"mdat") + 1200, data.index(b"moov") - 8
            noise = np.random.default_rng(0).integers(0, 256, end - start, np.uint8)
            data[start:end] = noise.tobytes()
            path.write_bytes(data)
        else:
            assert reason == "missing"
        return path

    @staticmethod
    def sound(path):
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())


@pytest.fixture(scope="session")
def videos() -> type[Videos]:
    return Videos


class TinyData:
    """Shards of videos v0.. (1 to 8 s, one shade each) and images i0.., and configs over them."""

    def __init__(self, folder: Path):
        self.folder = folder
        spec = ShardSpec(fps=2.0, size=16)
        writer = FrameShardWriter(folder / "shards", spec)
        for v in range(8):
            jpegs = [spec.encode(np.full((10, 16, 3), 40 + 20 * v, np.uint8))] * (2 * v + 2)
            times = [k / 2 for k in range(len(jpegs))]
            n = len(jpegs)
            info = MediaInfo(f"v{v}", "video", 5 * n, 10.0, n / 2, n, 2.0, 10, 16)
            writer.add(info, encode_segments(info.id, jpegs, times, (10, 16), spec))
        for i in range(4):
            info = MediaInfo(f"i{i}", "image", 1, 1.0, 0.0, 1, 1.0, 16, 10)
            jpeg = spec.encode(np.full((16, 10, 3), 10 * i, np.uint8))
            writer.add(info, encode_segments(info.id, [jpeg], [0.0], (16, 10), spec))
        writer.close()

    @staticmethod
    def records(kind: str, count: int) -> list[dict]:
        """`count` records of 'text', 'image' or 'video', told apart by their answers."""
        media = {
            "text": lambda n: {},
            "image": lambda n: {"image": f"i{n % 4}"},
            "video": lambda n: {"video": f"v{n % 8}"},
        }
        return [
            dict(id=f"{kind}{n}", question="What?", answer=f"{kind} {n}" + " so" * (n % 9))
            | media[kind](n)
            for n in range(count)
        ]

    def write(self, name: str, records: list[dict]) -> Path:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    def config(self, sources: dict[str, list[dict]], **changes: Any) -> DataConfig:
        settings = {
            "sources": {n: SourceConfig(str(self.write(n, r))) for n, r in sources.items()},
            "frames": (str(self.folder / "shards"),),
            "tokenizer": str(LLM),
            "batch_size": 8,
            "length": 256,
            "clips": 8,
            "frame_size": 16,
            "tokens_per_clip": 4,
        }
        return DataConfig(**(settings | changes))


@pytest.fixture
def tiny_data(tmp_path: Path) -> TinyData:
    return TinyData(tmp_path)
