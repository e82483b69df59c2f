# SPDX-License-Identifier: Apache-2.0
"""Videos and images -> frame shards, once, before training (`apollo-jax predecode`).

Decoding runs in processes of its own, so that no file can stop the job: what cannot be used goes
to `quarantine.jsonl` with the reason. Killed at any moment, the same command continues after the
last finished shard; the shards do not depend on the number of workers.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data_pipeline.frame_shard_writer import FrameShardWriter, write_atomic
from data_pipeline.frame_shards import ShardSpec
from data_pipeline.media_encoding import EncodedMedium, encode_image, encode_video
from data_pipeline.media_files import Medium, find_media, local_copy
from data_pipeline.video import VideoError
from data_pipeline.worker_pool import Casualty, run_isolated

_BATCH_MEDIA, _BATCH_BYTES = 16, 32 << 20  # what a worker is given at a time, at most
_LINE_SECONDS = 10.0  # between progress lines where there is no terminal


@dataclass(frozen=True)
class PredecodeConfig:
    """How frames are stored and how the job runs; 0 workers = one per CPU."""

    fps: float = 2.0
    size: int = 384  # longest side, pixels
    quality: int = 90
    subsampling: str = "420"  # '444' keeps small coloured text
    shard_bytes: int = 256 << 20
    workers: int = 0
    stall_seconds: float = 120.0  # a file that yields no frame for so long is given up

    def __post_init__(self):
        if self.fps <= 0 or self.size < 2 or not 1 <= self.quality <= 100:
            raise ValueError(f"fps > 0, size >= 2 and quality in 1..100 are needed: {self}")
        if self.subsampling not in ("420", "422", "444"):
            raise ValueError(f"subsampling {self.subsampling!r} is not one of 420, 422, 444")

    @property
    def spec(self) -> ShardSpec:
        return ShardSpec(self.fps, self.size, self.quality, self.subsampling)


@dataclass(frozen=True)
class PredecodeReport:
    """What a job stored and what it left out, by reason."""

    output: Path
    stored: int
    frames: int
    shards: int
    bytes: int
    quarantined: dict[str, int]
    seconds: float


def predecode(
    source: str | Path | Iterable[str | Path],
    output: str | Path,
    config: PredecodeConfig = PredecodeConfig(),
    *,
    root: str | Path | None = None,
    progress: bool = True,
) -> PredecodeReport:
    """Stores every medium of `source` (see `find_media`) as frame shards in `output`.

    ValueError if `output` was begun with other settings or another input, or if nothing at all
    could be stored.
    """
    start = time.monotonic()
    output, media = Path(output), find_media(source, root)
    _check_job(output, config, media)
    manifest_path = output / "manifest.json"
    if manifest_path.exists():
        return _report(output, json.loads(manifest_path.read_text()), start)
    writer = FrameShardWriter(output, config.spec, config.shard_bytes)
    todo = media[writer.finished :]
    tasks = [(medium, config.spec) for medium in todo]
    workers = config.workers or os.cpu_count() or 1
    with _Progress(progress, len(media), writer.finished, len(writer.rejected)) as status:
        results = run_isolated(
            _encode, _batches(tasks), workers, config.stall_seconds, report=status.show
        )
        try:
            for medium, result in zip(todo, results, strict=True):
                if isinstance(result, EncodedMedium):
                    writer.add(*result)
                else:
                    writer.reject(medium.id, result.reason, result.detail)
                    status.bad += 1
                status.done += 1
        finally:
            results.close()
            _write_quarantine(output, writer.rejected)
    return _report(output, writer.close(), start)


def _encode(task: tuple[Medium, ShardSpec], beat: Any) -> EncodedMedium | Casualty:
    medium, spec = task
    try:
        with local_copy(medium, beat) as path:
            if medium.kind == "image":
                return encode_image(path, medium.id, spec)
            return encode_video(path, medium.id, spec, beat)
    except VideoError as error:
        return Casualty(error.reason, error.detail)
    except Exception as error:  # whatever a file does to the decoder, the others must go on
        return Casualty("error", f"{type(error).__name__}: {error}")


def _batches(tasks: Sequence[tuple[Medium, ShardSpec]]) -> list[list[tuple[Medium, ShardSpec]]]:
    batches, size = [[]], 0
    for task in tasks:
        size += max(0, task[0].size)
        if batches[-1] and (len(batches[-1]) == _BATCH_MEDIA or size > _BATCH_BYTES):
            batches.append([])
            size = 0
        batches[-1].append(task)
    return batches


def _check_job(output: Path, config: PredecodeConfig, media: Sequence[Medium]) -> None:
    """Begins a job in an empty folder, or makes sure that the one begun there is this one."""
    names = "\0".join(f"{medium.kind} {medium.id}" for medium in media)
    digest = hashlib.sha256(names.encode()).hexdigest()
    job = {**asdict(config.spec), "media": len(media), "input": digest}
    path = output / "job.json"
    if path.exists():
        begun = json.loads(path.read_text())
        changed = [
            f"{k} {begun.get(k)} there, {v} now" for k, v in job.items() if begun.get(k) != v
        ]
        if changed:
            raise ValueError(
                f"{output} was begun with other settings or another input ({'; '.join(changed)}): "
                "choose another output, or delete that folder to start again"
            )
    elif output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and holds no frame shards; choose another output")
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(job, indent=1).encode())


def _write_quarantine(output: Path, rejected: Iterable[dict[str, str]]) -> None:
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected]
    write_atomic(output / "quarantine.jsonl", "".join(lines).encode())


class _Progress:
    """A bar on a terminal, a line now and then in a log; `frames` counts those decoded."""

    def __init__(self, enabled: bool, total: int, done: int, bad: int):
        self.total, self.done, self.bad, self.frames = total, done, bad, 0
        console = Console(stderr=True)
        self._lines = enabled and not console.is_terminal
        self._start, self._printed = time.monotonic(), -_LINE_SECONDS
        columns = (
            TextColumn("predecode"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        hidden = not enabled or self._lines
        self._bar = Progress(*columns, console=console, disable=hidden)
        self._task = self._bar.add_task("", total=total, note="")

    def __enter__(self) -> "_Progress":
        self._bar.start()
        self.show()
        return self

    def __exit__(self, *_: object) -> None:
        self._printed = -_LINE_SECONDS  # the last line is always printed
        self.show()
        self._bar.stop()

    def show(self, frames: int | None = None) -> None:
        self.frames = self.frames if frames is None else frames
        note = f"{self.frames} frames decoded, {self.bad} quarantined"
        self._bar.update(self._task, completed=self.done, note=note)
        seconds = time.monotonic() - self._start
        if self._lines and seconds - self._printed >= _LINE_SECONDS:
            self._printed = seconds
            line = f"predecode: {self.done}/{self.total} media, {note}, {seconds:.0f} s"
            print(line, file=sys.stderr, flush=True)


def _report(output: Path, manifest: dict[str, Any], start: float) -> PredecodeReport:
    return PredecodeReport(
        output=output,
        stored=manifest["media"],
        frames=manifest["frames"],
        shards=len(manifest["shards"]),
        bytes=sum(shard["bytes"] for shard in manifest["shards"]),
        quarantined=manifest["rejected"],
        seconds=time.monotonic() - start,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """`apollo-jax predecode`."""
    defaults = PredecodeConfig()
    parser = argparse.ArgumentParser("apollo-jax predecode", description=__doc__)
    parser.add_argument(
        "--input", required=True, help="folder of videos and images, or a JSONL that names them"
    )
    parser.add_argument("--output", required=True, help="folder for the frame shards")
    parser.add_argument("--root", help="ids are relative to this folder (default: the input's)")
    parser.add_argument("--fps", type=float, default=defaults.fps, help="stored frames per second")
    parser.add_argument("--size", type=int, default=defaults.size, help="longest side in pixels")
    parser.add_argument("--quality", type=int, default=defaults.quality, help="of the JPEGs")
    parser.add_argument("--subsampling", default=defaults.subsampling, help="420, 422 or 444")
    parser.add_argument("--shard-bytes", type=int, default=defaults.shard_bytes)
    parser.add_argument("--workers", type=int, default=0, help="processes (0: one per CPU)")
    parser.add_argument("--stall-seconds", type=float, default=defaults.stall_seconds)
    args = vars(parser.parse_args(argv))
    source, output, root = args.pop("input"), args.pop("output"), args.pop("root")
    report = predecode(source, output, PredecodeConfig(**args), root=root)
    bad = sum(report.quarantined.values())
    print(
        f"{report.output}: {report.stored} of {report.stored + bad} media stored, "
        f"{report.frames} frames in {report.shards} shards, {report.bytes / 1e6:.1f} MB, "
        f"{report.seconds:.1f} s"
    )
    if bad:
        reasons = ", ".join(f"{n} {reason}" for reason, n in report.quarantined.items())
        print(f"quarantined {bad}: {reasons} (see {report.output / 'quarantine.jsonl'})")


if __name__ == "__main__":
    main()
