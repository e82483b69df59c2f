# SPDX-License-Identifier: Apache-2.0
"""Filling: the planned rows of a batch made real, samples rendered and frames decoded in place.

B rows, L token positions, C clip slots. A record that cannot be used leaves no trace in its row but
its name; only errors of the data are taken for that, and those of the storage not before a few
tries.
"""

import re
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np

from data_pipeline.annotations import Record
from data_pipeline.batch import MODALITIES, Batch
from data_pipeline.packing import Draw, place
from data_pipeline.samples import Sample, SampleMaker, Unusable
from data_pipeline.sources import Source

DATA_ERRORS = (ValueError, OSError)
_WAITS = (0.1, 0.5, 2.0)  # seconds before storage that failed is asked again
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
_FAILED_CALL = re.compile(r"\bp?read\(\) failed: ")  # an OSError as ArrayRecord tells it

T = TypeVar("T")


class Counts(NamedTuple):
    """What became of a source's samples."""

    seen: int = 0
    trimmed: int = 0  # clips left out, see samples.py
    dropped: int = 0  # make no sample with these settings
    corrupt: int = 0  # could not be read


@dataclass
class Filled:
    """What one row holds: `counts` i64[sources, 4] as Counts, and (record id, reason) of the bad"""

    counts: np.ndarray
    bad: list[tuple[str, str]]


@dataclass(frozen=True)
class RowFiller:
    names: Sequence[str]
    sources: Sequence[Source]
    maker: SampleMaker
    size_of: Callable[[Draw], tuple[int, int]]  # what the plan reckoned with

    def fill(self, batch: Batch, row: int, draws: Sequence[Draw]) -> Filled:
        """Writes the samples of one row."""
        filled = Filled(np.zeros((len(self.sources), len(Counts._fields)), np.int64), [])
        token = clip = segment = 0
        for draw in draws:
            counts, record_id = filled.counts[draw[0]], f"{self.names[draw[0]]}[{draw[1]}]"
            counts[0] += 1
            try:
                record = patiently(self.sources[draw[0]].__getitem__, draw[1])
                record_id = record.id
                sample = self._make(record, draw)
                patiently(decode, batch, row, clip, segment + 1, sample)
            except DATA_ERRORS as error:
                counts[2 if isinstance(error, Unusable) else 3] += 1
                filled.bad.append((record_id, str(error)))
                continue
            counts[1] += sample.trimmed
            segment += 1
            visual = clip * self.maker.tokens_per_clip
            place(batch, row, sample.text, segment=segment, token=token, visual=visual)
            end = token + len(sample.text.tokens)
            batch.groups[row, token:end] = group_of(draw[0], record)
            token = end
            clip += sample.clips
        batch.frames[row, clip:] = 0  # the memory was another batch's
        return filled

    def _make(self, record: Record, draw: Draw) -> Sample:
        sample = self.maker.make(record)
        size, planned = (len(sample.text.tokens), sample.clips), self.size_of(draw)
        if size != planned:  # it might not fit into its row any more
            raise ValueError(f"(tokens, clips) are {size}, were {planned} when it was measured")
        return sample


def group_of(source: int, record: Record) -> int:
    """The group of a record's sample, by the number of its source and what is shown in it."""
    kinds = [MODALITIES.index(medium.kind) for medium in record.media]
    return source * len(MODALITIES) + max(kinds, default=0)


def decode(batch: Batch, row: int, clip: int, segment: int, sample: Sample) -> None:
    """Decodes a sample's frames into the slots from `clip` on."""
    slots = slice(clip, clip + sample.clips)
    try:
        at = clip
        for store, media_id, frames in sample.media:
            end = at + len(frames)
            geometry = store.read_clips(media_id, frames, batch.frames[row, at:end])
            batch.frame_geometry[row, at:end] = geometry
            at = end
    except DATA_ERRORS:
        batch.frame_geometry[row, slots] = 0
        raise
    batch.clip_mask[row, slots] = True
    batch.clip_segment_ids[row, slots] = segment


def patiently(read: Callable[..., T], *args: Any) -> T:
    """`read(*args)`, tried again a few times, ever later, while the storage fails."""
    for seconds in _WAITS:
        try:
            return read(*args)
        except DATA_ERRORS as error:
            if not _may_pass(error.__cause__ or error):
                raise
            time.sleep(seconds)
    return read(*args)


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return not isinstance(error, _LASTING)
    return bool(_FAILED_CALL.search(str(error)))


class Canvases:
    """Memory for the frames of batches, used again when nobody holds a batch's frames any more.

    Fresh memory costs the system a fifth of what decoding into it costs.
    """

    def __init__(self, keep: int):
        self._free: list[np.ndarray] = []
        self._keep = keep

    def take(self, shape: Sequence[int]) -> np.ndarray:
        """u8[shape], with anything in it."""
        size = prod(shape)
        memory = self._free.pop() if self._free else np.empty(size, np.uint8)
        # Every view of an array has as its base the last array that stands on no array itself:
        # this one, which lives until the last view of it is gone.
        whole = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(whole, self._give_back, memory).atexit = False
        return whole.reshape(shape)

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self._free) < self._keep:
            self._free.append(memory)
