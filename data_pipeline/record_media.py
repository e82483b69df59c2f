# SPDX-License-Identifier: Apache-2.0
"""Media that come inside a record, read as `FrameShards` reads those in shards.

n clips, F frames per clip, S canvas side.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageOps

from data_pipeline.canvas import Picture, copy_picture, draw_jpeg, open_pictures, side
from data_pipeline.frame_records import MediaInfo, ShardSpec
from data_pipeline.transforms import fit_canvas


class RecordMedia:
    """Image files by id, and media stored frame by frame as in shards: their facts and JPEGs."""

    def __init__(
        self,
        images: Mapping[str, bytes],
        stored: Mapping[str, tuple[MediaInfo, Sequence[bytes]]] | None = None,
    ):
        self._images, self._stored = images, stored or {}

    def __contains__(self, media_id: str) -> bool:
        return media_id in self._images or media_id in self._stored

    def info(self, media_id: str) -> MediaInfo:
        """As `FrameShards.info`; an image file is as it comes. ValueError if it is no image."""
        if media_id in self._stored:
            return self._stored[media_id][0]
        with _opened(self._images[media_id], media_id) as image:
            return _still(media_id, image.height, image.width)

    def read_clips(
        self, media_id: str, frame_indices: np.ndarray, canvas: np.ndarray
    ) -> np.ndarray:
        """As `FrameShards.read_clips`; an image file looks as it would after `predecode`."""
        if media_id in self._stored:
            info, jpegs = self._stored[media_id]
        else:
            info, jpegs = _predecoded(self._images[media_id], media_id, side(canvas))
        if max(info.height, info.width) > side(canvas):
            raise ValueError(
                f"{media_id!r} is stored at {info.height}x{info.width}, larger than the "
                f"{side(canvas)}-pixel frames asked for"
            )
        geometry, pictures = open_pictures(canvas, info.height, info.width)
        seconds = np.asarray(frame_indices) / info.fps
        grid = np.floor(seconds * info.stored_fps + 0.5).astype(np.int64)
        drawn: dict[int, Picture] = {}
        for slot, frame in np.ndenumerate(grid.clip(0, info.stored_frames - 1)):
            picture = tuple(views[slot] for views in pictures)
            if frame in drawn:
                copy_picture(drawn[frame], picture)
            else:
                draw_jpeg(jpegs[frame], picture)
                drawn[frame] = picture
        return geometry


def _opened(file: bytes, media_id: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(file))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{media_id!r} is no image: {error}") from error


def _predecoded(file: bytes, media_id: str, size: int) -> tuple[MediaInfo, list[bytes]]:
    """What `predecode` would store of an image, for a canvas of `size`."""
    try:
        with _opened(file, media_id) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{media_id!r} is damaged: {error}") from error
    frame = fit_canvas(pixels, size)
    return _still(media_id, *frame.shape[:2]), [ShardSpec(size=size).encode(frame)]


def _still(media_id: str, height: int, width: int) -> MediaInfo:
    return MediaInfo(media_id, "image", 1, 1.0, 0.0, 1, 1.0, height, width)
