# SPDX-License-Identifier: Apache-2.0
"""Makes a damaged folder of frame shards sound again; good shards are not touched.

A damaged shard is written anew with its good media, found by what their records say of themselves,
so a repair that was interrupted anywhere can be done again. What index and manifest say is then
gathered from the sidecars. Every file is replaced as a whole or not at all.
"""

import json
import struct
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from data_pipeline.frame_records import MAGIC, MediaInfo, ShardSpec, decode_segment
from data_pipeline.frame_shard_writer import (
    ShardFile,
    write_atomic,
    write_manifest,
    write_quarantine,
)
from data_pipeline.predecode import merge
from data_pipeline.predecode_plan import DEFAULTS, Plan
from data_pipeline.record_files import open_records
from data_pipeline.shard_checks import (
    RECORD_ERRORS,
    check_folder,
    check_record,
    check_shard,
    sidecar_is_right,
)
from data_pipeline.shard_folder import (
    COLUMNS,
    FACTS,
    PLAN,
    Folder,
    Problem,
    ShardTask,
    open_folder,
    read_sidecar,
)

DAMAGED = "damaged"  # the reason of media that a repair dropped
_BLOCK_BYTES, _BLOCK_HEADER = 1 << 16, 24  # of Riegeli, the format below ArrayRecord
_Medium = tuple[dict[str, Any], list[bytes]]  # entry of the sidecar, records
_INFO = [f.name for f in fields(MediaInfo)]
_WRITTEN = ("format", "version", "spec", "media", "videos", "frames", "seconds", "bytes")
_WRITTEN += ("rejected", "source_bytes", "sources_sha256", "index_sha256", "shards")


@dataclass
class Repair:
    """What was done, a line each, and what could not be mended."""

    lines: list[str] = field(default_factory=list)
    remaining: list[Problem] = field(default_factory=list)


def repair(
    path: str | Path,
    redo: bool = False,
    dry_run: bool = False,
    decode: bool = False,
    workers: int = 0,
) -> Repair:
    """Drops damaged media from their shards and writes again what describes the folder.

    `redo` drops nothing: it only removes the sidecars of shards that are damaged, or from which an
    earlier repair dropped media, so that `predecode` makes them again. FileNotFoundError if the
    folder holds no frame shards, ValueError if no sound medium is left.
    """
    folder, done = open_folder(Path(path)), Repair()
    plan = None  # also if it is damaged: then manifest and index say enough
    if (folder.path / PLAN).exists() and not any(p.file == PLAN for p in folder.problems):
        plan = Plan(folder.path)
    damaged = check_folder(folder, decode, workers)
    if redo and plan is None:
        raise ValueError(f"{path} has no {PLAN}: predecode cannot make single shards of it again")
    for task in folder.tasks(decode):
        problems = damaged.get(task.number, [])
        if redo and (problems or _lacks_media(task)):
            _forget(task, problems, dry_run, done)
        elif problems:
            _mend(task, problems, folder, plan, dry_run, done)
    if (redo and done.lines) or not (damaged or folder.problems):
        return done
    complete = folder.manifest is not None or (plan and len(folder.shards) == len(plan))
    if not complete:
        done.remaining += [p for p in folder.problems if p.file == "manifest.json"]
    elif not done.remaining:
        done.lines.append("index.npz, manifest.json: written again")
        if not dry_run:
            _describe(folder, plan)
    if not dry_run:
        found = _remaining(folder.path, damaged, decode)
        done.remaining += [problem for problem in found if problem not in done.remaining]
    return done


def _lacks_media(task: ShardTask) -> bool:
    return any(entry.get("reason") == DAMAGED for entry in read_sidecar(task)["rejected"])


def _forget(task: ShardTask, problems: list[Problem], dry_run: bool, done: Repair) -> None:
    done.lines += map(str, problems)
    done.lines.append(f"{task.sidecar}: removed; rerunning predecode makes its shard again")
    if not dry_run:
        (task.folder / task.sidecar).unlink(missing_ok=True)


def _mend(
    task: ShardTask,
    problems: list[Problem],
    folder: Folder,
    plan: Plan | None,
    dry_run: bool,
    done: Repair,
) -> None:
    """Makes one shard and its sidecar sound."""
    there = None
    with suppress(FileNotFoundError, ValueError):
        there = read_sidecar(task)
    if there and sidecar_is_right(task, there):
        sidecar = there
    elif task.facts is None or task.media is None:
        done.remaining += problems  # nothing says what was in there
        return
    else:
        sidecar = _sidecar_of(task, there or _lost_sidecar(task, folder, plan))
    if any(problem.file == sidecar["file"] for problem in problems):
        try:
            good, dropped = _salvage(task, sidecar)
        except OSError as error:  # of the disk, not of the data: nothing may be given up
            done.remaining.append(Problem(sidecar["file"], f"cannot be read now: {error}"))
            return
        what = (
            f"written again, {len(good)} media kept" if good else "removed, nothing in it is good"
        )
        done.lines.append(f"{sidecar['file']}: {what}")
        done.lines += [f"{sidecar['file']}: {p.media_id!r} dropped: {p.what}" for p in dropped]
        if not dry_run:
            _rewrite(task, sidecar, good, dropped)
    elif sidecar != there:
        done.lines.append(f"{task.sidecar}: written again from index.npz")
        if not dry_run:
            write_atomic(task.folder / task.sidecar, json.dumps(sidecar).encode())


def _sidecar_of(task: ShardTask, there: dict[str, Any]) -> dict[str, Any]:
    """A sidecar as manifest and index have it, with what only the one there says."""
    assert task.facts is not None
    assert task.media is not None
    noted, media = {row["id"]: row for row in there["media"]}, []
    for row in task.media:
        known = noted.get(row["id"], {"notes": {}})
        columns = {k: row[k] for k in ("id", *COLUMNS)}
        media.append({**known, **columns, "kind": "video" if row["is_video"] else "image"})
    return {**there, **{k: task.facts[k] for k in FACTS}, "media": media}


def _lost_sidecar(task: ShardTask, folder: Folder, plan: Plan | None) -> dict[str, Any]:
    """What plan and quarantine know of the media that a shard does not hold."""
    sidecar: dict[str, Any] = {"media": [], "rejected": []}
    if plan and task.media is not None:
        sidecar |= {"plan": plan.digest, "made_with": {}}
        for name, known in (folder.manifest or {}).get("made_with", {}).items():
            sidecar["made_with"][name] = known[0]
        stored, reasons = {row["id"] for row in task.media}, _quarantine(folder.path)
        unknown = {"reason": "unknown", "detail": "its shard's sidecar was lost"}
        sidecar["rejected"] = [
            reasons.get(medium.id, {"id": medium.id, **unknown})
            for medium in plan.media(task.number)
            if medium.id not in stored
        ]
    return sidecar


def _quarantine(path: Path) -> dict[str, dict[str, str]]:
    try:
        lines = (path / "quarantine.jsonl").read_bytes().splitlines()
        return {entry["id"]: entry for entry in map(json.loads, lines)}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _salvage(task: ShardTask, sidecar: dict[str, Any]) -> tuple[list[_Medium], list[Problem]]:
    """The good media of a shard, and what is lost. OSError if the disk cannot say."""
    found = _records(task.folder / sidecar["file"])
    good, dropped = [], []
    for row in sidecar["media"]:
        try:
            records = []
            for segment in range(-(-row["stored_frames"] // task.segment_frames)):
                if (row["id"], segment) not in found:
                    raise ValueError(f"segment {segment} is lost")
                records.append(found[row["id"], segment])
                check_record(records[-1], row, segment, task.segment_frames, task.decode)
            good.append((row, records))
        except RECORD_ERRORS as error:
            dropped.append(Problem(sidecar["file"], str(error), row["id"]))
    return good, dropped


def _records(path: Path) -> dict[tuple[str, int], bytes]:
    """The records of a file by id and segment; those that cannot be read are not there."""
    if not path.exists():
        return {}
    data = path.read_bytes()  # an OSError is the disk's; the reader would not say so
    try:
        reader = open_records(path)
    except RuntimeError:
        return _scattered_records(data)
    found = {}
    for number in range(reader.num_records()):
        with suppress(*RECORD_ERRORS):
            record = reader.read([number])[0]
            header, _ = decode_segment(record)
            found.setdefault((header["id"], header["seg"]), record)
    return found


def _scattered_records(file: bytes) -> dict[tuple[str, int], bytes]:
    """Where the end of a file is lost, readers find nothing; but each record has a magic.

    Whether a record is whole its frames' checksums tell. A Riegeli file is made of blocks, whose
    headers interrupt the records.
    """
    view, blocks = memoryview(file), range(0, len(file), _BLOCK_BYTES)
    data = b"".join(view[at + _BLOCK_HEADER : at + _BLOCK_BYTES] for at in blocks)
    found, at = {}, data.find(MAGIC)
    while at >= 0:
        with suppress(*RECORD_ERRORS):  # four bytes of a picture, or damage
            record = data[at : at + _length(data, at)]
            header, _ = decode_segment(record)
            found.setdefault((header["id"], header["seg"]), record)
        at = data.find(MAGIC, at + 1)
    return found


def _length(data: bytes, at: int) -> int:
    """Of the record that begins there, in bytes."""
    _, header_bytes, count = struct.unpack_from("<4sII", data, at)
    payload = 12 + header_bytes + 4 * (count + 1)
    return payload + struct.unpack_from("<I", data, at + payload - 4)[0]


def _rewrite(
    task: ShardTask, sidecar: dict[str, Any], good: list[_Medium], dropped: list[Problem]
) -> None:
    shard = ShardFile(task.folder, task.number)
    try:
        for row, records in good:
            notes = {k: v for k, v in row.items() if k not in (*_INFO, "record")}
            shard.add(MediaInfo(**{k: row[k] for k in _INFO}), records, **notes)
        shard.rejected += sidecar["rejected"]
        for problem in dropped:
            shard.reject(str(problem.media_id), DAMAGED, problem.what)
        known = (*FACTS, "media", "rejected")
        shard.commit(**{k: v for k, v in sidecar.items() if k not in known})
    finally:
        shard.discard()
    if not good:
        (task.folder / sidecar["file"]).unlink(missing_ok=True)


def _describe(folder: Folder, plan: Plan | None) -> None:
    """Index, quarantine and manifest from the sidecars; what interrupted jobs left is deleted."""
    if plan:
        names = {f.name for f in fields(DEFAULTS)}
        planned = {k: v for k, v in plan.job.items() if k in names}
        merge(plan, replace(DEFAULTS, **planned, max_rejected=1.0))
    else:
        manifest = folder.manifest or {}
        names = {f.name for f in fields(ShardSpec)}
        spec = ShardSpec(**{k: v for k, v in folder.spec.items() if k in names})
        sidecars = [read_sidecar(task) for task in folder.tasks()]
        write_quarantine(folder.path, sidecars)
        facts = {k: v for k, v in manifest.items() if k not in _WRITTEN}
        write_manifest(folder.path, spec, sidecars, facts)
    for problem in folder.problems:
        if problem.file.endswith(".tmp"):
            (folder.path / problem.file).unlink(missing_ok=True)


def _remaining(path: Path, damaged: dict[int, list[Problem]], decode: bool) -> list[Problem]:
    folder = open_folder(path)
    mended = (task for task in folder.tasks(decode) if task.number in damaged)
    return folder.problems + [problem for task in mended for problem in check_shard(task)]
