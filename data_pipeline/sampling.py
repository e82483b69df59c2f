# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video make its clips: Apollo's constant-fps rule, uniform and centre sampling.

F frames per clip, n clips. Frame numbers count the source's frames in display order; times are
frame number / average fps, in seconds, as in the published code.
"""

import math
import sys
from dataclasses import dataclass

import numpy as np

MODES = ("fps", "uniform", "centre")


@dataclass(frozen=True)
class ClipSampling:
    """How clips are drawn from a video; `max_clips` 0 = no limit."""

    mode: str = "fps"
    clip_duration: float = 2.0  # seconds
    frames_per_clip: int = 4
    max_clips: int = 0
    uniform_frames: int = 0  # frames in all, for mode 'uniform'; a multiple of frames_per_clip

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"sampling mode {self.mode!r} is not one of {', '.join(MODES)}")
        if self.clip_duration <= 0 or self.frames_per_clip < 1 or self.max_clips < 0:
            raise ValueError(
                f"clip_duration, frames_per_clip and max_clips must be positive: {self}"
            )
        if self.mode == "uniform" and (
            self.uniform_frames < 1 or self.uniform_frames % self.frames_per_clip
        ):
            raise ValueError(
                f"uniform_frames={self.uniform_frames} must be a positive multiple of "
                f"frames_per_clip={self.frames_per_clip}"
            )


@dataclass(frozen=True)
class SampledClips:
    """Source frame numbers i64[n, F] and the (first, last) frame's time f64[n, 2] in seconds."""

    frame_indices: np.ndarray
    timestamps: np.ndarray


def calculate_sample_indices(
    clip_duration: float,
    frames_per_clip: int,
    total_frames: int,
    fps: float,
    duration: float,
    clip_sampling_ratio: float = 1.0,
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Apollo's published rule, quirks included: flat frame numbers i64[n*F] and clip times.

    Kept exact for parity: below 0.5 fps it yields frame -1, and where F*ceil(1/step) does not
    divide evenly more than F numbers per clip. `sample_clips` decides those cases.
    """
    num_clips = math.ceil(duration / clip_duration * clip_sampling_ratio)
    clips = _official_clips(clip_duration, frames_per_clip, total_frames, fps, num_clips)
    return clips.reshape(-1), [(float(c[0]) / fps, float(c[-1]) / fps) for c in clips]


def _official_clips(
    clip_duration: float, frames_per_clip: int, total: int, fps: float, num_clips: int
) -> np.ndarray:
    """i64[n, F], or more than F columns where the published rule misaligns."""
    step = fps * clip_duration / frames_per_clip
    starts = np.arange(num_clips)[:, None]
    if step > 0.5:
        step = max(1, int(step))  # floored: 29.97 fps steps by 14 frames, not 15
        length = frames_per_clip * step
        offsets = step * np.arange(frames_per_clip)
        partition = total // num_clips
        if partition > length:  # the clip sits in the middle of its share of the video
            centred = np.minimum((partition - length) // 2 + offsets, partition - 1)
            return centred + starts * partition
    else:  # fewer source frames than wanted: each is repeated
        length = int(frames_per_clip * step)
        offsets = np.repeat(np.arange(length), math.ceil(1 / step))
        missing = max(0, frames_per_clip - len(offsets))
        offsets = np.pad(offsets, (0, missing), constant_values=length)
    clip_step = (total - length) // max(1, num_clips - 1) if total > length else 0
    return np.minimum(offsets, min(length, total) - 1) + starts * clip_step


def _slow_clips(sampling: ClipSampling, total: int, fps: float, num_clips: int) -> np.ndarray:
    """i64[n, F] for videos so slow that the published rule breaks: the frame shown at each time.

    Clip starts are spread evenly over the video; frame j of a clip is the one on screen
    j * clip_duration / F seconds after its start.
    """
    step = fps * sampling.clip_duration / sampling.frames_per_clip
    offsets = np.floor(step * np.arange(sampling.frames_per_clip)).astype(np.int64)
    room = max(0, total - 1 - int(offsets[-1]))
    starts = np.arange(num_clips) * room // max(1, num_clips - 1)
    return np.minimum(starts[:, None] + offsets, total - 1)


def sample_clips(
    sampling: ClipSampling, *, fps: float, num_frames: int, duration: float, ratio: float = 1.0
) -> SampledClips:
    """Always n x F valid frame numbers; `ratio` thins the clips as the published code does.

    Mode 'fps' is the published rule wherever that rule is well formed (F numbers per clip, none
    negative); elsewhere each clip holds the frames on screen at its F times. Mode 'uniform' takes
    the middle frames of `uniform_frames` equal parts, mode 'centre' the middle frame F times.
    """
    if num_frames < 1 or not (math.isfinite(fps) and fps > 0) or not math.isfinite(duration):
        raise ValueError(
            f"cannot sample clips from {num_frames} frames at {fps} fps lasting {duration} s"
        )
    frames_per_clip = sampling.frames_per_clip
    num_clips = count_clips(sampling, duration, ratio)
    if sampling.mode == "centre":
        clips = np.full((1, frames_per_clip), num_frames // 2, np.int64)
    elif sampling.mode == "uniform":
        count = num_clips * frames_per_clip
        clips = (2 * np.arange(count) + 1) * num_frames // (2 * count)
        clips = clips.reshape(-1, frames_per_clip)
    else:
        clips = _official_clips(sampling.clip_duration, frames_per_clip, num_frames, fps, num_clips)
        if clips.shape[1] != frames_per_clip or clips.min() < 0:
            clips = _slow_clips(sampling, num_frames, fps, num_clips)
    return SampledClips(clips, clips[:, [0, -1]] / fps)


def count_clips(sampling: ClipSampling, duration: float, ratio: float = 1.0) -> int:
    """How many clips `sample_clips` draws from a video of `duration` seconds."""
    limit = sampling.max_clips or sys.maxsize
    if sampling.mode == "centre":
        return 1
    if sampling.mode == "uniform":
        return min(sampling.uniform_frames // sampling.frames_per_clip, limit)
    return max(1, min(math.ceil(duration / sampling.clip_duration * ratio), limit))


def clip_sampling_ratio(
    duration: float,
    model_max_length: int,
    ratio: float,
    tokens_per_clip: int,
    clip_duration: float,
) -> float:
    """The share of a video's clips that fits `ratio` of the context (apollo's loader rule)."""
    return min(1.0, model_max_length * ratio / (duration * tokens_per_clip / clip_duration))
