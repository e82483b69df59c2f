# SPDX-License-Identifier: Apache-2.0
"""Annotations: what one record of a conversation file or dataset says, whichever format it has.

    LLaVA        {"id": .., "video": "a.mp4" | "image": "a.jpg" | "images": [..] | (text only),
                  "conversations": [{"from": "human", "value": "<video>\\nWhat?"},
                                    {"from": "gpt", "value": ".."}]}
    ShareGPT     the same, with more names for the two who talk (see ROLE_NAMES)
    Apollo       {.., "turns": [{"role": "user", "text": ".."}, {"role": "assistant", ..}]}
    OpenAI       {.., "messages": [{"role": "user", "content": ".."}, ..]}
    one exchange {.., "question": "..", "answer": ".."}, its media shown first
    plain text   {"text": ".."}: all of it is learnt; <image> and <video> may stand in it

A medium is named as in the frame shards. `"sampling": "centre"` shows one frame of a video (the
single-frame control), other values are those of `ClipSampling.mode`. Other fields are ignored.
"""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.conversation import PLACEHOLDER, Turn
from data_pipeline.sampling import MODES

ROLE_NAMES = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "chatgpt", "bing", "bard", "model"),
    "system": ("system",),
    "text": ("text",),  # a plain text, alone
}
_ROLE_OF = {name: role for role, names in ROLE_NAMES.items() for name in names}
_TURN_FIELDS = {  # field -> who speaks, what is said
    "conversations": ("from", "value"),
    "turns": ("role", "text"),
    "messages": ("role", "content"),
}
_FIELDS = (*_TURN_FIELDS, "question", "answer", "text")


@dataclass(frozen=True, slots=True)
class Media:
    kind: str  # 'video' | 'image'
    id: str  # as in the frame shards


@dataclass(frozen=True, slots=True)
class Record:
    id: str
    turns: tuple[Turn, ...]  # a single one of role 'text' for plain text
    media: tuple[Media, ...]  # in the order of the text's placeholders
    sampling: str = ""  # a `ClipSampling.mode`, '' = the loader's
    store: Any = None  # holds media that come inside the record, None = they are in the shards


def parse_record(line: bytes | str, place: str) -> Record:
    """One JSON object as a Record; ValueError naming the place ("a.jsonl:7") and the field."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from None
    return read_record(entry, place)


def read_record(entry: Any, place: str) -> Record:
    """The Record of parsed JSON; ValueError as `parse_record`. Without an id it is its place."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: expected an object, got {type(entry).__name__}")
    record_id = str(entry.get("id", place))
    try:
        videos, images = _names(entry, "video"), _names(entry, "image") + _names(entry, "images")
        turns = _turns(entry, videos, images)
        media = _in_order(turns, videos, images)
        sampling = entry.get("sampling", "")
        if sampling and sampling not in MODES:
            raise ValueError(f"sampling {sampling!r} is not one of {', '.join(MODES)}")
    except ValueError as error:
        where = place if record_id == place else f"{place} (id {record_id})"
        raise ValueError(f"{where}: {error}") from None
    return Record(record_id, turns, media, sampling)


def _names(entry: dict, field: str) -> list[str]:
    value = entry.get(field)
    if not value:
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"field {field!r} should be a name or a list of names, got {value!r}")
    return names


def _turns(entry: dict, videos: Sequence[str], images: Sequence[str]) -> tuple[Turn, ...]:
    """The conversation, whichever fields hold it; it must have something to learn."""
    for field in _TURN_FIELDS:
        if field in entry:
            return _turn_list(entry, field)
    if "question" in entry and "answer" in entry:
        shown = "<video>\n" * len(videos) + "<image>\n" * len(images)
        answer = str(entry["answer"])
        if not answer:
            raise ValueError("'answer' is empty, so there is nothing to learn")
        return Turn("user", f"{shown}{entry['question']}"), Turn("assistant", answer)
    if "text" in entry:
        if not isinstance(entry["text"], str) or not entry["text"].strip():
            raise ValueError(f"field 'text' should be a text, got {entry['text']!r}")
        return (Turn("text", entry["text"]),)
    near = [m for f in entry for m in difflib.get_close_matches(f, _FIELDS, 1, 0.8)]
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(
        f"no 'conversations', 'turns', 'messages', 'question' + 'answer' or 'text' among its "
        f"fields {', '.join(map(repr, entry))}{hint}"
    )


def _turn_list(entry: dict, field: str) -> tuple[Turn, ...]:
    turns, said = [], False
    role_key, text_key = _TURN_FIELDS[field]
    if not isinstance(entry[field], list):
        raise ValueError(f"field {field!r} should be a list of turns")
    for number, turn in enumerate(entry[field]):
        text = turn.get(text_key) if isinstance(turn, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{field}[{number}] lacks the text {text_key!r}: {turn!r}")
        role = _ROLE_OF.get(str(turn.get(role_key)))
        if role is None:
            raise ValueError(
                f"{role_key!r} is {turn.get(role_key)!r} in {field}[{number}]; known: "
                f"{', '.join(_ROLE_OF)}"
            )
        said = said or (role in ("assistant", "text") and bool(text))
        turns.append(Turn(role, text))
    if any(turn.role == "text" for turn in turns) and len(turns) > 1:
        raise ValueError(f"a turn of role 'text' does not stand alone in {field!r}")
    if not said:
        raise ValueError(f"the assistant says nothing in {field!r}, so there is nothing to learn")
    return tuple(turns)


def _in_order(turns: Sequence[Turn], videos: list[str], images: list[str]) -> tuple[Media, ...]:
    """Media in the order of the placeholders, which must be as many.

    In a record of one kind either placeholder will do: published video sets write <image>.
    """
    media = bool(videos or images)
    # A page of HTML has its own <video>: without media it is text like any other.
    texts = [t.text for t in turns if t.role == "user" or (t.role == "text" and media)]
    asked = [kind for text in texts if "<" in text for kind in PLACEHOLDER.findall(text)]
    if not (asked or media):
        return ()
    if not (videos and images):
        asked = ["video" if videos else "image" if images else kind for kind in asked]
    for kind, names in (("video", videos), ("image", images)):
        if asked.count(kind) != len(names):
            raise ValueError(
                f"the text has {asked.count(kind)} <{kind}> placeholders for {len(names)} {kind}s"
            )
    waiting = {"video": iter(videos), "image": iter(images)}
    return tuple(Media(kind, next(waiting[kind])) for kind in asked)
