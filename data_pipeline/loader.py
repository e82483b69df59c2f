# SPDX-License-Identifier: Apache-2.0
"""Loader: sources and frame shards to this process's rows of every batch, resumable exactly.

B rows of the global batch, L tokens and C clip slots per row, F frames per clip, S canvas side,
Q visual tokens per clip.

Everything that decides what is in a batch is planned from lengths (mixture -> samples -> packing)
and is a function of (seed, row) alone. Only then are frames decoded, straight into the batch.
The state is the next step, so it may be continued by any number of processes or threads.
"""

import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import grain
import numpy as np

from data_pipeline.batch import Batch, empty_batch
from data_pipeline.frame_shards import FrameShards
from data_pipeline.mixture import Mixture
from data_pipeline.packing import Draw, Plan, place
from data_pipeline.samples import Sample, SampleMaker
from data_pipeline.sampling import ClipSampling
from data_pipeline.sources import Source, SourceConfig, open_source
from data_pipeline.tokenizer import Tokenizer

WINDOW = 4096  # draws packed together: more than 99.5 % of the best possible fill


@dataclass(frozen=True)
class DataConfig:
    sources: dict[str, SourceConfig]
    frames: tuple[str, ...]  # folders of frame shards; the first that holds a medium is read
    tokenizer: str  # path, see tokenizer.py
    batch_size: int  # B, rows over all processes
    length: int  # L
    clips: int  # C
    frame_size: int  # S
    tokens_per_clip: int  # Q
    frames_per_clip: int = 4  # F
    clip_duration: float = 2.0  # seconds
    max_clips: int = 0  # per video, 0 = as many as a row holds
    sampling_mode: str = "fps"
    uniform_frames: int = 0
    seed: int = 0
    max_bad_share: float = 0.01  # of this process's samples; more stop the run
    threads: int = 2
    prefetch: int = 4  # batches


@dataclass(frozen=True)
class LoadStats:
    """What this process's part of one batch holds."""

    samples: int
    tokens: int  # without padding
    clips: int
    frames: int
    bad: tuple[tuple[str, str], ...]  # (record id, reason), masked
    fill_tokens: float  # share of the token positions in use
    fill_clips: float


# What may differ between a run and its continuation: where things lie and how fast they are read.
_FREE = ("sources", "frames", "tokenizer", "max_bad_share", "threads", "prefetch")
_DATA_ERRORS = (ValueError, OSError)


class Loader:
    """Iterates over (Batch with this process's rows, LoadStats) for `num_steps` steps.

    Raises ValueError or FileNotFoundError at once for data that cannot be read as configured.
    A record that fails later is masked, counted and named in the stats; more of them than
    `max_bad_share` stop the iteration with a ValueError.
    """

    def __init__(
        self, config: DataConfig, *, num_steps: int, process_index: int = 0, process_count: int = 1
    ):
        assert 0 <= process_index < process_count
        if config.batch_size % process_count:
            raise ValueError(
                f"batch_size={config.batch_size} rows do not divide over {process_count} processes"
            )
        if not config.sources:
            raise ValueError("the data config names no sources")
        self._config = config
        self._num_steps = num_steps
        rows = config.batch_size // process_count
        self._local = slice(process_index * rows, (process_index + 1) * rows)
        self._maker = sample_maker(config)
        self._sources = {n: _open_source(n, config, self._maker) for n in config.sources}
        sizes = {name: len(source) for name, source in self._sources.items()}
        weights = {name: source.weight for name, source in config.sources.items()}
        block = min(WINDOW, sum(sizes.values()))
        self._mixture = Mixture(sizes, weights, seed=config.seed, block=block)
        self._readers = list(self._sources.values())
        self._sizes = [np.full((len(source), 2), -1, np.int32) for source in self._readers]
        self._pool = ThreadPoolExecutor(config.threads, "loader")
        self._seen = self._bad = 0
        self._iterator = None
        self._start(0, (0, 0))

    def __iter__(self) -> Iterator[tuple[Batch, LoadStats]]:
        return self

    def __next__(self) -> tuple[Batch, LoadStats]:
        assert self._iterator is not None, "the loader was closed"
        batch, stats, cursor = next(self._iterator)
        self._next_step, self._cursor = self._next_step + 1, cursor
        self._judge(stats)
        return batch, stats

    def get_state(self) -> dict[str, Any]:
        """JSON-able: the next step, where its rows are planned, and what the data were."""
        window, row = self._cursor
        return {
            "next_step": self._next_step,
            "window": window,
            "window_first_row": row,
            "data": self._fingerprints(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was taken; ValueError for other data."""
        then, now = state["data"], self._fingerprints()
        changed = [
            f"{key}: {then.get(key)!r} then, {now.get(key)!r} now"
            for key in sorted(then | now)
            if then.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                "the data iterator was saved with other data; continuing would repeat or skip "
                "records:\n  " + "\n  ".join(changed) + "\nrestore these, or start a new run"
            )
        self._start(state["next_step"], (state["window"], state["window_first_row"]))

    def close(self) -> None:
        """Ends the reading threads."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None
        self._pool.shutdown()

    def _start(self, step: int, cursor: tuple[int, int]) -> None:
        if self._iterator is not None:
            self._iterator.close()
        config = self._config
        self._next_step, self._cursor = step, cursor
        plan = Plan(
            self._mixture,
            self._sizes_of,
            config.length,
            config.clips,
            seed=config.seed,
            start=cursor,
        )
        steps = grain.MapDataset.range(step, self._num_steps)
        batches = steps.map(functools.partial(self._load, plan))
        # One thread walks the plan; the rows of each step are decoded by the pool.
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch)
        self._iterator = iter(batches.to_iter_dataset(ahead))

    def _sizes_of(self, draws: np.ndarray) -> np.ndarray:
        """i32[n, 2] tokens and clips of draws, (0, 0) where unusable; worked out once each."""
        return np.array([self._size_of((source, index)) for source, index in draws.tolist()])

    def _size_of(self, draw: Draw) -> tuple[int, int]:
        """(tokens, clips) of a record, (0, 0) if it cannot be used; worked out once."""
        source, index = draw
        size = self._sizes[source][index]
        if size[0] < 0:
            try:
                sample = self._maker.make(self._readers[source][index])
                size[:] = len(sample.text.tokens), sample.clips
            except _DATA_ERRORS:
                size[:] = 0
        return int(size[0]), int(size[1])

    def _load(self, plan: Plan, step: int) -> tuple[Batch, LoadStats, tuple[int, int]]:
        config = self._config
        planned, cursor = plan.rows(step * config.batch_size, config.batch_size)
        rows = planned[self._local]
        batch = empty_batch(
            len(rows), config.length, config.clips, config.frames_per_clip, config.frame_size
        )
        bad = list(self._pool.map(functools.partial(self._fill_row, batch), range(len(rows)), rows))
        tokens, clips = int((batch.segment_ids > 0).sum()), int(batch.clip_mask.sum())
        stats = LoadStats(
            samples=int(batch.segment_ids.max(axis=1).sum()),
            tokens=tokens,
            clips=clips,
            frames=clips * config.frames_per_clip,
            bad=tuple(entry for row in bad for entry in row),
            fill_tokens=tokens / batch.segment_ids.size,
            fill_clips=clips / max(batch.clip_mask.size, 1),
        )
        return batch, stats, cursor

    def _fill_row(self, batch: Batch, row: int, draws: tuple[Draw, ...]) -> list[tuple[str, str]]:
        """Writes the samples of one row; returns (record id, reason) of those that failed."""
        token = clip = segment = 0
        bad = []
        for source, index in draws:
            record_id = f"{self._mixture.names[source]}[{index}]"
            try:
                record = self._readers[source][index]
                record_id = record.id
                sample = self._maker.make(record)
                _decode(batch, row, clip, segment + 1, sample)
            except _DATA_ERRORS as error:
                bad.append((record_id, str(error)))
                continue
            segment += 1
            visual = clip * self._config.tokens_per_clip
            place(batch, row, sample.text, segment=segment, token=token, visual=visual)
            token += len(sample.text.tokens)
            clip += sample.clips
        return bad

    def _judge(self, stats: LoadStats) -> None:
        """Stops at more bad samples than the share allows, three standard deviations included."""
        self._seen += stats.samples + len(stats.bad)
        self._bad += len(stats.bad)
        share = self._config.max_bad_share
        expected = share * self._seen
        if stats.bad and self._bad > (share > 0) + expected + 3 * math.sqrt(expected):
            named = "\n".join(f"  {record}: {reason}" for record, reason in stats.bad[:5])
            raise ValueError(
                f"{self._bad} of {self._seen} samples could not be read, more than "
                f"max_bad_share={share}; the latest:\n{named}"
            )

    def _fingerprints(self) -> dict[str, Any]:
        config = asdict(self._config)
        facts = {key: value for key, value in config.items() if key not in _FREE}
        facts["packing"] = f"windows of {WINDOW}"  # a state is of one way to plan rows
        for name, source in self._sources.items():
            facts[f"sources.{name}.weight"] = self._config.sources[name].weight
            facts[f"sources.{name}.content"] = source.fingerprint
        facts["frames"] = [shards.fingerprint for shards in self._maker.shards]
        facts["tokenizer"] = self._maker.tokenizer.fingerprint
        return facts


def _decode(batch: Batch, row: int, clip: int, segment: int, sample: Sample) -> None:
    """Decodes a sample's frames into the slots from `clip` on; leaves no trace if it fails."""
    slots = slice(clip, clip + sample.clips)
    try:
        at = clip
        for shards, media_id, frames in sample.media:
            end = at + len(frames)
            geometry = shards.read_clips(media_id, frames, batch.frames[row, at:end])
            batch.frame_geometry[row, at:end] = geometry
            at = end
    except _DATA_ERRORS:
        batch.frames[row, slots] = 0
        batch.frame_geometry[row, slots] = 0
        raise
    batch.clip_mask[row, slots] = True
    batch.clip_segment_ids[row, slots] = segment


def sample_maker(config: DataConfig) -> SampleMaker:
    """What makes samples as `config` says; FileNotFoundError or ValueError for wrong paths."""
    return SampleMaker(
        shards=[FrameShards(path) for path in config.frames],
        tokenizer=Tokenizer.from_path(config.tokenizer),
        sampling=ClipSampling(
            mode=config.sampling_mode,
            clip_duration=config.clip_duration,
            frames_per_clip=config.frames_per_clip,
            max_clips=config.max_clips,
            uniform_frames=config.uniform_frames,
        ),
        tokens_per_clip=config.tokens_per_clip,
        length=config.length,
        clips=config.clips,
    )


def _open_source(name: str, config: DataConfig, known: SampleMaker) -> Source:
    source, path = open_source(config.sources[name], known), config.sources[name].path
    if len(source.missing) > config.max_bad_share * len(source):
        examples = "\n".join(f"  {record}: {media!r}" for record, media in source.missing[:5])
        raise ValueError(
            f"source {name!r} ({path}): {len(source.missing)} of {len(source)} records need "
            f"media that are not in the frame shards {', '.join(config.frames) or '(none)'}, more "
            f"than max_bad_share={config.max_bad_share}; media are named by their path relative "
            f"to predecode's --root:\n{examples}"
        )
    return source
