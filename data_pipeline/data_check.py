# SPDX-License-Identifier: Apache-2.0
"""What a data config will give a run, found out from lengths alone: nothing is decoded.

Every record of every source is made into a sample as the loader would, once: see sizes.py.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.annotations import Record
from data_pipeline.data_config import DataConfig, sample_maker
from data_pipeline.loader import WINDOW
from data_pipeline.mixture import Mixture, draw_weights
from data_pipeline.packing import Plan
from data_pipeline.samples import MISSING, OUTCOMES, WHOLE, SampleMaker, Unusable
from data_pipeline.sizes import CLIPS, OUTCOME, TOKENS, compute, folder, open_measured
from data_pipeline.sources import Source

EXAMPLES = 5  # shown of every problem
_ROWS_PACKED = 2048  # at most, to foresee a run's rows
WORDS = {  # outcome -> what becomes of such records
    "trimmed": "lose clips, or the end of a plain text, to fit into a row",
    "missing medium": "are dropped: no frame shards hold their medium",
    "too many media": "are dropped: more media than clip slots",
    "too long": "are dropped: too long for a row even with a clip per medium",
    "faulty": "are dropped: what they say and their media do not fit together",
}


@dataclass
class SourceReport:
    """One source; `tokens` and `clips` are those of its samples, one epoch."""

    path: str
    weight: float
    records: int = 0
    fault: str = ""  # why training could not open the source at all
    tokens: int = 0
    clips: int = 0
    hours: float = 0.0  # of the videos behind them
    outcomes: dict[str, int] = field(default_factory=dict)  # records by what becomes of them
    examples: dict[str, list[str]] = field(default_factory=dict)  # of every outcome but 'whole'
    drawn: float = 0.0  # samples in the run
    epochs: float = 0.0
    kept: str = ""  # folder of its table of sizes

    @property
    def dropped(self) -> int:
        return sum(n for name, n in self.outcomes.items() if name not in ("whole", "trimmed"))


@dataclass
class DataReport:
    """Everything `check` found; shares are of 1."""

    sources: dict[str, SourceReport]
    rows: int  # of the run
    max_bad_share: float
    samples_per_row: float = 0.0
    fill_tokens: float = 0.0
    fill_clips: float = 0.0
    tokens_histogram: list[tuple[int, int]] = field(default_factory=list)  # (upper edge, samples)
    clips_histogram: list[tuple[int, int]] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """Why training would stop, one line each."""
        lines = []
        for name, source in self.sources.items():
            if source.fault:
                lines.append(f"source {name!r}: {source.fault}")
            elif source.dropped > self.max_bad_share * source.records:
                lines.append(
                    f"source {name!r}: {source.dropped} of {source.records} records would be "
                    f"dropped, more than max_bad_share={self.max_bad_share}"
                )
        return lines

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        values: dict[str, Any] = asdict(self) | {"failures": self.failures}
        for name, source in self.sources.items():
            values["sources"][name]["dropped"] = source.dropped
        return values


def check(
    config: DataConfig,
    num_steps: int,
    *,
    processes: int = 1,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> DataReport:
    """Measures what is not measured yet, with `processes`, and leaves the tables for the loader.

    `progress` hears (source, records done, records in all). Raises ValueError or FileNotFoundError
    for shards, a tokenizer or a folder for the tables that cannot be used; what is wrong with a
    source or a record is in the report.
    """
    maker = sample_maker(config)
    reports: dict[str, SourceReport] = {}
    tables: dict[str, np.ndarray] = {}
    for name, settings in config.sources.items():
        report = reports[name] = SourceReport(settings.path, settings.weight)
        told = functools.partial(progress, name)
        try:
            tables[name] = compute(config, name, processes=processes, progress=told)
        except (ValueError, FileNotFoundError) as error:
            report.fault = str(error)
            continue
        except OSError as error:
            raise ValueError(f"source {name!r}: {error}; {_ELSEWHERE}") from error
        report.kept = str(folder(settings, config.sizes) or "")
        if config.weight_by == "tokens" and not report.kept:
            report.fault = f"weight_by='tokens' needs what was measured, but {_NOWHERE}"
        source, _ = open_measured(settings, maker, config.sizes, config.max_bad_share)
        _describe(report, tables[name], source, maker)
    found = DataReport(reports, num_steps * config.batch_size, config.max_bad_share)
    if any(table[:, TOKENS].any() for table in tables.values()):
        _foresee(found, tables, config)
    return found


_NOWHERE = "it has no folder of its own to keep that in: config.data.sizes names one"
_ELSEWHERE = "tables of sizes are kept there, or in the folder that config.data.sizes names"


def _describe(report: SourceReport, table: np.ndarray, source: Source, maker: SampleMaker) -> None:
    report.records = len(table)
    report.tokens, report.clips, seconds = table[:, :OUTCOME].sum(0, dtype=np.int64).tolist()
    report.hours = seconds / 3600
    for outcome, name in enumerate(OUTCOMES):
        of_it = np.flatnonzero(table[:, OUTCOME] == outcome)
        if len(of_it):
            report.outcomes[name] = len(of_it)
        if len(of_it) and outcome != WHOLE:
            report.examples[name] = [_why(source, i, maker) for i in of_it[:EXAMPLES].tolist()]


def _why(source: Source, index: int, maker: SampleMaker) -> str:
    """Which record it is and what became of it."""
    record_id = f"record {index}"
    try:
        record = source[index]
        record_id = record.id
        sample = maker.make(record)
    except ValueError as error:
        missing = isinstance(error, Unusable) and error.outcome == MISSING
        hint = _near(source[index], maker) if missing else ""
        return f"{record_id}: {error}{hint}"
    return f"{record_id}: {len(sample.text.tokens)} tokens and {sample.clips} clips are left"


def _near(record: Record, maker: SampleMaker) -> str:
    """A stored name like the record's absent one, for the message."""
    absent = next(m.id for m in record.media if m.id not in maker)
    names = (absent, PurePosixPath(absent).name.lower())  # the folder is what mostly differs
    near = next(filter(None, (s.index.near(name) for name in names for s in maker.shards)), "")
    return f"; did you mean {near!r}?" if near else ""


def _foresee(report: DataReport, tables: dict[str, np.ndarray], config: DataConfig) -> None:
    """Packs the run's first rows as the loader will: fill rates, and the whole run's epochs."""
    records = {name: len(table) for name, table in tables.items()}
    weights = {name: config.sources[name].weight for name in tables}
    tokens = {name: table[:, TOKENS] for name, table in tables.items()}
    drawn = draw_weights(weights, config.weight_by, tokens)
    block = min(WINDOW, sum(records.values()))
    mixture = Mixture(records, drawn, seed=config.seed, block=block)
    sizes = [table[:, : CLIPS + 1] for table in tables.values()]

    def sizes_of(draws: np.ndarray) -> np.ndarray:
        found = np.empty((len(draws), 2), np.int32)
        for source, table in enumerate(sizes):
            mine = draws[:, 0] == source
            found[mine] = table[draws[mine, 1]]
        return found

    plan = Plan(mixture, sizes_of, config.length, config.clips, seed=config.seed)
    rows, _ = plan.rows(0, min(report.rows, _ROWS_PACKED))
    draws = np.array([draw for row in rows for draw in row])
    used = sizes_of(draws).sum(0).tolist()
    report.samples_per_row = len(draws) / len(rows)
    report.fill_tokens = used[TOKENS] / (len(rows) * config.length)
    report.fill_clips = used[CLIPS] / max(len(rows) * config.clips, 1)
    for number, name in enumerate(tables):
        share = float((draws[:, 0] == number).mean())
        report.sources[name].drawn = share * report.samples_per_row * report.rows
        report.sources[name].epochs = report.sources[name].drawn / records[name]
    whole = np.concatenate([size[size.any(axis=1)] for size in sizes])
    report.tokens_histogram = _histogram(whole[:, TOKENS], config.length)
    report.clips_histogram = _histogram(whole[:, CLIPS], config.clips)


def _histogram(values: np.ndarray, largest: int) -> list[tuple[int, int]]:
    """(upper edge, how many values are at most that and more than the last), by powers of two."""
    edges = [0, *(2**k for k in range(largest.bit_length()) if 2**k < largest), largest]
    counts = np.bincount(np.searchsorted(edges, values), minlength=len(edges))
    pairs = list(zip(edges, counts.tolist(), strict=True))
    first = next((i for i, (_, count) in enumerate(pairs) if count), 0)
    return pairs[first:]


def bars(histogram: Iterable[tuple[int, int]], width: int = 40) -> list[str]:
    """A histogram as lines of text."""
    pairs = list(histogram)
    most = max((count for _, count in pairs), default=0)
    return [
        f"  <= {edge:>8,} {'█' * -(-width * count // max(most, 1)):<{width}} {count:,}"
        for edge, count in pairs
    ]
