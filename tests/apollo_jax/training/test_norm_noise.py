# SPDX-License-Identifier: Apache-2.0
"""The noise scale by modality: the gradients it is taken from, and a problem whose answer is known.

test_norm_noise_runs.py has whole runs.
"""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apollo_jax import sharding
from apollo_jax.config import Experiment, LearningRates, OptimizerConfig, Remat, TrainConfig
from apollo_jax.models import apollo
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import accumulate, norm_noise, state, step
from apollo_jax.training.noise_scale import NoiseScale
from apollo_jax.training.norm_noise import PARTS, norm_estimates, norm_spread_of
from apollo_jax.training.rows import place
from data_pipeline.batch import MODALITIES, Batch, empty_batch
from data_pipeline.loader import DataConfig, SourceConfig

B, L, C, Q = 4, 64, 2, 8
TEXT, IMAGE, VIDEO = range(3)
# What the segments of each row are of. One video in all of them: nothing to compare it with.
ROWS = [(TEXT, VIDEO), (IMAGE, TEXT), (TEXT, TEXT), (IMAGE, IMAGE)]
MESHES = {"alone": (MeshConfig(), 1), "cut": (MeshConfig(data=2, fsdp=2, context=2), 8)}
QUICKLY = {"xla_backend_optimization_level": 0}
GAINS = norm_noise.Gains(count=11, width=32)  # of the model below
TOLERANCE = 1e-5  # relative to the largest entry


def small() -> apollo.Config:
    """One tower, a layer of everything else, and a decoder that is a loop: two are unrolled."""
    debug = apollo.Config.debug(vocab_size=256)
    return replace(
        debug,
        towers={"internvideo2": replace(debug.towers["internvideo2"], depth=2)},
        connector=replace(
            debug.connector,
            vision_hidden_size=64,
            token_input_shape=(4, 2, 2),
            resampler_depth=1,
            text_hidden_size=32,
        ),
        llm=replace(debug.llm, num_hidden_layers=5, hidden_size=32, intermediate_size=48),
    )


def experiment(remat: Remat, microbatches: int = 1) -> Experiment:
    train = TrainConfig(
        1, microbatches, noise_scale_norms=True, dtype="float32", frozen_dtype="float32",
        remat=remat,
    )  # fmt: skip
    data = DataConfig({"": SourceConfig("")}, (), "", B, L, C, frame_size=32, tokens_per_clip=Q)
    optimizer = OptimizerConfig(LearningRates(llm=1e-3), warmup_ratio=0.0)
    return Experiment("", small(), data, train, optimizer)


def batch(seed: int) -> Batch:
    """Packed rows: two segments with a clip each, padding at the end, few and many targets."""
    rng = np.random.default_rng(seed)
    b = empty_batch(B, L, C, 4, 32)
    b.tokens[:], b.targets[:] = rng.integers(0, 256, (2, B, L))
    b.positions[:] = np.r_[np.arange(30), np.arange(L - 30)]
    b.segment_ids[:] = np.r_[np.full(30, 1), np.full(L - 34, 2), np.zeros(4)]
    for row, (first, second) in enumerate(ROWS):
        b.groups[row] = np.r_[np.full(30, 3 + first), np.full(L - 34, second), np.zeros(4)]
    b.loss_weights[:] = rng.random((B, L)) * np.linspace(0.1, 1, B)[:, None]
    b.loss_weights[b.segment_ids == 0] = 0
    b.visual_index[:, 2 : 2 + Q], b.visual_index[:, 40 : 40 + Q] = np.arange(2 * Q).reshape(2, Q)
    b.frames[:] = rng.integers(0, 255, b.frames.shape)
    b.frame_geometry[:], b.clip_mask[:], b.clip_segment_ids[:] = [0, 0, 32, 32], True, [1, 2]
    return b


@functools.cache
def weights() -> dict[str, np.ndarray]:
    model = apollo.Apollo(small(), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)  # gains that are not all 1
    return {
        name: np.asarray(w[...]) * rng.uniform(0.5, 1.5, w.shape).astype(np.float32)
        for name, w in state.flatten(nnx.state(model)).items()
    }


@functools.cache
def gradient():
    """Jitted (loss weights, batch) -> gradients f32[N, D] of the decoder's gains."""
    plain = experiment("none")
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    graphdef, _ = state.abstract_model(plain.model, plain.train, apollo.COMPONENTS, mesh)
    names = ("llm/layers/norm1/scale", "llm/layers/norm2/scale", "llm/norm/scale")
    gains = {name: weights()[name] for name in names}
    rest = {n: jnp.asarray(w) for n, w in weights().items() if n not in names}

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def gradient(loss_weights, rows):
        def loss(gains):
            model = state.merge(graphdef, gains, rest)
            weighted = rows._replace(loss_weights=loss_weights)
            return step.batch_sums(model, weighted, plain.train).loss

        found = jax.grad(loss)(gains)
        return jnp.concatenate([jnp.atleast_2d(found[name]) for name in names])

    return gradient


@functools.cache
def one_by_one(seed: int) -> np.ndarray:
    """f32[N, B, M, D]: a backward pass for each row and modality, with all other weights at 0."""
    rows = batch(seed)
    pieces = [[gradient()(piece, rows) for piece in row] for row in pieces_of(rows)]
    return np.asarray(pieces).transpose(2, 0, 1, 3)


def pieces_of(b: Batch) -> np.ndarray:
    """f32[B, M, B, L]: the loss weights of each row and modality alone."""
    of = [
        [(np.arange(B)[:, None] == row) & (b.groups % 3 == m) for m in range(len(MODALITIES))]
        for row in range(B)
    ]
    return np.where(of, b.loss_weights, np.float32(0))


@pytest.mark.parametrize(("mesh", "remat"), [("alone", "none"), ("alone", "full"), ("cut", "full")])
def test_each_piece_has_the_gradient_of_its_own_loss(mesh, remat):
    """All of them from one backward pass, which gives the same gradients as ever."""
    axes, devices = MESHES[mesh]
    on = sharding.make_mesh(axes, jax.devices()[:devices])
    e = experiment(remat)
    graphdef, shapes = state.abstract_model(e.model, e.train, ("llm",), on)
    sums = functools.partial(step.batch_sums, train=e.train)

    with jax.set_mesh(on):
        placed = {n: jax.device_put(w, shapes[n].sharding) for n, w in weights().items()}
        point, frozen = state.split(placed, ("llm",))

        @functools.partial(jax.jit, compiler_options=QUICKLY)
        def both(point, frozen, rows):
            def loss(sums):
                return sums.loss, None

            inputs = loss, graphdef, sums, point, frozen, rows
            grads, by_piece, _ = accumulate.gradients(*inputs, GAINS)
            plain, nothing, _ = accumulate.gradients(*inputs, None)
            assert nothing is None
            return grads, by_piece, plain

        grads, by_piece, plain = jax.device_get(both(point, frozen, place(batch(0), on)))
    expected = one_by_one(0)
    assert by_piece.dtype == np.float32
    empty = [(row, m) for row in range(B) for m in range(3) if m not in ROWS[row]]
    for row, m in empty:
        assert not by_piece[:, row, m].any()
    assert np.count_nonzero(np.abs(expected).max(axis=(0, 3))) == 3 * B - len(empty)
    np.testing.assert_allclose(by_piece, expected, atol=TOLERANCE * np.abs(expected).max())
    for name, wanted in plain.items():
        scale = max(np.abs(wanted).max(), 1e-3)  # keys' biases have no gradient, but rounding
        np.testing.assert_allclose(grads[name], wanted, atol=TOLERANCE * scale, err_msg=name)


def by_definition(seeds: list[int]) -> dict[str, float]:
    """(sum of w_i |g_i - G|^2) / (n - 1), and what it leaves of |G|^2."""
    grads = np.concatenate([one_by_one(seed) for seed in seeds], axis=1).astype(np.float64)
    by_weight = np.concatenate([pieces_of(batch(seed)).sum((2, 3)) for seed in seeds])
    found = {}
    apart = [(grads.sum(2), by_weight.sum(1))]
    apart += [(grads[:, :, m], by_weight[:, m]) for m in range(len(MODALITIES))]
    for part, (g, w) in zip(PARTS, apart, strict=True):  # [N, pieces, D], [pieces]
        g, w = g[:, w > 0], w[w > 0]
        mean = g.sum(1, keepdims=True) / w.sum()
        distance = np.square(g / w[:, None] - mean).sum((0, 2))
        variance = np.sum(w * distance) / (w.size - 1) if w.size > 1 else math.nan
        found[f"noise/variance/{part}"] = variance
        found[f"noise/signal/{part}"] = np.sum(mean**2) - variance / w.sum()
    return found


@pytest.mark.parametrize(("mesh", "seeds"), [("alone", [0]), ("cut", [0, 1])])
def test_the_step_tells_the_spread_of_its_rows(mesh, seeds, monkeypatch):
    """From one microbatch, whose loss is a mean, and from two, whose losses are sums."""
    axes, devices = MESHES[mesh]
    on = sharding.make_mesh(axes, jax.devices()[:devices])
    monkeypatch.setattr(sharding, "compiler_options", lambda *asked: QUICKLY)
    program = step.build(experiment("full", len(seeds)), on)
    shapes = {**program.abstract.params, **program.abstract.frozen}
    with jax.set_mesh(on):
        placed = {n: jax.device_put(w, shapes[n].sharding) for n, w in weights().items()}
        now, accumulated = state.create(placed, program.abstract, program.tx), None
        for seed in seeds[:-1]:
            accumulated = program.add(now, place(batch(seed), on), accumulated)
        _, metrics = program.train_step(now, place(batch(seeds[-1]), on), None, accumulated)
    found = {n: float(v) for n, v in metrics.items() if n.startswith("noise/")}
    expected = by_definition(seeds)
    assert math.isnan(expected["noise/variance/norms/video"]) == (len(seeds) == 1)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, err_msg=name)


# A gain's gradient per unit of weight is drawn from N(MU, SD^2), by modality; a row holds the
# modalities in these shares, so that rows differ in their weights alone.
MU = np.array([[0.5, 0.0, 0.0], [0.3, -0.4, 0.0], [0.0, 0.2, 0.6]])
SD = np.array([[1.0, 2.0, 0.5], [1.0, 1.0, 1.0], [0.5, 0.5, 3.0]])
SHARES, WEIGHTS = np.array([0.5, 0.2, 0.3]), np.array([4, 1, 16, 0, 9])
TRUTH = {
    f"norms/{name}": (np.sum(SD[m] ** 2), np.sum(MU[m] ** 2)) for m, name in enumerate(MODALITIES)
}
TRUTH["norms"] = (np.sum(SHARES @ SD**2), np.sum((SHARES @ MU) ** 2))


def rows_of(shares: np.ndarray) -> Batch:
    """A position for each modality, and one of padding that counts for none."""
    b = empty_batch(len(WEIGHTS), 4, 0, 4, 32)
    b.segment_ids[:], b.groups[:] = [1, 2, 3, 0], [3 + TEXT, 3 + IMAGE, 3 + VIDEO, 0]
    b.loss_weights[:, :3] = WEIGHTS[:, None] * shares
    return b


@pytest.fixture(scope="module")
def updates() -> list[dict[str, float]]:
    """Estimates of 4000 updates."""
    rows = rows_of(SHARES)
    weights = rows.loss_weights[:, :3, None]  # [B, M, 1]
    noise = np.random.default_rng(0).standard_normal((4000, *weights.shape[:2], 3))
    sums = weights * MU + np.sqrt(weights) * SD * noise  # [updates, B, M, D]

    @jax.jit
    @jax.vmap
    def one(by_piece):
        return norm_estimates(norm_spread_of(by_piece[None], rows))

    found = one(jnp.asarray(sums, jnp.float32))
    return [dict(zip(found, row, strict=True)) for row in np.stack([*found.values()], 1).tolist()]


@pytest.mark.parametrize("part", PARTS)
def test_the_estimates_are_unbiased_whatever_the_weights(updates, part):
    for name, truth in zip(("noise/variance/", "noise/signal/"), TRUTH[part], strict=True):
        values = np.array([update[name + part] for update in updates])
        error = values.std() / math.sqrt(len(values))
        assert abs(values.mean() - truth) < 3 * error, (name, values.mean(), truth, error)
        assert error < 0.1 * truth


@pytest.mark.parametrize("part", PARTS)
def test_the_ratio_of_running_means_is_the_noise_scale(updates, part):
    noise = NoiseScale(decay=0.999)
    for update in updates:
        noise.see(update)
    variance, signal = TRUTH[part]
    assert noise.ratios()[f"noise_scale/{part}"] == pytest.approx(variance / signal, rel=0.1)


def test_rows_without_video_leave_its_running_mean_alone(updates):
    silent = norm_estimates(norm_spread_of(jnp.ones((1, 5, 3, 3)), rows_of(SHARES * [1, 1, 0])))
    without = {name: float(value) for name, value in silent.items()}
    assert {n for n, v in without.items() if math.isnan(v)} == {
        "noise/variance/norms/video",
        "noise/signal/norms/video",
    }
    noise = NoiseScale()
    assert "noise_scale/norms/video" not in noise.see(without)
    noise.see(updates[0])
    before = dict(noise.means)
    noise.see(without)
    same = {name for name, mean in noise.means.items() if mean == before[name]}
    assert same == {"noise/variance/norms/video", "noise/signal/norms/video"}
