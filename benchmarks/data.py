# SPDX-License-Identifier: Apache-2.0
"""Video to batches: frame shards against decoding mp4 and against tars, and the loader's qualities.

    python benchmarks/data.py [--quick] [--only NAME,...] [--rounds 3] [--folder D] [--json F]

`readers` loads the same clips in every way, in interleaved rounds, per CPU-second of all threads.
Ours is the complete pipeline: annotation read, prompt written and tokenised, rows packed, frames
decoded into the batch that goes to the device. What others hand over is part of their name. Peers
that are not installed are left out, with the command that adds them. Beside a measured ratio
stands what we aim at.

`--folder` keeps the videos that are made, for the next time; `--video F` is a film of your own in
the place of the 720p one.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import data_loader
import data_readers
import data_storage
from data_media import Film, Rows, film

# film, at most so many clips (0 = 2 frames of every second), what we aim at against decord
CASES = {
    "720p, dense": ("720p", 0, 190),
    "720p, 8 clips": ("720p", 8, 0),
    "360p, 10 minutes, dense": ("360p", 0, 70),
    "360p, an hour, 32 clips": ("hour", 32, 220),
}
SECONDS = {"720p": 120.0, "360p": 600.0, "hour": 3600.0}


@dataclass(frozen=True)
class Bench:
    """How much is done: films of SECONDS / `shorter`, records in all, rounds; where files lie."""

    folder: Path
    rounds: int = 3
    shorter: float = 1.0
    records: int = 1_000_000
    own: Path | None = None

    def film(self, name: str) -> Film:
        height = 720 if name == "720p" else 360
        own = self.own if name == "720p" else None
        return film(self.folder, name, max(2.0, SECONDS[name] / self.shorter), height, own)


def readers(bench: Bench) -> Rows:
    """Frames per CPU-second of every way to read the same clips."""
    rows: Rows = {}
    for case, (name, max_clips, aim) in CASES.items():
        video = bench.film(name)
        clips = data_readers.wanted(video, max_clips)
        print(f"{case}: {clips.size} frames", file=sys.stderr, flush=True)
        ways = data_readers.ways(video, clips, bench.folder, round(10_000 / bench.shorter))
        speeds = data_readers.measure(ways, bench.rounds)
        median = {way: statistics.median(values) for way, values in speeds.items()}
        for way, speed in sorted(median.items(), key=lambda item: -item[1]):
            rows[f"{case}: {way}"] = {
                "frames / CPU-s": speed,
                "spread": max(speeds[way]) / min(speeds[way]),
            }
            if data_readers.BASE in median:
                rows[f"{case}: {way}"]["x decord"] = speed / median[data_readers.BASE]
            if way.startswith(data_readers.COMPLETE) and aim:
                rows[f"{case}: {way}"]["aim"] = f">= {aim}x decord"
    return rows


PARTS: dict[str, Callable[[Bench], Rows]] = {
    "readers": readers,
    "packing": lambda b: data_loader.packing(max(4096, b.records // 50)),
    "start": lambda b: data_loader.start(b.folder, b.film("720p"), b.records // 10),
    "mixture": lambda b: data_loader.mixture(b.folder, b.film("720p"), 40, b.records),
    "memory": lambda b: data_loader.memory(b.folder, b.film("720p"), b.records // 10),
    "latency": lambda b: data_loader.latency(
        b.folder, b.film("720p"), 2 if b.records > 10_000 else 1
    ),
    "storage": lambda b: data_storage.storage(b.film("720p")),
    "predecode": lambda b: data_storage.predecode([b.film(name) for name in SECONDS]),
    "access": lambda b: data_storage.access(b.film("hour"), min(200, b.records // 100)),
}


def run(bench: Bench, parts: Iterable[str]) -> dict[str, Rows]:
    results = {}
    for part in parts:
        print(f"-- {part}", file=sys.stderr, flush=True)
        results[part] = PARTS[part](bench)
        show(part, results[part])
    return results


def show(part: str, rows: Rows) -> None:
    """A table of one part; columns that a row lacks stay empty."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    wide = max(len(name) for name in rows)
    print(f"\n{part:{wide}}" + "".join(f"  {name:>{_width(name)}}" for name in columns))
    for name, row in rows.items():
        cells = (f"  {_text(row.get(column, '')):>{_width(column)}}" for column in columns)
        print(f"{name:{wide}}" + "".join(cells))


def _width(column: str) -> int:
    return max(10, len(column))


def _text(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--quick", action="store_true", help="short films, few records, one round")
    parser.add_argument("--rounds", type=int, default=Bench.rounds)
    parser.add_argument("--shorter", type=float, default=Bench.shorter, help="divides the films")
    parser.add_argument("--records", type=int, default=Bench.records, help="of the mixture")
    parser.add_argument("--folder", type=Path, help="keeps the films for the next time")
    parser.add_argument("--video", type=Path, help="a film of your own instead of the 720p one")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        data_loader.job(args.job)
        return
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no parts {', '.join(unknown)}; known: {', '.join(PARTS)}")
    size = (1, 20, 20_000) if args.quick else (args.rounds, args.shorter, args.records)
    with tempfile.TemporaryDirectory() as temporary:
        results = run(Bench(args.folder or Path(temporary), *size, args.video), parts)
    for name, install in data_readers.PEERS.items():
        if not importlib.util.find_spec(name):
            print(f"\n{name} is not installed: pip install {install}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
