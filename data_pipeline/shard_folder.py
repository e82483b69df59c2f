# SPDX-License-Identifier: Apache-2.0
"""A folder of frame shards as it is found, whole or not, and what is wrong with it as a whole.

What it should hold is said twice: by manifest and index, which readers use, and by the sidecars
of its shards.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.frame_shards import FrameShardError, parse_manifest
from data_pipeline.media_index import INDEX_DTYPES, MediaIndex

FACTS = ("file", "records", "bytes", "sha256")  # in a sidecar and in the manifest
PLAN = "plan.jsonl"  # of a job: settings in the first line, then a line per shard
COLUMNS = sorted(INDEX_DTYPES.keys() - {"shard"})  # in a sidecar and in the index
MEDIUM = ("id", "kind", *COLUMNS)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in a file of the folder and perhaps with one medium."""

    file: str
    what: str
    media_id: str | None = None

    def __str__(self) -> str:
        medium = "" if self.media_id is None else f"{self.media_id!r} "
        return f"{self.file}: {medium}{self.what}"


@dataclass(frozen=True)
class ShardTask:
    """What manifest and index say of a shard, if they do; its sidecar says it again."""

    folder: Path
    number: int
    facts: dict[str, Any] | None
    media: list[dict[str, Any]] | None
    segment_frames: int
    decode: bool = False

    @property
    def sidecar(self) -> str:
        return f"frames-{self.number:05d}.json"


@dataclass
class Folder:
    """A folder's manifest and index, as far as they can be read."""

    path: Path
    manifest: dict[str, Any] | None = None
    index: MediaIndex | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    segment_frames: int = 0
    shards: Sequence[int] = ()  # their numbers
    problems: list[Problem] = field(default_factory=list)

    def add(self, file: str, what: str, media_id: str | None = None) -> None:
        self.problems.append(Problem(file, what, media_id))

    def tasks(self, decode: bool = False) -> Iterator[ShardTask]:
        """A task per shard; without a sound manifest, per finished shard."""
        known = groupby(self.index.rows(), itemgetter("shard")) if self.index else iter(())
        number, rows = next(known, (-1, iter(())))
        for shard in self.shards:
            media = None if self.index is None else []
            if number == shard:
                media = list(rows)
                number, rows = next(known, (-1, iter(())))
            facts = self.manifest["shards"][shard] if self.manifest else None
            yield ShardTask(self.path, shard, facts, media, self.segment_frames, decode)


def open_folder(path: Path) -> Folder:
    """Reads what describes the folder. FileNotFoundError if it holds no frame shards at all."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder")
    names = {p.name for p in path.iterdir()}
    finished = [int(n[7:-5]) for n in names if re.fullmatch(r"frames-\d{5,}\.json", n)]
    if not finished and names.isdisjoint(("manifest.json", PLAN)):
        raise FileNotFoundError(
            f"{path} holds no frame shards; `apollo-jax predecode --output {path}` makes them"
        )
    folder = Folder(path)
    plan = _read_plan(folder) if PLAN in names else None
    if "manifest.json" in names:
        _read_manifest(folder)
        _read_index(folder)
    else:
        total = f" of {plan[1]}" if plan else ""
        what = f"is missing: {len(finished)}{total} shards are finished; rerunning the same "
        folder.add("manifest.json", f"{what}`apollo-jax predecode` completes the set")
    if folder.manifest:
        folder.spec = folder.manifest["spec"]
        folder.shards = range(len(folder.manifest["shards"]))
    elif plan:
        folder.spec, folder.shards = plan[0], sorted(finished)
    else:
        found = "; ".join(map(str, folder.problems))
        raise FileNotFoundError(
            f"{path}: neither manifest.json nor {PLAN} say how its shards were made ({found}); "
            "`apollo-jax predecode` into another folder makes them again"
        )
    if plan and folder.manifest and folder.manifest.get("plan_sha256", plan[2]) != plan[2]:
        folder.add(PLAN, "is not the one that manifest.json names; predecode cannot continue it")
    folder.segment_frames = _segment_frames(folder.spec)
    total = plan[1] if plan else max(finished, default=-1) + 1
    _check_names(folder, names, len(folder.shards) if folder.manifest else total)
    return folder


def _read_plan(folder: Folder) -> tuple[dict[str, Any], int, str] | None:
    """The settings of the job, its number of shards, and the checksum of plan.jsonl."""
    try:
        data = (folder.path / PLAN).read_bytes()
        header, *shards = data.splitlines()
        spec = json.loads(header)
        _segment_frames(spec)
        return spec, len(shards), hashlib.sha256(data).hexdigest()
    except (ValueError, LookupError, TypeError) as error:
        folder.add(PLAN, f"is damaged: {type(error).__name__}: {error}")
        return None


def _read_manifest(folder: Folder) -> None:
    path = folder.path / "manifest.json"
    try:
        folder.manifest = parse_manifest(path.read_bytes(), path)
    except FrameShardError as error:  # not one of a later version, which is as it should be
        what, _, _ = str(error).removeprefix(f"{path} ").partition("; `")
        folder.add(path.name, what)


def _read_index(folder: Folder) -> None:
    """Keeps the index only if it fits the manifest."""
    path, manifest = folder.path / "index.npz", folder.manifest
    if not path.exists():
        return folder.add(path.name, "is missing")
    expected = manifest and manifest.get("index_sha256")
    if expected and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        return folder.add(path.name, "is not the one that manifest.json names: other sha256")
    try:
        index = MediaIndex(path)
    except ValueError as error:
        return folder.add(path.name, str(error).removeprefix(f"{path} "))
    if not manifest:
        return folder.add(path.name, "cannot be trusted without its manifest")
    wrong = _misfits(index, manifest)
    if not wrong:
        folder.index = index
    for what in wrong:
        folder.add(path.name, f"does not fit manifest.json: {what}")


def _misfits(index: MediaIndex, manifest: dict[str, Any]) -> list[str]:
    columns, shards = index.columns, manifest["shards"]
    frames, shard, record = (columns[k] for k in ("stored_frames", "shard", "record"))
    count, total = manifest.get("media", len(index)), manifest.get("frames", frames.sum())
    if (len(index), frames.sum()) != (count, total):
        what = f"{len(index)} media with {frames.sum()} frames"
        return [f"{what} instead of {count} with {total}"]
    if shard.min() < 0 or shard.max() >= len(shards) or (np.diff(shard) < 0).any():
        return ["its media lie in unknown shards or in no order"]
    per_segment = _segment_frames(manifest["spec"])
    segments = -(-frames.astype(np.int64) // per_segment)
    counts = np.bincount(shard, segments, len(shards)).astype(np.int64)
    wrong = [
        f"{counts[k]} records of {s['file']} instead of {s['records']}"
        for k, s in enumerate(shards)
        if counts[k] != s["records"]
    ]
    begin = np.cumsum(segments) - segments
    first = begin - (np.cumsum(counts) - counts)[shard]
    wrong += [
        f"{index.name(int(k))!r} begins at a wrong record" for k in np.flatnonzero(first - record)
    ]
    return wrong + [f"{name!r} is there twice" for name in index.doubles()]


def _segment_frames(spec: dict[str, Any]) -> int:
    return max(1, round(spec["fps"] * spec.get("segment_seconds", 8.0)))


def _check_names(folder: Folder, names: set[str], shards: int) -> None:
    """Files that are too many; those that are missing are found with their shard."""
    known = {f"frames-{k:05d}.{e}" for k in range(shards) for e in ("json", "array_record")}
    for name in sorted(names - known):
        if name.endswith(".tmp"):
            folder.add(name, "is what a killed job left, unless one is at work; nothing uses it")
        elif name.startswith("frames-"):
            folder.add(name, "belongs to no shard of the set")


def read_sidecar(task: ShardTask) -> dict[str, Any]:
    """ValueError or FileNotFoundError if it is no complete sidecar."""
    shard = json.loads((task.folder / task.sidecar).read_bytes())
    try:
        missing = [k for k in (*FACTS, "rejected") if k not in shard]
        missing += [k for row in shard["media"] for k in MEDIUM if k not in row]
    except (LookupError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if missing:
        raise ValueError(f"it does not say {missing[0]}")
    return shard
