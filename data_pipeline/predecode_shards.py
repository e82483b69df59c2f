# SPDX-License-Identifier: Apache-2.0
"""Makes planned shards: files are decoded in processes of their own, shards are written in order.

A shard depends on its media and the plan alone, not on the number of workers nor on who makes it.
What a file does to its decoder ends as an entry among the shard's rejected media.
"""

import errno
import glob
import importlib.metadata
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
from av.error import FFmpegError

from data_pipeline.frame_records import MediaInfo, ShardSpec
from data_pipeline.frame_shard_writer import ShardFile
from data_pipeline.media_encoding import (
    Beat,
    MediaLimits,
    RecordSpool,
    encode_image,
    encode_video,
    source_facts,
)
from data_pipeline.media_files import Medium, local_copy
from data_pipeline.predecode_plan import Plan, PredecodeConfig
from data_pipeline.video import VideoError
from data_pipeline.worker_pool import Casualty, run_isolated

_BATCH_MEDIA, _BATCH_BYTES = 16, 32 << 20  # what a worker is given at a time, at most
_ATTEMPTS, _PAUSE_SECONDS = 3, 2.0  # where a disk or a network fails
_LOST = ("missing", "io")  # reasons that say something about the machine
_NO_SPACE = "no_space"


class Status(Protocol):
    """Hears how far the job is."""

    def show(self, frames: int | None = None) -> None: ...
    def count(self, bad: bool) -> None: ...


class _Task(NamedTuple):
    medium: Medium
    spec: ShardSpec
    limits: MediaLimits
    spool: str  # where records go that are too many for memory


class _Stored(NamedTuple):
    info: MediaInfo
    records: RecordSpool
    facts: dict[str, Any]


def make_shards(
    plan: Plan, shards: Sequence[int], config: PredecodeConfig, status: Status | None = None
) -> None:
    """Makes those of `shards` that are unfinished, one after the other, each at once or not at all.

    ValueError if the disk is full, FileNotFoundError if all media of a shard are gone that were
    there when it was planned: then something is wrong with this machine.
    """
    todo = [shard for shard in shards if plan.sidecar(shard) is None]
    with _scratch_folder() as scratch:
        spec, limits = config.spec, config.media_limits
        tasks = [
            [_Task(m, spec, limits, f"{scratch}/{shard}-{k}") for k, m in enumerate(media)]
            for shard, media in ((shard, plan.media(shard)) for shard in todo)
        ]
        batches = [batch for group in tasks for batch in _batches(group)]
        workers = config.workers or os.cpu_count() or 1
        report = status.show if status else lambda frames: None
        results = run_isolated(_encode, batches, workers, config.task_limits, report)
        try:
            for shard, group in zip(todo, tasks, strict=True):
                _make_shard(plan, shard, group, results, status)
        finally:
            results.close()


def _scratch_folder() -> tempfile.TemporaryDirectory:
    """In TMPDIR; those of processes that were killed on this machine go."""
    start = f"predecode-{socket.gethostname()}-"
    for folder in Path(tempfile.gettempdir()).glob(glob.escape(start) + "*"):
        try:
            os.kill(int(folder.name.split("-")[-2]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError):
            pass  # another user's
    return tempfile.TemporaryDirectory(prefix=f"{start}{os.getpid()}-")


def _make_shard(
    plan: Plan, number: int, tasks: Sequence[_Task], results: Iterator, status: Status | None
) -> None:
    shard = ShardFile(plan.output, number)
    try:
        for task, result in zip(tasks, results, strict=False):
            if isinstance(result, _Stored):
                shard.add(result.info, result.records, **result.facts)
            elif result.reason == _NO_SPACE:
                raise ValueError(f"{result.detail}: TMPDIR may name a folder with more space")
            else:
                shard.reject(task.medium.id, result.reason, result.detail)
            Path(task.spool).unlink(missing_ok=True)
            if status:
                status.count(isinstance(result, Casualty))
        lost = all(entry["reason"] in _LOST for entry in shard.rejected)
        if lost and not shard.media and all(task.medium.size > 0 for task in tasks):
            raise FileNotFoundError(
                f"none of the {len(tasks)} media of shard {number} can be read, though they were "
                f"there when it was planned ({tasks[0].medium.path}): is the input mounted here?"
            )
        if plan.sidecar(number) is None:  # else another process was faster: the same shard
            try:
                shard.commit(plan=plan.digest, made_with=decoder_versions())
            except FileNotFoundError:  # faster by little: the set is complete and cleared already
                if plan.sidecar(number) is None:
                    raise
            plan.publish(number)
    finally:
        shard.discard()


def _encode(task: _Task, beat: Beat) -> _Stored | Casualty:
    """In a process of its own. Whatever a file does to the decoder, the others must go on."""
    for attempt in range(_ATTEMPTS):
        try:
            return _encode_once(task, beat)
        except VideoError as error:
            return Casualty(error.reason, error.detail)
        except MemoryError:
            return Casualty("memory", "there is not enough memory to decode it")
        except OSError as error:
            if isinstance(error, FFmpegError):
                return Casualty("error", f"{type(error).__name__}: {error}")
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return Casualty(_NO_SPACE, str(error))
            failure = Casualty("io", f"{type(error).__name__}: {error}")
            if isinstance(error, PermissionError):
                return failure
            if attempt < _ATTEMPTS - 1:
                time.sleep(_PAUSE_SECONDS * 2**attempt)
                beat(0)
        except Exception as error:
            return Casualty("error", f"{type(error).__name__}: {error}")
    return failure


def _encode_once(task: _Task, beat: Beat) -> _Stored:
    medium, spool = task.medium, RecordSpool(Path(task.spool))
    with ExitStack() as stack:
        stack.callback(spool.close)
        path = stack.enter_context(local_copy(medium, beat))
        try:
            facts = source_facts(path, beat)
        except FileNotFoundError:
            raise VideoError(path, "missing", "there is no such file") from None
        if medium.kind == "image":
            info, records, notes = encode_image(path, medium.id, task.spec, task.limits)
            for record in records:
                spool.append(record)
        else:
            encode = (path, medium.id, task.spec, beat, task.limits, spool)
            info, _, notes = encode_video(*encode)
    return _Stored(info, spool, {"notes": notes, **facts})


def _batches(tasks: Sequence[_Task]) -> list[list[_Task]]:
    batches, size = [[]], 0
    for task in tasks:
        size += max(0, task.medium.size)
        if batches[-1] and (len(batches[-1]) == _BATCH_MEDIA or size > _BATCH_BYTES):
            batches.append([])
            size = 0
        batches[-1].append(task)
    return batches


@cache
def decoder_versions() -> dict[str, str]:
    """Of everything that decides a stored frame's bytes."""
    names = ("av", "numpy", "pillow", "simplejpeg")
    versions = {name: importlib.metadata.version(name) for name in names}
    libraries = {k: ".".join(map(str, v)) for k, v in av.library_versions.items()}
    return versions | {k: libraries[k] for k in ("libavcodec", "libavformat", "libswscale")}
