# SPDX-License-Identifier: Apache-2.0
"""Frame geometry and normalisation on the host, bit for bit the published preprocessing.

T frames, h x w source pixels, s their long side, R the side a square is resized to, S the side an
encoder sees; RGB, channels last.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

RESAMPLERS = ("pil_bicubic", "cv2_bilinear", "pil_bilinear", "torch_bicubic")
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class FrameSpec:
    """The picture an encoder was trained on: side in pixels, statistics, resize filter.

    resize: side of the square before its middle is cut out, 0 for `size`, which cuts nothing.
    """

    size: int
    mean: Colour
    std: Colour
    resample: str = "pil_bicubic"
    resize: int = 0

    def __post_init__(self):
        if self.resample not in RESAMPLERS:
            raise ValueError(f"resample {self.resample!r} is not one of {', '.join(RESAMPLERS)}")
        if self.side < self.size:
            raise ValueError(f"a square of {self.resize} pixels has no middle of {self.size}")

    @property
    def side(self) -> int:
        """R, the side of the whole square."""
        return self.resize or self.size

    @property
    def middle(self) -> slice:
        """What stays of a side of R pixels; of an odd margin the larger part is cut at its end."""
        start = (self.side - self.size) // 2
        return slice(start, start + self.size)

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


def cubic_weights(before: int, after: int) -> np.ndarray:
    """f64[after, before]: antialiased cubic resampling of one axis, as torch has it (a = -0.5)."""
    scale = before / after
    centre = (np.arange(after)[:, None] + 0.5) * scale
    x = np.abs(np.arange(before) + 0.5 - centre) / max(scale, 1.0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


def resize(square: np.ndarray, spec: FrameSpec) -> np.ndarray:
    """u8[s, s, 3] -> [R, R, 3]: grey levels, f32 between them only for torch_bicubic."""
    size = (spec.side, spec.side)
    if spec.resample == "cv2_bilinear":  # no antialiasing, as InternVideo2 was trained
        return cv2.resize(square, size, interpolation=cv2.INTER_LINEAR)
    if spec.resample == "torch_bicubic":  # neither rounded nor clipped
        w = cubic_weights(len(square), spec.side)
        return np.einsum("ih,jw,hwc->ijc", w, w, square, optimize=True).astype(np.float32)
    pil = Image.Resampling.BICUBIC if spec.resample == "pil_bicubic" else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(square).resize(size, pil))


def preprocess(frames: np.ndarray, spec: FrameSpec) -> np.ndarray:
    """u8[T, h, w, 3] -> f32[T, S, S, 3]: pad to a square, resize, cut the middle, normalise."""
    squares = np.stack([resize(pad_to_square(f, spec.pad_colour), spec) for f in frames])
    pictures = squares[:, spec.middle, spec.middle]
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return (pictures.astype(np.float32) / np.float32(255) - mean) / std


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
