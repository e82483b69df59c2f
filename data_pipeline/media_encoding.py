# SPDX-License-Identifier: Apache-2.0
"""One video or image file -> the records of its frames on a constant-fps grid.

Grid frame k is the last source frame with time <= k / fps, for k / fps < the video's length; times
are seconds after the first frame. Frames are fitted to the stored size with PIL's bicubic.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from av.video.frame import VideoFrame

from data_pipeline.frame_shards import MediaInfo, ShardSpec, encode_segments
from data_pipeline.transforms import fit_canvas
from data_pipeline.video import (
    RgbConverter,
    VideoError,
    average_rate,
    decoded_frames,
    open_video,
    read_image,
)

_TOLERATED_LOSS = 0.2  # share of damaged frames that is dropped rather than rejected
_LONGEST_FREEZE = 1800.0  # seconds one frame may stay; more means broken timestamps
_BEAT_EVERY = 50  # decoded frames


class EncodedMedium(NamedTuple):
    """What a shard stores of one file; `notes` say what was repaired."""

    info: MediaInfo
    records: list[bytes]
    notes: dict[str, str]


class _Grid:
    """Collects the frame on screen at every grid time; a repeated frame is encoded once."""

    def __init__(self, spec: ShardSpec, convert: Callable[[Any], np.ndarray]):
        self.jpegs: list[bytes] = []
        self.pts: list[float] = []
        self.size = (0, 0)
        self._spec, self._convert = spec, convert
        self._frame, self._time, self._jpeg = None, 0.0, b""

    def show(self, frame: VideoFrame, time: float, tolerance: float) -> None:
        """From `time` on `frame` is on screen."""
        self._frame = self._frame or frame  # before the first good frame, that one
        self.fill(time - tolerance)
        self._frame, self._time, self._jpeg = frame, time, b""

    def fill(self, end: float) -> None:
        """Stores the frame on screen for all grid times before `end`."""
        while len(self.jpegs) / self._spec.fps < end:
            if not self._jpeg:
                stored = fit_canvas(self._convert(self._frame), self._spec.size)
                self._jpeg, self.size = self._spec.encode(stored), stored.shape[:2]
            self.jpegs.append(self._jpeg)
            self.pts.append(self._time)


def encode_video(
    path: str | Path, media_id: str, spec: ShardSpec, beat: Callable[[int], None] = lambda n: None
) -> EncodedMedium:
    """Decodes a file once, front to back; `beat` hears of n more frames. VideoError if unusable."""
    seen = damaged = 0
    start, time = None, 0.0
    with open_video(path) as (container, stream):
        grid = _Grid(spec, RgbConverter(stream))
        tick = float(stream.time_base or 0)
        # Times are rounded to ticks: half a tick late is still in time.
        tolerance = min(tick / 2, 1e-3) + 1e-6
        for frame in decoded_frames(container, stream):
            seen += 1
            if seen % _BEAT_EVERY == 0:
                beat(_BEAT_EVERY)
            if frame is None or frame.is_corrupt:
                damaged += 1
                continue
            if frame.pts is None or not tick:
                now = (seen - 1) / average_rate(stream, seen, 0)
            else:
                start = frame.pts * tick if start is None else start
                now = frame.pts * tick - start
            if now - time > _LONGEST_FREEZE:
                detail = f"the time jumps from {time:.0f} to {now:.0f} s"
                raise VideoError(path, "bad_timestamps", detail)
            time = max(time, now)
            grid.show(frame, time, tolerance)
        beat(seen % _BEAT_EVERY)
        _check(path, seen, damaged)
        fps = average_rate(stream, seen, time)
        grid.fill(time + 1 / fps - tolerance)
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
        stored_frames=len(grid.jpegs),
        stored_fps=spec.fps,
        height=grid.size[0],
        width=grid.size[1],
    )
    return EncodedMedium(
        info, encode_segments(media_id, grid.jpegs, grid.pts, grid.size, spec), notes
    )


def _check(path: str | Path, seen: int, damaged: int) -> None:
    if seen == damaged:
        raise VideoError(path, "no_frames", "no frame can be decoded")
    if damaged > _TOLERATED_LOSS * seen:
        raise VideoError(path, "corrupt", f"{damaged} of {seen} frames are damaged")


def encode_image(path: str | Path, media_id: str, spec: ShardSpec) -> EncodedMedium:
    """An image is a video of one frame; VideoError if unusable."""
    frame = fit_canvas(read_image(path), spec.size)
    size = frame.shape[:2]
    info = MediaInfo(media_id, "image", 1, 1.0, 0.0, 1, 1.0, *size)
    return EncodedMedium(
        info, encode_segments(media_id, [spec.encode(frame)], [0.0], size, spec), {}
    )
