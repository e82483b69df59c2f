# SPDX-License-Identifier: Apache-2.0
"""Stored frames of a few media as one picture, each frame with its time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.frame_shards import FrameShards

_GAP, _LINE = 4, 18  # pixels between frames; height of a line of text
_MAX_FRAMES = 2000  # a sheet of more would need gigabytes
_BACK, _INK, _TITLE = (24, 24, 24), (255, 255, 255), (255, 200, 80)


@dataclass(frozen=True)
class Strip:
    """One medium: frames u8[h, w, 3] and the seconds at which the source shows them."""

    title: str
    frames: list[np.ndarray]
    seconds: list[float]


def clock(seconds: float) -> str:
    """'1:02:03.4', without hours if there are none."""
    tenths = round(seconds * 10)
    hours, minutes = tenths // 36000, tenths // 600 % 60
    rest = f"{tenths % 600 / 10:04.1f}"
    return f"{hours}:{minutes:02}:{rest}" if hours else f"{minutes}:{rest}"


def grid_frames(stored: int, fps: float, count: int, every: float | None) -> list[int]:
    """Which of `stored` grid frames: one `every` so many seconds, or `count` spread evenly."""
    if every is not None:
        step = max(1.0, every * fps)
        return [int(k * step) for k in range(int((stored - 1) / step) + 1)]
    middles = (np.arange(min(count, stored)) + 0.5) * stored / min(count, stored)
    return middles.astype(int).tolist()


def read_strips(shards: FrameShards, wanted: Mapping[str, Sequence[int]]) -> list[Strip]:
    """Grid frames of media; FrameShardError if one is damaged, ValueError if they are too many."""
    total = sum(map(len, wanted.values()))
    if total > _MAX_FRAMES:
        raise ValueError(
            f"a sheet of {total} frames is too large (at most {_MAX_FRAMES}): ask for fewer media, "
            "fewer --frames or a longer --every"
        )
    return [_read_strip(shards, media_id, frames) for media_id, frames in wanted.items()]


def _read_strip(shards: FrameShards, media_id: str, wanted: Sequence[int]) -> Strip:
    info, per_segment = shards.info(media_id), shards.spec.segment_frames
    chosen, frames, seconds = set(wanted), [], []
    for header, jpegs in shards.segments(media_id):
        for k, jpeg in enumerate(jpegs):
            if header["seg"] * per_segment + k in chosen:
                frames.append(simplejpeg.decode_jpeg(jpeg))
                seconds.append(header["pts_us"][k] / 1e6)
    length = f"{clock(info.duration)}, " if info.kind == "video" else ""
    title = f"{media_id}  ({length}{info.width}x{info.height})"
    return Strip(title, frames, seconds)


def contact_sheet(strips: Sequence[Strip], columns: int = 6, side: int = 256) -> Image.Image:
    """Strips below each other, `columns` frames a row, none larger than `side` pixels."""
    parts = [_draw_strip(strip, columns, side) for strip in strips]
    size = max(p.width for p in parts), sum(p.height for p in parts)
    sheet = Image.new("RGB", size, _BACK)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _draw_strip(strip: Strip, columns: int, side: int) -> Image.Image:
    pictures = [Image.fromarray(frame) for frame in strip.frames]
    for picture in pictures:
        picture.thumbnail((side, side))
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows, font = -(-len(pictures) // columns), ImageFont.load_default(13)
    across = _GAP + min(columns, len(pictures)) * (width + _GAP)
    title = int(font.getlength(strip.title)) + 2 * _GAP
    sheet = Image.new("RGB", (max(across, title), _LINE + _GAP + rows * (height + _GAP)), _BACK)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 1), strip.title, _TITLE, font)
    for k, (picture, seconds) in enumerate(zip(pictures, strip.seconds, strict=True)):
        left = _GAP + k % columns * (width + _GAP)
        top = _LINE + _GAP + k // columns * (height + _GAP)
        sheet.paste(picture, (left, top))
        below = top + picture.height - _LINE
        label = clock(seconds)
        draw.rectangle((left, below, left + font.getlength(label) + 6, below + _LINE), _BACK)
        draw.text((left + 3, below + 1), label, _INK, font)
    return sheet
