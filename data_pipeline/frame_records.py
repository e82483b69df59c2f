# SPDX-License-Identifier: Apache-2.0
"""Records of frame shards (format AFS1): a segment of one medium, as bytes.

    "AFS1" | u32 header bytes | u32 n | msgpack header | u32 offsets[n+1] | JPEG payloads

n frames; grid frame k shows the source at k / stored fps seconds.
"""

import itertools
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import simplejpeg

MAGIC = b"AFS1"
RECORD_VERSION = 1  # grows when a reader of the old version could not read the new one
_PREFIX = struct.Struct("<4sII")  # magic, header bytes, number of frames


@dataclass(frozen=True)
class ShardSpec:
    """How frames are stored: grid fps, longest side in pixels, JPEG settings, segment length."""

    fps: float = 2.0
    size: int = 384
    quality: int = 90
    subsampling: str = "420"
    segment_seconds: float = 8.0

    @property
    def segment_frames(self) -> int:
        return max(1, round(self.fps * self.segment_seconds))

    def encode(self, frame: np.ndarray) -> bytes:
        """u8[h, w, 3] RGB -> JPEG."""
        return simplejpeg.encode_jpeg(
            np.ascontiguousarray(frame), self.quality, colorsubsampling=self.subsampling
        )


@dataclass(frozen=True)
class MediaInfo:
    """One stored video or image; times in seconds, sides of the stored frames in pixels."""

    id: str
    kind: str  # 'video' | 'image'
    num_frames: int  # of the source
    fps: float  # of the source, average
    duration: float
    stored_frames: int
    stored_fps: float
    height: int
    width: int


def encode_segments(
    media_id: str,
    jpegs: Sequence[bytes],
    pts: Sequence[float],
    size: tuple[int, int],
    spec: ShardSpec,
    first_segment: int = 0,
) -> list[bytes]:
    """Grid frames of one medium -> its records; `pts` is each shown frame's true time (s).

    `first_segment` says where they begin, for a medium that is written piece by piece.
    """
    records = []
    for start in range(0, len(jpegs), spec.segment_frames):
        part = jpegs[start : start + spec.segment_frames]
        shown = pts[start : start + spec.segment_frames]
        segment = first_segment + start // spec.segment_frames
        grid = range(segment * spec.segment_frames, segment * spec.segment_frames + len(part))
        header: bytes = msgpack.packb(  # pyright: ignore[reportAssignmentType]
            {
                "v": RECORD_VERSION,
                "id": media_id,
                "seg": segment,
                "layer": 0,
                "n": len(part),
                "hw": size,
                "codec": "jpeg",
                "q": spec.quality,
                "subsampling": spec.subsampling,
                "fps": spec.fps,
                "t_us": [round(k * 1e6 / spec.fps) for k in grid],
                "pts_us": [round(seconds * 1e6) for seconds in shown],
                "crc": [zlib.crc32(jpeg) for jpeg in part],
            }
        )
        offsets = np.cumsum([0, *map(len, part)], dtype="<u4").tobytes()
        prefix = _PREFIX.pack(MAGIC, len(header), len(part))
        records.append(b"".join((prefix, header, offsets, *part)))
    return records


Segment = tuple[dict[str, Any], list[memoryview]]  # a record's header and its JPEGs


def decode_segment(record: bytes) -> Segment:
    """Record -> (header, JPEG payloads), without copying."""
    magic, header_bytes, count = _PREFIX.unpack_from(record)
    if magic != MAGIC:
        raise ValueError(f"record starts with {magic!r}, not {MAGIC!r}")
    view = memoryview(record)
    at = _PREFIX.size + header_bytes
    header = msgpack.unpackb(view[_PREFIX.size : at])
    if header["v"] != RECORD_VERSION:
        raise ValueError(f"a record of version {header['v']}, not {RECORD_VERSION}")
    offsets = np.frombuffer(record, "<u4", count + 1, at).tolist()
    payload = view[at + 4 * (count + 1) :]
    return header, [payload[a:b] for a, b in itertools.pairwise(offsets)]
