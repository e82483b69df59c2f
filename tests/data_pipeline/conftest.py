# SPDX-License-Identifier: Apache-2.0
"""Small videos of every kind, whole and damaged, made with PyAV."""

import struct
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

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
            stream: Any = container.add_stream(codec, rate=fps, options=_OPTIONS[codec])
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


@pytest.fixture
def videos() -> type[Videos]:
    return Videos
