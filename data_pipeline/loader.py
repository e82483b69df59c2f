# SPDX-License-Identifier: Apache-2.0
"""Loader: sources and frame shards to this process's rows of every batch, resumable exactly.

B rows of the global batch, L tokens and C clip slots per row, F frames per clip, S canvas side,
Q visual tokens per clip.

Everything that decides what is in a batch is planned from lengths (mixture -> samples -> packing)
and is a function of (seed, row) alone. Only then are frames decoded, straight into the batch.
The state is the next step, so it may be continued by any number of processes or threads.
"""

import collections
import functools
import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import grain
import numpy as np

from data_pipeline.batch import Batch, empty_batch
from data_pipeline.canvas import frame_shape
from data_pipeline.data_config import DataConfig, sample_maker
from data_pipeline.filling import Canvases, Counts, RowFiller, patiently
from data_pipeline.load_stats import LoadStats
from data_pipeline.mixture import Mixture, draw_weights
from data_pipeline.packing import Draw, Plan
from data_pipeline.samples import MISSING
from data_pipeline.sizes import OUTCOME, TOKENS, measure, open_measured
from data_pipeline.sources import Source, SourceConfig

__all__ = ["WINDOW", "Counts", "DataConfig", "LoadStats", "Loader", "SourceConfig", "sample_maker"]

_log = logging.getLogger(__name__)
WINDOW = 4096  # draws packed together: more than 99.5 % of the best possible fill
_MANY = 100_000  # records that are better measured once than by every process


# What may differ between a run and its continuation: where things lie and how fast they are read.
_FREE = (
    "sources", "frames", "tokenizer", "layout", "sizes", "max_bad_share", "threads", "prefetch",
)  # fmt: skip


class Loader:
    """Iterates over (Batch with this process's rows, LoadStats) for `num_steps` batches.

    The records of the last `recall` batches can be asked for.
    Raises ValueError or FileNotFoundError at once for data that cannot be read as configured.
    A record that fails later is masked, counted and named in the stats; more of them than
    `max_bad_share` stop the iteration with a ValueError.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        num_steps: int,
        process_index: int = 0,
        process_count: int = 1,
        recall: int = 4,
    ):
        assert 0 <= process_index < process_count
        if config.batch_size % process_count:
            raise ValueError(
                f"batch_size={config.batch_size} rows do not divide over {process_count} processes"
            )
        if not config.sources:
            raise ValueError("the data config names no sources")
        self._config = config
        frame_shape(config.layout, config.frame_size)  # says so now if there is no such thing
        self._num_steps = num_steps
        self._alone = process_count == 1
        rows = config.batch_size // process_count
        self._local = slice(process_index * rows, (process_index + 1) * rows)
        self._maker = sample_maker(config)
        self._open_sources(quiet=process_index > 0)
        self._pool = ThreadPoolExecutor(config.threads, "loader")
        self._canvases = Canvases(keep=config.prefetch + 2)
        self._filler = RowFiller(
            list(self._sources), list(self._sources.values()), self._maker, self._size_of
        )
        self._seen = self._bad = 0
        # (step, where its rows are planned) of the last batches, should someone ask what they held.
        self._latest: collections.deque[tuple[int, tuple[int, int]]]
        self._latest = collections.deque(maxlen=recall)
        self._iterator = None
        self._start(0, (0, 0))

    def _open_sources(self, quiet: bool) -> None:
        config = self._config
        self._sources: dict[str, Source] = {}
        tables: dict[str, np.ndarray | None] = {}
        for name, settings in config.sources.items():
            share = config.max_bad_share
            source, table = open_measured(settings, self._maker, config.sizes, share)
            _judge_missing(name, source, table, config)
            self._sources[name], tables[name] = source, table
        numbers = {name: len(source) for name, source in self._sources.items()}
        unknown = [name for name, table in tables.items() if table is None]
        if sum(numbers[name] for name in unknown) > _MANY and not quiet:
            _log.warning(
                "%d of %d sources (%s): samples are measured when they are first planned, by every "
                "process; to do that once: apollo-jax data check --config FILE",
                len(unknown),
                len(tables),
                ", ".join(unknown[:5]) + ", .." * (len(unknown) > 5),
            )
        weights = {name: source.weight for name, source in config.sources.items()}
        tokens = {n: None if t is None else t[:, TOKENS] for n, t in tables.items()}
        weights = draw_weights(weights, config.weight_by, tokens)
        block = min(WINDOW, sum(numbers.values()))
        self._mixture = Mixture(numbers, weights, seed=config.seed, block=block)
        # Tokens and clips by record, -1 = not known yet.
        self._sizes = [
            np.full((numbers[name], 2), -1, np.int32) if table is None else table[:, :2]
            for name, table in tables.items()
        ]

    def __iter__(self) -> Iterator[tuple[Batch, LoadStats]]:
        return self

    def __next__(self) -> tuple[Batch, LoadStats]:
        assert self._iterator is not None, "the loader was closed"
        batch, stats, cursor = next(self._iterator)
        self._latest.append((self._next_step, self._cursor))
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

    def records(self, step: int) -> list[str]:
        """Ids of the records, in all rows, of a batch among the last few; none for an older one."""
        cursor = dict(self._latest).get(step)
        if cursor is None:
            return []
        config = self._config
        budget = config.length, config.clips
        plan = Plan(self._mixture, self._sizes_of, *budget, seed=config.seed, start=cursor)
        rows, _ = plan.rows(step * config.batch_size, config.batch_size)
        sources = list(self._sources.values())
        return [sources[source][record].id for row in rows for source, record in row]

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
        found = np.empty((len(draws), 2), np.int32)
        for source in np.unique(draws[:, 0]).tolist():
            mine = draws[:, 0] == source
            records, sizes = draws[mine, 1], self._sizes[source]
            for record in records[sizes[records, 0] < 0].tolist():
                reader = self._filler.sources[source]
                sizes[record] = patiently(measure, reader, record, self._maker)[:2]
            found[mine] = sizes[records]
        return found

    def _size_of(self, draw: Draw) -> tuple[int, int]:
        tokens, clips = self._sizes[draw[0]][draw[1]].tolist()
        return tokens, clips

    def empty(self) -> Batch:
        """This process's rows of a batch that is all padding."""
        config, rows = self._config, self._local.stop - self._local.start
        frames = config.frames_per_clip, config.frame_size, config.layout
        return empty_batch(rows, config.length, config.clips, *frames)

    def _load(self, plan: Plan, step: int) -> tuple[Batch, LoadStats, tuple[int, int]]:
        config = self._config
        planned, cursor = plan.rows(step * config.batch_size, config.batch_size)
        rows = planned[self._local]
        batch = self.empty()
        batch = batch._replace(frames=self._canvases.take(batch.frames.shape))
        fill = functools.partial(self._filler.fill, batch)
        filled = list(self._pool.map(fill, range(len(rows)), rows))
        tokens, clips = int((batch.segment_ids > 0).sum()), int(batch.clip_mask.sum())
        counts = np.sum([row.counts for row in filled], axis=0)
        stats = LoadStats(
            samples=int(batch.segment_ids.max(axis=1).sum()),
            tokens=tokens,
            clips=clips,
            frames=clips * config.frames_per_clip,
            bad=tuple(entry for row in filled for entry in row.bad),
            fill_tokens=tokens / batch.segment_ids.size,
            fill_clips=clips / max(batch.clip_mask.size, 1),
            sources={
                name: Counts(*found.tolist())
                for name, found in zip(self._sources, counts, strict=True)
                if found[0]
            },
        )
        return batch, stats, cursor

    def _judge(self, stats: LoadStats) -> None:
        """Stops at too many bad samples. Where there are more processes, their run does that."""
        self._seen += stats.samples + len(stats.bad)
        self._bad += len(stats.bad)
        share = self._config.max_bad_share
        if self._alone and stats.bad and too_many(self._bad, self._seen, share):
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


def too_many(bad: int, seen: int, share: float) -> bool:
    """Whether `bad` of `seen` are more than the share allows, three standard deviations included.

    If any are allowed, the first is.
    """
    expected = share * seen
    return bad > (share > 0) + expected + 3 * math.sqrt(expected)


def _judge_missing(name: str, source: Source, table: np.ndarray | None, config: DataConfig) -> None:
    """ValueError if more records lack media than may be bad."""
    count, missing = len(source.missing), source.missing[:5]
    if table is not None:
        lacking = np.flatnonzero(table[:, OUTCOME] == MISSING)
        count = len(lacking)
        missing = [
            (r.id, ", ".join(m.id for m in r.media))
            for r in map(source.__getitem__, lacking[:5].tolist())
        ]
    if count > config.max_bad_share * len(source):
        examples = "\n".join(f"  {record}: {media!r}" for record, media in missing)
        raise ValueError(
            f"source {name!r} ({config.sources[name].path}): {count} of {len(source)} records need "
            f"media that are not in the frame shards {', '.join(config.frames) or '(none)'}, more "
            f"than max_bad_share={config.max_bad_share}; media are named by their path relative "
            f"to predecode's --root:\n{examples}"
        )
