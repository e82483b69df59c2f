# SPDX-License-Identifier: Apache-2.0
"""Sources: files of conversations, by random access; annotations.py says what a record may be.

A file is JSONL, one record per line, or (`.json`) one array of records, as LLaVA is published.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from data_pipeline.annotations import Record, parse_record


@dataclass(frozen=True)
class SourceConfig:
    """Where records come from, and how many of them; all but the first two are for TFDS."""

    path: str  # JSONL or JSON, see annotations.py; or tfds:..@.., see tfds_source.py
    weight: float = 1.0  # share of the samples, relative to the other sources
    data_dir: str = ""  # "" = TFDS's own default
    image: str = ""  # the field with the pictures; "" = the only one there is
    question: str = ""  # what is asked, with {field} for what a record says
    answer: str = ""  # likewise; "" = the records are conversations already


class Source(Protocol):
    """Records by random access."""

    fingerprint: str  # changes when the records do
    missing: list[tuple[str, str]]  # (record id, media id) that are known to be absent

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


def open_source(
    config: SourceConfig,
    known: Container[str] | None = None,
    *,
    index: Path | None = None,
    max_bad_share: float = 0.0,
) -> Source:
    """The source at `config.path`; FileNotFoundError or ValueError if it cannot be read as such.

    `known` holds the media there are; None leaves `missing` empty. `index` is the folder where the
    index of a JSONL file may be, `max_bad_share` the share of its records that may be faulty.
    """
    if config.path.startswith("tfds:"):
        from data_pipeline.tfds_source import TfdsSource  # TFDS takes most of a second to import

        return TfdsSource(config)
    return JsonlSource(config.path, known, index, max_bad_share)


_ERRORS_SHOWN = 5
_INDEX_VERSION = 1  # of the checks: raised when they find faults that they did not find before
_SPACE = tuple(" \t\n\r")


class JsonlSource:
    """The records of one JSONL or JSON file; every record is checked when it is opened.

    Raises FileNotFoundError, or ValueError naming the file, place and field of the first faults if
    there are more than `max_bad_share`; a few are told when they are read. Records whose media
    `known` does not hold are no fault of the file: `missing` lists them. If `index` is a folder
    where `write_index` left what it found in this very content, nothing is checked again: then
    `indexed` is True and `missing` empty.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        known: Container[str] | None = None,
        index: Path | None = None,
        max_bad_share: float = 0.0,
    ):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"annotation file {self.path} does not exist")
        if self.path.suffix == ".txt":
            raise ValueError(
                f"{self.path} does not say where one text ends and the next begins; write every "
                'text as a line {"text": ".."} of a JSONL file'
            )
        self.missing: list[tuple[str, str]] = []  # (record id, media id)
        self._place = "{}[{}]" if self.path.suffix == ".json" else "{}:{}"
        with open(self.path, "rb") as file:
            self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            file.seek(0)
            found = None if index is None else _read_index(self._index_path(index))
            self.indexed = found is not None
            self._records = self._check(file, known) if found is None else found
            # Not a memory map: a file cut short while it is mapped kills the process.
            self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)
        self._judge(max_bad_share)

    def _check(self, file: BinaryIO, known: Container[str] | None) -> np.ndarray:
        """Where the records are, i64[n, 3]: first byte, end, number in the file, ~ if faulty."""
        records = []
        for number, start, part in _parts(file, self.path):
            if not part.strip():
                continue
            records.append((start, start + len(part), number))
            try:
                record = parse_record(part, self._place.format(self.path.name, number))
            except ValueError:
                records[-1] = (start, start + len(part), ~number)
                continue
            absent = (m.id for m in record.media if known is not None and m.id not in known)
            self.missing += [(record.id, media_id) for media_id in absent][:1]
        if not records:
            raise ValueError(f"annotation file {self.path} has no records")
        return np.array(records, np.int64)

    def _judge(self, max_bad_share: float) -> None:
        faulty = np.flatnonzero(self._records[:, 2] < 0)
        if len(faulty) <= max_bad_share * len(self):
            return
        lines = [
            f"{len(faulty)} faulty records in {self.path}, of {len(self)}, more than "
            f"max_bad_share={max_bad_share}:"
        ]
        for index in faulty[:_ERRORS_SHOWN].tolist():
            try:
                self[index]
            except ValueError as error:
                lines.append(f"  {error}")
        more = len(faulty) - _ERRORS_SHOWN
        raise ValueError("\n".join(lines + [f"  and {more} more"] * (more > 0)))

    def _index_path(self, folder: Path) -> Path:
        return folder / f"{self.path.name}.index{_INDEX_VERSION}-{self.fingerprint}.npy"

    def write_index(self, folder: Path) -> None:
        """Leaves in `folder` what the checks found, for whoever opens the same content again."""
        write_array(self._index_path(folder), self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        start, end, number = self._records[index].tolist()
        part = os.pread(self._file, end - start, start)
        faulty, number = number < 0, max(number, ~number)
        try:
            return parse_record(part, self._place.format(self.path.name, number))
        except ValueError as error:
            if faulty:
                raise
            raise ValueError(f"{self.path} was changed while it was in use: {error}") from None


def _read_index(path: Path) -> np.ndarray | None:
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return None


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file so that readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
    os.replace(temporary, path)


def _parts(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, bytes]]:
    try:
        yield from _array(file) if path.suffix == ".json" else _lines(file)
    except ValueError as error:
        raise ValueError(f"annotation file {path}: {error}") from None


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, first byte, bytes) of every line."""
    start = 0
    for number, line in enumerate(file, 1):
        yield number, start, line
        start += len(line)


def _array(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """(number from 0, first byte, bytes) of every element of a JSON array; ValueError if none."""
    text = file.read().decode()
    read = json.JSONDecoder().raw_decode
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError("a .json file is one array of records; a file of lines is called .jsonl")
    done, start, number = 0, 0, 0  # characters and bytes behind us
    at = _after_space(text, at + 1)
    while text[at : at + 1] != "]":
        _, end = read(text, at)
        start += len(text[done:at].encode())
        part = text[at:end].encode()
        yield number, start, part
        start, done, number = start + len(part), end, number + 1
        at = _after_space(text, end)
        if text[at : at + 1] == ",":
            at = _after_space(text, at + 1)
        elif text[at : at + 1] != "]":
            raise ValueError(f"',' or ']' is missing after record {number - 1}")


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1] in _SPACE and at < len(text):
        at += 1
    return at
