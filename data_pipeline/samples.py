# SPDX-License-Identifier: Apache-2.0
"""Samples: one record made ready, its tokens and which frames it needs, before any decoding.

n clips of one medium, F frames per clip, Q visual tokens per clip.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.annotations import Media, Record
from data_pipeline.conversation import MediaClips, Rendered, render
from data_pipeline.frame_shards import FrameShards
from data_pipeline.sampling import ClipSampling, sample_clips
from data_pipeline.tokenizer import Tokenizer

_CLIP_TEXT = 32  # an upper bound of the tokens of one clip's "123.4-125.9 seconds: "


@dataclass(frozen=True)
class Sample:
    id: str
    text: Rendered
    media: tuple[tuple[FrameShards, str, np.ndarray], ...]  # id, source frames i64[n, F]

    @property
    def clips(self) -> int:
        return sum(len(frames) for _, _, frames in self.media)


@dataclass(frozen=True)
class SampleMaker:
    """Records to samples of at most `length` tokens and `clips` clips."""

    shards: Sequence[FrameShards]
    tokenizer: Tokenizer
    sampling: ClipSampling
    tokens_per_clip: int
    length: int
    clips: int

    def __contains__(self, media_id: str) -> bool:
        return any(media_id in shards for shards in self.shards)

    def make(self, record: Record) -> Sample:
        """The sample of a record; every image is one clip.

        What exceeds a row loses clips, never text: fewer clips, spread over the whole video, as
        Apollo does with long ones (paper, section 4.1). Raises ValueError with the reason if
        that cannot make it fit, or a medium is not in the shards.
        """
        videos = sum(medium.kind == "video" for medium in record.media)
        free = self.clips - (len(record.media) - videos)
        if free < videos:
            raise ValueError(
                f"{len(record.media)} media need more than the {self.clips} clip slots"
            )
        limit = min(self.sampling.max_clips or free, free // max(videos, 1))
        while True:
            drawn = [self._draw(medium, record, limit) for medium in record.media]
            parts = [part for part, _ in drawn]
            text = render(record.turns, parts, self.tokenizer, self.tokens_per_clip)
            excess = len(text.tokens) - self.length
            if excess <= 0:
                return Sample(record.id, text, tuple(source for _, source in drawn))
            most = max((len(p.timestamps) for p in parts if p.kind == "video"), default=0)
            if most <= 1:
                raise ValueError(
                    f"needs {len(text.tokens)} tokens even with a clip per medium; a row holds "
                    f"{self.length}"
                )
            too_many = math.ceil(excess / (videos * (self.tokens_per_clip + _CLIP_TEXT)))
            limit = max(1, most - too_many)

    def _draw(
        self, medium: Media, record: Record, limit: int
    ) -> tuple[MediaClips, tuple[FrameShards, str, np.ndarray]]:
        stores = [record.store] if record.store is not None else self.shards
        shards = next((s for s in stores if medium.id in s), None)
        if shards is None:
            raise ValueError(f"{medium.kind} {medium.id!r} is not in the frame shards")
        info = shards.info(medium.id)
        if info.kind != medium.kind:
            raise ValueError(
                f"{medium.id!r} is named as {medium.kind}, but the shards hold a {info.kind}"
            )
        duration = self.sampling.clip_duration
        if info.kind == "image":
            still = np.zeros((1, self.sampling.frames_per_clip), np.int64)
            return MediaClips("image", np.zeros((1, 2))), (shards, medium.id, still)
        sampling = replace(
            self.sampling, mode=record.sampling or self.sampling.mode, max_clips=limit
        )
        clips = sample_clips(
            sampling, fps=info.fps, num_frames=info.num_frames, duration=info.duration
        )
        part = MediaClips("video", clips.timestamps, info.duration, duration)
        return part, (shards, medium.id, clips.frame_indices)
