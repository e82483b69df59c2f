# SPDX-License-Identifier: Apache-2.0
"""Image files as display-oriented RGB; what cannot be used is told as of videos."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.video import VideoError, not_empty


def read_image(path: str | Path, max_pixels: int = 0) -> np.ndarray:
    """u8[h, w, 3] RGB of an image file, EXIF orientation applied; VideoError if unreadable.

    Larger ones than `max_pixels` are not decoded (0: than what PIL takes for a bomb).
    """
    path = not_empty(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            if max_pixels and image.width * image.height > max_pixels:
                detail = f"{image.width} x {image.height} pixels, more than {max_pixels}"
                raise VideoError(path, "too_large", detail)
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except VideoError:
        raise
    except Image.DecompressionBombError as error:
        raise VideoError(path, "too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise VideoError(path, "unreadable", "not an image file") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise VideoError(path, "corrupt", str(error)) from error
