# SPDX-License-Identifier: Apache-2.0
"""Which videos and images a job is about, and the names by which annotations know them.

An input is a folder, a pattern (`*`, `**`, `?`, `[]`, and braces as in `shard-{000..123}.tar`), a
manifest (see media_manifests.py), a WebDataset tar or one medium, or a Python list of such names;
each a local path or a URL. Its media have an order, which depends on nothing but the input:

    folder, pattern   sorted by path; hidden files are left out. A pattern finds tars or manifests
                      only if it ends like one, so captions beside videos are no lists of them
    braces            as bash expands them
    manifest          as it stands
    tar               as in the tar

An id is the path below the root (default: the folder, or the literal start of the pattern), and in
a manifest what that says. A tar's member has its name in the tar, as if unpacked in place, so a
folder and its tar give the same ids; with a root, the tar's path below it comes in front. Names
are compared as they are: case counts, and Unicode is not normalised. What is not there or cannot
be read is found out where it is read, except for the input itself and its tars and manifests.
"""

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_pipeline import remote_files
from data_pipeline.file_listing import (
    expand_braces,
    is_pattern,
    list_folder,
    list_matches,
    literal_folder,
)
from data_pipeline.media_manifests import MANIFESTS, is_manifest, read_manifest
from data_pipeline.media_tars import TarIndex, index_tars, is_tar
from data_pipeline.remote_files import is_remote, join, parent, relative
from data_pipeline.video import VideoError

_ENDINGS = {
    "video": "mp4 m4v mov mkv webm avi mpg mpeg ts wmv flv 3gp ogv gif",
    "image": "jpg jpeg png webp bmp tif tiff",
}
_KINDS = {f".{ending}": kind for kind, endings in _ENDINGS.items() for ending in endings.split()}
_STATS_AT_A_TIME, _STAT_THREADS = 1000, 16


class Medium(NamedTuple):
    """A file to store; its id is the name by which annotations know it."""

    id: str
    kind: str  # 'video' | 'image' | 'tar': a damaged one, for which the members it lost are unknown
    path: str  # a local path or a URL; for a tar's member the tar's
    size: int = -1  # bytes; -1: the listing did not say, or there is no such file
    offset: int = -1  # of a tar's member inside its tar; -1: the file as a whole


Names = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def find_media(source: Names, root: str | os.PathLike[str] | None = None) -> list[Medium]:
    """The media of an input, each once, in the order and with the ids that the module describes.

    FileNotFoundError if there is no such input, ValueError if it makes no sense, is empty, or
    gives one id to two media. Remote files are not asked one by one; local ones are, for sizes.
    """
    base = None if root is None else remote_files.as_path(root)
    what = "the list"
    if isinstance(source, str | os.PathLike):
        what = remote_files.as_path(source)
        found = _in_source(what, base)
    else:
        found = _in_list([remote_files.as_path(name) for name in source], base)
    try:
        media = _distinct(found)
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:
        if is_remote(what) or isinstance(error, OSError):  # every storage has its own
            raise ValueError(f"{what} cannot be read: {type(error).__name__}: {error}") from error
        raise
    if not media:
        raise ValueError(f"{what} names no videos or images{_others(what)}")
    for medium in {m.path.partition("://")[0]: m for m in media if is_remote(m.path)}.values():
        remote_files.require_storage(
            medium.path
        )  # a worker should not be the first to miss a backend
    _add_sizes(media)
    return media


@contextmanager
def local_copy(medium: Medium, beat: Callable[[int], None] = lambda steps: None) -> Iterator[Path]:
    """A path to decode a medium from: its own, or a temporary copy of what is remote or in a tar.

    The copy lies in TMPDIR and goes with the context, on Linux even if the process is killed.
    `beat(0)` is called while it is made. VideoError missing, unreadable or io (after repeated
    attempts); OSError if the disk is full.
    """
    if medium.kind == "tar":
        detail = "the tar is cut off or damaged, files may be lost; those before that are used"
        raise VideoError(medium.path, "unreadable", detail)
    if medium.offset < 0 and not is_remote(medium.path):
        if os.path.exists(medium.path) and not os.path.isfile(medium.path):
            raise VideoError(medium.path, "unreadable", "not a regular file")
        yield Path(medium.path)
        return
    with _temporary_file(medium) as (file, path):
        pieces = remote_files.read_range(
            medium.path, max(0, medium.offset), medium.size, lambda: beat(0)
        )
        while piece := _next_piece(pieces, medium):
            file.write(piece)
            beat(0)
        file.flush()
        yield path


def _next_piece(pieces: Iterator[bytes], medium: Medium) -> bytes:
    try:
        return next(pieces, b"")
    except FileNotFoundError as error:
        raise VideoError(medium.path, "missing", "there is no such file") from error
    except OSError as error:
        raise VideoError(medium.path, "io", str(error)) from error


@contextmanager
def _temporary_file(medium: Medium) -> Iterator[tuple[BinaryIO, Path]]:
    if sys.platform == "linux":
        with tempfile.TemporaryFile() as file:  # has no name, so no crash can leave it behind
            yield file, Path(f"/proc/self/fd/{file.fileno()}")
    else:
        with tempfile.NamedTemporaryFile(suffix=remote_files.suffix(medium.path)) as file:
            yield file, Path(file.name)


def _in_source(name: str, root: str | None) -> Iterator[Medium]:
    literal = not is_remote(name) and os.path.exists(name)  # with whatever characters
    names = [name] if literal else expand_braces(name)
    if names != [name] or (is_pattern(name) and not literal):
        base = literal_folder(name) or "."
        files = [(n, f) for n in names for f in (list_matches(n) if is_pattern(n) else [(n, -1)])]
        if not files:
            raise FileNotFoundError(f"no file matches {name}")
        yield from _in_files([f for n, f in files if _alike(n, f[0])], base, root)
    elif remote_files.is_folder(name):
        files = [file for file in list_folder(name) if _kind(file[0])]
        yield from _in_files(files, name, root)
    elif remote_files.is_file(name):
        if not (is_tar(name) or is_manifest(name) or _kind(name)):
            raise ValueError(
                f"{name} is neither a video, an image, a .tar nor a manifest, "
                f"which ends in {', '.join(MANIFESTS)}"
            )
        yield from _in_files([(name, -1)], parent(name) or ".", root)
    else:
        raise FileNotFoundError(f"input {name} does not exist: no folder, file or pattern of files")


def _alike(pattern: str, path: str) -> bool:
    """Whether a pattern is about such files: it asks for tars or manifests by their ending."""
    if is_tar(pattern) or is_manifest(pattern):
        return is_tar(path) or is_manifest(path)
    return bool(_kind(path))


def _in_list(names: Sequence[str], root: str | None) -> Iterator[Medium]:
    """Names as they are given; relative ones lie in the root."""
    paths = [join(root or "", name) for name in names]
    whole = [is_tar(path) or is_manifest(path) for path in paths]
    files = [(path, -1) for path, is_whole in zip(paths, whole, strict=True) if is_whole]
    yield from _in_files(files, "", root)
    for path, is_whole in zip(paths, whole, strict=True):
        if not is_whole:
            media_id = _text(relative(path, root) if root else path)
            yield Medium(media_id, _kind(path) or "video", path)


def _in_files(files: Sequence[tuple[str, int]], base: str, root: str | None) -> Iterator[Medium]:
    indexes = index_tars([path for path, _ in files if is_tar(path)])
    for path, size in files:
        if is_tar(path):
            yield from _in_tar(path, next(indexes), root)
        elif is_manifest(path):
            yield from _in_manifest(path, parent(path) if root is None else root)
        else:
            media_id = _text(relative(path, base if root is None else root))
            yield Medium(media_id, _kind(path), path, size)


def _in_tar(path: str, index: TarIndex, root: str | None) -> Iterator[Medium]:
    start = "" if root is None else relative(path, root) + "/"
    for name, offset, size in index.members:
        hidden = any(part.startswith(".") for part in name.split("/"))
        if _kind(name) and not hidden:
            yield Medium(_text(start + name), _kind(name), path, size, offset)
    if index.damage:
        yield Medium(path, "tar", path)


def _in_manifest(manifest: str, base: str) -> Iterator[Medium]:
    for entry in read_manifest(manifest):
        if is_tar(entry.name):
            raise ValueError(f"{entry.place}: {entry.name} is a tar; give tars as the input itself")
        kind = entry.kind or _kind(entry.name) or "video"
        yield Medium(entry.id, kind, join(base, remote_files.as_path(entry.name)))


def _kind(path: str) -> str:
    return _KINDS.get(remote_files.suffix(path), "")


def _text(name: str) -> str:
    """A name that can be written: bytes that are no UTF-8 become U+FFFD in the id."""
    return name if name.isascii() else os.fsencode(name).decode(errors="replace")


def _distinct(media: Iterable[Medium]) -> list[Medium]:
    by_id: dict[str, Medium] = {}
    for medium in media:
        other = by_id.setdefault(medium.id, medium)
        if (other.path, other.offset) != (medium.path, medium.offset):
            raise ValueError(
                f"two media are called {medium.id!r}, in {other.path} and in {medium.path}: give "
                "them ids that differ (a manifest's `id`; for tars a root, which puts the tar's "
                "name in front)"
            )
    return list(by_id.values())


def _others(source: str) -> str:
    """What else there is, for an input that turned out to be empty."""
    if not remote_files.is_folder(source):
        return ""
    endings = Counter(remote_files.suffix(path) for path, _ in list_folder(source))
    known = {
        e: n for e, n in endings.items() if e in (".tar", ".jsonl", ".csv", ".tsv", ".parquet")
    }
    found = ", ".join(f"{n} {e}" for e, n in known.items())
    return f", but {found}: give those as {source.rstrip('/')}/*{min(known)}" if known else ""


def _add_sizes(media: list[Medium]) -> None:
    def sized(start: int) -> list[Medium]:
        return [_sized(medium) for medium in media[start : start + _STATS_AT_A_TIME]]

    starts = range(0, len(media), _STATS_AT_A_TIME)
    with ThreadPoolExecutor(_STAT_THREADS) as pool:  # a network's file system takes its time
        for start, part in zip(starts, pool.map(sized, starts), strict=True):
            media[start : start + len(part)] = part


def _sized(medium: Medium) -> Medium:
    if medium.size >= 0 or is_remote(medium.path):
        return medium
    try:
        return medium._replace(size=os.stat(medium.path).st_size)
    except OSError:
        return medium
