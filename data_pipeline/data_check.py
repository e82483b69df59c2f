# SPDX-License-Identifier: Apache-2.0
"""What a data config will give a run, found out from lengths alone: nothing is decoded.

Every record of every source is made into a sample as the loader would, n records to a source.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.loader import WINDOW, DataConfig, sample_maker
from data_pipeline.mixture import Mixture
from data_pipeline.packing import Plan
from data_pipeline.samples import FAULTY, MISSING, OUTCOMES, TRIMMED, WHOLE, SampleMaker, Unusable
from data_pipeline.sources import Source, open_source

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
    fault: str = ""  # why the source cannot be opened at all
    tokens: int = 0
    clips: int = 0
    hours: float = 0.0  # of the videos behind them
    outcomes: dict[str, int] = field(default_factory=dict)  # records by what becomes of them
    examples: dict[str, list[str]] = field(default_factory=dict)  # of every outcome but 'whole'
    drawn: float = 0.0  # samples in the run
    epochs: float = 0.0

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
    config: DataConfig, num_steps: int, tick: Callable[[str, int, int], None] = lambda *_: None
) -> DataReport:
    """Measures every record; `tick` hears (source, records done, records in all).

    Raises ValueError or FileNotFoundError for shards or a tokenizer that cannot be read; what is
    wrong with a source or a record is in the report.
    """
    maker = sample_maker(config)
    reports: dict[str, SourceReport] = {}
    sizes: dict[str, np.ndarray] = {}
    for name, settings in config.sources.items():
        report = reports[name] = SourceReport(settings.path, settings.weight)
        try:
            source = open_source(settings)
        except (ValueError, FileNotFoundError) as error:
            report.fault = str(error)
            continue
        report.records = len(source)
        sizes[name] = _measure_source(source, maker, report, functools.partial(tick, name))
    found = DataReport(reports, num_steps * config.batch_size, config.max_bad_share)
    if sizes and any(size.any() for size in sizes.values()):
        _foresee(found, sizes, config)
    return found


def _measure_source(
    source: Source, maker: SampleMaker, report: SourceReport, tick: Callable[[int, int], None]
) -> np.ndarray:
    """(tokens, clips) i32[n, 2] of the samples, (0, 0) for what is dropped; fills the report."""
    sizes = np.zeros((len(source), 2), np.int32)
    for index in range(len(source)):
        tick(index + 1, len(source))
        outcome, detail = WHOLE, ""
        try:
            sample = maker.make(source[index])
        except (ValueError, OSError) as error:
            outcome = error.outcome if isinstance(error, Unusable) else FAULTY
            detail = f"{_id(source, index)}: {error}"
        else:
            sizes[index] = len(sample.text.tokens), sample.clips
            report.hours += sample.seconds / 3600
            if sample.trimmed:
                outcome = TRIMMED
                detail = f"{sample.id}: {len(sample.text.tokens)} tokens, {sample.clips} clips left"
        name = OUTCOMES[outcome]
        report.outcomes[name] = report.outcomes.get(name, 0) + 1
        if detail and report.outcomes[name] <= EXAMPLES:
            hint = _near(source, index, maker) if outcome == MISSING else ""
            report.examples.setdefault(name, []).append(detail + hint)
    report.tokens, report.clips = sizes.sum(0, dtype=np.int64).tolist()
    return sizes


def _id(source: Source, index: int) -> str:
    try:
        return source[index].id
    except (ValueError, OSError):
        return f"record {index}"


def _near(source: Source, index: int, maker: SampleMaker) -> str:
    """A stored name like the record's absent one, for the message."""
    absent = next(m.id for m in source[index].media if m.id not in maker)
    names = (absent, PurePosixPath(absent).name.lower())  # the folder is what mostly differs
    near = next(filter(None, (s.index.near(name) for name in names for s in maker.shards)), "")
    return f"; did you mean {near!r}?" if near else ""


def _foresee(report: DataReport, sizes: dict[str, np.ndarray], config: DataConfig) -> None:
    """Packs the run's first rows as the loader will: fill rates, and the whole run's epochs."""
    weights = {name: config.sources[name].weight for name in sizes}
    lengths = {name: len(size) for name, size in sizes.items()}
    block = min(WINDOW, sum(lengths.values()))
    mixture = Mixture(lengths, weights, seed=config.seed, block=block)
    tables = list(sizes.values())

    def sizes_of(draws: np.ndarray) -> np.ndarray:
        return np.array([tables[source][record] for source, record in draws.tolist()])

    plan = Plan(mixture, sizes_of, config.length, config.clips, seed=config.seed)
    rows, _ = plan.rows(0, min(report.rows, _ROWS_PACKED))
    draws = np.array([draw for row in rows for draw in row])
    packed = sizes_of(draws)
    report.samples_per_row = len(draws) / len(rows)
    report.fill_tokens = packed[:, 0].sum() / (len(rows) * config.length)
    report.fill_clips = packed[:, 1].sum() / max(len(rows) * config.clips, 1)
    for number, (name, size) in enumerate(sizes.items()):
        share = (draws[:, 0] == number).mean()
        report.sources[name].drawn = share * report.samples_per_row * report.rows
        report.sources[name].epochs = report.sources[name].drawn / len(size)
    used = np.concatenate([size[size.any(axis=1)] for size in tables])
    report.tokens_histogram = _histogram(used[:, 0], config.length)
    report.clips_histogram = _histogram(used[:, 1], config.clips)


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
