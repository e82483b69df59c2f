# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice questions: the prompt, the choice read out of a reply, the scores."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

LETTERS = "ABCDEFGHIJ"
Z95 = 1.959964  # two-sided 95 %


@dataclasses.dataclass(frozen=True)
class Question:
    """One multiple-choice question about a video, an image, or nothing but its words."""

    question: str
    options: tuple[str, ...]
    answer: int  # index into options
    category: str
    family: str = ""
    temporal: bool = True  # False: one frame is enough
    id: str = ""
    video: str = ""  # path of the media
    image: str = ""


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How a question is put to a model, and how its reply would begin with an option's text."""

    option: str = "({letter}) {text}"
    instruction: str = ""  # a last line
    reply: str = "{text}"


def question_text(question: Question, prompt: PromptFormat = PromptFormat()) -> str:
    """The question, one option per line, the instruction if there is one."""
    options = [
        prompt.option.format(letter=letter, text=text)
        for letter, text in zip(LETTERS, question.options, strict=False)
    ]
    return "\n".join(filter(None, [question.question, *options, prompt.instruction]))


def parse_choice(reply: str, options: Sequence[str]) -> int | None:
    """The option a reply chooses, or None. Never guesses.

    A reply that is an option's text means that option. Otherwise a letter counts, looked for in
    this order: at the start, at the end, after "answer is", as (B), B., B:, B), B before a space,
    anywhere; within one form the last occurrence counts. Reasoning in <think> tags is ignored.
    """
    reply = re.sub(r"<think>.*?</think>", "", reply, flags=re.DOTALL).strip()
    plain = reply.strip(" .").casefold()
    same = [i for i, option in enumerate(options) if option.strip(" .").casefold() == plain]
    if len(same) == 1:
        return same[0]
    letter = f"([{LETTERS[: len(options)]}])"
    if alone := re.fullmatch(rf"\(?{letter}[).:]*", reply, re.IGNORECASE):
        return LETTERS.index(alone[1].upper())
    forms = (
        rf"^\W*{letter}(?![\w'])",
        rf"(?<![\w']){letter}\W*$",
        rf"(?i:answer|option|choice)(?i:\s+is|:)?:?\s*\(?{letter}\b",
        rf"\({letter}\)",
        rf"\b{letter}\.",
        rf"\b{letter}:",
        rf"\b{letter}\)",
        rf"\b{letter}\s",
        rf"\b{letter}\b",
    )
    for form in forms:
        if found := re.findall(form, reply):
            return LETTERS.index(found[-1])
    return None


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracy with a 95 % interval, in shares of 1."""

    questions: int
    accuracy: float
    low: float
    high: float


def score(correct: Sequence[bool], clusters: Sequence[str]) -> Score:
    """Accuracy of answers of which those with the same cluster (video) are not independent.

    A Wilson interval at the effective number of questions: the number divided by the ratio of the
    clustered variance (Miller, arXiv 2411.00640, eq. 4) to that of independent questions.
    """
    right = np.asarray(correct, float)
    n, p = len(right), float(right.mean())
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(index, right - p)
    independent = n * p * (1 - p)
    if independent:
        effective = n / max(1.0, float(np.square(sums).sum()) / independent)
    else:  # all right or all wrong: a video tells as much as one question
        effective = float(index.max() + 1)
    return Score(n, p, *_wilson(p, effective))


def _wilson(p: float, n: float) -> tuple[float, float]:
    z2 = Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(rows: Sequence[dict]) -> dict:
    """Scores of response rows (`correct`, `parse_ok`, `video`, `category`, `family`, `temporal`).

    A reply that could not be read counts as wrong. `overall` is over questions, `macro` the mean
    over categories (ApolloBench's Overall); `temporal` leaves out what one frame can answer.
    """
    temporal = [row for row in rows if row["temporal"]]
    categories = _scores_by(rows, "category")
    return {
        "overall": _score_rows(rows),
        "temporal": _score_rows(temporal) if temporal else None,
        "macro": float(np.mean([s["accuracy"] for s in categories.values()])),
        "categories": categories,
        "families": _scores_by(rows, "family"),
        "chance": float(np.mean([1 / len(row["options"]) for row in rows])),
        "parse_rate": float(np.mean([row["parse_ok"] for row in rows])),
        "errors": sum(row["status"] != "ok" for row in rows),
    }


def _score_rows(rows: Sequence[dict]) -> dict:
    clusters = [row["video"] or row["id"] for row in rows]
    return dataclasses.asdict(score([row["correct"] for row in rows], clusters))


def _scores_by(rows: Sequence[dict], field: str) -> dict[str, dict]:
    names = dict.fromkeys(row[field] for row in rows if row[field])
    return {name: _score_rows([row for row in rows if row[field] == name]) for name in names}


def paired_difference(first: Sequence[dict], second: Sequence[dict]) -> dict:
    """Accuracy of `first` minus that of `second` on the questions of both, with its interval."""
    other = {row["id"]: row["correct"] for row in second}
    rows = [row for row in first if row["id"] in other]
    gains = np.array([row["correct"] - other[row["id"]] for row in rows], float)
    clusters = np.array([row["video"] or row["id"] for row in rows])
    mean = float(gains.mean())
    sums = np.bincount(np.unique(clusters, return_inverse=True)[1], gains - mean)
    half = Z95 * math.sqrt(np.square(sums).sum()) / len(gains)
    return {"questions": len(gains), "difference": mean, "low": mean - half, "high": mean + half}
