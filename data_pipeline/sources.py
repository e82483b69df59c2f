# SPDX-License-Identifier: Apache-2.0
"""Sources: annotation files of conversations, by random access.

A JSONL file holds one record per line:

    {"id": ..., "video": "a.mp4" | "image": "a.jpg" | "images": [...] | (neither: text only),
     "conversations": [{"from": "human", "value": "<video>\\nWhat?"}, {"from": "gpt", "value": ..}]}

LLaVA's fields, that is. `turns` ([{"role", "text"}]) may stand for `conversations`, and
`question` + `answer` for a single exchange about media that are shown first. A medium is named as
in the frame shards. `"sampling": "centre"` shows one frame of a video (the single-frame control),
other values are those of `ClipSampling.mode`. Fields not mentioned here are ignored.
"""

import difflib
import hashlib
import json
import os
import weakref
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.conversation import PLACEHOLDER, Turn
from data_pipeline.sampling import MODES

_ROLES = {"human": "user", "gpt": "assistant"} | {r: r for r in ("system", "user", "assistant")}
_TEXT_FIELDS = ("conversations", "turns", "question", "answer")
_ERRORS_SHOWN = 5


@dataclass(frozen=True)
class Media:
    kind: str  # 'video' | 'image'
    id: str  # as in the frame shards


@dataclass(frozen=True)
class Record:
    id: str
    turns: tuple[Turn, ...]
    media: tuple[Media, ...]  # in the order of the text's placeholders
    sampling: str = ""  # a `ClipSampling.mode`, '' = the loader's


class JsonlSource:
    """The records of one JSONL file; every line is checked when it is opened.

    Raises FileNotFoundError, or ValueError naming the file, line and field of the first faults.
    Records whose media `known` does not hold are no fault of the file: `missing` lists them.
    """

    def __init__(self, path: str | os.PathLike, known: Container[str] | None = None):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"annotation file {self.path} does not exist")
        self.missing: list[tuple[str, str]] = []  # (record id, media id)
        digest, offsets, numbers, faults = hashlib.sha256(), [0], [], []
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                end += len(line)
                if not line.strip():
                    offsets[-1] = end
                    continue
                offsets.append(end)
                numbers.append(number)
                try:
                    record = parse_record(line, f"{self.path.name}:{number}")
                except ValueError as error:
                    faults.append(f"  {error}")
                    continue
                absent = (m.id for m in record.media if known is not None and m.id not in known)
                self.missing += [(record.id, media_id) for media_id in absent][:1]
            if faults:
                more = len(faults) - _ERRORS_SHOWN
                raise ValueError(
                    "\n".join(
                        [f"{len(faults)} faulty records in {self.path}:"]
                        + faults[:_ERRORS_SHOWN]
                        + [f"  and {more} more"] * (more > 0)
                    )
                )
            if not numbers:
                raise ValueError(f"annotation file {self.path} has no records")
            # Not a memory map: a file cut short while it is mapped kills the process.
            self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)
        self._offsets = np.array(offsets, np.int64)
        self._numbers = np.array(numbers, np.int64)
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        start, end = self._offsets[index], self._offsets[index + 1]
        line = os.pread(self._file, end - start, start)
        try:
            return parse_record(line, f"{self.path.name}:{self._numbers[index]}")
        except ValueError as error:
            raise RuntimeError(f"{self.path} was changed while it was in use: {error}") from None


def parse_record(line: bytes | str, default_id: str) -> Record:
    """One JSON line as a Record; ValueError naming the record and the field."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{default_id}: not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{default_id}: expected an object, got {type(entry).__name__}")
    record_id = str(entry.get("id", default_id))
    try:
        videos, images = _names(entry, "video"), _names(entry, "image") + _names(entry, "images")
        turns = _turns(entry, ["video"] * len(videos) + ["image"] * len(images))
        media = _in_order(turns, videos, images)
        sampling = entry.get("sampling", "")
        if sampling and sampling not in MODES:
            raise ValueError(f"sampling {sampling!r} is not one of {', '.join(MODES)}")
    except ValueError as error:
        where = default_id if record_id == default_id else f"{default_id} (id {record_id})"
        raise ValueError(f"{where}: {error}") from None
    return Record(record_id, turns, media, sampling)


def _names(entry: dict, field: str) -> list[str]:
    value = entry.get(field) or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"field {field!r} should be a name or a list of names, got {value!r}")
    return names


def _turns(entry: dict, kinds: list[str]) -> tuple[Turn, ...]:
    """The conversation, whichever fields hold it; it must have something the assistant says."""
    if "conversations" in entry:
        turns = _turn_list(entry, "conversations", "from", "value")
    elif "turns" in entry:
        turns = _turn_list(entry, "turns", "role", "text")
    elif "question" in entry and "answer" in entry:
        shown = "".join(f"<{kind}>\n" for kind in kinds)
        turns = [
            Turn("user", f"{shown}{entry['question']}"),
            Turn("assistant", str(entry["answer"])),
        ]
    else:
        near = [m for f in entry for m in difflib.get_close_matches(f, _TEXT_FIELDS, 1, 0.8)]
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"no 'conversations', 'turns' or 'question' + 'answer' among its fields "
            f"{', '.join(map(repr, entry))}{hint}"
        )
    if not any(turn.role == "assistant" and turn.text for turn in turns):
        raise ValueError("the assistant says nothing in it, so there is nothing to learn")
    return tuple(turns)


def _turn_list(entry: dict, field: str, role_key: str, text_key: str) -> list[Turn]:
    turns = []
    if not isinstance(entry[field], list):
        raise ValueError(f"field {field!r} should be a list of turns")
    for turn in entry[field]:
        if not isinstance(turn, dict) or not isinstance(turn.get(text_key), str):
            raise ValueError(f"a turn in {field!r} lacks the text {text_key!r}: {turn!r}")
        role = _ROLES.get(str(turn.get(role_key)))
        if role is None:
            raise ValueError(
                f"{role_key!r} is {turn.get(role_key)!r} in {field!r}; known: {', '.join(_ROLES)}"
            )
        turns.append(Turn(role, turn[text_key]))
    return turns


def _in_order(turns: tuple[Turn, ...], videos: list[str], images: list[str]) -> tuple[Media, ...]:
    """Media in the order of the placeholders, which must be as many.

    In a record of one kind either placeholder will do: published video sets write <image>.
    """
    asked = [kind for t in turns if t.role == "user" for kind in PLACEHOLDER.findall(t.text)]
    if not (videos and images):
        asked = ["video" if videos else "image" if images else kind for kind in asked]
    for kind, names in (("video", videos), ("image", images)):
        if asked.count(kind) != len(names):
            raise ValueError(
                f"the text has {asked.count(kind)} <{kind}> placeholders for {len(names)} {kind}s"
            )
    waiting = {"video": iter(videos), "image": iter(images)}
    return tuple(Media(kind, next(waiting[kind])) for kind in asked)
