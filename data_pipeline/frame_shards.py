# SPDX-License-Identifier: Apache-2.0
"""Frame shards (format AFS1): JPEG frames on a constant-fps grid inside ArrayRecord files.

A directory holds `frames-00000.array_record`, ..., one JSON sidecar per finished shard, and, once
complete, `index.npz` (where each medium lies) and `manifest.json`, which readers require. One
record is one segment (8 s) of one medium, see frame_records.py.

n clips, F frames per clip, S canvas side; grid frame k shows the source at k / stored fps seconds.
"""

import hashlib
import itertools
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.canvas import Picture, copy_picture, draw_jpeg, open_pictures, side
from data_pipeline.frame_records import MAGIC, MediaInfo, Segment, ShardSpec, decode_segment
from data_pipeline.media_index import INDEX_DTYPES as INDEX_DTYPES
from data_pipeline.media_index import MediaIndex
from data_pipeline.record_files import RecordFiles

MANIFEST_VERSION = 1  # grows when a reader of the old version could not read the new one
_READ_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, OSError, struct.error)


class FrameShardError(ValueError):
    """Stored bytes that cannot be read; the message names the file, and the medium."""


def parse_manifest(text: bytes, path: Path) -> dict[str, Any]:
    """FrameShardError if it is damaged, ValueError if it is of a format of another time."""
    try:
        manifest = json.loads(text)
        if manifest["format"] != MAGIC.decode():
            raise ValueError(f"{path}: format {manifest['format']!r} is not {MAGIC.decode()}")
        if manifest.get("version", 1) > MANIFEST_VERSION:
            raise ValueError(
                f"{path} is of version {manifest['version']}, this apollo_jax reads up to "
                f"{MANIFEST_VERSION}: update it"
            )
        missing = [k for k in ("spec", "shards") if k not in manifest]
        facts = ("file", "records", "bytes", "sha256")
        missing += [k for shard in manifest["shards"] for k in facts if k not in shard]
        if missing:
            raise LookupError(f"it does not say {missing[0]}")
        float(manifest["spec"]["fps"])
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise FrameShardError(
            f"{path} is damaged ({type(error).__name__}: {error}); `apollo-jax shards repair "
            f"{path.parent}` writes it again"
        ) from None
    return manifest


class FrameShards:
    """Random access to a complete directory of frame shards; picklable and thread-safe."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = self.path / "manifest.json"
        if not manifest.exists():
            raise FileNotFoundError(
                f"{manifest} does not exist: {self.path} is no complete set of frame shards; "
                f"make one with `apollo-jax predecode --output {self.path}` (rerun it to resume)"
            )
        text = manifest.read_bytes()
        self.manifest = parse_manifest(text, manifest)
        self.fingerprint = hashlib.sha256(text).hexdigest()
        known = {f.name for f in fields(ShardSpec)}
        self.spec = ShardSpec(**{k: v for k, v in self.manifest["spec"].items() if k in known})
        self.index = MediaIndex(self.path / "index.npz")
        self._columns = self.index.columns
        shards = self.manifest["shards"]
        media, last = self.manifest.get("media", len(self)), self._columns["shard"].max()
        if media != len(self) or last >= len(shards):
            raise ValueError(
                f"{self.path}: index.npz does not fit manifest.json; `apollo-jax shards repair "
                f"{self.path}` writes both again"
            )
        self._files = RecordFiles([self.path / (s["file"] or "") for s in shards])
        there = set(os.listdir(self.path))  # one request, where a stat per shard would be many
        for shard in shards:
            if shard["file"] and shard["file"] not in there:
                raise FileNotFoundError(
                    f"{self.path / shard['file']} does not exist, but manifest.json names it: copy "
                    f"it again, or `apollo-jax shards repair {self.path}` drops what it held"
                )

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state):
        self.__init__(state["path"])

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, media_id: str) -> bool:
        return self.index.find(media_id) >= 0

    def ids(self) -> list[str]:
        return self.index.names()

    def _row(self, media_id: str) -> int:
        row = self.index.find(media_id)
        if row < 0:
            near = self.index.near(media_id)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ValueError(f"{media_id!r} is not in the frame shards {self.path}{hint}")
        return row

    def info(self, media_id: str) -> MediaInfo:
        """What is stored of a medium; ValueError with a suggestion when unknown."""
        row = self._row(media_id)
        column = {k: v[row].item() for k, v in self._columns.items()}
        kind = "video" if column.pop("is_video") else "image"
        del column["shard"], column["record"]
        return MediaInfo(id=media_id, kind=kind, **column)

    def read_clips(
        self, media_id: str, frame_indices: np.ndarray, canvas: np.ndarray
    ) -> np.ndarray:
        """Decodes clips in place; returns the picture's i32[4] top, left, height, width.

        `frame_indices` i64[n, F] are source frame numbers; each shows the stored frame nearest to
        its time, number / average fps. What is shown was on screen no further than 0.5 / stored fps
        seconds from that time, for constant and variable frame rates; in source frames that is
        0.5 * fps / stored fps, and one more where times in the file are rounded.

        `canvas` u8[n, F, S, S, 3], or planes u8[n, F, S*S*3//2] (see `canvas.py`), gets the picture
        centred and zeros around it. An image fills every slot. FrameShardError for a damaged
        record, ValueError if S is too small, or for planes of what is not stored as 4:2:0.
        """
        info = self.info(media_id)
        self._check_canvas(info, canvas)
        geometry, pictures = open_pictures(canvas, info.height, info.width)
        seconds = np.asarray(frame_indices) / info.fps
        grid = np.floor(seconds * info.stored_fps + 0.5).astype(np.int64)
        wanted, slot_frame = np.unique(grid.clip(0, info.stored_frames - 1), return_inverse=True)
        jpegs = self._jpegs(media_id, wanted.tolist())
        drawn: dict[int, Picture] = {}
        slots = itertools.product(*map(range, canvas.shape[:2]))
        for slot, frame in zip(slots, slot_frame.ravel().tolist(), strict=True):
            picture = tuple(views[slot] for views in pictures)
            if frame in drawn:
                copy_picture(drawn[frame], picture)
                continue
            drawn[frame] = picture
            try:
                draw_jpeg(jpegs[frame], picture)
            except ValueError as error:
                raise self._error(media_id, error) from error
        return geometry

    def _check_canvas(self, info: MediaInfo, canvas: np.ndarray) -> None:
        if max(info.height, info.width) > side(canvas):
            raise ValueError(
                f"{info.id!r} is stored at {info.height}x{info.width} in {self.path}, larger than "
                f"the {side(canvas)}-pixel frames asked for; use frame_size={self.spec.size}"
            )
        self.check_layout("rgb" if canvas.ndim == 5 else "yuv420")

    def check_layout(self, layout: str) -> None:
        """ValueError if the frames cannot be read in this layout, see canvas.py."""
        if layout == "yuv420" and self.spec.subsampling != "420":
            raise ValueError(
                f"{self.path} is stored with subsampling {self.spec.subsampling}, whose colours do "
                "not fit into layout='yuv420'; use layout='rgb', or predecode with 420"
            )

    def check_size(self, side: int) -> None:
        """ValueError if frames are stored that a canvas of `side` pixels cannot hold."""
        largest = int(max(self._columns["height"].max(), self._columns["width"].max()))
        if largest > side:
            raise ValueError(
                f"{self.path} holds frames of up to {largest} pixels, more than the "
                f"frame_size={side} asked for: predecode with --size {side}, or make frame_size "
                f"{self.spec.size} if the model takes that"
            )

    def _jpegs(self, media_id: str, frames: list[int]) -> list[memoryview]:
        """JPEGs of ascending grid frames; every segment is read once."""
        per_segment = self.spec.segment_frames
        wanted = {f // per_segment for f in frames}
        segments = {s: self._segment(media_id, s)[1] for s in wanted}
        return [segments[f // per_segment][f % per_segment] for f in frames]

    def _segment(self, media_id: str, segment: int, check: bool = False) -> Segment:
        row = self._row(media_id)
        shard, first = int(self._columns["shard"][row]), int(self._columns["record"][row])
        try:
            header, jpegs = decode_segment(self._files.read(shard, first + segment))
            if (header["id"], header["seg"]) != (media_id, segment):
                raise ValueError(f"the record holds {header['id']!r} segment {header['seg']}")
            if check and [zlib.crc32(jpeg) for jpeg in jpegs] != header["crc"]:
                raise ValueError(f"a frame of segment {segment} has a wrong checksum")
        except _READ_ERRORS as error:
            raise self._error(media_id, error) from error
        return header, jpegs

    def segments(self, media_id: str) -> Iterator[Segment]:
        """Header and JPEGs of each segment of a medium, checked; FrameShardError if damaged."""
        for segment in range(-(-self.info(media_id).stored_frames // self.spec.segment_frames)):
            yield self._segment(media_id, segment, check=True)

    def _error(self, media_id: str, error: Exception) -> FrameShardError:
        shard = self.manifest["shards"][self._columns["shard"][self._row(media_id)]]
        return FrameShardError(f"{self.path / shard['file']}: {media_id!r}: {error}")

    def verify(self) -> list[str]:
        """Reads everything, checksums included; one line per damaged medium, empty if sound."""
        damaged = []
        for media_id in self.ids():
            try:
                for _ in self.segments(media_id):
                    pass
            except FrameShardError as error:
                damaged.append(str(error))
        return damaged
