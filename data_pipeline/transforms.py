# SPDX-License-Identifier: Apache-2.0
"""Frame geometry and normalisation on the host, bit for bit the published preprocessing.

T frames, h x w source pixels, S the square side an encoder expects; RGB, channels last.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

RESAMPLERS = ("pil_bicubic", "cv2_bilinear")
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class FrameSpec:
    """The picture an encoder was trained on: side in pixels, statistics, resize filter."""

    size: int
    mean: Colour
    std: Colour
    resample: str = "pil_bicubic"

    def __post_init__(self):
        if self.resample not in RESAMPLERS:
            raise ValueError(f"resample {self.resample!r} is not one of {', '.join(RESAMPLERS)}")

    @property
    def pad_colour(self) -> tuple[int, int, int]:
        """The encoder's mean as uint8, truncated: 127 for SigLIP's 0.5."""
        red, green, blue = (int(255 * m) for m in self.mean)
        return red, green, blue


def pad_to_square(frame: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """u8[h, w, 3] -> u8[s, s, 3] with s = max(h, w), the picture centred."""
    height, width = frame.shape[:2]
    size = max(height, width)
    square = np.empty((size, size, 3), np.uint8)
    square[:] = colour
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = frame
    return square


def _resize(square: np.ndarray, spec: FrameSpec) -> np.ndarray:
    """u8[s, s, 3] -> u8[S, S, 3]."""
    size = (spec.size, spec.size)
    if spec.resample == "cv2_bilinear":  # no antialiasing, as InternVideo2 was trained
        return cv2.resize(square, size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(Image.fromarray(square).resize(size, Image.Resampling.BICUBIC))


def preprocess(frames: np.ndarray, spec: FrameSpec) -> np.ndarray:
    """u8[T, h, w, 3] -> f32[T, S, S, 3]: pad to a square, resize, normalise."""
    squares = np.stack([_resize(pad_to_square(f, spec.pad_colour), spec) for f in frames])
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return (squares.astype(np.float32) / np.float32(255) - mean) / std


def fit_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the long side at most `size`, never upscaled, both even."""
    scale = min(1.0, size / max(height, width))
    # Even sides, so that 4:2:0 chroma planes are exactly half as large.
    even_height, even_width = (max(2, round(side * scale) // 2 * 2) for side in (height, width))
    return even_height, even_width


def fit_canvas(frame: np.ndarray, size: int) -> np.ndarray:
    """u8[h, w, 3] -> u8[h', w', 3], long side at most `size`; PIL's antialiased bicubic."""
    height, width = fit_size(frame.shape[0], frame.shape[1], size)
    if (height, width) == frame.shape[:2]:
        return frame
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
