# SPDX-License-Identifier: Apache-2.0
"""Samples: one record made ready, its tokens and which frames it needs, before any decoding.

n clips of one medium, F frames per clip, Q visual tokens per clip.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from data_pipeline.annotations import Media, Record
from data_pipeline.conversation import MediaClips, Rendered, render
from data_pipeline.frame_records import MediaInfo
from data_pipeline.frame_shards import FrameShards
from data_pipeline.sampling import ClipSampling, count_clips, sample_clips
from data_pipeline.tokenizer import Tokenizer

_VERSION = 1  # of how samples are made: raised when the same record may get another size
_CLIP_TEXT = 32  # an upper bound of the tokens of one clip's "123.4-125.9 seconds: "


OUTCOMES = ("whole", "trimmed", "missing medium", "too many media", "too long", "faulty")
WHOLE, TRIMMED, MISSING, TOO_MANY, TOO_LONG, FAULTY = range(len(OUTCOMES))  # from MISSING on: none


class Unusable(ValueError):
    """A record that makes no sample with these settings; `outcome` is a number of OUTCOMES."""

    def __init__(self, outcome: int, reason: str):
        super().__init__(reason)
        self.outcome = outcome


@dataclass(frozen=True)
class Sample:
    id: str
    text: Rendered
    media: tuple[tuple[Any, str, np.ndarray], ...]  # store, id, source frames i64[n, F]
    seconds: float = 0.0  # of video, in all
    trimmed: bool = False  # a longer row would hold more clips of it, or more plain text

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

    @property
    def fingerprint(self) -> str:
        """Changes with whatever may change the size of a sample."""
        facts = [asdict(self.sampling), self.tokens_per_clip, self.length, self.clips]
        facts += [self.tokenizer.fingerprint, [shards.fingerprint for shards in self.shards]]
        return hashlib.sha256(json.dumps([_VERSION, *facts]).encode()).hexdigest()[:16]

    def info(self, media_id: str, record: Record | None = None) -> MediaInfo | None:
        """What is stored of a medium, inside the record or in the shards; None if nothing is."""
        store = self._store(media_id, record)
        return None if store is None else store.info(media_id)

    def wanted_clips(self, record: Record) -> int:
        """The clips that a record's media would get in a row without end."""
        found = [self.info(medium.id, record) for medium in record.media]
        return sum(1 if i.kind == "image" else self._count(i, record) for i in found if i)

    def make(self, record: Record) -> Sample:
        """The sample of a record; every image is one clip.

        What exceeds a row loses clips, never text: fewer clips, spread over the whole video, as
        Apollo does with long ones (paper, section 4.1). Plain text without media loses its end.
        Raises Unusable with the reason if neither makes it fit, or a medium is not in the shards,
        or record and medium do not agree.
        """
        videos = sum(medium.kind == "video" for medium in record.media)
        free = self.clips - (len(record.media) - videos)
        if free < videos:
            raise Unusable(
                TOO_MANY, f"{len(record.media)} media need more than the {self.clips} clip slots"
            )
        fit = min(free // max(videos, 1), max(1, self.length // self.tokens_per_clip))
        limit = min(self.sampling.max_clips or fit, fit)
        while True:
            drawn = [self._draw(medium, record, limit) for medium in record.media]
            parts = [part for part, _, _ in drawn]
            try:
                text = render(record.turns, parts, self.tokenizer, self.tokens_per_clip)
            except ValueError as error:
                raise Unusable(FAULTY, str(error)) from error
            excess = len(text.tokens) - self.length
            if excess <= 0:
                return Sample(
                    record.id,
                    text,
                    tuple(source for _, source, _ in drawn),
                    seconds=sum(part.duration for part in parts),
                    trimmed=any(len(part.timestamps) < wanted for part, _, wanted in drawn),
                )
            if not record.media and [turn.role for turn in record.turns] == ["text"]:
                cut = (field[: self.length] for field in vars(text).values())
                return Sample(record.id, Rendered(*cut), (), trimmed=True)
            most = max((len(p.timestamps) for p in parts if p.kind == "video"), default=0)
            if most <= 1:
                raise Unusable(
                    TOO_LONG,
                    f"needs {len(text.tokens)} tokens even with a clip per medium; a row holds "
                    f"{self.length}",
                )
            too_many = math.ceil(excess / (videos * (self.tokens_per_clip + _CLIP_TEXT)))
            limit = max(1, most - too_many)

    def _draw(
        self, medium: Media, record: Record, limit: int
    ) -> tuple[MediaClips, tuple[Any, str, np.ndarray], int]:
        """A medium's at most `limit` clips for the text, for the decoder, and how many it wants."""
        store = self._store(medium.id, record)
        if store is None:
            raise Unusable(MISSING, f"{medium.kind} {medium.id!r} is not in the frame shards")
        info = store.info(medium.id)
        if info.kind != medium.kind:
            raise Unusable(
                FAULTY,
                f"{medium.id!r} is named as {medium.kind}, but the shards hold a {info.kind}",
            )
        if info.kind == "image":
            still = np.zeros((1, self.sampling.frames_per_clip), np.int64)
            return MediaClips("image", np.zeros((1, 2))), (store, medium.id, still), 1
        mode = record.sampling or self.sampling.mode
        try:
            clips = sample_clips(
                replace(self.sampling, mode=mode, max_clips=limit),
                fps=info.fps,
                num_frames=info.num_frames,
                duration=info.duration,
            )
        except ValueError as error:
            raise Unusable(FAULTY, f"{medium.id!r}: {error}") from error
        part = MediaClips("video", clips.timestamps, info.duration, self.sampling.clip_duration)
        return part, (store, medium.id, clips.frame_indices), self._count(info, record)

    def _store(self, media_id: str, record: Record | None) -> Any:
        """Who holds a medium: the record itself, the first shards that have it, or None."""
        own = None if record is None else record.store
        stores = self.shards if own is None else [own, *self.shards]
        return next((store for store in stores if media_id in store), None)

    def _count(self, video: MediaInfo, record: Record) -> int:
        sampling = replace(self.sampling, mode=record.sampling or self.sampling.mode)
        return count_clips(sampling, video.duration)
