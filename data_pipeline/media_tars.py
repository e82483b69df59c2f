# SPDX-License-Identifier: Apache-2.0
"""WebDataset tars: where each file lies inside, so that it can be read without unpacking the rest.

The headers are read once, with all tars of a job side by side. WebDataset's key of a member is its
name up to the first dot of its last part; a sample is all the members of one key.
"""

import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import BinaryIO, NamedTuple

from data_pipeline.remote_files import is_http, open_file, patiently, real_fault

_READ_AT_A_TIME = 64 << 10  # bytes: the small files after a video come with its header
_TARS_AT_A_TIME = 16
# What tarfile raises for headers that lie, about sizes above all.
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, MemoryError)
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


class TarIndex(NamedTuple):
    """(name, offset, bytes) of a tar's files in their order; damage says why there may be more."""

    members: list[tuple[str, int, int]]
    damage: str = ""


def is_tar(path: str) -> bool:
    """ValueError for a compressed one, which has no offsets."""
    name = os.path.basename(path).partition("?")[0].lower()
    if name.endswith(_PACKED):
        raise ValueError(f"{path} is compressed: files inside cannot be reached; make it a .tar")
    return name.endswith(".tar")


def index_tars(paths: Sequence[str]) -> Iterator[TarIndex]:
    """In the order of `paths`; OSError for a tar that cannot be read, ValueError for a place that
    gives whole files only."""
    with ThreadPoolExecutor(_TARS_AT_A_TIME) as pool:
        yield from pool.map(partial(patiently, index_tar), paths)


def _opened(path: str) -> BinaryIO:
    try:
        return open_file(path, _READ_AT_A_TIME)
    except FileNotFoundError as error:
        raise (real_fault(error) or FileNotFoundError(f"there is no tar {path}")) from None


def index_tar(path: str) -> TarIndex:
    """Regular files and hard links to them; of several with one name the last, as tar unpacks."""
    members = {}
    with _opened(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue] # it keeps all
                    name = member.name.removeprefix("./")
                    if member.islnk() and member.linkname.removeprefix("./") in members:
                        members[name] = members[member.linkname.removeprefix("./")]
                    elif member.size < 0:
                        raise tarfile.ReadError(f"{name} has {member.size} bytes")
                    elif member.isreg() and not member.issparse():
                        members[name] = member.offset_data, member.size
                file.seek(tar.offset)
                if any(file.read(tarfile.BLOCKSIZE) or b"?"):
                    damage = f"no end after {len(members)} files: cut off or damaged"
                else:
                    damage = ""
        except _DAMAGE as error:
            if is_http(path) and isinstance(error, ValueError):
                raise ValueError(f"{path} cannot be read in parts: {error}") from None
            damage = f"{error} after {len(members)} files"
    return TarIndex([(name, *where) for name, where in members.items()], damage)
