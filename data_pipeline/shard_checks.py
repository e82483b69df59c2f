# SPDX-License-Identifier: Apache-2.0
"""What is wrong with frame shards: every file, every record, every frame is looked at."""

import hashlib
import os
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import simplejpeg

from data_pipeline.frame_records import decode_segment
from data_pipeline.record_files import open_records
from data_pipeline.shard_folder import COLUMNS, FACTS, Folder, Problem, ShardTask, read_sidecar

# What damaged bytes provoke in msgpack, numpy, Riegeli and libjpeg.
RECORD_ERRORS = (RuntimeError, ValueError, LookupError, TypeError, OSError, struct.error)

_LINE_SECONDS = 10.0  # between progress lines where there is no terminal
_WORKER_BYTES = 64 << 20  # a process of its own pays from here on


def check_shard(task: ShardTask) -> list[Problem]:
    """Everything that is wrong with one shard; media that cannot be used are named."""
    problems, shard = [], None
    try:
        shard = read_sidecar(task)
    except FileNotFoundError:
        problems.append(Problem(task.sidecar, "is missing"))
    except ValueError as error:
        problems.append(Problem(task.sidecar, f"is damaged: {error}"))
    if shard and task.facts:
        problems += [
            Problem(task.sidecar, f"says {name} {shard[name]}, manifest.json {task.facts[name]}")
            for name in FACTS
            if shard[name] != task.facts[name]
        ]
    if shard and task.media is not None:
        problems += [
            Problem(task.sidecar, "and index.npz disagree", media_id)
            for media_id in _disagreements(shard["media"], task.media)
        ]
    facts, media = task.facts, task.media
    if shard and sidecar_is_right(task, shard):
        facts, media = shard, shard["media"]
    if facts is None or media is None:
        what = "and nothing else says what its shard holds; `repair --redo` gives it to predecode"
        return [*problems, Problem(task.sidecar, what)]
    return problems + (_check_file(task, facts, media) if facts["file"] else [])


def sidecar_is_right(task: ShardTask, shard: dict[str, Any]) -> bool:
    """Whether to believe a sidecar, and not manifest and index, where they differ.

    Those have checksums; but an interrupted repair leaves them behind the sidecar and its file.
    """
    if task.facts is None or task.media is None:
        return True
    path = task.folder / (shard["file"] or task.sidecar)
    if shard["sha256"] == task.facts["sha256"] or not path.exists():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"]


def _disagreements(there: list[dict[str, Any]], here: list[dict[str, Any]]) -> list[str]:
    ours, theirs = ({row["id"]: row for row in rows} for rows in (here, there))
    return [
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours
        or name not in theirs
        or any(ours[name][k] != theirs[name][k] for k in COLUMNS)
    ]


def _check_file(
    task: ShardTask, facts: dict[str, Any], media: list[dict[str, Any]]
) -> list[Problem]:
    name, problems = facts["file"], []
    path = task.folder / name
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            problems.append(Problem(name, f"has {size} bytes instead of {facts['bytes']}"))
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                problems.append(Problem(name, "has another sha256 than when it was written"))
        reader = open_records(path)
    except FileNotFoundError:
        return [Problem(name, "is missing"), *(Problem(name, "is lost", m["id"]) for m in media)]
    except (RuntimeError, OSError) as error:
        lost = [Problem(name, "cannot be read", m["id"]) for m in media]
        return [*problems, Problem(name, f"cannot be read: {error}"), *lost]
    if reader.num_records() != facts["records"]:
        what = f"holds {reader.num_records()} records instead of {facts['records']}"
        problems.append(Problem(name, what))
    for row in media:
        try:
            for segment in range(-(-row["stored_frames"] // task.segment_frames)):
                record = reader.read([row["record"] + segment])[0]
                check_record(record, row, segment, task.segment_frames, task.decode)
        except RECORD_ERRORS as error:
            problems.append(Problem(name, f"is damaged: {error}", row["id"]))
    return problems


def check_record(
    record: bytes, row: dict[str, Any], segment: int, segment_frames: int, decode: bool
) -> None:
    """ValueError (or what its bytes provoke) unless it is this segment of this medium, sound."""
    header, jpegs = decode_segment(record)
    if (header["id"], header["seg"]) != (row["id"], segment):
        raise ValueError(f"its record holds {header['id']!r} segment {header['seg']}")
    count = min(segment_frames, row["stored_frames"] - segment * segment_frames)
    if not count == header["n"] == len(jpegs) == len(header["pts_us"]) == len(header["crc"]):
        raise ValueError(f"segment {segment} holds {len(jpegs)} frames instead of {count}")
    if sorted(header["pts_us"]) != header["pts_us"]:
        raise ValueError(f"the times of segment {segment} are in no order")
    if list(header["hw"]) != [row["height"], row["width"]]:
        raise ValueError(f"segment {segment} is of size {header['hw']}")
    for frame, (jpeg, crc) in enumerate(zip(jpegs, header["crc"], strict=True)):
        if zlib.crc32(jpeg) != crc:
            raise ValueError(f"frame {frame} of segment {segment} has a wrong checksum")
        if decode and simplejpeg.decode_jpeg(jpeg).shape[:2] != (row["height"], row["width"]):
            raise ValueError(f"frame {frame} of segment {segment} is of another size")


class _Progress:
    """A line that is written over on a terminal, one now and then in a log."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done, self.problems = what, total, 0, 0
        self._terminal, self._start, self._next = sys.stderr.isatty(), time.monotonic(), 0.0

    def step(self, problems: int) -> None:
        self.done, self.problems = self.done + 1, self.problems + problems
        seconds = time.monotonic() - self._start
        if seconds >= self._next or self.done == self.total:
            self._next = seconds + (0.5 if self._terminal else _LINE_SECONDS)
            end = "\n" if not self._terminal or self.done == self.total else "\r"
            line = f"{self.what}: {self.done}/{self.total} shards, {self.problems} problems"
            print(f"{line}, {seconds:.0f} s", end=end, file=sys.stderr, flush=True)


def check_folder(
    folder: Folder, decode: bool = False, workers: int = 0
) -> dict[int, list[Problem]]:
    """What is wrong with each damaged shard, by its number; 0 workers: as many as pay."""
    size = sum(path.stat().st_size for path in folder.path.glob("frames-*.array_record"))
    workers = workers or max(1, min(os.cpu_count() or 1, size // _WORKER_BYTES))
    progress, damaged = _Progress("verify", len(folder.shards)), {}
    results = check_shards(folder.tasks(decode), workers)
    for number, problems in zip(folder.shards, results, strict=True):
        if problems:
            damaged[number] = problems
        progress.step(len(problems))
    return damaged


def check_shards(tasks: Iterator[ShardTask], workers: int) -> Iterator[list[Problem]]:
    """`check_shard` of every task, in order, in processes of their own if there are many."""
    if workers == 1:
        yield from map(check_shard, tasks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        ahead = deque()
        for task in tasks:  # a bounded number of tasks: those of 10^6 media are large
            ahead.append(pool.submit(check_shard, task))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
