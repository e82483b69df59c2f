# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: multiple-choice questions from a local JSONL file, tolerant of field names.

id | question_id                      default: the line number
video | video_path | image            path, relative to the folder of the file
question
options | candidates | a0, a1, ... | option0, option1, ...
answer | answer_id | correct_choice   index, letter or the option's text
category | type | question_category   default: "all"
family, temporal                      optional
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from apollo_jax.evaluation import scenes
from apollo_jax.evaluation.multiple_choice import LETTERS, PromptFormat, Question

_LETTER = PromptFormat(
    option="{letter}. {text}",
    instruction="Answer with the option's letter from the given choices directly.",
)
PROMPTS = {  # benchmark -> how it asks
    "apollobench_mini": scenes.PROMPT,
    "apollobench": _LETTER,  # as lmms-eval asks, which the paper used
    "multiple_choice": _LETTER,  # any local file
}


@dataclass(frozen=True)
class Benchmark:
    """Questions whose media paths are complete, and how they are put."""

    name: str
    questions: list[Question]
    prompt: PromptFormat


def load(name: str, data: str | Path) -> Benchmark:
    """Read `data`, a JSONL file or a folder with NAME.jsonl or test.jsonl.

    Raises ValueError or FileNotFoundError naming the file, the line and the field.
    """
    if name not in PROMPTS:
        raise ValueError(f"benchmark {name!r} is unknown; known: {', '.join(PROMPTS)}")
    path = _find(name, Path(data))
    questions = []
    for number, line in enumerate(path.read_text().split("\n"), 1):  # text may hold U+2028
        if line.strip():
            where = f"{path}, line {number}"
            questions.append(_question(_record(line, where), path.parent, number, where))
    if not questions:
        raise ValueError(f"{path} has no questions")
    _check(questions, path)
    return Benchmark(name, questions, PROMPTS[name])


def _find(name: str, data: Path) -> Path:
    candidates = [data] if data.is_file() else [data / f"{name}.jsonl", data / "test.jsonl"]
    for path in candidates:
        if path.is_file():
            return path
    tried = " nor ".join(str(path) for path in candidates)
    raise FileNotFoundError(f"neither {tried} exists: --data takes a JSONL file or its folder")


def _record(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: must be a JSON object, is {type(record).__name__}")
    return record


def _question(record: dict, folder: Path, number: int, where: str) -> Question:
    name = str(_first(record, "id", "question_id", default=f"{number:06d}"))
    where = f"{where} (id {name})"
    for field in ("start", "end"):
        if record.get(field) is not None:
            raise ValueError(f"{where}: {field!r} asks for a part of the video; cut it beforehand")
    question = _first(record, "question")
    if not question:
        raise ValueError(f"{where}: has no 'question'; its fields are {', '.join(record)}")
    options = _options(record, where)
    video, image = _first(record, "video", "video_path", default=""), record.get("image") or ""
    return Question(
        question=question,
        options=options,
        answer=_answer(_first(record, "answer", "answer_id", "correct_choice"), options, where),
        category=str(_first(record, "category", "type", "question_category", default="all")),
        family=record.get("family") or "",
        temporal=record.get("temporal", True),
        id=name,
        video=str(folder / video) if video else "",
        image=str(folder / image) if image else "",
    )


def _first(record: dict, *names: str, default=None):
    return next((record[name] for name in names if record.get(name) is not None), default)


def _options(record: dict, where: str) -> tuple[str, ...]:
    options = _first(record, "options", "candidates")
    if options is None:
        stem = "a" if "a0" in record else "option"
        keys = [f"{stem}{i}" for i in range(len(LETTERS))]
        options = [record[key] for key in keys if record.get(key) not in (None, "N/A")]
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{where}: needs a list of 2 to {len(LETTERS)} options, has {options!r}")
    options = [str(option) for option in options]
    named = zip(LETTERS, options, strict=False)  # there are more letters
    lettered = [re.fullmatch(rf"\(?{letter}[.:)]\s*(.+)", option) for letter, option in named]
    return tuple(match[1] for match in lettered if match) if all(lettered) else tuple(options)


def _answer(answer: object, options: tuple[str, ...], where: str) -> int:
    if isinstance(answer, int) and 0 <= answer < len(options):
        return answer
    if isinstance(answer, str):
        if answer in options:
            return options.index(answer)
        letter = re.match(rf"\(?([{LETTERS[: len(options)]}])(?:[.:)]|$)", answer.strip())
        if letter:
            return LETTERS.index(letter[1])
    raise ValueError(
        f"{where}: answer {answer!r} is neither an index below {len(options)}, a letter, nor one "
        f"of the options {list(options)}"
    )


def _check(questions: list[Question], path: Path) -> None:
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ValueError(f"{path}: the id {question.id!r} occurs twice")
        seen.add(question.id)
    media = dict.fromkeys(q.video or q.image for q in questions)
    missing = [m for m in media if m and not Path(m).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(media)} media files do not exist, first {missing[0]}"
        )
