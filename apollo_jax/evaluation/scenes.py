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

SIZE = 64
FPS = 8
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 70, 230),
    "yellow": (235, 215, 40),
    "purple": (140, 40, 170),
    "orange": (245, 130, 20),
    "cyan": (40, 210, 220),
    "white": (240, 240, 240),
}
SHAPES = ("square", "circle", "triangle")
# Options are single words, one token each: a small model answers by saying one.
PLACES = {"top": (32, 13), "bottom": (32, 51), "left": (13, 32), "right": (51, 32)}  # x, y
DIRECTIONS = ("left", "right", "forward", "backward")
NUMBERS = ("one", "two", "three", "four")
PERIODS = {"one": 1, "two": 2, "four": 4, "never": 0}  # seconds
LENGTHS = {"half": 0.5, "one": 1, "two": 2, "four": 4}  # seconds
# Spaces before words: a word is one token wherever it stands.
PROMPT = PromptFormat(option=" {text}", reply=" {text}")
STILLS = {  # share of each kind of image: where a thing is takes longest to learn
    "object": 0.4,
    "number": 0.2,
    "door": 0.2,
    "screen": 0.08,
    "light": 0.04,
    "lamp": 0.04,
    "star": 0.04,
}
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

# Rows of each digit, three bits wide.
DIGITS = {
    "0": (7, 5, 5, 5, 7),
    "1": (2, 6, 2, 2, 7),
    "2": (7, 1, 7, 4, 7),
    "3": (7, 1, 7, 1, 7),
    "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7),
    "6": (7, 4, 7, 5, 7),
    "7": (7, 1, 1, 1, 1),
    "8": (7, 5, 7, 5, 7),
    "9": (7, 5, 7, 1, 7),
}


class Scene(NamedTuple):
    """One clip of the world."""

    frames: np.ndarray  # u8[T, 64, 64, 3] at FPS
    questions: list[Question]
    caption: str


# ------------------------------------------------------------------------------------------ drawing
def _shade(rng: np.random.Generator) -> int:
    return int(rng.integers(20, 60))


def _canvas(shade: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), shade, np.uint8)


def draw_digit(digit: str, shade: int) -> np.ndarray:
    """u8[64, 64, 3]: a white 24x40 digit in the centre."""
    frame = _canvas(shade)
    bits = np.array([[row >> bit & 1 for bit in (2, 1, 0)] for row in DIGITS[digit]], bool)
    frame[12:52, 20:44][bits.repeat(8, 0).repeat(8, 1)] = 240
    return frame


def draw_object(color: str, shape: str, x: float, y: float, shade: int) -> np.ndarray:
    """u8[64, 64, 3]: a coloured shape with its centre at (x, y) pixels, 18 pixels wide."""
    frame = _canvas(shade)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    dx, dy = np.abs(columns - x), rows - y
    inside = {
        "square": (dx <= 8) & (np.abs(dy) <= 8),
        "circle": dx**2 + dy**2 <= 81,
        "triangle": (np.abs(dy) <= 8) & (dx <= (dy + 9) / 2),
    }[shape]
    frame[inside] = COLORS[color]
    return frame


def draw_door(side: float, near: float, shade: int) -> np.ndarray:
    """u8[64, 64, 3]: a door on the horizon; side -1..1 moves it left to right, near -1..1 to us."""
    frame = _canvas(90 + shade)  # sky
    frame[34:] = (60 + shade, 110, 60)  # ground
    scale = 2.0**near
    x, half, up, down = 32 + 20 * side, 7 * scale, 14 * scale, 8 * scale
    top, bottom = round(max(0, 34 - up)), round(34 + down)
    frame[top:bottom, round(x - half) : round(x + half)] = (150, 60, 20)
    return frame


def draw_lamp(kind: str, lit: bool, shade: int) -> np.ndarray:
    """u8[64, 64, 3]: a light (yellow disc), a lamp (cyan square) or a star (white cross)."""
    frame = _canvas(shade)
    rows, columns = np.abs(np.mgrid[:SIZE, :SIZE] - 31.5)
    inside, color = {
        "light": (rows**2 + columns**2 <= 20**2, "yellow"),
        "lamp": (np.maximum(rows, columns) <= 17, "cyan"),
        "star": ((np.minimum(rows, columns) <= 6) & (np.maximum(rows, columns) <= 24), "white"),
    }[kind]
    frame[inside] = COLORS[color] if lit else shade + 30
    return frame


def draw_screen(color: str) -> np.ndarray:
    """u8[64, 64, 3] of one colour."""
    return np.full((SIZE, SIZE, 3), COLORS[color], np.uint8)


def draw_still(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A random still image u8[64, 64, 3] and its caption, in the words of the videos' captions."""
    shade = _shade(rng)
    kind = rng.choice(list(STILLS), p=list(STILLS.values())).item()
    if kind == "number":
        digit = rng.choice(list(DIGITS)).item()
        return draw_digit(digit, shade), f"number {digit}"
    if kind == "screen":
        color = rng.choice(list(COLORS)).item()
        return draw_screen(color), f"screen {color}"
    if kind == "object":
        color, shape = rng.choice(list(COLORS)).item(), rng.choice(SHAPES).item()
        place = rng.choice([*PLACES, "centre"]).item()
        x, y = PLACES.get(place, (32, 32)) + rng.uniform(-4, 4, 2)
        return draw_object(color, shape, x, y, shade), f"object {color} {place}"
    if kind == "door":
        poses = {"left": (-1, 0), "right": (1, 0), "near": (0, 1), "far": (0, -1), "ahead": (0, 0)}
        word = rng.choice(list(poses)).item()
        side, near = np.array(poses[word]) * rng.uniform(0.4, 1)
        return draw_door(side, near, shade), f"door {word}"
    lit = bool(rng.integers(2))
    return draw_lamp(kind, lit, shade), f"{kind} {'on' if lit else 'off'}"


# ----------------------------------------------------------------------------------------- families
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
    frames = _thirds([draw_digit(d, _shade(rng)) for d in (first, middle, last)], rng)
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
    total, shade = _num_frames(rng), _shade(rng)
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
    total, shade = _num_frames(rng), _shade(rng)
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
    shade = _shade(rng)
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
    still = draw_object(color, shape, x, y, _shade(rng))
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
