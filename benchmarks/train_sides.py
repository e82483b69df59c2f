# SPDX-License-Identifier: Apache-2.0
"""The two sides of train.py: the same model and samples as our train step and as PyTorch's.

Ours is the step of `apollo_jax.training`, the batch's way to the device included. PyTorch (see
torch_apollo.py) gets the batch twice: packed, in exactly our tensors, and padded, a sample per row
and no empty clip slots, as the official code batches.

B rows, L tokens, C clip slots per row, F frames per clip, S canvas side, Q visual tokens per clip.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch_apollo

from apollo_jax import config, sharding
from apollo_jax.demo import CONFIG
from apollo_jax.models import pixels
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


def torch_step(batch: Batch, folder: Path, *, padded: bool, compiled: bool) -> Step:
    model = torch_apollo.Apollo(folder)
    if compiled:
        model.compile()
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
