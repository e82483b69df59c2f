# SPDX-License-Identifier: Apache-2.0
"""Writing the published layout: a whole Apollo, or its parts each in their own folder."""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apollo_jax.checkpoints import companions
from apollo_jax.checkpoints.checkpoint import Checkpoint, write_part
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.models import apollo


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A path to write to, which becomes `target` if nothing goes wrong, and vanishes if it does.

    What `target` was before is replaced last.
    """
    own = f"{socket.gethostname()}-{os.getpid()}"
    temporary = target.with_name(f"{target.name}.tmp-{own}{target.suffix}")
    old = target.with_name(f"{target.name}.old-{own}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        companions.sync(temporary)
        if target.exists():
            os.rename(target, old)
        os.rename(temporary, target)
        _remove(old)
    finally:
        _remove(temporary)


def claim(target: Path, overwrite: bool) -> None:
    """Make sure that `target` may be written; clear away what a killed process left of it.

    FileExistsError if it is there and not to be overwritten, ValueError if it is no checkpoint.
    """
    if target.parent.is_dir():
        _clear(target)
    if target.exists() and not overwrite:
        how = "pass overwrite=True (--overwrite)"
        raise FileExistsError(f"{target} exists; choose another path or {how}")
    if target.is_dir() and any(target.iterdir()) and not _is_ours(target):
        raise ValueError(f"{target} holds something else than a checkpoint: not overwritten")


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a checkpoint, or the parts of one each in its own."""
    return any((at / companions.CONFIG).is_file() for at in (folder, *folder.iterdir()))


def _clear(target: Path) -> None:
    """Remove what processes of this host left that are no more; give back what one had moved."""
    name, host = re.escape(target.name), re.escape(socket.gethostname())
    for path in target.parent.iterdir():
        found = re.match(rf"{name}\.(tmp|old)-{host}-(\d+)", path.name)
        if found and (int(found[2]) == os.getpid() or not _alive(int(found[2]))):
            if found[1] == "old" and not target.exists():
                os.rename(path, target)
            _remove(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_apollo(
    folder: Path, checkpoint: Checkpoint, *, dtype: str | None, max_shard_size: str | int | None
) -> None:
    """The folder that the published PyTorch code loads."""
    config = checkpoint.config
    assert isinstance(config, apollo.Config)
    for name, part in folders(checkpoint).items():
        write_part(folder / name, part, dtype=dtype, max_shard_size=max_shard_size)
    files = checkpoint.files or fresh_root(checkpoint, dtype)
    companions.write(folder, files if dtype is None else companions.state_dtype(files, dtype))


def write_parts(
    folder: Path, checkpoint: Checkpoint, *, dtype: str | None, max_shard_size: str | int | None
) -> None:
    """The published folder of a part, or one for each part of an Apollo."""
    kw: Any = dict(dtype=dtype, max_shard_size=max_shard_size)
    if "" in checkpoint.parts:
        folder.mkdir(parents=True)
        return write_part(folder, checkpoint.parts[""], **kw)
    for name, part in folders(checkpoint).items():
        write_part(folder / name.rpartition("/")[2], part, **kw)


def folders(checkpoint: Checkpoint) -> dict[str, Any]:
    """The parts of an Apollo by their folders in the published layout."""
    config = checkpoint.config
    assert isinstance(config, apollo.Config)
    names = [f"{layout.TOWERS}/{name}" for name in config.towers]
    return dict(zip([*names, layout.CONNECTOR, layout.LLM], checkpoint.parts.values(), strict=True))


def fresh_root(checkpoint: Checkpoint, dtype: str | None) -> companions.Files:
    """The files outside the parts, of an Apollo that was never published."""
    parts = folders(checkpoint)
    configs = {
        name: companions.parse(part.files, companions.CONFIG, Path(name))
        for name, part in parts.items()
    }
    held = next(iter(parts[layout.LLM].tensors.stored.values())).dtype
    config: Any = checkpoint.config
    fresh = layout.published(config, configs, dtype or held)
    return {name: companions.dump(content) for name, content in fresh.items()}
