# SPDX-License-Identifier: Apache-2.0
"""Many questions about many videos through the model: read ahead, encode once, answer in batches.

n clips, Q visual tokens per clip, D stream.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np

from apollo_jax.evaluation.multiple_choice import (
    LETTERS,
    PromptFormat,
    Question,
    parse_choice,
    question_text,
)
from apollo_jax.inference import decoding
from apollo_jax.inference.processor import Media, Processor
from apollo_jax.inference.processor import question as ask
from apollo_jax.models.apollo import Apollo

Scoring = Literal["generate", "letter", "cloze"]

ROWS = 32  # prompts of one device batch
CLIPS = 64  # of a wave, unless one video has more
READERS = 4  # threads that decode

Row = tuple[np.ndarray, np.ndarray | None, np.ndarray]  # tokens, visual f[n, Q, D], visual index


class Seen(NamedTuple):
    """A question with its medium, or why that could not be read."""

    question: Question
    media: Media | None
    error: str = ""


class Reply(NamedTuple):
    """What the model said, and the option it means (None: cannot be read)."""

    choice: int | None
    text: str


# ----------------------------------------------------------------------------------- reading
def read_ahead(processor: Processor, questions: Iterable[Question]) -> Iterator[Seen]:
    """The questions grouped by medium, which threads decode a few ahead of the caller."""

    def read(medium: tuple[str, str]) -> tuple[Media | None, str]:
        video, image = medium
        try:
            return processor.media(video or None, image=image or None), ""
        except (ValueError, OSError) as error:
            return None, str(error)

    groups: dict[tuple[str, str], list[Question]] = {}
    for question in questions:
        groups.setdefault((question.video, question.image), []).append(question)
    media = iter(groups)
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque = deque()
        while True:
            while len(waiting) < 2 * READERS and (medium := next(media, None)) is not None:
                waiting.append((groups[medium], pool.submit(read, medium)))
            if not waiting:
                return
            group, future = waiting.popleft()
            yield from (Seen(question, *future.result()) for question in group)


def waves(seen: Iterable[Seen]) -> Iterator[list[Seen]]:
    """Groups of about ROWS questions or CLIPS clips; a medium's questions stay together."""
    wave: list[Seen] = []
    clips = 0
    for one in seen:
        is_new = not wave or one.media is None or one.media is not wave[-1].media
        if is_new and (len(wave) >= ROWS or clips >= CLIPS):
            yield wave
            wave, clips = [], 0
        wave.append(one)
        clips += len(one.media.frame_indices) if is_new and one.media is not None else 0
    if wave:
        yield wave


# --------------------------------------------------------------------------------- answering
@dataclasses.dataclass(frozen=True)
class Answerer:
    """A model, how it is asked, and how its choice is found.

    generate: the reply is decoded greedily and its choice parsed. letter: the likeliest option
    letter as the next token. cloze: the option with the highest log-likelihood per token.
    """

    model: Apollo
    processor: Processor
    prompt: PromptFormat
    scoring: Scoring = "generate"
    max_new_tokens: int = 16

    def __call__(self, wave: list[Seen]) -> list[Reply]:
        """Replies to readable questions; ValueError if a prompt exceeds the model's context."""
        if not wave:
            return []
        visual = self._encode([seen.media for seen in wave])
        rows: list[Row] = []
        for seen in wave:
            turn = ask(question_text(seen.question, self.prompt), seen.media)
            rendered = self.processor.render([turn], seen.media)
            rows.append((rendered.tokens, visual[id(seen.media)], rendered.visual_index))
        questions = [seen.question for seen in wave]
        score = {"generate": self._generate, "letter": self._letter, "cloze": self._cloze}
        return score[self.scoring](questions, rows)

    def _encode(self, media: list[Media | None]) -> dict[int, np.ndarray | None]:
        """{id(media): visual tokens f[n, Q, D]}, the clips of all of them encoded together."""
        shown = list({id(m): m for m in media if m is not None}.values())
        encoded: dict[int, np.ndarray | None] = {id(None): None}
        if shown:
            pixels = {k: np.concatenate([m.pixels[k] for m in shown]) for k in shown[0].pixels}
            cuts = np.cumsum([len(m.frame_indices) for m in shown])[:-1]
            visual = np.split(decoding.encode(self.model, pixels), cuts)
            encoded |= {id(m): v for m, v in zip(shown, visual, strict=True)}
        return encoded

    def _generate(self, questions: list[Question], rows: list[Row]) -> list[Reply]:
        texts: list[str] = []
        for batch in _batches(rows):
            tokens = decoding.generate_tokens(
                self.model,
                *decoding.collate(batch),
                stop=self.processor.stop,
                max_new_tokens=self.max_new_tokens,
            )
            texts += [self.processor.tokenizer.decode(ids).strip() for ids in np.asarray(tokens)]
        answered = zip(questions, texts, strict=False)  # the last batch was filled up
        return [Reply(parse_choice(text, q.options), text) for q, text in answered]

    def _letter(self, questions: list[Question], rows: list[Row]) -> list[Reply]:
        letters = [self.processor.tokenizer.encode(letter)[0] for letter in LETTERS]
        logits = [
            np.asarray(decoding.next_token_logits(self.model, *decoding.collate(batch)))
            for batch in _batches(rows)
        ]
        of_letters = np.concatenate(logits)[: len(rows), letters]
        best = [
            int(row[: len(q.options)].argmax())
            for q, row in zip(questions, of_letters, strict=True)
        ]
        return [Reply(choice, LETTERS[choice]) for choice in best]

    def _cloze(self, questions: list[Question], rows: list[Row]) -> list[Reply]:
        continued, starts = [], []
        for question, (tokens, visual, index) in zip(questions, rows, strict=True):
            for option in question.options:
                reply = self.prompt.reply.format(text=option)
                ids = np.array(self.processor.tokenizer.encode(reply), np.int32)
                longer = np.pad(index, (0, len(ids)), constant_values=-1)
                continued.append((np.concatenate([tokens, ids]), visual, longer))
                starts.append(len(tokens))
        likelihood = [
            decoding.log_likelihood(
                self.model, *decoding.collate(batch), starts=np.array(start, np.int32)
            )
            for batch, start in zip(_batches(continued), _batches(starts), strict=True)
        ]
        lengths = np.array([len(row[0]) for row in continued]) - starts
        per_token = np.concatenate(likelihood)[: len(continued)] / lengths
        cuts = np.cumsum([len(question.options) for question in questions])[:-1]
        best = [int(options.argmax()) for options in np.split(per_token, cuts)]
        return [Reply(c, q.options[c]) for c, q in zip(best, questions, strict=True)]


def _batches(rows: list) -> list[list]:
    """Lists of ROWS, the last filled up with its last row: one shape to compile."""
    full = rows + rows[-1:] * (-len(rows) % ROWS)
    return [full[i : i + ROWS] for i in range(0, len(full), ROWS)]
