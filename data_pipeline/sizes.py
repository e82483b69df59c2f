# SPDX-License-Identifier: Apache-2.0
"""Sizes: how long every sample of a source will be, measured once and kept in a file beside it.

n records of a source: i32[n, 4], tokens and clips in a row, seconds of video, and the number of an
outcome (samples.OUTCOMES). Without such a table every process of a run measures what it plans.
A table belongs to the content of the source and to all that decides a sample's size: both are in
its name, so one that has become stale is not found.
"""

import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from data_pipeline.data_config import DataConfig, sample_maker
from data_pipeline.samples import FAULTY, TRIMMED, WHOLE, SampleMaker, Unusable
from data_pipeline.sources import JsonlSource, Source, SourceConfig, open_source, write_array

TOKENS, CLIPS, SECONDS, OUTCOME = range(4)  # columns
_CHUNK = 1000  # records a worker measures at a time
_FEW = 2000  # records for which no workers are started


def folder(source: SourceConfig, sizes: str = "") -> Path | None:
    """Where the table and the index of a source are kept; None if nowhere was given."""
    if sizes:
        return Path(sizes)
    beside = Path(source.path).parent if Path(source.path).is_file() else None
    return beside or (Path(source.data_dir) if source.data_dir else None)


def table_path(where: Path, settings: SourceConfig, source: Source, maker: SampleMaker) -> Path:
    """The file for exactly this content and these settings."""
    name = re.sub(r"[^\w.-]+", "-", Path(settings.path).name)
    return where / f"{name}.sizes-{source.fingerprint[:16]}-{maker.fingerprint}.npy"


def open_measured(
    settings: SourceConfig, maker: SampleMaker, sizes: str = "", max_bad_share: float = 0.0
) -> tuple[Source, np.ndarray | None]:
    """The source and its table, i32[n, 4], if it was measured with these settings.

    With both of its files opening a source costs a hash of it, and one of a million records about
    a second. Raises as `open_source`.
    """
    where = folder(settings, sizes)
    how = {"max_bad_share": max_bad_share}
    source = open_source(settings, maker, index=where, **how)
    table = None if where is None else _read(table_path(where, settings, source, maker), source)
    if table is None and isinstance(source, JsonlSource) and source.indexed:
        source = open_source(
            settings, maker, max_bad_share=max_bad_share
        )  # which media are missing is not known
    return source, table


def measure(source: Source, index: int, maker: SampleMaker) -> tuple[int, int, int, int]:
    """A row of the table: zeros and the outcome for a record that makes no sample."""
    try:
        sample = maker.make(source[index])
    except Unusable as error:
        return 0, 0, 0, error.outcome
    except ValueError:
        return 0, 0, 0, FAULTY
    outcome = TRIMMED if sample.trimmed else WHOLE
    return len(sample.text.tokens), sample.clips, round(sample.seconds), outcome


def compute(
    config: DataConfig,
    name: str,
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """The table of source `name`, read if it is there, else measured by `processes` and written.

    `progress` hears (records done, records in all). Raises as `open_source`, and OSError if a
    record or the folder cannot be read or written.
    """
    settings, maker = config.sources[name], sample_maker(config)
    source, table = open_measured(settings, maker, config.sizes, config.max_bad_share)
    if table is not None:
        progress(len(source), len(source))
        return table
    where = folder(settings, config.sizes)
    if where is not None and isinstance(source, JsonlSource):
        source.write_index(where)
    starts = range(0, len(source), _CHUNK)
    table = np.empty((len(source), 4), np.int32)
    processes = 1 if len(source) < _FEW else min(processes, len(starts))
    if processes == 1:
        for start in starts:
            table[start : start + _CHUNK] = _measure_chunk(source, maker, start)
            progress(min(start + _CHUNK, len(source)), len(source))
    else:
        # Not forked: the shards' readers have threads.
        with ProcessPoolExecutor(
            processes, get_context("spawn"), initializer=_open_worker, initargs=(config, name)
        ) as pool:
            for start, part in zip(starts, pool.map(_measure_in_worker, starts), strict=True):
                table[start : start + _CHUNK] = part
                progress(start + len(part), len(source))
    if where is not None:
        write_array(table_path(where, settings, source, maker), table)
    return table


def _read(path: Path, source: Source) -> np.ndarray | None:
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return None
    return table if table.shape == (len(source), 4) and table.dtype == np.int32 else None


def _measure_chunk(source: Source, maker: SampleMaker, start: int) -> np.ndarray:
    indices = range(start, min(start + _CHUNK, len(source)))
    return np.array([measure(source, index, maker) for index in indices], np.int32)


def _open_worker(config: DataConfig, name: str) -> None:
    global _worker
    settings, maker = config.sources[name], sample_maker(config)
    where = folder(settings, config.sizes)
    share = config.max_bad_share
    _worker = open_source(settings, maker, index=where, max_bad_share=share), maker


def _measure_in_worker(start: int) -> np.ndarray:
    return _measure_chunk(*_worker, start)


_worker: tuple[Source, SampleMaker]  # of a worker process
