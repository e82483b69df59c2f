# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice questions: the prompt, the answer read out of a reply, the scores."""

import dataclasses
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"


@dataclasses.dataclass(frozen=True)
class Question:
    """One multiple-choice question about a video or an image."""

    question: str
    options: tuple[str, ...]
    answer: int  # index into options
    category: str
    family: str = ""
    temporal: bool = True  # False: one frame is enough
    id: str = ""
    video: str = ""  # path of the media, relative to the benchmark's folder
    image: str = ""


def question_text(question: Question, instruction: str = "") -> str:
    """The question, one `(A) option` per line, and an instruction if given."""
    options = [f"({letter}) {o}" for letter, o in zip(LETTERS, question.options, strict=False)]
    return "\n".join([question.question, *options, *([instruction] if instruction else [])])


def answer_text(options: Sequence[str], answer: int) -> str:
    """The content, then the letter: `red (B)`. In this order a small model binds the letter."""
    return f"{options[answer]} ({LETTERS[answer]})"
