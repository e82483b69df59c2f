# SPDX-License-Identifier: Apache-2.0
"""Which videos and images a job is about, and the names by which annotations know them."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_VIDEO = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")
_VIDEO += (".3gp", ".ogv", ".gif")
_IMAGE = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_FIELDS = {"video": "video", "image": "image", "images": "image"}  # of a JSONL record -> kind


class Medium(NamedTuple):
    """A file to store; its id is the name by which annotations know it."""

    id: str
    kind: str  # 'video' | 'image'
    path: Path


def find_media(
    source: str | Path | Iterable[str | Path], root: str | Path | None = None
) -> list[Medium]:
    """The media of a folder, of a JSONL's video, image and images fields, or of a list of files.

    Ids are paths relative to `root` (default: the folder, or the JSONL's folder); a JSONL's names
    are taken as they stand.
    """
    if not isinstance(source, str | Path):
        base = Path(root or ".")
        named = ((str(name), _kind(Path(name)) or "video") for name in source)
        media = [Medium(_relative(base / name, root), kind, base / name) for name, kind in named]
    elif Path(source).is_dir():
        base = Path(root or source)
        files = sorted(p for p in Path(source).rglob("*") if _kind(p) and p.is_file())
        media = [Medium(_relative(p, base), _kind(p), p) for p in files]
    elif Path(source).is_file():
        base = Path(root or Path(source).parent)
        media = [Medium(name, kind, base / name) for name, kind in _named_in(Path(source))]
    else:
        raise FileNotFoundError(f"input {source} is neither a folder nor a JSONL file")
    if not media:
        raise ValueError(f"{source} names no videos or images")
    return list({medium.id: medium for medium in media}.values())


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    return "video" if suffix in _VIDEO else "image" if suffix in _IMAGE else ""


def _relative(path: Path, root: str | Path | None) -> str:
    return path.relative_to(root).as_posix() if root else path.as_posix()


def _named_in(jsonl: Path) -> Iterator[tuple[str, str]]:
    with jsonl.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                for field, kind in _FIELDS.items():
                    names = entry.get(field) or []
                    for name in [names] if isinstance(names, str) else names:
                        yield os.fspath(name), kind
            except (ValueError, AttributeError, TypeError) as error:
                raise ValueError(
                    f"{jsonl}:{number}: no record with media fields: {error}"
                ) from None
