# SPDX-License-Identifier: Apache-2.0
"""The pictures that scenes.py puts together, each 64x64 RGB, and single ones with a caption."""

import numpy as np

SIZE = 64
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
PLACES = {"top": (32, 13), "bottom": (32, 51), "left": (13, 32), "right": (51, 32)}  # x, y
STILLS = {  # share of each kind of image: where a thing is takes longest to learn
    "object": 0.4,
    "number": 0.2,
    "door": 0.2,
    "screen": 0.08,
    "light": 0.04,
    "lamp": 0.04,
    "star": 0.04,
}
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


def random_shade(rng: np.random.Generator) -> int:
    """A random grey for the ground of a picture."""
    return int(rng.integers(20, 60))


def _canvas(shade: int) -> np.ndarray:
    """u8[64, 64, 3] of one grey."""
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
    shade = random_shade(rng)
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
