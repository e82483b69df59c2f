# SPDX-License-Identifier: Apache-2.0
"""Frames per CPU-second: frame shards against decoding the mp4 again for every sample.

    python benchmarks/loading.py [--seconds 40] [--rounds 5] [--json F]

Makes a 720p30 H.264 file, predecodes it, then loads the same clips in every way, in interleaved
rounds; the time is `process_time`, that is all threads of this process. The shard loader ends with
the uint8 canvas that goes to the device (resizing and normalisation happen there); the others end
with what a PyTorch loader hands over: one normalised float32 array per encoder. "same output"
adds that work to the shards. decord is measured if it is installed.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.frame_shards import FrameShards, ShardSpec
from data_pipeline.media_encoding import encode_video
from data_pipeline.sampling import ClipSampling, sample_clips
from data_pipeline.transforms import FrameSpec, pad_to_square, preprocess
from data_pipeline.video import iter_frames

HEIGHT, WIDTH, FPS = 720, 1280, 30
ENCODERS = (
    FrameSpec(384, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    FrameSpec(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "cv2_bilinear"),
)
CANVAS = 384
OURS = "shards -> uint8 canvas"


def make_video(path: Path, seconds: float) -> None:
    """A camera panning over a texture of all scales, with grain and moving objects."""
    rng = np.random.default_rng(0)
    texture = np.zeros((HEIGHT + 400, WIDTH + 400, 3), np.float32)
    for octave in range(3, 9):
        cells = rng.normal(0, 1, (2**octave, 2**octave, 3)).astype(np.float32)
        texture += 50 / 1.6 ** (octave - 3) * cv2.resize(cells, texture.shape[1::-1])
    texture = (texture + 110).clip(0, 255).astype(np.uint8)
    grain = rng.integers(0, 7, (8, HEIGHT, WIDTH, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(
            "libx264", rate=FPS, options={"preset": "veryfast", "crf": "20"}
        )
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(round(seconds * FPS)):
            angle = number / FPS
            top, left = int(200 + 190 * np.sin(angle / 3)), int(200 + 190 * np.cos(angle / 2))
            frame: Any = cv2.add(
                texture[top : top + HEIGHT, left : left + WIDTH], grain[number % 8]
            )
            for k in range(6):
                x, y = (
                    WIDTH * (0.5 + 0.4 * np.sin(angle + k)),
                    HEIGHT * (0.5 + 0.4 * np.cos(k * angle)),
                )
                cv2.circle(frame, (int(x), int(y)), 25 + 10 * k, (40 * k, 255 - 40 * k, 128), -1)
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


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


def loaders(video: Path, shards: FrameShards) -> dict[str, Callable[[np.ndarray], object]]:
    """Name -> load(i64[n, F] frame numbers), each going clip by clip."""

    def canvas(clips: np.ndarray) -> np.ndarray:
        frames = np.zeros((*clips.shape, CANVAS, CANVAS, 3), np.uint8)
        shards.read_clips(video.name, clips, frames)
        return frames

    def same_output(clips: np.ndarray) -> None:
        for clip in canvas(clips):
            normalised(clip)

    def pyav(clips: np.ndarray) -> None:
        for _, frame, _ in iter_frames(video, clips):
            normalised(frame[None])

    def pyav_official(clips: np.ndarray) -> None:
        for _, frame, _ in iter_frames(video, clips):
            [preprocess(frame[None], spec) for spec in ENCODERS]

    ways = {
        OURS: canvas,
        "shards, same output": same_output,
        "PyAV seek + float32": pyav,
        "official preprocessing on PyAV": pyav_official,
    }
    if importlib.util.find_spec("decord"):
        import decord  # pyright: ignore[reportMissingImports]

        def decord_float32(clips: np.ndarray) -> None:
            reader = decord.VideoReader(str(video), num_threads=1)
            for clip in clips:
                normalised(reader.get_batch(clip).asnumpy())

        def official(clips: np.ndarray) -> None:
            decord.VideoReader(str(video), num_threads=1).get_avg_fps()  # opened twice, as there
            reader = decord.VideoReader(str(video), num_threads=1)
            frames = reader.get_batch(clips.reshape(-1)).asnumpy()
            for clip in frames.reshape(*clips.shape, *frames.shape[1:]):
                [preprocess(clip, spec) for spec in ENCODERS]

        ways |= {"decord + float32": decord_float32, "official loader (decord)": official}
    return ways


def measure(
    ways: dict[str, Callable[[np.ndarray], object]], clips: np.ndarray, rounds: int
) -> dict[str, float]:
    """Median frames per CPU-second of every way."""
    speeds = {name: [] for name in ways}
    for number in range(rounds):
        print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, load in ways.items():
            start = time.process_time()
            load(clips)
            speeds[name].append(clips.size / (time.process_time() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def run(folder: Path, seconds: float, rounds: int) -> dict[str, Any]:
    video = folder / "video.mp4"
    print(f"encoding {seconds:g} s of 720p", file=sys.stderr, flush=True)
    make_video(video, seconds)
    start = time.process_time()
    medium = encode_video(video, video.name, ShardSpec())
    predecode_speed = seconds / (time.process_time() - start)
    writer = FrameShardWriter(folder / "shards", ShardSpec())
    writer.add(*medium)
    writer.close()
    ways, info = loaders(video, FrameShards(folder / "shards")), medium.info
    jpeg_bytes = sum(map(len, medium.records)) / info.stored_frames
    results: dict[str, Any] = {
        "video": {"seconds": seconds, "bytes_per_second": video.stat().st_size / seconds},
        "predecode": {"times_real_time": predecode_speed, "bytes_per_frame": jpeg_bytes},
        "decord": "decord + float32" in ways,
        "frames_per_cpu_second": {},
    }
    for access, limit in (("dense, 2 fps", 0), ("sparse, 4 clips", 4)):
        sampled = sample_clips(
            ClipSampling(max_clips=limit),
            fps=info.fps,
            num_frames=info.num_frames,
            duration=info.duration,
        )
        print(f"{access}: {sampled.frame_indices.size} frames", file=sys.stderr, flush=True)
        results["frames_per_cpu_second"][access] = measure(ways, sampled.frame_indices, rounds)
    return results


def show(results: dict[str, Any]) -> None:
    video, stored = results["video"], results["predecode"]
    print(
        f"720p30, {video['seconds']:g} s, {video['bytes_per_second'] / 1e3:.0f} kB/s; predecoded "
        f"at {stored['times_real_time']:.1f}x real time per CPU, "
        f"{stored['bytes_per_frame'] / 1e3:.1f} kB/frame"
    )
    for access, speeds in results["frames_per_cpu_second"].items():
        print(f"\n{access}\n{'':32} frames / CPU-second   shards are faster by")
        for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
            print(f"{name:32} {speed:20.1f} {speeds[OURS] / speed:20.1f}x")
    if not results["decord"]:
        print("\ndecord is not installed: pip install decord adds it to the comparison")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=40.0, help="length of the video")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run(Path(folder), args.seconds, args.rounds)
    show(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
