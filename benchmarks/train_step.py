# SPDX-License-Identifier: Apache-2.0
"""The tiny train step on CPU: ours against the same model in eager PyTorch.

    python benchmarks/train_step.py [--rounds 9] [--steps 2] [--threads 2] [--devices 1] [--json F]

A full step (forward, backward, clip, AdamW; everything trains; float32) of the demo's model on a
batch of the demo's size, from the same published folder. Ours is the step of `apollo_jax.training`,
the batch's way to the device included. PyTorch (see torch_apollo.py) gets the batch twice: packed,
in exactly our tensors, and padded, a sample per row and no empty clip slots, as the official code
batches. Losses and gradient norms of the first steps must agree before anything is timed. The
rounds of all three are interleaved in one process, on the same cores, with the demo's settings.
Times are per step; CPU time is that of all threads. Needs the torch extra.

B rows, L tokens, C clip slots per row, F frames per clip, S canvas side, Q visual tokens per clip.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch_apollo
from flax import nnx

import apollo_jax
from apollo_jax import config, cpu, sharding
from apollo_jax.demo import CONFIG
from apollo_jax.models import apollo, pixels
from apollo_jax.training.rows import place
from apollo_jax.training.state import create
from apollo_jax.training.step import build
from apollo_jax.training.weights import initial_weights
from data_pipeline import packing
from data_pipeline.batch import Batch, empty_batch
from data_pipeline.conversation import Rendered

DEMO = config.load(f"{CONFIG}:warmup")  # the stage in which everything trains
MODEL, DATA = DEMO.model, DEMO.data
TOKENS_PER_CLIP = DATA.tokens_per_clip
RATES = dict(vision_tower=1e-4, connector=1e-4, llm=1e-4)
ADAM = dict(eps=1e-8, weight_decay=0.01)
CLIP_NORM = 1.0
CHECKED_STEPS, TOLERANCE = 3, 1e-3

OURS = "apollo_jax, packed"
Step = Callable[[], tuple[float, float]]  # one train step -> loss, gradient norm


# ---- the batch


def make_samples(count: int) -> list[Rendered]:
    """Samples of random tokens in the demo's proportions: text, single images, videos."""
    rng = np.random.default_rng(0)
    samples = []
    for clips in rng.choice(7, count, p=[0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.2]).tolist():
        parts = [np.full(rng.integers(15, 40), -1)]  # the prompt's head
        for clip in range(clips):
            visual = clip * TOKENS_PER_CLIP + np.arange(TOKENS_PER_CLIP)
            parts += [np.full(10, -1), visual]  # "0.0-1.5 seconds: " and the clip
        answer = rng.integers(3, 8)
        parts += [np.full(rng.integers(8, 30) + answer, -1)]
        index = np.concatenate(parts).astype(np.int32)
        tokens = np.where(index < 0, rng.integers(3, MODEL.llm.vocab_size, index.size), 0)
        weights = (np.arange(index.size) >= index.size - answer).astype(np.float32)
        samples.append(Rendered(tokens.astype(np.int32), weights, index))
    return samples


def clips_of(sample: Rendered) -> int:
    return int(sample.visual_index.max() + 1) // TOKENS_PER_CLIP


def make_batches() -> tuple[Batch, Batch]:
    """The same samples packed into rows, and each in a row of its own."""
    samples = make_samples(200)
    sizes = np.array([(len(s.tokens), clips_of(s)) for s in samples])
    rows = packing.pack(sizes, DATA.length, DATA.clips)
    np.random.default_rng(1).shuffle(rows)
    chosen = [[samples[i] for i in row] for row in rows[: DATA.batch_size]]
    alone = [[sample] for row in chosen for sample in row]
    longest = max(len(row[0].tokens) for row in alone)
    most = max(clips_of(row[0]) for row in alone)
    return fill(chosen, DATA.length, DATA.clips), fill(alone, longest, most)


def fill(rows: list[list[Rendered]], length: int, clips: int) -> Batch:
    side, frames = MODEL.frame_size, MODEL.frames_per_clip
    batch = empty_batch(len(rows), length, clips, frames, side)
    rng = np.random.default_rng(2)  # the same frames clip by clip, wherever the clips stand
    for number, row in enumerate(rows):
        token = slot = 0
        for segment, sample in enumerate(row, start=1):
            visual = slot * TOKENS_PER_CLIP
            packing.place(batch, number, sample, segment=segment, token=token, visual=visual)
            here = (number, slice(slot, slot + clips_of(sample)))
            batch.frames[here] = rng.integers(0, 256, batch.frames[here].shape, np.uint8)
            batch.frame_geometry[here] = 4, 0, side - 8, side  # a wide picture
            batch.clip_mask[here], batch.clip_segment_ids[here] = True, segment
            token, slot = token + len(sample.tokens), slot + clips_of(sample)
    return batch


# ---- the two sides


def our_step(batch: Batch, folder: Path) -> Step:
    optimizer = config.OptimizerConfig(
        config.LearningRates(**RATES), "constant", warmup_ratio=0.0, clip_norm=CLIP_NORM
    )
    optimizer = dataclasses.replace(optimizer, **ADAM)
    experiment = dataclasses.replace(DEMO, optimizer=optimizer, init_from=str(folder))
    mesh = sharding.make_mesh(experiment.mesh)
    program = build(experiment, mesh)
    weights, _ = initial_weights(experiment, program.abstract.params)
    state = create(weights, program.abstract, program.tx)

    def step() -> tuple[float, float]:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = program.train_step(state, place(batch, mesh))
        jax.block_until_ready(state)
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return step


def torch_step(batch: Batch, folder: Path, *, padded: bool) -> Step:
    model = torch_apollo.Apollo(folder)
    trainer = torch_apollo.Trainer(model, RATES, CLIP_NORM, **ADAM)
    inputs = torch_inputs(batch, padded=padded)
    return lambda: trainer.step(inputs)


def torch_inputs(batch: Batch, *, padded: bool) -> torch_apollo.Inputs:
    """A Batch as PyTorch code would have it; `padded`: no empty clips, rows are single samples."""
    keep = batch.clip_mask.ravel() if padded else np.ones(batch.clip_mask.size, bool)
    frames = jnp.asarray(batch.frames.reshape(keep.size, *batch.frames.shape[2:])[keep])
    geometry = jnp.asarray(batch.frame_geometry.reshape(keep.size, 4)[keep])
    prepared = {
        name: np.asarray(pixels.prepare(frames, geometry, tower.frame_spec))  # [N, F, S, S, 3]
        for name, tower in MODEL.towers.items()
    }
    number = np.cumsum(keep) - 1  # clip slot -> clip
    slot, latent = np.divmod(batch.visual_index, TOKENS_PER_CLIP)
    slot = slot + np.arange(len(slot))[:, None] * batch.clip_mask.shape[1]
    is_visual = batch.visual_index >= 0
    mask = batch.segment_ids > 0  # [B, L]
    if not padded:
        same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
        mask = np.tril(same)[:, None]  # [B, 1, L, L]
    learnt = np.where(batch.loss_weights > 0, batch.targets, torch_apollo.IGNORE)
    return torch_apollo.Inputs(
        {name: torch.tensor(x.transpose(0, 1, 4, 2, 3)) for name, x in prepared.items()},
        torch.tensor(batch.tokens, dtype=torch.long),
        torch.tensor(learnt, dtype=torch.long),
        torch.tensor(batch.positions, dtype=torch.long),
        torch.tensor(mask, dtype=torch.long if padded else torch.bool),
        torch.tensor(is_visual),
        torch.tensor((number[slot] * TOKENS_PER_CLIP + latent)[is_visual]),
    )


# ---- the comparison


def check(steps: dict[str, Step]) -> dict[str, float]:
    """Largest relative difference from ours in loss and gradient norm over the first steps."""
    first = {name: np.array([step() for _ in range(CHECKED_STEPS)]) for name, step in steps.items()}
    ours = first.pop(OURS)
    differences = {name: float(np.abs(x / ours - 1).max()) for name, x in first.items()}
    for name, difference in differences.items():
        print(f"{name}: loss and gradient norm of {CHECKED_STEPS} steps within {difference:.1e}")
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"not the same computation:\n{ours}\n{first}")
    return differences


def measure(steps: dict[str, Step], rounds: int, count: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds per step of every way in every round, wall and CPU."""
    times = {name: {"wall": [], "cpu": []} for name in steps}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                step()
            times[name]["wall"].append(1e3 * (time.perf_counter() - wall) / count)
            times[name]["cpu"].append(1e3 * (time.process_time() - cpu) / count)
    return times


def ratios(times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Median over the rounds of theirs / ours, so that load from outside hits both alike."""

    def median_ratio(theirs: Iterable[float], ours: Iterable[float]) -> float:
        return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))

    return {
        name: {clock: median_ratio(t, times[OURS][clock]) for clock, t in clocks.items()}
        for name, clocks in times.items()
    }


def show(times: dict[str, dict[str, list[float]]], faster: dict[str, dict[str, float]]) -> None:
    print(f"\n{'':20} {'wall ms':>9} {'CPU ms':>9} {'/ ours, wall':>13} {'/ ours, CPU':>12}")
    for name, clocks in times.items():
        wall, cpu = (statistics.median(t) for t in clocks.values())
        ratio = faster[name]
        print(f"{name:20} {wall:9.1f} {cpu:9.1f} {ratio['wall']:13.2f} {ratio['cpu']:12.2f}")


def use_cores(threads: int, devices: int) -> None:
    """Both sides on the same `threads` cores; must run before either looks for them."""
    cpu.keep_freed_memory()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="per round and way")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--devices", type=int, default=1, help="2: data parallel, as the demo runs")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    use_cores(args.threads, args.devices)
    packed, alone = make_batches()
    used, slots = (packed.segment_ids > 0).mean(), packed.clip_mask.mean()
    print(
        f"packed {packed.tokens.shape}, {used:.0%} of tokens and {slots:.0%} of clip slots in use; "
        f"padded {alone.tokens.shape}; {args.threads} threads, {args.devices} devices"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        apollo_jax.save_pretrained(apollo.Apollo(MODEL, rngs=nnx.Rngs(0)), folder)
        steps = {
            OURS: our_step(packed, folder),
            "PyTorch, packed": torch_step(packed, folder, padded=False),
            "PyTorch, padded": torch_step(alone, folder, padded=True),
        }
    differences = check(steps)
    times = measure(steps, args.rounds, args.steps)
    faster = ratios(times)
    show(times, faster)
    if args.json:
        settings = dict(threads=args.threads, devices=args.devices, steps=args.steps)
        numbers = dict(settings, differences=differences, ms_per_step=times, times_ours=faster)
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
