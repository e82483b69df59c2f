# SPDX-License-Identifier: Apache-2.0
"""Which files lie in a folder or match a pattern, local or remote, with their sizes in bytes.

Sizes come with the listing, so a remote file costs no request of its own; -1 = it does not say.
Hidden files and folders (.git, ._clip.mp4) are left out.
"""

import os
import re
from collections.abc import Iterator
from typing import Any, cast

from fsspec.utils import glob_translate

from data_pipeline.remote_files import file_system, is_http, is_remote, real_fault, relative

_MOST_NAMES = 1_000_000  # that braces may stand for
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def list_folder(folder: str) -> list[tuple[str, int]]:
    """(path, bytes) of every file below, sorted.

    Links are followed, except back to a folder they are in; a link to nowhere is listed too, so
    that somebody will miss its file.
    """
    if not is_remote(folder):
        return sorted(_walk(folder, None))
    try:
        found = file_system(folder).find(folder, detail=True, **_strictly(folder))
    except FileNotFoundError as error:
        raise (real_fault(error) or FileNotFoundError(f"there is no folder {folder}")) from None
    return _remote(folder, folder, cast(dict, found))


def is_pattern(path: str) -> bool:
    """Whether it has *, [ or (outside of http, where it starts a query) ? in it."""
    return any(c in path for c in ("*[" if is_http(path) else "*?["))


def literal_folder(pattern: str) -> str:
    """The folder in front of the first part that is not literal, '' for the current one."""
    plain = re.split(r"[*\[{]" if is_http(pattern) else r"[*?\[{]", pattern, maxsplit=1)[0]
    return plain[: plain.rfind("/") + 1]


def list_matches(pattern: str) -> list[tuple[str, int]]:
    """(path, bytes) of the files that *, ?, [] and, for folders of any depth, ** match; sorted."""
    folder = literal_folder(pattern)
    if is_remote(pattern):
        found = file_system(pattern).glob(pattern, detail=True, **_strictly(pattern))
        return _remote(pattern, folder, cast(dict, found))
    if not os.path.isdir(folder or "."):
        return []
    matches = re.compile(glob_translate(pattern)).match
    rest = pattern[len(folder) :]
    depth = None if "**" in rest else rest.count("/") + 1
    files = ((path.removeprefix("./"), size) for path, size in _walk(folder or ".", depth))
    return sorted(file for file in files if matches(file[0]))


def expand_braces(pattern: str) -> list[str]:
    """a-{000..123}.tar and a-{x,y}.tar as bash expands them; other braces stay as they are."""
    for braces in _BRACES.finditer(pattern):
        inner = braces[1]
        if span := _RANGE.fullmatch(inner):
            first, last = int(span[1]), int(span[2])
            step = 1 if last >= first else -1
            padded = any(end != "0" and end.startswith("0") for end in span.groups())
            width = max(map(len, span.groups())) if padded else 0
            if abs(last - first) >= _MOST_NAMES:
                raise ValueError(f"{pattern}: {braces[0]} stands for more than {_MOST_NAMES} names")
            parts = [f"{number:0{width}}" for number in range(first, last + step, step)]
        elif "," in inner:
            parts = inner.split(",")
        else:
            continue
        before, after = pattern[: braces.start()], pattern[braces.end() :]
        names = []
        for part in parts:
            names += expand_braces(before + part + after)
            if len(names) > _MOST_NAMES:
                raise ValueError(f"{pattern} stands for more than {_MOST_NAMES} names")
        return names
    return [pattern]


def _strictly(url: str) -> dict[str, Any]:
    """On http, which is listed page by page, a page that fails would be left out quietly."""
    return {"on_error": "raise"} if is_http(url) else {}


def _remote(source: str, folder: str, found: dict[str, dict[str, Any]]) -> list[tuple[str, int]]:
    system = file_system(source)
    files = []
    for name, entry in found.items():
        path, size = system.unstrip_protocol(name), entry.get("size")
        hidden = any(part.startswith(".") for part in relative(path, folder).split("/"))
        if entry.get("type") == "file" and not hidden:
            files.append((path, -1 if size is None else int(size)))
    system.invalidate_cache()  # a million files take a gigabyte of it
    return sorted(files)


def _walk(
    folder: str, depth: int | None, above: tuple[tuple[int, int], ...] = ()
) -> Iterator[tuple[str, int]]:
    """`above` are the inodes of the folders that this one is in."""
    here = os.stat(folder)
    inode = (here.st_dev, here.st_ino)
    if inode in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
                size = entry.stat().st_size if is_file else -1
                is_file = is_file or (entry.is_symlink() and not os.path.exists(entry.path))
            except OSError:  # a link to itself, or what was removed this moment
                is_folder, is_file, size = False, True, -1
            if is_folder and depth != 1:
                yield from _walk(entry.path, depth and depth - 1, (*above, inode))
            elif is_file:
                yield entry.path, size
