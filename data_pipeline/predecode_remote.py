# SPDX-License-Identifier: Apache-2.0
"""A predecode job whose output is a URL (gs://, s3://): shards are made here and then sent.

Storages replace a file as a whole or not at all, and the sidecar is sent last, so what holds for a
folder holds there. For training the folder is mounted or copied.
"""

import json
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.frame_shard_writer import shard_path
from data_pipeline.predecode_plan import PLAN, Plan
from data_pipeline.remote_files import file_system


class RemotePlan(Plan):
    """`output` is a temporary folder here, `name` the URL."""

    def __init__(self, url: str):
        """FileNotFoundError if there is no plan."""
        self._url, self._storage = url.rstrip("/"), file_system(url)
        try:
            data: Any = self._storage.cat_file(f"{self._url}/{PLAN}")
        except FileNotFoundError:
            raise FileNotFoundError(f"{url} holds no plan yet: say what the input is") from None
        folder = Path(tempfile.mkdtemp(prefix="predecode-output-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        (folder / PLAN).write_bytes(data)
        super().__init__(folder)
        self.name = self._url
        self.names()

    def names(self) -> set[str]:
        self._sizes = _sizes(self._storage, self._url)
        return set(self._sizes)

    def size(self, name: str) -> int | None:
        """As of the last listing: a shard that another process made since is made twice."""
        return self._sizes.get(name)

    def read_sidecar(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            data: Any = self._storage.cat_file(f"{self._url}/{path.name}")
            path.write_bytes(data)
        return json.loads(path.read_text())

    def publish(self, shard: int) -> None:
        record = shard_path(self.output, shard, "array_record")
        if record.exists():
            self._send(record)
            record.unlink()
        self._send(shard_path(self.output, shard, "json"))

    def publish_set(self) -> None:
        for name in ("quarantine.jsonl", "index.npz", "manifest.json"):
            if (self.output / name).exists():
                self._send(self.output / name)

    def _send(self, path: Path) -> None:
        self._storage.put_file(str(path), f"{self._url}/{path.name}")
        self._sizes[path.name] = path.stat().st_size


def write_first(url: str, data: bytes) -> None:
    """The plan, unless another process was faster. ValueError if other things lie there."""
    storage = file_system(url)
    storage.makedirs(url, exist_ok=True)
    if any(name != PLAN for name in _sizes(storage, url)) and PLAN not in _sizes(storage, url):
        raise ValueError(f"{url} is not empty and holds no frame shards; choose another output")
    with suppress(FileExistsError):
        storage.pipe_file(f"{url.rstrip('/')}/{PLAN}", data, mode="create")


def _sizes(storage: Any, url: str) -> dict[str, int]:
    """Name -> bytes of what lies there."""
    storage.invalidate_cache()
    try:
        entries = storage.ls(url, detail=True)
    except FileNotFoundError:
        return {}
    names = ((entry["name"].rstrip("/").rpartition("/")[2], entry) for entry in entries)
    return {name: entry["size"] for name, entry in names if name}
