# SPDX-License-Identifier: Apache-2.0
"""The synthetic scenes of ApolloBench-mini: frames, questions, captions.

The families keep the five categories of ApolloBench (arXiv 2412.10360, section 2.3). Every temporal
scene is built so that its centre frame and the words of the question say nothing about the answer:
the centre shows the *middle* digit, a camera at rest, an object in the centre, a light that is lit
equally often whatever the answer. Durations are drawn independently of the answers.

T frames of a scene at FPS frames per second, each 64x64 RGB.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from apollo_jax.evaluation.multiple_choice import PromptFormat, Question
from apollo_jax.evaluation.pictures import (
    COLORS,
    DIGITS,
    PLACES,
    SHAPES,
    draw_digit,
    draw_door,
    draw_lamp,
    draw_object,
    draw_screen,
    random_shade,
)

FPS = 8
# Options are single words, one token each: a small model answers by saying one.
DIRECTIONS = ("left", "right", "forward", "backward")
NUMBERS = ("one", "two", "three", "four")
PERIODS = {"one": 1, "two": 2, "four": 4, "never": 0}  # seconds
LENGTHS = {"half": 0.5, "one": 1, "two": 2, "four": 4}  # seconds
# Spaces before words: a word is one token wherever it stands.
PROMPT = PromptFormat(option=" {text}", reply=" {text}")
CATEGORIES = {  # family -> category of the paper
    "ocr": "Temporal OCR",
    "ego": "Egocentric",
    "spat": "Spatial",
    "blink": "Perception",
    "dur": "Perception",
    "color": "Reasoning",
    "count": "Reasoning",
    "static": "Static",
}
FAMILIES = tuple(CATEGORIES)
RATE_FAMILIES = ("blink", "dur")  # need absolute time: what constant-fps sampling is for


class Scene(NamedTuple):
    """One clip of the world."""

    frames: np.ndarray  # u8[T, 64, 64, 3] at FPS
    questions: list[Question]
    caption: str


def _ask(family: str, options: Iterable[str], asked: dict[str, str], rng) -> list[Question]:
    """One question per {text: answer}, all with the same options in the same shuffled order."""
    options = tuple(rng.permutation(list(options)).tolist())
    kind = (CATEGORIES[family], family, family != "static")
    return [Question(text, options, options.index(answer), *kind) for text, answer in asked.items()]


def _num_frames(rng, shortest: int = 3) -> int:
    """Log-uniform whole seconds up to 12."""
    return FPS * round(np.exp(rng.uniform(np.log(shortest), np.log(12))))


def _thirds(stills: Sequence[np.ndarray], rng) -> np.ndarray:
    """Three stills in turn; the boundaries vary but the centre frame is always the second."""
    total = _num_frames(rng)
    first, second = (round(total * rng.uniform(*span)) for span in ((0.25, 0.42), (0.58, 0.75)))
    return np.stack(stills).repeat((first, second - first, total - second), axis=0)


def _ocr(rng) -> Scene:
    first, middle, last, other = rng.choice(list(DIGITS), 4, replace=False).tolist()
    frames = _thirds([draw_digit(d, random_shade(rng)) for d in (first, middle, last)], rng)
    asked = {"Which number is shown first?": first, "Which number is shown last?": last}
    questions = _ask("ocr", (first, middle, last, other), asked, rng)
    return Scene(frames, questions, f"number {first} then {middle} then {last}")


def _color(rng) -> Scene:
    before, middle, after, *others = rng.choice(list(COLORS), 5, replace=False).tolist()
    frames = _thirds([draw_screen(c) for c in (before, middle, after)], rng)
    asked = {
        f"Which color comes right before {middle}?": before,
        f"Which color comes right after {middle}?": after,
    }
    questions = _ask("color", (before, after, *others), asked, rng)
    return Scene(frames, questions, f"screen {before} then {middle} then {after}")


def _ego(rng) -> Scene:
    """The camera arrives at rest from one direction and leaves it in another."""
    first, last = rng.choice(DIRECTIONS, 2).tolist()
    # When the camera moves left the door moves right; when it moves forward the door comes nearer.
    motion = {"left": (1, 0), "right": (-1, 0), "forward": (0, 1), "backward": (0, -1)}
    total, shade = _num_frames(rng), random_shade(rng)
    begin, end = rng.uniform(0.34, 0.42), rng.uniform(0.58, 0.66)
    frames = []
    for u in np.linspace(0, 1, total):
        approach, leave = min(0, u / begin - 1), max(0, (u - end) / (1 - end))
        side, near = approach * np.array(motion[first]) + leave * np.array(motion[last])
        frames.append(draw_door(side, near, shade))
    asked = {
        "Which way does the camera move first?": first,
        "Which way does the camera move last?": last,
    }
    questions = _ask("ego", DIRECTIONS, asked, rng)
    return Scene(np.stack(frames), questions, f"camera {first} then {last}")


def _spat(rng) -> Scene:
    """An object goes from one side through the centre to another."""
    start, end = rng.choice(list(PLACES), 2).tolist()
    color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    total, shade = _num_frames(rng), random_shade(rng)
    path = [PLACES[start], PLACES[start], (32, 32), (32, 32), PLACES[end], PLACES[end]]
    u = np.linspace(0, 1, total)
    x, y = (np.interp(u, (0, 0.12, 0.42, 0.58, 0.88, 1), axis) for axis in np.transpose(path))
    frames = [draw_object(color, shape, *at, shade) for at in zip(x, y, strict=True)]
    asked = {
        "Where is the object at the start?": start,
        "Where is the object at the end?": end,
    }
    questions = _ask("spat", PLACES, asked, rng)
    return Scene(np.stack(frames), questions, f"object {color} {start} then {end}")


def _lit_scene(kind: str, lit: np.ndarray, rng) -> np.ndarray:
    shade = random_shade(rng)
    off, on = (draw_lamp(kind, state, shade) for state in (False, True))
    return np.stack([off, on])[lit.astype(int)]


def _blink(rng) -> Scene:
    often = rng.choice(list(PERIODS)).item()
    frame = np.arange(_num_frames(rng)) + rng.integers(8 * FPS)
    half = PERIODS[often] * FPS // 2
    lit = frame // half % 2 if half else np.full(len(frame), rng.integers(2))
    questions = _ask("blink", PERIODS, {"Every how many seconds does the light blink?": often}, rng)
    caption = "light blinks never" if often == "never" else f"light blinks every {often}"
    return Scene(_lit_scene("light", lit, rng), questions, caption)


def _dur(rng) -> Scene:
    long = rng.choice(list(LENGTHS)).item()
    total, length = _num_frames(rng, shortest=5), round(LENGTHS[long] * FPS)
    # Always lit at the centre: from one frame every length is as likely.
    start = rng.integers(max(0, total // 2 + 1 - length), min(total // 2 - 1, total - length) + 1)
    lit = (np.arange(total) >= start) & (np.arange(total) < start + length)
    questions = _ask("dur", LENGTHS, {"For how many seconds is the lamp on?": long}, rng)
    return Scene(_lit_scene("lamp", lit, rng), questions, f"lamp on for {long}")


def _count(rng) -> Scene:
    """Flashes of half a second, at least half a second apart, none at the centre."""
    times = rng.choice(NUMBERS).item()
    total = _num_frames(rng, shortest=5)
    slots = np.delete(np.arange(total // FPS), total // 2 // FPS)
    slots = rng.choice(slots, NUMBERS.index(times) + 1, replace=False)
    frame = np.arange(total) - rng.integers(4)
    lit = np.isin(frame // FPS, slots) & (frame % FPS < FPS // 2)
    questions = _ask("count", NUMBERS, {"How many times does the star flash?": times}, rng)
    return Scene(_lit_scene("star", lit, rng), questions, f"star flashes {times}")


def _static(rng) -> Scene:
    color, *others = rng.choice(list(COLORS), 4, replace=False).tolist()
    shape = rng.choice(SHAPES)
    x, y = rng.uniform(16, 48, 2)
    still = draw_object(color, shape, x, y, random_shade(rng))
    questions = _ask("static", (color, *others), {"What color is the object?": color}, rng)
    return Scene(still[None].repeat(_num_frames(rng), 0), questions, f"still object {color}")


def make_scene(family: str, rng: np.random.Generator) -> Scene:
    """A random scene of one family with its questions (4 options) and caption."""
    makers: dict[str, Callable[[np.random.Generator], Scene]] = {
        "ocr": _ocr,
        "ego": _ego,
        "spat": _spat,
        "blink": _blink,
        "dur": _dur,
        "color": _color,
        "count": _count,
        "static": _static,
    }
    if family not in makers:
        raise ValueError(f"family {family!r} is unknown; the families are {', '.join(FAMILIES)}")
    return makers[family](rng)
