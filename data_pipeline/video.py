# SPDX-License-Identifier: Apache-2.0
"""Decoding video files with PyAV: display-oriented RGB frames by number, in bounded memory.

Frame i is the i-th frame in display order; times are seconds after the first frame. Sample aspect
ratio and rotation metadata are applied, so h x w is what a player shows. h, w pixels; n frames.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

# Titles in an unknown encoding are no reason to refuse a video; PyAV 19 never does.
_OPEN_OPTIONS: Any = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)
# A wanted frame that cannot be decoded is replaced by its neighbour. It counts as lost if that is
# further away than this, and a file is corrupt if more than this share of the frames is lost.
_NEIGHBOUR_SECONDS = 0.5
_TOLERATED_LOSS = 0.2


class VideoError(ValueError):
    """A file that cannot be used; `reason` is one short word per class of trouble.

    missing, empty, no_moov, unreadable, no_video_stream, no_frames or corrupt; too_large.
    """

    def __init__(self, path: str | Path, reason: str, detail: str):
        super().__init__(f"{path}: {detail} ({reason})")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class VideoInfo:
    """fps is the average rate; duration = num_frames / fps, as the published code computes it."""

    fps: float
    num_frames: int
    duration: float
    height: int  # as displayed
    width: int
    rotation: int  # degrees counter-clockwise, already applied to height and width


class RgbConverter:
    """Decoded frames -> u8[h, w, 3] as displayed, all of the first frame's size."""

    def __init__(self, stream: VideoStream):
        aspect = float(stream.sample_aspect_ratio or 1)
        self._aspect = aspect if 0.1 < aspect < 10 else 1.0  # others are broken headers
        self._size = None
        self._reformatter = VideoReformatter()  # keeps the scaler between frames

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        self._size = self._size or (max(1, round(frame.width * self._aspect)), frame.height)
        rgb = self._reformatter.reformat(
            frame, *self._size, format="rgb24", interpolation="BICUBIC", threads=1
        )
        return np.ascontiguousarray(np.rot90(rgb.to_ndarray(), round(frame.rotation / 90) % 4))


def not_empty(path: str | Path) -> Path:
    """The path of a file that is there and holds something; VideoError else."""
    path = Path(path)
    if not path.exists():
        raise VideoError(path, "missing", "there is no such file")
    if path.stat().st_size == 0:
        raise VideoError(path, "empty", "the file has 0 bytes")
    return path


@contextmanager
def open_video(
    path: str | Path, threads: int = 1, file: BinaryIO | None = None
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first real video stream; VideoError says why there is none.

    With `path` also opened as `file`, a failing disk is an OSError then and while decoding, rather
    than a file that seems to end there.
    """
    path = not_empty(path)
    try:
        container = av.open(file or str(path), **_OPEN_OPTIONS)
    except (FFmpegError, OSError, ValueError) as error:
        if file and isinstance(error, OSError) and not isinstance(error, FFmpegError):
            raise
        with path.open("rb") as f:
            is_mp4 = f.read(8)[4:] == b"ftyp"
        if is_mp4:
            detail = "an mp4 without its index (moov); the file was cut off"
            raise VideoError(path, "no_moov", detail) from error
        raise VideoError(path, "unreadable", f"not a video file: {error}") from error
    with container:
        streams = [
            s for s in container.streams.video if not s.disposition & Disposition.attached_pic
        ]
        if not streams:
            raise VideoError(path, "no_video_stream", "the file holds no video stream")
        streams[0].thread_type = "AUTO"
        streams[0].codec_context.thread_count = threads
        yield container, streams[0]


def readable_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """The stream's packets, to its end or to where the file was cut off."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except FFmpegError:
            return
        if packet is None:
            return
        yield packet


def decoded_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame | None]:
    """Frames in display order, None for every packet that cannot be decoded.

    A file that was cut off ends early instead of failing.
    """
    for packet in readable_packets(container, stream):
        try:
            yield from packet.decode()
        except FFmpegError:
            yield None


class _Timeline(NamedTuple):
    """Every frame's time in ticks, ascending, and the keyframes' times."""

    pts: list[int]
    keyframes: list[int]
    tick: float  # seconds
    seekable: bool  # False: the packets have no usable times, and pts simply counts frames


def _timeline(path: str | Path) -> _Timeline:
    """Read from the packets alone, without decoding: exact for any frame rate and container."""
    path = Path(path)
    stat = path.stat() if path.exists() else None
    return _scan(str(path), *((stat.st_mtime_ns, stat.st_size) if stat else (0, 0)))


@lru_cache(maxsize=8)
def _scan(path: str, _modified: int, _size: int) -> _Timeline:
    pts, keyframes = [], []
    with open_video(path) as (container, stream):
        for packet in readable_packets(container, stream):
            if packet.size == 0 or packet.is_discard:
                continue
            pts.append(packet.pts)
            if packet.is_keyframe:
                keyframes.append(packet.pts)
        if not pts:
            raise VideoError(path, "no_frames", "the video stream holds no frames")
        if None in pts or len(set(pts)) < len(pts) or not keyframes or not stream.time_base:
            tick = 1 / average_rate(stream, len(pts), 0)
            return _Timeline(list(range(len(pts))), [0], tick, False)
        return _Timeline(sorted(pts), sorted(keyframes), float(stream.time_base), True)


def average_rate(stream: VideoStream, num_frames: int, span: float) -> float:
    """Frames per second as the container states it, unless the frames' own times contradict it.

    `span` is the time from the first to the last frame in seconds, 0 if unknown.
    """
    stated = float(stream.average_rate or stream.guessed_rate or 0)
    measured = (num_frames - 1) / span if span > 0 else stated
    return stated if stated and abs(stated / measured - 1) < 0.02 else measured or 1.0


def probe(path: str | Path) -> VideoInfo:
    """Reads headers, packet times and the first frame; VideoError if there is no frame to show."""
    timeline = _timeline(path)
    count = len(timeline.pts)
    with open_video(path) as (container, stream):
        frames = (f for f in decoded_frames(container, stream) if f and not f.is_corrupt)
        first = next(frames, None)
        if first is None:
            raise VideoError(path, "no_frames", "no frame can be decoded")
        height, width = RgbConverter(stream)(first).shape[:2]
        fps = average_rate(stream, count, (timeline.pts[-1] - timeline.pts[0]) * timeline.tick)
        return VideoInfo(fps, count, count / fps, height, width, first.rotation % 360)


def iter_frames(
    path: str | Path, indices: Sequence[int] | np.ndarray
) -> Iterator[tuple[int, np.ndarray, float]]:
    """(frame number, u8[h, w, 3], seconds) for every distinct wanted frame, ascending.

    Seeks to the keyframe before a wanted frame and converts only wanted frames, so memory does
    not grow with the video. A frame that cannot be decoded is replaced by its neighbour; too many
    of them are a VideoError.
    """
    wanted = np.unique(indices).tolist()
    timeline = _timeline(path)
    if wanted and not 0 <= wanted[0] <= wanted[-1] < len(timeline.pts):
        raise ValueError(
            f"{path} has frames 0 to {len(timeline.pts) - 1}; asked for {wanted[0]}..{wanted[-1]}"
        )
    lost = 0
    with open_video(path, threads=0) as (container, stream):
        convert = RgbConverter(stream)
        rgb = None
        for index, (clock, frame) in zip(
            wanted, _shown(container, stream, timeline, wanted), strict=True
        ):
            if frame is not None:
                rgb = convert(frame)
            if rgb is None:
                raise VideoError(path, "corrupt", "no frame can be decoded")
            lost += abs(clock - timeline.pts[index]) * timeline.tick > _NEIGHBOUR_SECONDS
            yield index, rgb, (timeline.pts[index] - timeline.pts[0]) * timeline.tick
    if lost > _TOLERATED_LOSS * len(wanted):
        detail = f"{lost} of {len(wanted)} wanted frames cannot be decoded"
        raise VideoError(path, "corrupt", detail)


def _shown(
    container: InputContainer, stream: VideoStream, timeline: _Timeline, wanted: list[int]
) -> Iterator[tuple[int, VideoFrame | None]]:
    """For every wanted frame the first good one at or after it: (its time, frame).

    Past the last good frame that one is repeated; None if there was none at all.
    """
    frames = _clocked(container, stream, timeline)
    clock, frame = -1, None
    upcoming = 0  # the next frame the decoder would give
    seekable = timeline.seekable
    for index in wanted:
        target = timeline.pts[index]
        keyframe = timeline.keyframes[max(0, bisect_right(timeline.keyframes, target) - 1)]
        if seekable and keyframe > timeline.pts[min(upcoming, len(timeline.pts) - 1)]:
            frames = _seek(container, stream, timeline, keyframe)
            clock, frame = next(frames, (target + 1, None))
            if clock > target:  # this container seeks too far: decode it from the start
                seekable = False
                frames = _seek(container, stream, timeline, timeline.pts[0])
                clock, frame = -1, None
        while frame is None or clock < target:
            following = next(frames, None)
            if following is None:
                break
            clock, frame = following
        upcoming = index + 1
        yield clock, frame


def _seek(
    container: InputContainer, stream: VideoStream, timeline: _Timeline, position: int
) -> Iterator[tuple[int, VideoFrame]]:
    container.seek(position, stream=stream)
    return _clocked(container, stream, timeline)


def _clocked(
    container: InputContainer, stream: VideoStream, timeline: _Timeline
) -> Iterator[tuple[int, VideoFrame]]:
    """Good frames with their time on the timeline."""
    for count, frame in enumerate(decoded_frames(container, stream)):
        if frame is not None and not frame.is_corrupt:
            pts = frame.pts if timeline.seekable else count
            yield count if pts is None else pts, frame


def decode_frames(path: str | Path, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """u8[n, h, w, 3]: frame `indices` i64[n] in the order asked for, repeats allowed."""
    indices = np.asarray(indices)
    frames = None
    for index, rgb, _ in iter_frames(path, indices):
        if frames is None:
            frames = np.empty((len(indices), *rgb.shape), np.uint8)
        frames[indices == index] = rgb
    if frames is None:
        raise ValueError(f"no frames of {path} were asked for")
    return frames
