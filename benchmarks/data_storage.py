# SPDX-License-Identifier: Apache-2.0
"""What frames cost to store, to make and to reach, for benchmarks/data.py."""

import io
import statistics
from collections.abc import Callable, Iterable

import cv2
import numpy as np
from data_media import CANVAS, Film, Rows, cpu_seconds
from data_readers import decoders, with_shards
from PIL import Image

from data_pipeline.frame_records import ShardSpec
from data_pipeline.frame_shards import FrameShards
from data_pipeline.transforms import fit_canvas
from data_pipeline.video import iter_frames

_FRAMES = 60  # of the film, for the table of formats


def storage(film: Film) -> Rows:
    """Bytes per second of video at 2 frames per second, by format; PSNR against no compression."""
    info = FrameShards(film.shards).info(film.id)
    numbers = np.linspace(0, info.num_frames - 1, _FRAMES).astype(np.int64)
    originals = [frame for _, frame, _ in iter_frames(film.path, numbers)]
    source = film.path.stat().st_size / film.seconds
    rows: Rows = {"the mp4": {"kB / s": source / 1e3, "of the mp4": 1.0}}
    for size in (384, 224, 448):
        frames = [fit_canvas(frame, size) for frame in originals]
        for name, encode in _formats().items():
            if size == CANVAS or name == "JPEG q90 4:2:0":
                coded = [encode(frame) for frame in frames]
                rate = 2 * statistics.mean(map(len, coded))
                rows[f"{name}, {size} pixels"] = {
                    "kB / s": rate / 1e3,
                    "of the mp4": rate / source,
                    "PSNR, dB": _psnr(frames, coded),
                    "aim": "< 1 of the mp4" if name == "JPEG q90 4:2:0" else "",
                }
    return rows


def _formats() -> dict[str, Callable[[np.ndarray], bytes]]:
    jpegs = [(80, "420"), (90, "420"), (95, "420"), (90, "444"), (95, "444")]
    formats = {
        f"JPEG q{quality} {':'.join(chroma)}": ShardSpec(quality=quality, subsampling=chroma).encode
        for quality, chroma in jpegs
    }
    return formats | {"WebP q90": _webp, "PNG": _png}


def _webp(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "webp", quality=90, method=2)
    return file.getvalue()


def _png(frame: np.ndarray) -> bytes:
    return cv2.imencode(".png", frame[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _psnr(frames: list[np.ndarray], coded: list[bytes]) -> float:
    decoded = [np.asarray(Image.open(io.BytesIO(c)).convert("RGB"), np.float32) for c in coded]
    error = np.mean([np.square(d - f).mean() for d, f in zip(decoded, frames, strict=True)])
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def predecode(films: Iterable[Film]) -> Rows:
    """How fast a CPU stores frames, and what 1,000 hours of such video cost."""
    rows: Rows = {}
    for film in films:
        stored = sum(path.stat().st_size for path in film.shards.glob("frames-*.array_record"))
        rows[film.path.stem] = {
            "x real time per CPU": film.seconds / film.predecode_cpu_seconds,
            "CPU-h / 1,000 h": 1000 * film.predecode_cpu_seconds / film.seconds,
            "GB / 1,000 h": 3.6e6 * stored / film.seconds / 1e9,
            "GB of mp4": 3.6e6 * film.path.stat().st_size / film.seconds / 1e9,
        }
    return rows


def access(film: Film, reads: int) -> Rows:
    """CPU milliseconds to reach one clip of 4 frames at a random place of a long video.

    Files are opened anew for each, as for each sample of a loader; PyAV's packet times are kept.
    """
    rng = np.random.default_rng(0)
    last = FrameShards(film.shards).info(film.id).num_frames - 60
    clips = rng.integers(0, last, (reads, 1, 1)) + 15 * np.arange(4)
    ways = {"apollo-jax": with_shards(film)} | decoders(film)
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number, clip in enumerate(clips):
        for name, decode in ways.items():
            if name == "apollo-jax" or number % 10 == 0:
                start = cpu_seconds()
                list(decode(clip))
                took[name].append(1e3 * (cpu_seconds() - start))
    ours = statistics.median(took["apollo-jax"])
    return {
        name: {
            "median, ms": statistics.median(values),
            "worst, ms": max(values),
            "times ours": statistics.median(values) / ours,
        }
        for name, values in took.items()
    }
