# SPDX-License-Identifier: Apache-2.0
"""What storing frames as JPEGs costs: bytes, PSNR, drift of the encoders' features, decoding speed.

    python benchmarks/pixels.py [--video FILE] [--clips 8] [--json FILE]

N clips of F = 4 frames at 2 frames per second, S = 384 pixels; without a video, pictures with a
natural spectrum and no motion. The encoders have the released ones' inputs, tokens and blocks, less
width and depth, and random but fixed weights; drift is the relative distance (L2) of their features
from those of the same frames unstored. Speed is frames per CPU-second, median of 5, into memory
that was used before.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apollo_jax.models import internvideo2, pixels, siglip
from apollo_jax.models.vision_tower import VisionTower
from data_pipeline import canvas, jpeg_planes
from data_pipeline.frame_records import ShardSpec
from data_pipeline.transforms import fit_canvas
from data_pipeline.video import iter_frames, probe

S, F, FPS = 384, 4, 2.0
STORED = [(q, chroma) for chroma in ("420", "444") for q in (80, 90, 95)]
TOWERS = {
    "SigLIP": siglip.Config(
        hidden_size=144, intermediate_size=288, num_hidden_layers=7, num_attention_heads=2,
        image_size=384, patch_size=14,
    ),
    "InternVideo2": internvideo2.Config(
        d_model=176, depth=6, num_heads=2, mlp_ratio=2.0, img_size=224, patch_size=14,
        init_values=0.1,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="what storing frames as JPEGs costs")
    parser.add_argument("--video", help="a file; its clips are spread over it")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    frames = film(args.video, args.clips) if args.video else drawn(args.clips)
    report = {"frame": frames.shape[1:3], "stored": stored(frames), "speed": speed(frames)}
    if args.json:
        args.json.write_text(json.dumps(report, indent=2))


def film(path: str, clips: int) -> np.ndarray:
    """u8[N*F, h, w, 3] of a video, fitted to S."""
    facts = probe(path)
    starts = np.linspace(0, max(facts.duration - F / FPS, 0), clips)
    seconds = (starts[:, None] + np.arange(F) / FPS).ravel()
    numbers = np.unique((seconds * facts.fps).astype(np.int64).clip(0, facts.num_frames - 1))
    read = {number: fit_canvas(frame, S) for number, frame, _ in iter_frames(path, numbers)}
    found = np.stack([read[number] for number in sorted(read)])
    return found[: len(found) // F * F]


def drawn(clips: int) -> np.ndarray:
    """u8[N*F, 216, S, 3], colours whose power falls as 1 / frequency squared."""
    rng = np.random.default_rng(0)
    y, x = np.fft.fftfreq(216)[:, None], np.fft.rfftfreq(S)[None]
    scale = 1 / np.maximum(np.hypot(y, x), 1 / S)
    phases = np.exp(2j * np.pi * rng.random((clips * F, 3, *scale.shape)))
    light, *tints = np.moveaxis(np.fft.irfft2(scale * phases, (216, S)), 1, 0)
    frames = np.stack([light + 0.3 * tints[0], light, light + 0.3 * tints[1]], axis=-1)
    return (120 + 50 * frames / frames.std()).clip(0, 255).astype(np.uint8)


def stored(frames: np.ndarray) -> list[dict]:
    """A row per way of storing."""
    graphdef, weights = nnx.split(VisionTower(TOWERS, rngs=nnx.Rngs(0)))

    @jax.jit
    def run(canvases: jax.Array, geometry: jax.Array) -> dict[str, jax.Array]:
        rgb = pixels.to_rgb(canvases, geometry)
        prepared = {n: pixels.prepare(rgb, geometry, t.frame_spec) for n, t in TOWERS.items()}
        return nnx.merge(graphdef, weights).features(prepared)

    def features(drawn: np.ndarray) -> dict[str, np.ndarray]:
        canvases = np.zeros((len(drawn) // F, F, S, S, 3), np.uint8)
        geometry, (views,) = canvas.open_pictures(canvases, *drawn.shape[1:3])
        views[:] = drawn.reshape(views.shape)
        places = jnp.tile(jnp.asarray(geometry), (len(canvases), 1))
        # A clip at a time: memory as of one.
        parts = [run(c[None], g[None]) for c, g in zip(jnp.asarray(canvases), places, strict=True)]
        return {name: np.concatenate([part[name] for part in parts]) for name in TOWERS}

    expected, rows = features(frames), []
    print(f"| {frames.shape[2]}x{frames.shape[1]} | kB/s | PSNR dB | " + " | ".join(TOWERS) + " |")
    print("|---|---|---|" + "---|" * len(TOWERS))
    for quality, chroma in STORED:
        spec = ShardSpec(quality=quality, subsampling=chroma)
        jpegs = [spec.encode(frame) for frame in frames]
        decoded = np.empty_like(frames)
        for jpeg, picture in zip(jpegs, decoded, strict=True):
            canvas.draw_jpeg(jpeg, (picture,))
        error = np.mean((decoded.astype(np.float32) - frames) ** 2)
        row = {
            "stored": f"q{quality} {':'.join(chroma)}",
            "kB/s": FPS * statistics.mean(map(len, jpegs)) / 1e3,
            "psnr": float(10 * np.log10(255**2 / error)),
        }
        for name, feature in features(decoded).items():
            apart = np.linalg.norm(feature - expected[name])
            row[name] = float(apart / np.linalg.norm(expected[name]))
        rows.append(row)
        drift = " | ".join(f"{row[name]:.4f}" for name in TOWERS)
        print(f"| {row['stored']} | {row['kB/s']:.1f} | {row['psnr']:.1f} | {drift} |", flush=True)
    return rows


def speed(frames: np.ndarray) -> dict[str, float]:
    """Frames per CPU-second of what is stored by default, by layout and decoder."""
    jpegs = [ShardSpec().encode(frame) for frame in frames]
    ways = {layout: _way(jpegs, layout, *frames.shape[1:3]) for layout in canvas.LAYOUTS}
    planes = ways["yuv420"] if jpeg_planes.turbojpeg() else ways.pop("yuv420")

    def without_libturbojpeg() -> None:
        with mock.patch.object(jpeg_planes, "turbojpeg", return_value=None):
            planes()

    ways["yuv420 without libturbojpeg"] = without_libturbojpeg
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):  # they take turns
        for name, way in ways.items():
            start = time.process_time()
            way()
            rates[name].append(len(jpegs) / (time.process_time() - start))
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    print("\n| decoded, q90 4:2:0 | frames per CPU-second |\n|---|---|")
    for name, rate in medians.items():
        print(f"| {name} | {rate:,.0f} |")
    return medians


def _way(jpegs: list[bytes], layout: str, height: int, width: int) -> Callable[[], None]:
    canvases = np.ones((1, len(jpegs), *canvas.frame_shape(layout, S)), np.uint8)
    _, views = canvas.open_pictures(canvases, height, width)

    def draw() -> None:
        for slot, jpeg in enumerate(jpegs):
            canvas.draw_jpeg(jpeg, tuple(view[0, slot] for view in views))

    return draw


if __name__ == "__main__":
    main()
