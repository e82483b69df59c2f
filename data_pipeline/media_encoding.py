# SPDX-License-Identifier: Apache-2.0
"""One video or image file -> the records of its frames on a constant-fps grid.

Grid frame k is the last source frame with time <= k / fps; times are seconds after the first frame.
The grid ends with the video, or after: no wanted time is further than half a grid interval from a
stored frame. Frames are fitted to the stored size with PIL's bicubic.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from data_pipeline.frame_records import MediaInfo, ShardSpec, encode_segments
from data_pipeline.image_files import read_image
from data_pipeline.transforms import fit_canvas
from data_pipeline.video import (
    RgbConverter,
    VideoError,
    average_rate,
    decoded_frames,
    open_video,
    readable_packets,
)

_TOLERATED_LOSS = 0.2  # share of damaged frames that is dropped rather than rejected
_LONGEST_FREEZE = 1800.0  # seconds one frame may stay; more means broken timestamps
_BEAT_SECONDS = 1.0
_MEMORY_BYTES = 8 << 20  # of records; a spool holds more in a file

Beat = Callable[[int], None]


@dataclass(frozen=True)
class MediaLimits:
    """What a file may be at most; VideoError too_long or too_large beyond."""

    hours: float = 8.0
    pixels: int = 160_000_000  # of a frame


class RecordSpool:
    """Records of one medium in order: the first few MB in memory, the others in a file at `path`.

    What is in the file can be iterated over in another process, as often as wanted.
    """

    def __init__(self, path: Path | None = None):
        self.path, self.sizes, self._memory, self._file = path, [], [], None
        self._room = _MEMORY_BYTES

    def append(self, record: bytes) -> None:
        self._room -= len(record)
        if self.path is None or self._room >= 0:
            self._memory.append(record)
            return
        self._file = self._file or self.path.open("wb")
        self._file.write(record)
        self.sizes.append(len(record))

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def __iter__(self) -> Iterator[bytes]:
        yield from self._memory
        if self.path and self.sizes:
            with self.path.open("rb") as file:
                for size in self.sizes:
                    yield file.read(size)


class EncodedMedium(NamedTuple):
    """What a shard stores of one file; `notes` say what was repaired."""

    info: MediaInfo
    records: Any  # an iterable of bytes: a list, or the spool that was given
    notes: dict[str, str]


class _Pulse:
    """Beats once a second at most; counts frames in between."""

    def __init__(self, beat: Beat):
        self._beat, self._frames, self._last = beat, 0, time.monotonic()

    def __call__(self, frames: int = 0, now: bool = False) -> None:
        self._frames += frames
        if now or time.monotonic() - self._last > _BEAT_SECONDS:
            self._beat(self._frames)
            self._frames, self._last = 0, time.monotonic()


class _Grid:
    """Turns the frames on screen at grid times to records; a repeated frame is encoded once."""

    def __init__(self, media_id: str, spec: ShardSpec, convert: Callable[[Any], np.ndarray], sink):
        self.count = 0
        self.size = (0, 0)
        self._id, self._spec, self._convert, self._sink = media_id, spec, convert, sink
        self._jpegs: list[bytes] = []  # of the segment begun
        self._pts: list[float] = []
        self._frame, self._time, self._jpeg = None, 0.0, b""

    def show(self, frame: VideoFrame, seconds: float, tolerance: float) -> None:
        """From `seconds` on `frame` is on screen."""
        self._frame = self._frame or frame  # before the first good frame, that one
        self.fill(seconds - tolerance)
        self._frame, self._time, self._jpeg = frame, seconds, b""

    def fill(self, end: float) -> None:
        """Stores the frame on screen for all grid times before `end`."""
        while self.count / self._spec.fps < end:
            if not self._jpeg:
                stored = fit_canvas(self._convert(self._frame), self._spec.size)
                if self.count and stored.shape[:2] != self.size:
                    raise ValueError(f"the picture turns from {self.size} to {stored.shape[:2]}")
                self._jpeg, self.size = self._spec.encode(stored), stored.shape[:2]
            self._jpegs.append(self._jpeg)
            self._pts.append(self._time)
            self.count += 1
            if len(self._jpegs) == self._spec.segment_frames:
                self.flush()

    def flush(self) -> None:
        segment = (self.count - 1) // self._spec.segment_frames
        for record in encode_segments(
            self._id, self._jpegs, self._pts, self.size, self._spec, segment
        ):
            self._sink.append(record)
        self._jpegs, self._pts = [], []


def encode_video(
    path: str | Path,
    media_id: str,
    spec: ShardSpec,
    beat: Beat = lambda frames: None,
    limits: MediaLimits = MediaLimits(),
    sink: RecordSpool | None = None,
) -> EncodedMedium:
    """Decodes a file once, front to back; `beat` hears of n more frames, about once a second.

    Records go to `sink` as soon as they are complete (default: a list). VideoError if the file is
    unusable, OSError if it cannot be read to its end.
    """
    path, records = Path(path), [] if sink is None else sink
    if not path.is_file() or not path.stat().st_size:
        with open_video(path):
            pass  # says what is wrong
    pulse = _Pulse(beat)
    with path.open("rb") as file, open_video(path, file=file) as (container, stream):
        _check_header(path, container, stream, limits, pulse)
        grid = _Grid(media_id, spec, RgbConverter(stream), records)
        seen, damaged, last, tolerance = _show_frames(path, container, stream, grid, limits, pulse)
        if seen == damaged:
            raise VideoError(path, "no_frames", "no frame can be decoded")
        if damaged > _TOLERATED_LOSS * seen:
            raise VideoError(path, "corrupt", f"{damaged} of {seen} frames are damaged")
        fps = _frame_rate(path, stream, seen, last)
        # To the end of the last frame, and so far that the last wanted time, (seen - 1) / fps, has
        # a grid frame within half an interval.
        grid.fill(max(last + 1 / fps - tolerance, (seen - 1) / fps + 0.5 / spec.fps + 1e-6))
        grid.flush()
        notes = {}
        if damaged:
            notes["damaged"] = f"{damaged} of {seen} frames"
        if seen < 0.98 * stream.frames:
            notes["truncated"] = f"{seen} of {stream.frames} frames"
    info = MediaInfo(
        id=media_id,
        kind="video",
        num_frames=seen,
        fps=fps,
        duration=seen / fps,
        stored_frames=grid.count,
        stored_fps=spec.fps,
        height=grid.size[0],
        width=grid.size[1],
    )
    return EncodedMedium(info, records, notes)


def _show_frames(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    grid: _Grid,
    limits: MediaLimits,
    pulse: _Pulse,
) -> tuple[int, int, float, float]:
    """Decodes all frames to the grid: (frames seen, damaged ones, last time, tolerance in s)."""
    seen = damaged = 0
    start, last = None, 0.0
    tick = float(stream.time_base or 0)
    # Times are rounded to ticks: half a tick late is still in time.
    tolerance = min(tick / 2, 1e-3) + 1e-6
    for frame in decoded_frames(container, stream):
        seen += 1
        pulse(1)
        if frame is None or frame.is_corrupt:
            damaged += 1
            continue
        _check_size(path, frame, limits)
        if frame.pts is None or not tick:
            now = (seen - 1) / average_rate(stream, seen, 0)
        else:
            start = frame.pts * tick if start is None else start
            now = frame.pts * tick - start
        if now - last > _LONGEST_FREEZE:
            detail = f"the time jumps from {last:.0f} to {now:.0f} s"
            raise VideoError(path, "bad_timestamps", detail)
        last = max(last, now)
        if last > 3600 * limits.hours:
            raise _too_long(path, limits)
        grid.show(frame, last, tolerance)
    pulse(now=True)
    return seen, damaged, last, tolerance


def _check_header(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    limits: MediaLimits,
    pulse: _Pulse,
) -> None:
    """Refuses what is too large or too long without decoding it."""
    _check_size(path, stream.codec_context, limits)
    # Frames that grow later are looked at when they are decoded, unless that alone is a danger.
    stream.codec_context.options = {"max_pixels": str(4 * limits.pixels)}
    tick = float(stream.time_base or 0)
    stated = max((stream.duration or 0) * tick, (container.duration or 0) / 1e6)
    if stated <= 3600 * limits.hours:
        return
    # A header's word is not enough: the packets know.
    first = None
    with path.open("rb") as file, open_video(path, file=file) as (again, video):
        for packet in readable_packets(again, video):
            pulse()
            if packet.pts is not None and packet.size:
                first = packet.pts if first is None else min(first, packet.pts)
                if (packet.pts - first) * tick > 3600 * limits.hours:
                    raise _too_long(path, limits)


def _check_size(path: Path, picture: Any, limits: MediaLimits) -> None:
    if picture.width * picture.height > limits.pixels:
        detail = f"{picture.width} x {picture.height} pixels, more than {limits.pixels}"
        raise VideoError(path, "too_large", detail)


def _too_long(path: Path, limits: MediaLimits) -> VideoError:
    return VideoError(path, "too_long", f"it lasts more than {limits.hours:g} hours")


def _frame_rate(path: Path, stream: VideoStream, frames: int, span: float) -> float:
    """The average rate as stated, unless frame numbers would drift from the frames' own times."""
    fps = average_rate(stream, frames, span)
    if span and abs((frames - 1) / fps - span) > 1 / fps:
        fps = (frames - 1) / span
    if not 1 / _LONGEST_FREEZE <= fps < 1e5:
        raise VideoError(path, "bad_timestamps", f"{fps:g} frames a second")
    return fps


def encode_image(
    path: str | Path, media_id: str, spec: ShardSpec, limits: MediaLimits = MediaLimits()
) -> EncodedMedium:
    """An image is a video of one frame; VideoError if unusable."""
    frame = fit_canvas(read_image(path, limits.pixels), spec.size)
    size = frame.shape[:2]
    info = MediaInfo(media_id, "image", 1, 1.0, 0.0, 1, 1.0, *size)
    return EncodedMedium(
        info, encode_segments(media_id, [spec.encode(frame)], [0.0], size, spec), {}
    )


def source_facts(path: Path, beat: Beat = lambda frames: None) -> dict[str, Any]:
    """Size and SHA-256 of a file, read in pieces."""
    digest, size, pulse = hashlib.sha256(), 0, _Pulse(beat)
    with path.open("rb") as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
            size += len(piece)
            pulse()
    return {"source_bytes": size, "source_sha256": digest.hexdigest()}
