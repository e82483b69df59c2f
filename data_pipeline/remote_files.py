# SPDX-License-Identifier: Apache-2.0
"""Files wherever they lie: local paths, and URLs such as gs://, s3:// and https:// by fsspec.

Paths are strings, because a pathlib.Path makes one slash out of a URL's two. Credentials and
options of a storage come from its own environment variables and files, or from fsspec's
(~/.config/fsspec).
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import lru_cache
from typing import BinaryIO, TypeVar, cast
from urllib.parse import unquote, urlsplit

import fsspec

Result = TypeVar("Result")

_CHUNK = 8 << 20  # bytes asked of a storage at a time
_WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before it is asked again after a failure
_RETRIED_STATUS = (408, 429)  # of HTTP's 4xx: too slow, too many requests
_LASTING = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def as_path(name: str | os.PathLike[str]) -> str:
    """The name as this module knows it; a file:// URL becomes a local path."""
    name = os.fspath(name)
    return unquote(urlsplit(name).path) if name.startswith("file://") else name


def is_remote(path: str) -> bool:
    return "://" in path


def is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def suffix(path: str) -> str:
    """'.mp4'; the query of an http URL is not part of it."""
    return os.path.splitext(urlsplit(path).path if is_http(path) else path)[1].lower()


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, or `name` itself if it stands alone (a URL, an absolute path)."""
    alone = not folder or is_remote(name) or name.startswith("/")
    return name if alone else f"{folder.rstrip('/')}/{name}"


def parent(path: str) -> str:
    """The folder of a file, '' for a bare name."""
    return path.rpartition("/")[0] or "/" * path.startswith("/")


def relative(path: str, folder: str) -> str:
    """How `path` is called inside `folder`; ValueError if it lies elsewhere."""
    inside, start = _plain(path), _plain(folder).rstrip("/") + "/"
    if is_remote(path) != is_remote(folder) or not inside.startswith(start):
        raise ValueError(f"{path} does not lie in the root {folder}")
    name = inside[len(start) :]
    return unquote(name) if is_http(path) else name


def _plain(path: str) -> str:
    """One spelling per file: without protocol, which may have aliases, or absolute."""
    if not is_remote(path):
        return os.path.abspath(path)
    return cast(str, _storage_class(path.partition("://")[0])._strip_protocol(path))


@lru_cache
def _storage_class(protocol: str) -> type[fsspec.AbstractFileSystem]:
    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ValueError(
            f"{protocol}:// cannot be read: {str(error).rstrip('. ')}; "
            "pip install 'apollo-jax[remote]' brings what gs://, s3:// and http(s):// need"
        ) from None
    except ValueError:
        near = get_close_matches(protocol, fsspec.available_protocols(), 1)
        hint = f"; did you mean {near[0]}://?" if near else ""
        raise ValueError(f"{protocol}:// is no storage that fsspec knows{hint}") from None


def require_storage(path: str) -> None:
    """ValueError in one line if nothing that is installed can read such a URL."""
    _storage_class(path.partition("://")[0])


def file_system(path: str) -> fsspec.AbstractFileSystem:
    require_storage(path)
    return fsspec.url_to_fs(path)[0]


def is_folder(path: str) -> bool:
    """Whether files lie under that name; on http, where nobody can tell, if it ends with a /."""
    if is_http(path):
        return path.endswith("/")
    return _type(path) == "directory" if is_remote(path) else os.path.isdir(path)


def is_file(path: str) -> bool:
    return _type(path) == "file" if is_remote(path) else os.path.isfile(path)


def _type(path: str) -> str:
    """fsspec's isdir and isfile would say no if the storage cannot be reached."""
    try:
        return file_system(path).info(path)["type"]
    except FileNotFoundError as error:
        if fault := real_fault(error):
            raise fault from None
        return ""


def real_fault(error: Exception) -> BaseException | None:
    """None if there is no such file. fsspec's http says so whatever went wrong; the cause knows."""
    if not isinstance(error, FileNotFoundError):
        return error
    cause = error.__cause__
    absent = isinstance(cause, FileNotFoundError) or getattr(cause, "status", 0) in (404, 410)
    return None if absent else cause


def open_file(path: str, chunk: int = _CHUNK, cache: str = "readahead") -> BinaryIO:
    """For reading bytes. A remote file is asked for `chunk` bytes at a time (0: on http a stream);
    `cache` is fsspec's way of keeping them, 'none' = each read is one request."""
    if not is_remote(path):
        return open(path, "rb")
    opened = file_system(path).open(path, "rb", block_size=chunk, cache_type=cache)
    return cast(BinaryIO, opened)


def read_range(
    path: str, start: int, size: int, waiting: Callable[[], object] = lambda: None
) -> Iterator[bytes]:
    """The `size` bytes from `start` on, -1 = to the end, in pieces; asked for again where it broke.

    `waiting` is called while nothing comes. FileNotFoundError at once, OSError for a fault that
    lasts or after four more attempts in vain.
    """
    done, failures, chunk = 0, 0, _CHUNK
    while True:
        try:
            with open_file(path, chunk, cache="none") as file:
                _skip(file, start + done)
                while piece := file.read(_CHUNK if size < 0 else min(_CHUNK, size - done)):
                    yield piece
                    done, failures = done + len(piece), 0
            if done < size:
                raise OSError(f"it ended after {done} of {size} bytes")
            return
        except Exception as caught:  # every storage has its own
            error = real_fault(caught)
            if error is None:
                raise
            if is_http(path) and chunk and isinstance(error, ValueError):
                chunk = 0  # this server gives whole files only
                continue
            if failures == len(_WAITS) or _lasts(error):
                raise OSError(f"{type(error).__name__}: {error}") from error
        waiting()
        time.sleep(_WAITS[failures])
        failures += 1


def patiently(read: Callable[[str], Result], path: str) -> Result:
    """read(path), tried again while a storage has trouble that may pass."""
    for wait in _WAITS:
        try:
            return read(path)
        except Exception as caught:
            error = real_fault(caught)
            if error is None or not is_remote(path) or _lasts(error):
                raise
        time.sleep(wait)
    return read(path)


def _skip(file: BinaryIO, offset: int) -> None:
    try:
        file.seek(offset)
    except ValueError:  # it is a stream
        while offset and (piece := file.read(min(_CHUNK, offset))):
            offset -= len(piece)


def _lasts(error: BaseException) -> bool:
    """Whether asking again is useless."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED_STATUS
    return refused or isinstance(error, ValueError) or getattr(error, "errno", None) in _LASTING
