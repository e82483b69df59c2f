# SPDX-License-Identifier: Apache-2.0
"""Writes frame shards: data_pipeline/frame_shards.py describes the format and reads it."""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipeline.frame_shards import INDEX_DTYPES, MAGIC, MediaInfo, ShardSpec

_MAX_SHARD_MEDIA = 4096  # bounds the work an interrupted job repeats when media are tiny


def write_atomic(path: Path, data: bytes) -> None:
    """Either the old file or the whole new one, even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


class FrameShardWriter:
    """Appends media to shards; every finished shard survives a crash.

    Opening a directory again continues after its last finished shard: `finished` media (stored or
    rejected, in the order they were given) need not be given again.
    """

    def __init__(self, directory: str | Path, spec: ShardSpec, shard_bytes: int = 256 << 20):
        self.directory, self.spec, self.shard_bytes = Path(directory), spec, shard_bytes
        if (self.directory / "manifest.json").exists():
            raise FileExistsError(f"{self.directory} is a complete set of frame shards already")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._shards = []
        while (sidecar := self._path(len(self._shards), "json")).exists():
            self._shards.append(json.loads(sidecar.read_text()))
        self._ids = {row["id"] for shard in self._shards for row in shard["media"]}
        self._open_shard()

    @property
    def finished(self) -> int:
        return sum(len(shard["media"]) + len(shard["rejected"]) for shard in self._shards)

    @property
    def rejected(self) -> list[dict[str, str]]:
        shards = [*self._shards, {"rejected": self._rejected}]
        return [entry for shard in shards for entry in shard["rejected"]]

    def _path(self, shard: int, suffix: str) -> Path:
        return self.directory / f"frames-{shard:05d}.{suffix}"

    def _open_shard(self) -> None:
        self._media, self._rejected, self._records, self._bytes = [], [], 0, 0
        self._writer = None

    def add(
        self, info: MediaInfo, records: Sequence[bytes], notes: dict[str, str] | None = None
    ) -> None:
        """Stores one medium, all of its records in one shard; notes go to the shard's sidecar."""
        if info.id in self._ids:
            raise ValueError(f"{self.directory}: {info.id!r} was added twice")
        if self._writer is None:
            temporary = str(self._path(len(self._shards), "array_record.tmp"))
            self._writer = ArrayRecordWriter(temporary, "group_size:1,uncompressed")
        self._ids.add(info.id)
        self._media.append({**asdict(info), "record": self._records, "notes": notes or {}})
        for record in records:
            self._writer.write(record)
        self._records += len(records)
        self._bytes += sum(map(len, records))
        self._roll()

    def reject(self, media_id: str, reason: str, detail: str) -> None:
        """Notes a medium that could not be stored."""
        self._rejected.append({"id": media_id, "reason": reason, "detail": detail})
        self._roll()

    def _roll(self) -> None:
        media = len(self._media) + len(self._rejected)
        if self._bytes >= self.shard_bytes or media >= _MAX_SHARD_MEDIA:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if not self._media and not self._rejected:
            return
        shard = {"file": None, "records": self._records, "bytes": 0, "sha256": None}
        if self._writer is not None:
            self._writer.close()
            path = self._path(len(self._shards), "array_record")
            with path.with_name(path.name + ".tmp").open("rb+") as f:
                os.fsync(f.fileno())
                shard["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
                shard["bytes"] = f.tell()
            path.with_name(path.name + ".tmp").replace(path)
            shard["file"] = path.name
        shard |= {"media": self._media, "rejected": self._rejected}
        # The sidecar comes last: a shard counts as finished only when it exists.
        write_atomic(self._path(len(self._shards), "json"), json.dumps(shard).encode())
        self._shards.append(shard)
        self._open_shard()

    def close(self) -> dict[str, Any]:
        """Finishes the last shard and writes index and manifest; returns the manifest."""
        self._finish_shard()
        reasons = dict(Counter(entry["reason"] for entry in self.rejected).most_common())
        if not self._ids:
            raise ValueError(
                f"{self.directory}: nothing to store, all media were rejected: {reasons}"
            )
        rows = [{**m, "shard": s} for s, shard in enumerate(self._shards) for m in shard["media"]]
        columns = {k: np.array([r[k] for r in rows], t) for k, t in INDEX_DTYPES.items()}
        # NUL cannot occur in a path, so it separates the names.
        names = "\0".join(row["id"] for row in rows).encode()
        columns["ids"] = np.frombuffer(names, np.uint8)
        columns["is_video"] = np.array([row["kind"] == "video" for row in rows])
        index = io.BytesIO()
        np.savez(index, allow_pickle=False, **columns)
        write_atomic(self.directory / "index.npz", index.getvalue())
        facts = [{k: s[k] for k in ("file", "records", "bytes", "sha256")} for s in self._shards]
        manifest = {
            "format": MAGIC.decode(),
            "spec": asdict(self.spec),
            "media": len(rows),
            "frames": int(columns["stored_frames"].sum()),
            "rejected": reasons,
            "shards": facts,
        }
        write_atomic(self.directory / "manifest.json", json.dumps(manifest, indent=1).encode())
        return manifest
