# SPDX-License-Identifier: Apache-2.0
"""Writes frame shards: data_pipeline/frame_shards.py describes the format and reads it.

A shard is one ArrayRecord file and one JSON sidecar that says what is in it; the sidecar comes
last, so a shard counts as finished when it exists. `write_manifest` makes a set of finished shards
readable. Each of these steps may be done by any process, twice, or be interrupted.
"""

import hashlib
import io
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipeline.frame_records import MAGIC, MediaInfo, ShardSpec
from data_pipeline.frame_shards import INDEX_DTYPES, MANIFEST_VERSION

_MAX_SHARD_MEDIA = 4096  # bounds the work an interrupted job repeats when media are tiny
_PER_SHARD = ("file", "records", "bytes", "sha256")  # of a sidecar, repeated in the manifest


def temporary_path(path: Path) -> Path:
    """Beside `path`, of a name that no other process uses."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")


@contextmanager
def written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A temporary file beside `path` that holds `data`, also after a power cut; it goes at last."""
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Either the old file or the whole new one, even after a power cut or with two writers."""
    while True:
        try:
            with written_beside(path, data) as temporary:
                temporary.replace(path)
            return
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            # Another process has completed the set and cleared what it took for a leftover.


def shard_path(directory: Path, number: int, suffix: str) -> Path:
    """`suffix` 'array_record' or 'json'."""
    return directory / f"frames-{number:05d}.{suffix}"


class ShardFile:
    """One shard in the making; nothing is visible before `commit`."""

    def __init__(self, directory: Path, number: int):
        self.path = shard_path(directory, number, "array_record")
        self.sidecar = shard_path(directory, number, "json")
        self.media: list[dict[str, Any]] = []
        self.rejected: list[dict[str, str]] = []
        self.records = self.bytes = 0
        self._writer = None
        self._temporary = temporary_path(self.path)

    def add(self, info: MediaInfo, records: Iterable[bytes], **facts: Any) -> None:
        """Stores one medium; `facts` go to its entry in the sidecar."""
        if self._writer is None:
            self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1,uncompressed")
        self.media.append({**asdict(info), "record": self.records, **facts})
        for record in records:
            with self._faults():
                self._writer.write(record)
            self.records += 1
            self.bytes += len(record)

    def reject(self, media_id: str, reason: str, detail: str) -> None:
        """Notes a medium that could not be stored."""
        self.rejected.append({"id": media_id, "reason": reason, "detail": detail})

    def commit(self, **facts: Any) -> dict[str, Any]:
        """Makes the shard a finished one; returns its sidecar, `facts` included.

        ValueError if it cannot be written, because the disk is full for example.
        """
        shard: dict[str, Any] = {"file": None, "records": self.records, "bytes": 0, "sha256": None}
        try:
            if self._writer is not None:
                with self._faults():
                    self._writer.close()
                with self._temporary.open("rb+") as f:
                    os.fsync(f.fileno())
                    shard["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
                    shard["bytes"] = f.tell()
                self._temporary.replace(self.path)
                shard["file"] = self.path.name
        finally:
            self.discard()
        shard |= {**facts, "media": self.media, "rejected": self.rejected}
        write_atomic(self.sidecar, json.dumps(shard).encode())
        return shard

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what ArrayRecord makes of a full disk
            raise ValueError(f"{self.path} cannot be written: {error}") from error

    def discard(self) -> None:
        """Leaves no file behind."""
        if self._writer is not None and self._writer.is_open():
            with suppress(RuntimeError):  # a full disk; the file is not wanted any more
                self._writer.close()
        self._temporary.unlink(missing_ok=True)


def write_manifest(
    directory: Path, spec: ShardSpec, sidecars: Iterable[dict[str, Any]], facts: dict[str, Any]
) -> dict[str, Any]:
    """Index and manifest of all finished shards, in order; returns the manifest.

    `facts` are added to the manifest. ValueError if nothing was stored.
    """
    ids, shards, reasons = [], [], Counter()
    dtypes = {**INDEX_DTYPES, "is_video": np.bool_}
    columns = {name: [np.empty(0, dtype)] for name, dtype in dtypes.items()}
    sources, source_bytes = hashlib.sha256(), 0
    for number, sidecar in enumerate(sidecars):
        shards.append({k: sidecar[k] for k in _PER_SHARD} | {"media": len(sidecar["media"])})
        reasons.update(entry["reason"] for entry in sidecar["rejected"])
        rows = [{**m, "shard": number, "is_video": m["kind"] == "video"} for m in sidecar["media"]]
        for name, dtype in dtypes.items():
            columns[name].append(np.array([row[name] for row in rows], dtype))
        for row in rows:
            ids.append(row["id"])
            source_bytes += row.get("source_bytes", 0)
            sources.update(f"{row.get('source_sha256')} {row['id']}\0".encode())
    rejected = dict(reasons.most_common())
    if not ids:
        hint = "; --root says which folder names are relative to" * ("missing" in rejected)
        raise ValueError(
            f"{directory}: nothing to store, all media were rejected: {rejected}; see "
            f"quarantine.jsonl{hint}"
        )
    arrays: dict[str, Any] = {name: np.concatenate(parts) for name, parts in columns.items()}
    # NUL cannot occur in a path, so it separates the names.
    arrays["ids"] = np.frombuffer("\0".join(ids).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    index = buffer.getvalue()
    write_atomic(directory / "index.npz", index)
    manifest = {
        "format": MAGIC.decode(),
        "version": MANIFEST_VERSION,
        "spec": asdict(spec),
        "media": len(ids),
        "videos": int(arrays["is_video"].sum()),
        "frames": int(arrays["stored_frames"].sum()),
        "seconds": round(float(arrays["duration"].sum()), 3),
        "bytes": sum(shard["bytes"] for shard in shards),
        "rejected": rejected,
        "source_bytes": source_bytes,
        "sources_sha256": sources.hexdigest(),  # over "sha256 id\0" of every stored medium
        "index_sha256": hashlib.sha256(index).hexdigest(),
        **facts,
        "shards": shards,
    }
    write_atomic(directory / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest


def write_quarantine(directory: Path, sidecars: Iterable[dict[str, Any]]) -> None:
    """`quarantine.jsonl`: all rejected media, one JSON object with id, reason, detail a line."""
    entries = (entry for sidecar in sidecars for entry in sidecar["rejected"])
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    write_atomic(directory / "quarantine.jsonl", "".join(lines).encode())


class FrameShardWriter:
    """Appends media to shards of about `shard_bytes`; every finished shard survives a crash.

    Opening a directory again continues after its last finished shard: `finished` media (stored or
    rejected, in the order they were given) need not be given again. For one process; large jobs
    plan their shards beforehand (predecode_plan.py).
    """

    def __init__(self, directory: str | Path, spec: ShardSpec, shard_bytes: int = 256 << 20):
        self.directory, self.spec, self.shard_bytes = Path(directory), spec, shard_bytes
        if (self.directory / "manifest.json").exists():
            raise FileExistsError(f"{self.directory} is a complete set of frame shards already")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._shards: list[dict[str, Any]] = []
        while (sidecar := shard_path(self.directory, len(self._shards), "json")).exists():
            self._shards.append(json.loads(sidecar.read_text()))
        self._ids = {row["id"] for shard in self._shards for row in shard["media"]}
        self._open = ShardFile(self.directory, len(self._shards))

    @property
    def finished(self) -> int:
        return sum(len(shard["media"]) + len(shard["rejected"]) for shard in self._shards)

    def add(
        self, info: MediaInfo, records: Sequence[bytes], notes: dict[str, str] | None = None
    ) -> None:
        """Stores one medium, all of its records in one shard; notes go to the shard's sidecar."""
        if info.id in self._ids:
            raise ValueError(f"{self.directory}: {info.id!r} was added twice")
        self._ids.add(info.id)
        self._open.add(info, records, notes=notes or {})
        self._roll()

    def reject(self, media_id: str, reason: str, detail: str) -> None:
        """Notes a medium that could not be stored."""
        self._open.reject(media_id, reason, detail)
        self._roll()

    def _roll(self) -> None:
        media = len(self._open.media) + len(self._open.rejected)
        if self._open.bytes >= self.shard_bytes or media >= _MAX_SHARD_MEDIA:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._open.media or self._open.rejected:
            self._shards.append(self._open.commit())
            self._open = ShardFile(self.directory, len(self._shards))

    def close(self) -> dict[str, Any]:
        """Finishes the last shard and writes index and manifest; returns the manifest."""
        self._finish_shard()
        return write_manifest(self.directory, self.spec, self._shards, {})
