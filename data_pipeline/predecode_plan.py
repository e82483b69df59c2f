# SPDX-License-Identifier: Apache-2.0
"""Which medium goes to which shard: decided once, before anything is decoded.

`plan.jsonl` in the output folder holds the job in its first line and then one line per shard with
that shard's media. It is written by whoever comes first and never changes, so machines that share
nothing but the folder agree on it, and a shard is the same whoever makes it.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.frame_records import ShardSpec
from data_pipeline.frame_shard_writer import shard_path, written_beside
from data_pipeline.media_encoding import MediaLimits
from data_pipeline.media_files import Medium
from data_pipeline.remote_files import is_remote
from data_pipeline.worker_pool import TaskLimits

PLAN = "plan.jsonl"
_VERSION = 1
_SHARD_MEDIA = 4096  # at most: bounds the work that an interrupted job repeats
_UNKNOWN_BYTES = {"video": 16 << 20, "image": 256 << 10}  # where a listing does not say


@dataclass(frozen=True)
class PredecodeConfig:
    """What is stored, how media are cut into shards, and how the job runs.

    The first two groups are the plan's, equal for everyone who works on an output. 0 workers = one
    per CPU.
    """

    fps: float = 2.0
    size: int = 384  # longest side, pixels
    quality: int = 90
    subsampling: str = "420"  # '444' keeps small coloured text
    max_hours: float = 8.0  # of a video
    max_pixels: int = 160_000_000  # of a frame

    shard_bytes: int = 1 << 30  # of source files per shard
    shards: int = 0  # so many instead

    workers: int = 0
    stall_seconds: float = 120.0  # a file that yields no frame for so long is given up
    file_seconds: float = 7200.0  # and one that takes so long in all
    file_memory: int = 4 << 30  # and one that needs more bytes
    max_rejected: float = 0.5  # a larger share of unusable media is an error

    def __post_init__(self):
        if self.fps <= 0 or self.size < 2 or not 1 <= self.quality <= 100:
            given = f"fps {self.fps}, size {self.size}, quality {self.quality}"
            raise ValueError(f"fps > 0, size >= 2 and quality in 1..100 are needed, not {given}")
        if self.subsampling not in ("420", "422", "444"):
            raise ValueError(f"subsampling {self.subsampling!r} is not one of 420, 422, 444")
        if min(self.max_hours, self.max_pixels, self.shard_bytes, self.file_seconds) <= 0:
            raise ValueError(f"limits and shard_bytes must be positive: {self}")
        if self.shards < 0 or self.workers < 0 or not 0 <= self.max_rejected <= 1:
            raise ValueError(f"shards, workers >= 0 and max_rejected in 0..1 are needed: {self}")

    @property
    def spec(self) -> ShardSpec:
        return ShardSpec(self.fps, self.size, self.quality, self.subsampling)

    @property
    def media_limits(self) -> MediaLimits:
        return MediaLimits(self.max_hours, self.max_pixels)

    @property
    def task_limits(self) -> TaskLimits:
        return TaskLimits(self.stall_seconds, self.file_seconds, self.file_memory)

    @property
    def planned(self) -> dict[str, Any]:
        """The settings that the plan fixes."""
        limits = {"max_hours": self.max_hours, "max_pixels": self.max_pixels}
        cut = {"shards": self.shards} if self.shards else {"shard_bytes": self.shard_bytes}
        return {**asdict(self.spec), **limits, **cut}


DEFAULTS = PredecodeConfig()


class Plan:
    """The plan of an output folder: the job's settings and every shard's media."""

    def __init__(self, output: Path):
        self.output = output  # where shards are written
        self.name: str | Path = output  # what people call it
        data = (output / PLAN).read_bytes()
        header, *self._shards = data.splitlines()
        self.job: dict[str, Any] = json.loads(header)
        if self.job.get("plan") != _VERSION:
            raise ValueError(
                f"{output / PLAN} is of version {self.job.get('plan')}, this is {_VERSION}: finish "
                "it with the apollo_jax it was begun with, or choose another output"
            )
        self.digest = hashlib.sha256(data).hexdigest()

    def __len__(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def media(self, shard: int) -> list[Medium]:
        return [Medium(*entry) for entry in json.loads(self._shards[shard])]

    def sidecar(self, shard: int) -> dict[str, Any] | None:
        """What a finished shard holds; None if it is unfinished or its file is not the one named.

        ValueError if it was made for another plan.
        """
        path = shard_path(self.output, shard, "json")
        if self.size(path.name) is None:
            return None
        sidecar = self.read_sidecar(path)
        if sidecar.get("plan") != self.digest:
            raise ValueError(
                f"{self.name}/{path.name} belongs to another plan than {PLAN} beside it: jobs with "
                "different inputs or settings have used this folder; delete it and start one again"
            )
        whole = sidecar["file"] is None or self.size(sidecar["file"]) == sidecar["bytes"]
        return sidecar if whole else None

    def unfinished(self) -> list[int]:
        """Shards without a sidecar."""
        names = self.names()
        return [k for k in range(len(self)) if shard_path(self.output, k, "json").name not in names]

    # What follows differs for an output that is a URL (predecode_remote.py).

    def names(self) -> set[str]:
        """Of the files in the output."""
        return set(os.listdir(self.output))

    def size(self, name: str) -> int | None:
        """Bytes of a file in the output, None if there is none."""
        path = self.output / name
        return path.stat().st_size if path.exists() else None

    def read_sidecar(self, path: Path) -> dict[str, Any]:
        return json.loads(path.read_text())

    def publish(self, shard: int) -> None:
        """A shard was written."""

    def publish_set(self) -> None:
        """The manifest was written, and what it needs."""
        for leftover in self.output.glob("*.tmp"):  # of processes that were killed
            leftover.unlink(missing_ok=True)


def open_plan(output: str | Path) -> Plan:
    """The plan there is; FileNotFoundError."""
    if is_remote(str(output)):
        from data_pipeline.predecode_remote import RemotePlan

        return RemotePlan(str(output))
    if not (Path(output) / PLAN).exists():
        raise FileNotFoundError(f"{output} holds no plan yet: say what the input is")
    return Plan(Path(output))


def begin_plan(output: str | Path, config: PredecodeConfig, media: Sequence[Medium]) -> Plan:
    """The plan of `output`, made now if there is none.

    ValueError if there is one for other settings or media, or if the folder holds other things.
    """
    names = "\0".join(f"{medium.kind} {medium.id}" for medium in media)
    digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
    job = {"plan": _VERSION, **config.planned, "media": len(media), "input": digest}
    try:
        plan = open_plan(output)
    except FileNotFoundError:
        _write_plan(output, job, config, media)
        plan = open_plan(output)
    changed = _changes(plan.job, job)
    if changed:
        raise ValueError(
            f"{output} was begun with other settings or another input ({'; '.join(changed)}): "
            "choose another output, or delete that folder to start again"
        )
    return plan


def _changes(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In what two jobs differ, in words."""
    differ = [key for key in there | now if there.get(key) != now.get(key)]
    values = [
        f"{key} {there.get(key, 'not said')} there, {now.get(key, 'not said')} now"
        for key in differ
        if key != "input"
    ]
    return values + ["the input has other media"] * ("input" in differ)


def _write_plan(
    output: str | Path, job: dict[str, Any], config: PredecodeConfig, media: Sequence[Medium]
) -> None:
    found = [m if is_remote(m.path) else m._replace(path=os.path.abspath(m.path)) for m in media]
    groups = cut(found, config.shards, config.shard_bytes)
    data = "".join(json.dumps(line) + "\n" for line in (job, *groups)).encode()
    if is_remote(str(output)):
        from data_pipeline.predecode_remote import write_first

        write_first(str(output), data)
    else:
        _write_first(Path(output), data)


def cut(media: Sequence[Medium], shards: int, shard_bytes: int) -> list[list[Medium]]:
    """Consecutive groups of about equal source bytes: `shards` of them, or of `shard_bytes` each.

    A file is never cut, so one group may be much larger than the others.
    """
    sizes = [m.size if m.size >= 0 else _UNKNOWN_BYTES.get(m.kind, 0) for m in media]
    if shards > len(media):
        raise ValueError(f"{len(media)} media cannot fill {shards} shards; ask for fewer")
    if not shards:
        groups, room = [[]], shard_bytes
        for medium, size in zip(media, sizes, strict=True):
            if groups[-1] and (size > room or len(groups[-1]) == _SHARD_MEDIA):
                groups.append([])
                room = shard_bytes
            groups[-1].append(medium)
            room -= size
        return groups
    groups, total, done, start = [], sum(sizes), 0, 0
    for group in range(shards):
        end = start
        # At least one medium for this group, and one left for every later one.
        while end == start or (
            end < len(media) - (shards - group - 1)
            and (group == shards - 1 or done + sizes[end] / 2 <= total * (group + 1) / shards)
        ):
            done += sizes[end]
            end += 1
        groups.append(list(media[start:end]))
        start = end
    return groups


def _write_first(output: Path, data: bytes) -> None:
    """First come, first served: others may be doing the same this moment."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / PLAN
    if any(not name.startswith(PLAN) for name in os.listdir(output)) and not path.exists():
        raise ValueError(f"{output} is not empty and holds no frame shards; choose another output")
    with written_beside(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # another process was first; begin_plan compares
        except OSError:  # no hard links here: the last one wins, and sidecars name their plan
            if not path.exists():
                temporary.replace(path)
