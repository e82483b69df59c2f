# SPDX-License-Identifier: Apache-2.0
"""Conversation: chat turns and sampled clips to prompt text, tokens and loss weights.

n tokens of one sample, Q visual tokens per clip.

The text is that of Apollo's published code, character by character. Visual positions are written
as Q placeholders per clip, and every run of text between placeholders is tokenised on its own, as
the official code does. That code also drops the first token after a prompt that *begins* with a
placeholder, meant for tokenizers that prepend a BOS; ours always begin with <|im_start|>, so
nothing is ever dropped. Answers too are tokenised on their own: what a model is trained to
continue is exactly the prompt it will be given.

A plain text (a single turn of role 'text') has no chat around it: all of it is learnt, up to the
<|endoftext|> that closes it, save for what introduces its media.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

import numpy as np
from num2words import num2words

from data_pipeline.tokenizer import PAD, TURN_END, TURN_START, Tokenizer

SYSTEM = "You are a helpful vision-language assistant."
ROLES = ("system", "user", "assistant")
VISUAL_TOKEN = {"video": "<|video_token|>", "image": "<|image_token|>"}
PLACEHOLDER = re.compile(r"<(video|image)>")  # where a medium stands in a user's text
_VISUAL_RUN = re.compile("((?:" + "|".join(map(re.escape, VISUAL_TOKEN.values())) + ")+)")


@dataclass(frozen=True)
class Turn:
    role: str  # one of ROLES, or 'text'
    text: str


@dataclass(frozen=True)
class MediaClips:
    """The sampled clips of one video, or one image (a single clip)."""

    kind: str  # 'video' | 'image'
    timestamps: np.ndarray  # f64[clips, 2], first and last sampled frame in seconds
    duration: float = 0.0  # of the whole video, seconds
    clip_duration: float = 2.0  # seconds


@dataclass(frozen=True)
class Rendered:
    """One sample, unshifted: packing shifts targets inside the segment."""

    tokens: np.ndarray  # i32[n], the padding id at visual positions
    loss_weights: np.ndarray  # f32[n], 1 on what the assistant says, its <|im_end|> included
    visual_index: np.ndarray  # i32[n], counts the sample's visual tokens, -1 on text


def ask(question: str, media: Sequence[MediaClips] = ()) -> Turn:
    """A user's turn about `media`, which stand in front of the question."""
    return Turn("user", "".join(f"<{medium.kind}>\n" for medium in media) + question)


def media_text(medium: MediaClips, tokens_per_clip: int) -> str:
    """What stands in the prompt for one medium.

    A video is introduced by its clips and their times; an image is its tokens alone, where its
    placeholder stood (the official loader of images is empty, so this is our decision).
    """
    tokens = VISUAL_TOKEN[medium.kind] * tokens_per_clip
    if medium.kind == "image":
        return tokens
    clips = ",\n".join(
        f"{round(float(start), 1)}-{round(float(end), 1)} seconds: {tokens}"
        for start, end in medium.timestamps
    )
    return (
        f"You are provided the following series of {_words(len(medium.timestamps))}, "
        f"{medium.clip_duration:g} second clips from a {timedelta(seconds=medium.duration)} "
        f"[H:MM:SS] video.\n{clips}"
    )


def prompt_text(turns: Sequence[Turn], media: Sequence[MediaClips], tokens_per_clip: int) -> str:
    """The whole conversation as text, ready for the assistant if it does not have the last word.

    Raises ValueError unless the users' texts hold one <video> or <image> per medium.
    """
    return "".join(text for text, _ in _pieces(turns, media, tokens_per_clip))


def render(
    turns: Sequence[Turn],
    media: Sequence[MediaClips],
    tokenizer: Tokenizer,
    tokens_per_clip: int,
) -> Rendered:
    """Tokens, loss weights and visual positions of `prompt_text`; raises ValueError as it does."""
    ids: list[int] = []
    shown: list[slice] = []  # the visual tokens
    learnt: list[slice] = []
    seen = 0
    for text, is_answer in _pieces(turns, media, tokens_per_clip):
        start = len(ids)
        for number, run in enumerate(_VISUAL_RUN.split(text)):
            if number % 2:
                count = run.count("<|")
                shown.append(slice(len(ids), len(ids) + count))
                ids += [tokenizer.pad_id] * count
                seen += count
            elif run:
                ids += tokenizer.encode(run)
        if is_answer:
            learnt.append(slice(start, len(ids)))
    expected = tokens_per_clip * sum(len(medium.timestamps) for medium in media)
    if seen != expected:
        raise ValueError(
            f"a turn's own text spells {seen - expected} of the reserved tokens "
            f"{' and '.join(VISUAL_TOKEN.values())}; write <video> or <image> where a medium stands"
        )
    weights = np.zeros(len(ids), np.float32)
    for part in learnt:
        weights[part] = 1
    is_visual = np.zeros(len(ids), np.bool_)
    for part in shown:
        is_visual[part] = True
    visual = np.full(len(ids), -1, np.int32)
    visual[is_visual] = np.arange(seen)
    return Rendered(np.array(ids, np.int32), weights, visual)


def _pieces(
    turns: Sequence[Turn], media: Sequence[MediaClips], tokens_per_clip: int
) -> list[tuple[str, bool]]:
    """Alternating (text, whether the assistant says it); an answer ends with its <|im_end|>."""
    pieces: list[tuple[str, bool]] = []
    waiting = list(media)
    if [turn.role for turn in turns] == ["text"]:
        return _plain_text(turns[0].text, media, tokens_per_clip)
    if not turns or turns[0].role != "system":
        turns = [Turn("system", SYSTEM), *turns]
    prompt = ""
    for turn in turns:
        if turn.role not in ROLES:
            raise ValueError(f"unknown role {turn.role!r}; known: {', '.join(ROLES)}")
        prompt += f"{TURN_START}{turn.role}\n" + "\n" * (turn.role == "system")
        if turn.role == "assistant":
            pieces += [(prompt, False), (turn.text + TURN_END, True)]
            prompt = "\n"
            continue
        text = _fill(turn.text, waiting, tokens_per_clip) if turn.role == "user" else turn.text
        prompt += f"{text}{TURN_END}\n"
    if waiting:
        raise ValueError(
            f"the text has {len(media) - len(waiting)} <video>/<image> placeholders for "
            f"{len(media)} media"
        )
    if turns[-1].role != "assistant":
        pieces.append((f"{prompt}{TURN_START}assistant\n", False))
    return pieces


def _plain_text(
    text: str, media: Sequence[MediaClips], tokens_per_clip: int
) -> list[tuple[str, bool]]:
    runs = PLACEHOLDER.split(text)[::2] if media else [text]
    if len(runs) != len(media) + 1:
        raise ValueError(
            f"the text has {len(runs) - 1} <video>/<image> placeholders for {len(media)} media"
        )
    pieces = [(runs[0], True)]
    for medium, after in zip(media, runs[1:], strict=True):
        pieces += [(media_text(medium, tokens_per_clip), False), (after, True)]
    return [*pieces, (PAD, True)]


def _fill(text: str, waiting: list[MediaClips], tokens_per_clip: int) -> str:
    """Replaces each placeholder by the next waiting medium; a video is its own paragraph."""
    first, *rest = PLACEHOLDER.split(text)[::2]
    if len(rest) > len(waiting):
        raise ValueError(
            f"the text has a <video>/<image> placeholder more than the sample has media: {text!r}"
        )
    filled = first
    for after in rest:
        medium = waiting.pop(0)
        if medium.kind == "video":
            filled = filled.rstrip() and filled.rstrip() + "\n\n"
            after = after.lstrip() and "\n\n" + after.lstrip()
        filled += media_text(medium, tokens_per_clip) + after
    return filled


@lru_cache(maxsize=1024)
def _words(number: int) -> str:
    return num2words(number)
