# SPDX-License-Identifier: Apache-2.0
"""Manifests: tables and lists that name media, one record after the other in bounded memory.

JSONL, CSV, TSV (these three also as .gz), parquet, and JSON arrays as LLaVA publishes them (held in
memory whole) name media in the fields

    video, image, images    the name, or in JSONL and parquet a list of names, as annotations
                            know the medium: its id is that name
    path, url               where the file is, for records without the above; a field `id`
                            beside it is the medium's id, otherwise what stands here is

A record without any of them is about no medium. A text list (.txt, .lst) holds one name a line,
exactly as it stands but for the line's end. Names are relative to a root, absolute, or URLs.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, BinaryIO, NamedTuple

import pyarrow
import pyarrow.parquet

from data_pipeline.remote_files import open_file, suffix

_NAMES = {"video": "video", "image": "image", "images": "image"}  # field -> kind
_PLACES = ("path", "url")
FIELDS = (*_NAMES, *_PLACES)
MANIFESTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".lst")
_ROWS = 4096  # of a parquet file in memory at a time


class Named(NamedTuple):
    """What one record says of one medium; kind is '' where the name's ending decides."""

    id: str
    kind: str
    name: str
    place: str  # manifest and line, or row: 'a.csv:7'


def is_manifest(path: str) -> bool:
    return _format(path) in MANIFESTS


def _format(path: str) -> str:
    ending = suffix(path)
    return suffix(path[: -len(ending)]) if ending == ".gz" else ending


def read_manifest(path: str) -> Iterator[Named]:
    """ValueError naming the file and its line (parquet: row) where a record makes no sense."""
    form = _format(path)
    with _opened(path, form) as file:
        if form in (".txt", ".lst"):
            names = ((n, line.rstrip("\r\n")) for n, line in enumerate(_text(file, path), 1))
            records = ((n, {"path": name}) for n, name in names if name)
        elif form in (".csv", ".tsv"):
            records = _table(_text(file, path), path, "\t" if form == ".tsv" else ",")
        elif form == ".parquet":
            records = _parquet(file, path)
        elif form == ".json":
            records = _json_array("".join(_text(file, path)), path)
        else:
            records = _json_lines(_text(file, path), path)
        yield from _named(records, path)


@contextmanager
def _opened(path: str, form: str) -> Iterator[BinaryIO]:
    with open_file(path) as file:
        if suffix(path) == ".gz" and form != ".parquet":
            with gzip.open(file) as unpacked:
                yield unpacked  # pyright: ignore[reportReturnType]
        else:
            yield file


def _named(records: Iterator[tuple[int, dict]], path: str) -> Iterator[Named]:
    about_media, unknown = False, {}
    for number, record in records:
        place = f"{path}:{number}"
        media = list(_media_of(record, place))
        about_media = about_media or bool(media)
        if not about_media:
            unknown |= dict.fromkeys(record)
        yield from media
    if not about_media:
        what = f"its records have {_listed(unknown)}" if unknown else "it has no records"
        raise ValueError(f"{path} names no media: {what}; known are {', '.join(FIELDS)}")


def _media_of(record: dict[str, Any], place: str) -> Iterator[Named]:
    found = False
    for field, kind in _NAMES.items():
        value = record.get(field)
        for name in value if isinstance(value, list) else [value]:
            if name is not None and name != "":
                found = True
                yield Named(_checked(name, field, place), kind, name, place)
    places = (field for field in _PLACES if record.get(field) not in (None, ""))
    if not found and (field := next(places, None)):
        name = _checked(record[field], field, place)
        media_id = record.get("id")
        if not isinstance(media_id, str | int | None):
            raise ValueError(f"{place}: field 'id' should be a name, not {media_id!r}")
        given = media_id is not None and media_id != ""
        yield Named(_checked(str(media_id), "id", place) if given else name, "", name, place)


def _checked(name: Any, field: str, place: str) -> str:
    """NUL and half a surrogate pair occur in no file name and cannot be stored."""
    if not isinstance(name, str):
        raise ValueError(f"{place}: field {field!r} should be a name, not {str(name)[:80]!r}")
    if "\0" in name or not (name.isascii() or _is_text(name)):
        raise ValueError(f"{place}: field {field!r} is no name: {name[:80]!r}")
    return name


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(fields: dict[str, None]) -> str:
    near = [m for f in fields for m in get_close_matches(str(f).lower(), FIELDS, 1, 0.7)]
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"the fields {', '.join(map(repr, list(fields)[:20]))}{hint}"


def _text(file: BinaryIO, path: str) -> Iterator[str]:
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
            yield from lines
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def _json_lines(lines: Iterator[str], path: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith("["):
            raise ValueError(
                f"{path}:1: a JSON array; one object a line is needed (jq -c '.[]' makes that)"
            )
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected an object, got {type(record).__name__}")
        yield number, record


def _json_array(text: str, path: str) -> Iterator[tuple[int, dict]]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: a .json file is one array of objects")
    yield from enumerate(entries)


def _table(lines: Iterator[str], path: str, delimiter: str) -> Iterator[tuple[int, dict]]:
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        _check_columns(header, f"{path}:1", "; a list of names without a header is a .txt file")
        for row in rows:
            if row and len(row) != len(header):
                cells = f"{len(row)} cells under a header of {len(header)}"
                raise ValueError(f"{path}:{rows.line_num}: {cells}")
            yield rows.line_num, dict(zip(header, row, strict=False))
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: {error}") from None


def _parquet(file: BinaryIO, path: str) -> Iterator[tuple[int, dict]]:
    try:
        table = pyarrow.parquet.ParquetFile(file)
        header = table.schema_arrow.names
        _check_columns(header, path)
        columns = [name for name in (*FIELDS, "id") if name in header]
        rows = (
            row for part in table.iter_batches(_ROWS, columns=columns) for row in part.to_pylist()
        )
        yield from enumerate(rows, 1)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a whole parquet file: {error}") from None


def _check_columns(header: list[str], place: str, hint: str = "") -> None:
    if not set(header) & set(FIELDS):
        raise ValueError(
            f"{place}: a column {', '.join(FIELDS[:-1])} or {FIELDS[-1]} is needed, but it has "
            f"{_listed(dict.fromkeys(header))}{hint}"
        )
