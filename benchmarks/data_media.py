# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/data.py reads: mp4 files of natural-like content, their shards, tars and records.

The content is calibrated, not beautiful: cut, panned and zoomed textures of all scales with grain
and moving objects, at a bit rate usual for natural video (2 Mb/s at 720p), of which a stored frame
has about as many bytes (15 kB). `--video FILE` puts a film of your own in its place.
"""

import io
import json
import resource
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from data_pipeline.frame_records import ShardSpec, decode_segment
from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.loader import DataConfig, SourceConfig
from data_pipeline.media_encoding import encode_video

FPS = 30
SCENE = 6.0  # seconds between cuts
LOOP = 30.0  # seconds of distinct content; longer videos repeat its packets
CANVAS, Q = 384, 32  # pixels, visual tokens per clip
Rows = dict[str, dict[str, float | str]]  # what a part of the benchmark finds: columns by name
TOKENIZER = Path(__file__).parents[1] / "tests/fixtures/apollo-tiny-a/checkpoint/llm"


def cpu_seconds() -> float:
    """Of this process, all of its threads, and the processes it has waited for."""
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, who))


@dataclass(frozen=True)
class Film:
    """A video, its frame shards and the same JPEGs as a WebDataset tar."""

    path: Path
    shards: Path
    tar: Path
    seconds: float
    predecode_cpu_seconds: float

    @property
    def id(self) -> str:
        return self.path.name


def film(folder: Path, name: str, seconds: float, height: int, own: Path | None = None) -> Film:
    """Makes, or finds in `folder`, an mp4 and what is stored of it."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    path = own or folder / f"{name}.mp4"
    if not path.exists():
        part = path.with_suffix(".part")
        with av.open(str(part), "w", format="mp4") as container:
            _mux(container, seconds, height)
        part.rename(path)
    shards, tar, note = folder / "shards", folder / "frames.tar", folder / "predecode.json"
    if not note.exists():
        shutil.rmtree(shards, ignore_errors=True)
        note.write_text(json.dumps(_store(path, shards, tar)))
    return Film(path, shards, tar, *json.loads(note.read_text()))


def write_records(path: Path, count: int, video: str, text_share: float = 0.2) -> SourceConfig:
    """Conversations about the video, a share of them text alone."""
    ask = "What happens in this video, and in which order do the people in it act?"
    tell = "A camera moves over a landscape while four discs drift from one side to the other."
    with path.open("w") as file:
        for number in range(count):
            text = int((number + 1) * text_share) > int(number * text_share)
            shown = {} if text else {"video": video}
            turns = [
                {"from": "human", "value": "<video>\n" * len(shown) + ask},
                {"from": "gpt", "value": f"{number}. {tell}"},
            ]
            file.write(json.dumps({"id": number, "conversations": turns} | shown) + "\n")
    return SourceConfig(str(path))


def data_config(film: Film, sources: dict[str, SourceConfig], **changes: Any) -> DataConfig:
    """A loader's settings with the film's shards; rows of 4,096 tokens and 64 clips."""
    fields = dict(length=4096, clips=64, frame_size=CANVAS, tokens_per_clip=Q, batch_size=1)
    places = dict(frames=(str(film.shards),), tokenizer=str(TOKENIZER), sources=sources)
    return DataConfig(**(places | fields | changes))  # pyright: ignore[reportArgumentType]


def _store(path: Path, shards: Path, tar: Path) -> tuple[float, float]:
    """Predecodes a file; returns its length and the CPU-seconds that took."""
    start, spec = cpu_seconds(), ShardSpec()
    medium = encode_video(path, path.name, spec)
    took = cpu_seconds() - start
    writer = FrameShardWriter(shards, spec)
    writer.add(*medium)
    writer.close()
    jpegs = [jpeg for record in medium.records for jpeg in decode_segment(record)[1]]
    with tarfile.open(tar, "w") as archive:
        for number, jpeg in enumerate(jpegs):
            entry = tarfile.TarInfo(f"video.{number:05d}.jpg")
            entry.size = len(jpeg)
            archive.addfile(entry, io.BytesIO(jpeg))
    return medium.info.duration, took


def _mux(container: Any, seconds: float, height: int) -> None:
    """Encodes LOOP seconds and repeats their packets until the video is `seconds` long."""
    width = round(height * 16 / 9 / 2) * 2
    stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
    stream.bit_rate = round(2e6 * (height / 720) ** 1.6)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    count = round(min(seconds, LOOP) * FPS)
    packets = []
    for picture in _pictures(count, height, width):
        packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
    packets += stream.encode()
    ticks = round(count / FPS / packets[0].time_base)
    for turn in range(round(seconds * FPS / count)):
        for packet in packets:
            copy = av.Packet(bytes(packet))
            copy.stream, copy.time_base = stream, packet.time_base
            copy.pts, copy.dts = packet.pts + turn * ticks, packet.dts + turn * ticks
            copy.duration, copy.is_keyframe = packet.duration, packet.is_keyframe
            container.mux(copy)


def _pictures(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """u8[h, w, 3]: a camera over textures, cut every SCENE seconds, objects in front of it."""
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 4.0, (8, height, width, 1)).astype(np.float32)
    texture = np.zeros(0)
    for number in range(count):
        t = number / FPS % SCENE
        if t == 0:
            texture = _texture(rng, height, width)
        zoom = 1 + 0.02 * t
        place = np.array([[zoom, 0, -10 - 30 * t], [0, zoom, -20 - 12 * t]], np.float32)
        picture = cv2.warpAffine(texture, place, (width, height))
        for k in range(4):
            x = width * (0.5 + 0.4 * np.sin(t / 2 + k))
            y = height * (0.5 + 0.4 * np.cos(k * t / 3))
            radius = int(height * (0.04 + 0.03 * k))
            colour = (60 + 40 * k, 200 - 40 * k, 128.0)
            cv2.circle(picture, (int(x), int(y)), radius, colour, -1, cv2.LINE_AA)
        yield (picture + grain[number % 8]).clip(0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """f32[h + 200, w + 300, 3] with detail at every scale, falling as in photographs."""
    texture = np.zeros((height + 200, width + 300, 3), np.float32)
    for octave in range(2, 10):
        shape = (2**octave * 9 // 16, 2**octave, 1)
        light = rng.normal(0, 1, shape) + 0.3 * rng.normal(0, 1, (*shape[:2], 3))
        size = texture.shape[1::-1]
        layer = cv2.resize(light.astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
        texture += 45 / 1.7 ** (octave - 2) * layer
    return texture + 115
