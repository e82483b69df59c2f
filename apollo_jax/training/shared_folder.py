# SPDX-License-Identifier: Apache-2.0
"""Whether the folder of a run is one folder for all of its processes: each saves its part there."""

import itertools
import json
import secrets
import time
from pathlib import Path

import jax

from apollo_jax.training import processes

_SECONDS = 60.0  # for which a network's file system may show an old list of files
_asked = itertools.count()  # the service takes every key once


def refuse_apart(folder: Path, seconds: float) -> None:
    """ValueError, in all processes, unless all see in `folder` what process 0 writes there.

    Without it, a checkpoint lacks the parts that lie elsewhere, and the next start may hang.

    Args:
      seconds: that the processes wait for each other.
    """
    if jax.process_count() == 1:
        return
    client, me = processes.state().client, jax.process_index()
    key, sign = f"apollo/folder/{next(_asked)}", folder / f".{secrets.token_hex(8)}"
    if me == 0:
        folder.mkdir(parents=True, exist_ok=True)
        sign.touch()
        client.key_value_set(key, json.dumps([str(folder.absolute()), sign.name]))
    where, name = json.loads(client.blocking_key_value_get(key, round(1000 * seconds)))
    if not _comes(folder, name, min(_SECONDS, seconds / 2)):
        where = f"{folder.absolute()}, where nothing is that process 0 writes; all need one folder"
    try:
        processes.same("folder", {"--workdir": where}, seconds)
    finally:
        if me == 0:
            sign.unlink()


def _comes(folder: Path, name: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        if folder.is_dir() and any(path.name == name for path in folder.iterdir()):
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
