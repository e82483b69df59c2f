# SPDX-License-Identifier: Apache-2.0
"""Two towers learn which caption belongs to which picture, and Apollo takes the tower over."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apollo_jax import config, sharding
from apollo_jax.checkpoints import manager
from apollo_jax.evaluation import pictures
from apollo_jax.models import apollo, two_towers
from apollo_jax.training import checks, contrastive, critical_batch, throughput
from apollo_jax.training.contrastive import Contrastive, Rates, captions, pair_sums
from apollo_jax.training.step import build
from apollo_jax.training.train import train
from apollo_jax.training.weights import initial_weights
from data_pipeline.batch import empty_batch
from data_pipeline.frame_records import MediaInfo, ShardSpec, encode_segments
from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.loader import SourceConfig
from data_pipeline.tokenizer import train_sentencepiece

SPEC = ShardSpec(fps=2.0, size=32)
PICTURES = [(color, shape) for color in pictures.COLORS for shape in pictures.SHAPES]  # 24
TOWER = apollo.Config.debug().towers["siglip"]
PAIRS = Path(__file__).parent / "pairs.py"
MODEL = replace(contrastive.load(f"{PAIRS}:").model, towers={"siglip": TOWER})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Clips of coloured shapes and their captions, each in a place and light of its own."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    writer, records = FrameShardWriter(folder / "shards", SPEC), []
    for number, (color, shape) in enumerate(PICTURES):
        x, y = rng.integers(20, 44, 2).tolist()
        picture = pictures.draw_object(color, shape, x, y, 90 + number % 8)[::2, ::2]
        info = MediaInfo(f"v{number}", "video", 20, 10.0, 2.0, 4, 2.0, 32, 32)
        jpegs = [SPEC.encode(np.ascontiguousarray(picture))] * 4
        writer.add(info, encode_segments(info.id, jpegs, [0.0, 0.5, 1.0, 1.5], (32, 32), SPEC))
        said = [
            {"from": "human", "value": "<video>\nDescribe."},
            {"from": "gpt", "value": f"A {color} {shape}."},
        ]
        records.append({"id": info.id, "conversations": said, "video": info.id})
    writer.close()
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    texts = [turn["value"] for r in records for turn in r["conversations"]]
    train_sentencepiece(texts, folder / "tokenizer.model", 400)
    return folder


def experiment(folder: Path, steps: int = 4, **changes: Any) -> Contrastive:
    plain = contrastive.load(f"{PAIRS}:{folder}")
    training = replace(plain.train, num_steps=steps, checkpoint_every=1000)
    optimizer = config.OptimizerConfig(schedule="constant", warmup_ratio=0.1, b2=0.95)
    rates = Rates(3e-3, 3e-3, 3e-3)
    e = replace(plain, model=MODEL, train=training, rates=rates, optimizer=optimizer)
    return replace(e, **changes)


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("run")
    assert contrastive.train(experiment(pairs, steps=150), workdir)
    return workdir


def test_retrieval_rises_far_above_chance(run):
    """Chance is 1 in 8."""
    found = [line["accuracy"] for line in lines(run)]
    assert np.mean(found[:5]) < 0.3
    assert np.mean(found[-10:]) > 0.75


def test_apollo_takes_the_tower_over(run, pairs, experiment_of_apollo):
    e = replace(experiment_of_apollo, init_parts=config.PartPaths(towers={"siglip": str(run)}))
    mesh = sharding.make_mesh(e.mesh)
    with jax.set_mesh(mesh):
        abstract = build(e, mesh).abstract
        shapes = {**abstract.params, **abstract.frozen}
        weights, origin = initial_weights(e, shapes)
    assert f"vision_tower/towers/0/ from {run}" in origin
    own = contrastive.build(experiment(pairs, steps=150), mesh)
    checkpoints = manager.Checkpoints(run, read_only=True)
    trained = checkpoints.restore_weights({**own.abstract.params, **own.abstract.frozen})[1]
    checkpoints.close()
    names = [n for n in shapes if n.startswith("vision_tower/towers/0/")]
    assert names
    for name in names:
        np.testing.assert_array_equal(weights[name], trained[name])


@pytest.fixture
def experiment_of_apollo(world):
    return config.load(f"{Path(__file__).parent / 'tiny.py'}:{world}")


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_losses_are_told_by_source_and_held_out(pairs, tmp_path, loss, monkeypatch):
    """Of two sources, over steps of two microbatches; with MFU where the peak is known."""
    monkeypatch.setattr(throughput, "peak_flops", {"cpu": 2e12}.get)
    path = str(pairs / "train.jsonl")
    few = SourceConfig(path, weight=0.2)
    e = experiment(pairs, steps=2, loss=loss)
    data = replace(e.data, sources={"many": SourceConfig(path), "few": few})
    held_out = config.EvalConfig({"held": SourceConfig(path)}, every=2, batches=3)
    e = replace(e, data=data, evaluation=held_out, train=replace(e.train, accumulate=2))
    assert contrastive.train(e, tmp_path)
    *steps, held = lines(tmp_path)
    for line in steps:
        named = {n: v for n, v in line.items() if n.startswith("target_tokens/dataset/")}
        assert sum(named.values()) == line["target_tokens"] == 16
        parts = [v * line[n.replace("target_tokens", "loss")] for n, v in named.items()]
        assert sum(parts) == pytest.approx(16 * line["loss"], rel=1e-5)
        assert line["loss/modality/video"] == pytest.approx(line["loss"], rel=1e-5)
        assert line["mfu"] > 0
    assert {"loss/dataset/many", "loss/dataset/few"} <= {name for line in steps for name in line}
    assert held["eval/loss/dataset/held"] == pytest.approx(held["eval/loss"], rel=1e-5)
    assert held["eval/target_tokens/dataset/held"] == 24


def test_needed_flops_are_those_of_the_towers_and_of_all_pairs(pairs):
    e = experiment(pairs)
    twice = replace(e, data=replace(e.data, batch_size=16))
    one, two = contrastive.pair_flops(e), contrastive.pair_flops(twice)
    products = 6 * e.model.embedding_size
    assert two - 2 * one == products * (16**2 - 2 * 8**2)
    frozen = contrastive.pair_flops(replace(e, rates=Rates(0.0, 1e-3, 1e-3)))
    assert one / 3 < frozen < one


def test_what_does_not_fit_is_refused(pairs, tmp_path):
    e = experiment(pairs)
    short = replace(e, model=replace(MODEL, text=replace(MODEL.text, vocab_size=100)))
    with pytest.raises(ValueError, match=r"table \(config\.model\.text\.vocab_size\) only 100"):
        contrastive.train(short, tmp_path / "run")
    with pytest.raises(ValueError, match=r"to you:\n  --config\.data\.tokenizer=PATH"):
        contrastive.train(replace(e, data=replace(e.data, tokenizer="")), tmp_path / "run")
    nowhere = config.EvalConfig({"held": SourceConfig("nowhere")}, every=2)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        contrastive.train(replace(e, evaluation=nowhere), tmp_path / "run")
    mesh = sharding.make_mesh(e.mesh)
    state = contrastive.build(e, mesh).abstract
    needed = checks.on_device(checks.held_bytes(state, state.params), mesh.shape)
    contrastive.check_memory(e, state, mesh.shape, limit=needed)
    with pytest.raises(ValueError, match=r"mesh data=8, .*; nearest that work: mesh .*fsdp=\d"):
        contrastive.check_memory(e, state, mesh.shape, limit=needed * 0.7)
    assert not (tmp_path / "run").exists()


def test_a_run_of_pairs_is_no_run_of_an_apollo(run, experiment_of_apollo):
    """Not to begin with as a whole, to fork, nor to continue; each says what it is for."""
    said = r"a contrastive run has two towers .* --config\.init_parts\.towers\.NAME="
    whole = replace(experiment_of_apollo, init_from=str(run))
    with pytest.raises(ValueError, match=said):
        initial_weights(whole, {})
    with pytest.raises(ValueError, match=said):
        train(experiment_of_apollo, run)
    flags = ["--workdir", str(run), "--output", str(run / "forks"), "--tokens", "1000"]
    with pytest.raises(ValueError, match=said):
        critical_batch.main(flags)


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_rates_of_zero_freeze(pairs, tmp_path, loss):
    e = experiment(pairs, steps=2, rates=Rates(0.0, 1e-3, 1e-3), loss=loss)
    assert contrastive.train(e, tmp_path)
    mesh = sharding.make_mesh(e.mesh)
    abstract = contrastive.build(e, mesh).abstract
    shapes = {**abstract.params, **abstract.frozen}
    assert {n.split("/")[0] for n in abstract.frozen} == {"vision_tower"}
    with jax.set_mesh(mesh):
        fresh = contrastive.random_weights(e.model, e.train, shapes, e.seed)
    checkpoints = manager.Checkpoints(tmp_path, read_only=True)
    after = checkpoints.restore_weights(shapes)[1]
    checkpoints.close()
    still = {n for n in shapes if np.array_equal(fresh[n], after[n])}
    assert set(abstract.frozen) <= still
    assert "text/embedding" not in still


def test_another_config_does_not_continue_a_run(run, pairs):
    with pytest.raises(ValueError, match=r"loss: 'sigmoid' -> 'softmax'"):
        contrastive.train(experiment(pairs, steps=150, loss="softmax"), run)


def test_configs_that_do_not_fit_are_named(pairs):
    e = experiment(pairs)
    with pytest.raises(ValueError, match=r"data\.clips is 2"):
        replace(e, data=replace(e.data, clips=2))
    with pytest.raises(ValueError, match=r"data\.frames_per_clip is 2, the model takes 4"):
        replace(e, data=replace(e.data, frames_per_clip=2))
    with pytest.raises(ValueError, match="one must be positive"):
        replace(e, rates=Rates(0.0, 0.0, 0.0))
    optimizer = replace(e.optimizer, name="schedule_free", schedule="cosine")
    with pytest.raises(ValueError, match=r"needs .*schedule=constant, which is cosine"):
        replace(e, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"rates\.text is -1\.0, must be at least 0"):
        replace(e, rates=Rates(1.0, -1.0, 1.0))
    with pytest.raises(ValueError, match="12 does not divide over the 8 devices"):
        contrastive.train(replace(e, data=replace(e.data, batch_size=12)), pairs / "none")


def test_captions_are_what_a_row_teaches():
    targets = jnp.arange(12).reshape(2, 6)
    weights = jnp.asarray([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0]], jnp.float32)
    tokens, there = captions(targets, weights, 2)
    np.testing.assert_array_equal(tokens, [[1, 2], [0, 0]])
    np.testing.assert_array_equal(there, [[True, True], [False, False]])
    tokens, there = captions(targets, weights, 8)
    np.testing.assert_array_equal(tokens[0], [1, 2, 4, 0, 0, 0, 0, 0])
    assert there.sum() == 3


def test_rows_without_a_pair_move_only_the_bias():
    """A batch of padding has a finite loss, and no gradient in either tower."""
    model = two_towers.TwoTowers(MODEL, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    batch = empty_batch(8, 32, 1, 4, 32)

    def loss(state):
        return pair_sums(nnx.merge(graphdef, state), batch).loss / 8

    with jax.set_mesh(sharding.make_mesh(sharding.MeshConfig())):
        value, slopes = jax.jit(jax.value_and_grad(loss))(state)
    assert np.isfinite(value)
    moved = {p[0] for p, v in nnx.to_flat_state(slopes) if np.any(np.asarray(v[...]) != 0)}
    assert moved == {"heads"}


@pytest.mark.parametrize("frame", range(4))
def test_every_frame_of_a_clip_is_seen(frame):
    model = two_towers.TwoTowers(MODEL, rngs=nnx.Rngs(0))
    frames = np.full((1, 4, 32, 32, 3), 100, np.uint8)
    other = frames.copy()
    other[:, frame, :16] = 200
    where = jnp.asarray([[0, 0, 32, 32]])
    one, two = (model.embed_clips(jnp.asarray(f), where) for f in (frames, other))
    assert np.abs(np.asarray(one - two)).max() > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(one, axis=1), 1.0, rtol=1e-5)


def test_the_published_config_is_of_the_size_it_says():
    for kind in ("images", "videos"):
        path = Path(__file__).parents[3] / "configs" / "contrastive" / "siglip.py"
        e = contrastive.load(f"{path}:{kind}", {"data.batch_size": "64"})
        assert e.data.batch_size == 64
        assert asdict(e.model.towers["siglip-so400m-patch14-384"])["hidden_size"] == 1152
