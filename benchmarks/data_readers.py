# SPDX-License-Identifier: Apache-2.0
"""Ways from a video to frames, for benchmarks/data.py: ours, and what others read mp4 or tars with.

n clips of F frames. Every way gets the same frame numbers i64[n, F]. What it hands over is part of
its name: *float32* is what a PyTorch loader ends with, one normalised array per encoder, here by
OpenCV and so faster than the published processors; *uint8* is a canvas and *yuv420* its planes,
which the device resizes and normalises.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from data_media import CANVAS, Film, Q, cpu_seconds, data_config, write_records

from data_pipeline.canvas import LAYOUTS, frame_shape
from data_pipeline.frame_shards import FrameShards
from data_pipeline.loader import Loader
from data_pipeline.sampling import ClipSampling, sample_clips
from data_pipeline.transforms import FrameSpec, pad_to_square, preprocess
from data_pipeline.video import iter_frames

ENCODERS = (
    FrameSpec(384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    FrameSpec(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "cv2_bilinear"),
)
COMPLETE, BASE, TARS = "apollo-jax, complete: ", "decord, float32", "WebDataset tar of JPEGs, uint8"
PEERS = {"decord": "decord", "torchcodec": "torchcodec torch", "webdataset": "webdataset"}
_JUMP = 250  # frames: to go further, OpenCV seeks rather than reads

Way = Callable[[], Callable[[], int]]  # makes ready, then loads so many frames, which is timed
Decode = Callable[[np.ndarray], Iterator[np.ndarray]]  # i64[n, F] -> n times u8[F, h, w, 3]


def measure(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Frames per CPU-second of every way, round by round."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name in list(ways) if number % 2 else reversed(ways):
            load = ways[name]()
            start = cpu_seconds()
            speeds[name].append(load() / (cpu_seconds() - start))
    return speeds


def wanted(film: Film, max_clips: int) -> np.ndarray:
    """i64[n, F]: what Apollo's rule takes of the film, at most `max_clips` clips (0 = all)."""
    info = FrameShards(film.shards).info(film.id)
    sampling = ClipSampling(max_clips=max_clips)
    sampled = sample_clips(
        sampling, fps=info.fps, num_frames=info.num_frames, duration=info.duration
    )
    return sampled.frame_indices


# ---- ours


def complete(film: Film, clips: np.ndarray, layout: str, folder: Path, frames: int) -> Way:
    """Read, prompt, tokenise, pack and decode to batches: conversations about the film.

    A round is so many `frames` that threads and memory are warm for most of it.
    """
    per_row = max(1, 64 // len(clips))
    records = max(4 * per_row, frames // clips.size)
    source = write_records(folder / f"{film.path.stem}.jsonl", records, film.id, text_share=0)
    config = data_config(
        film,
        {"films": source},
        length=per_row * (len(clips) * (Q + 24) + 200),
        clips=per_row * len(clips),
        max_clips=len(clips),
        prefetch=1,
        layout=layout,
    )

    def prepare() -> Callable[[], int]:
        loader = Loader(config, num_steps=records // per_row)

        def load() -> int:
            with closing(loader):
                return sum(stats.frames for _, stats in loader)

        return load

    return prepare


def bare(film: Film, clips: np.ndarray, layout: str) -> Way:
    """The shards' frames alone, on a canvas that was used before."""
    shards = FrameShards(film.shards)

    def prepare() -> Callable[[], int]:
        canvas = np.ones((*clips.shape, *frame_shape(layout, CANVAS)), np.uint8)

        def load() -> int:
            shards.read_clips(film.id, clips, canvas)
            return clips.size

        return load

    return prepare


def normalised(frames: np.ndarray) -> list[np.ndarray]:
    """One f32[T, S, S, 3] per encoder, with OpenCV: the fast way on a host."""
    outputs = []
    for spec in ENCODERS:
        squares = [pad_to_square(f, spec.pad_colour) for f in frames]
        resized = [cv2.resize(s, (spec.size, spec.size)) for s in squares]
        scale = 1 / (255 * np.array(spec.std, np.float32))
        shift = np.array(spec.mean, np.float32) / np.array(spec.std, np.float32)
        outputs.append(np.stack(resized) * scale - shift)
    return outputs


# ---- decoders of mp4 files, one thread each


def with_shards(film: Film) -> Decode:
    shards = FrameShards(film.shards)

    def decode(clips: np.ndarray) -> Iterator[np.ndarray]:
        canvas = np.zeros((1, clips.shape[1], CANVAS, CANVAS, 3), np.uint8)
        for clip in clips:
            shards.read_clips(film.id, clip[None], canvas)
            yield canvas[0]

    return decode


def with_pyav(film: Film) -> Decode:
    """A seek to the keyframe before each clip, as `iter_frames` does for inference."""

    def decode(clips: np.ndarray) -> Iterator[np.ndarray]:
        frames = iter_frames(film.path, clips)
        shown: dict[int, np.ndarray] = {}
        for clip in clips:
            shown = {n: frame for n, frame in shown.items() if n >= clip[0]}  # clips may overlap
            while clip[-1] not in shown:
                index, frame, _ = next(frames)
                shown[index] = frame
            yield np.stack([shown[number] for number in clip])

    return decode


def with_opencv(film: Film) -> Decode:
    def decode(clips: np.ndarray) -> Iterator[np.ndarray]:
        video = cv2.VideoCapture(str(film.path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        at = 0
        for clip in clips:
            frames = []
            for number in clip.tolist():
                if number - at > _JUMP:
                    video.set(cv2.CAP_PROP_POS_FRAMES, number)
                    at = number
                while at < number:
                    video.grab()
                    at += 1
                frames.append(cv2.cvtColor(video.read()[1], cv2.COLOR_BGR2RGB))
                at += 1
            yield np.stack(frames)

    return decode


def with_decord(film: Film) -> Decode:
    import decord  # pyright: ignore[reportMissingImports]

    def decode(clips: np.ndarray) -> Iterator[np.ndarray]:
        reader = decord.VideoReader(str(film.path), num_threads=1)
        for clip in clips:
            yield reader.get_batch(clip).asnumpy()

    return decode


def with_torchcodec(film: Film) -> Decode:
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]

    def decode(clips: np.ndarray) -> Iterator[np.ndarray]:
        video = VideoDecoder(str(film.path), dimension_order="NHWC", num_ffmpeg_threads=1)
        for clip in clips:
            yield video.get_frames_at(clip.tolist()).data.numpy()

    return decode


DECODERS = {"PyAV": with_pyav, "OpenCV": with_opencv}
OPTIONAL = {"decord": with_decord, "torchcodec": with_torchcodec}


def decoders(film: Film) -> dict[str, Decode]:
    """The mp4 decoders that are here."""
    here = {name: make for name, make in OPTIONAL.items() if importlib.util.find_spec(name)}
    return {name: make(film) for name, make in (DECODERS | here).items()}


# ---- the ways


def _each(
    decode: Decode, clips: np.ndarray, then: Callable[[np.ndarray], object] = lambda _: None
) -> Way:
    """Decodes clip by clip and does `then` to each, u8[F, h, w, 3]."""

    def load() -> int:
        for frames in decode(clips):
            then(frames)
        return clips.size

    return lambda: load


def _canvas(frames: np.ndarray) -> list[np.ndarray]:
    """The least that must happen on a host: the device resizes and normalises here too."""
    height = CANVAS * frames.shape[1] // frames.shape[2]
    return [pad_to_square(cv2.resize(f, (CANVAS, height)), (0, 0, 0)) for f in frames]


def _processors(frames: np.ndarray) -> list[np.ndarray]:
    """As the published loader: squares, then PIL's and OpenCV's resizing."""
    return [preprocess(frames, spec) for spec in ENCODERS]


def _decord_twice(film: Film) -> Decode:
    """The published loader opens a file for its length, then again for its frames."""

    def decode(clips: np.ndarray) -> Iterator[np.ndarray]:
        import decord  # pyright: ignore[reportMissingImports]

        decord.VideoReader(str(film.path), num_threads=1).get_avg_fps()
        yield from with_decord(film)(clips)

    return decode


def from_tar(film: Film, clips: np.ndarray) -> Iterator[np.ndarray]:
    """u8[F, S, S, 3] per clip, of the same JPEGs as in the shards."""
    from webdataset.compat import WebDataset  # pyright: ignore[reportMissingImports]

    info = FrameShards(film.shards).info(film.id)
    stored = np.floor(clips / info.fps * info.stored_fps + 0.5).astype(int)
    top = (CANVAS - info.height) // 2
    canvas = np.zeros((clips.shape[1], CANVAS, CANVAS, 3), np.uint8)
    for sample in WebDataset(str(film.tar), shardshuffle=False):
        for clip in stored.clip(0, info.stored_frames - 1):
            for slot, number in zip(canvas, clip, strict=True):
                simplejpeg.decode_jpeg(
                    sample[f"{number:05d}.jpg"], buffer=slot[top : top + info.height]
                )
            yield canvas


def ways(film: Film, clips: np.ndarray, folder: Path, frames: int) -> dict[str, Way]:
    """Everything that can be measured here; checks first that the decoders show the same frames."""
    mp4 = decoders(film)
    _agree(film, mp4, clips[: len(clips) : max(1, len(clips) // 3)])
    found = {f"{COMPLETE}{at}": complete(film, clips, at, folder, frames) for at in LAYOUTS}
    found |= {f"shards alone: {at}": bare(film, clips, at) for at in LAYOUTS}
    found["shards, float32"] = _each(with_shards(film), clips, normalised)
    if importlib.util.find_spec("webdataset"):
        found[TARS] = _each(functools.partial(from_tar, film), clips)
    found |= {f"{name}, float32": _each(decode, clips, normalised) for name, decode in mp4.items()}
    found["PyAV, uint8"] = _each(mp4["PyAV"], clips, _canvas)
    if "decord" in mp4:
        found["official loader (decord, PIL)"] = _each(_decord_twice(film), clips, _processors)
    return found


def _agree(film: Film, mp4: dict[str, Decode], clips: np.ndarray) -> None:
    """Every decoder's pictures within 3 grey levels of PyAV's, the tar's equal to the shards'."""
    expected = list(mp4["PyAV"](clips))
    for name, decode in mp4.items():
        for frames, others in zip(decode(clips), expected, strict=True):
            off = np.abs(frames.astype(np.int16) - others).mean()
            assert off < 3, f"{name} shows other frames than PyAV, {off:.1f} levels off"
    if importlib.util.find_spec("webdataset"):
        for tar, shard in zip(from_tar(film, clips), with_shards(film)(clips), strict=True):
            assert np.array_equal(tar, shard), "the tar holds other frames than the shards"
