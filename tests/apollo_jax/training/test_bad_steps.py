# SPDX-License-Identifier: Apache-2.0
"""What docs/survive.md says of steps that go wrong: left out or rewound they leave no trace."""

import contextlib
import json
import os
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from apollo_jax import sharding
from apollo_jax.config import load
from apollo_jax.training.processes import Again
from apollo_jax.training.rows import place
from apollo_jax.training.state import create
from apollo_jax.training.step import build
from apollo_jax.training.train import train
from data_pipeline.loader import Loader
from data_pipeline.tokenizer import Tokenizer

SMALL = Path(__file__).parent / "small.py"


def losses(workdir: Path) -> dict[int, tuple[float, float]]:
    """Loss and number of targets by step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["target_tokens"]) for line in lines}


def weights_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint: weights and moments, without the optimizer's own counts."""
    folder = workdir / "checkpoints" / f"{step:08d}"
    arrays = {}
    for part in ("weights", "optimizer"):
        with warnings.catch_warnings():  # that the devices may be others now
            warnings.simplefilter("ignore")
            restored = ocp.PyTreeCheckpointer().restore(folder / part)
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
            arrays[part + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


@pytest.fixture
def poison(monkeypatch):
    """poison(taken, n): weights of the nth batch of a run are no numbers, from now on.

    The run goes on after the first `taken` of them.
    """

    def poison(taken: int, *numbers: int) -> None:
        now = iter(range(taken + 1, 1000))

        def placed(rows, mesh):
            if not rows.segment_ids.any():  # to compile for, not of the run
                return place(rows, mesh)
            factor = np.float32(np.nan if next(now) in numbers else 1)
            return place(rows._replace(loss_weights=rows.loss_weights * factor), mesh)

        monkeypatch.setattr("apollo_jax.training.train.place", placed)

    return poison


def bad_steps(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "bad_steps.jsonl").read_text().splitlines()]


def test_stop_then_skip_leaves_the_step_out_bit_for_bit(texts, small_run, begun, poison, capsys):
    poison(2, 5)
    with pytest.raises(ValueError, match=r"the loss of step 5 is nan; its records: t\d+, t\d+"):
        train(load(f"{SMALL}:{texts}"), begun)
    assert sorted(os.listdir(begun / "checkpoints")) == ["00000002", "00000004"]
    (said,) = bad_steps(begun)
    poison(4, 5)
    every = {"train.checkpoint_every": "1", "train.keep": "9"}
    skipping = {"train.on_nonfinite": "skip", **every}
    assert train(load(f"{SMALL}:{texts}", skipping), begun)
    out = " ".join(capsys.readouterr().out.split())
    assert "the loss of step 5 is nan; its records: t" in out
    assert "its update is left out" in out
    assert "; 1 bad steps" in out
    assert bad_steps(begun) == [said]
    found, expected = losses(begun), losses(small_run)
    assert found[5][0] is None
    assert [found[step] for step in (1, 2, 3, 4)] == [expected[step] for step in (1, 2, 3, 4)]
    before, after, later = (weights_of(begun, step) for step in (4, 5, 6))
    assert len(before) > 20
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert not all(np.array_equal(before[name], later[name]) for name in before)


def test_the_records_that_are_named_are_those_of_the_batch(texts):
    data = load(f"{SMALL}:{texts}").data
    tokenizer, loader = Tokenizer.from_path(data.tokenizer), Loader(data, num_steps=20)
    with contextlib.closing(loader):
        for step in range(12):
            batch, _ = next(loader)
            asked = loader.records(step)
            text = [tokenizer.decode(row[row > 0].tolist()) for row in batch.tokens]
            told = zip(asked, text, strict=True)
            assert all(f"What is {name[1:]} and {name[1:]}?" in row for name, row in told)
        assert loader.records(step - 1) != asked
        assert loader.records(0) == []


def test_rewind_goes_on_from_the_last_checkpoint_with_later_batches(
    texts, small_run, begun, poison
):
    poison(2, 5)
    assert train(load(f"{SMALL}:{texts}", {"train.on_nonfinite": "rewind"}), begun)
    (said,) = bad_steps(begun)
    assert said["step"] == 5
    back, after, later = (weights_of(begun, step) for step in (4, 6, 8))
    assert all(np.array_equal(back[name], after[name]) for name in back)
    assert not all(np.array_equal(back[name], later[name]) for name in back)
    found, expected = losses(begun), losses(small_run)
    assert found[5][0] is None
    assert [found[step] for step in (3, 4)] == [expected[step] for step in (3, 4)]
    assert found[7][0] != expected[7][0]  # the same batch, seen by the parameters of step 4
    assert found[7][1] == expected[7][1]
    poison(0, 1)
    fresh = begun.with_name("fresh")
    one = {"train.on_nonfinite": "rewind", "train.num_steps": "2"}
    assert train(load(f"{SMALL}:{texts}", one), fresh)  # it begins with a checkpoint
    zero, end = (weights_of(fresh, step) for step in (0, 2))
    assert all(np.array_equal(zero[name], end[name]) for name in zero)


def test_the_jitted_step_obeys_the_limits(texts):
    """Above them nothing moves but the counter, and what the step reports."""
    experiment = load(f"{SMALL}:{texts}", {"train.on_nonfinite": "skip"})
    mesh = sharding.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        program = build(experiment, mesh)
        shapes = {**program.abstract.params, **program.abstract.frozen}
        weights = {
            n: jax.device_put(np.full(s.shape, 0.01, s.dtype), s.sharding)
            for n, s in shapes.items()
        }
        with contextlib.closing(Loader(experiment.data, num_steps=1)) as loader:
            rows, _ = next(loader)
        for limits, moves in (((0.0, np.inf), False), ((np.inf, 0.0), False), ((1e9, 1e9), True)):
            state = create(weights, program.abstract, program.tx)
            before = jax.tree.map(np.asarray, (state.params, state.opt_state))
            weights = jax.tree.map(lambda x: x.copy(), weights)  # the step takes the old ones
            batch = place(rows, mesh)
            after, metrics = program.train_step(state, batch, np.asarray(limits, np.float32))
            assert int(after.step) == 1
            assert float(metrics["grad_norm"]) > 0
            now = jax.tree.map(np.asarray, (after.params, after.opt_state))
            assert jax.tree.all(jax.tree.map(np.array_equal, before, now)) != moves


def test_updates_that_are_taken_back_leave_out_all_their_microbatches(
    texts, small_run, begun, as_after, poison, tmp_path
):
    """Update 3 is bad, which is known when 4 is under way: both go, and 5 is from what follows.

    The measure is a run in which both are bad and skipped. Microbatches: 1|2|3 4|5 6|7|8|9|10.
    """
    ramp = {"train.batch_ramp": "0:1,2:2,4:1"}
    rewinding = load(f"{SMALL}:{texts}", ramp | {"train.on_nonfinite": "rewind"})
    rewound, skipped = (as_after(begun, 2, tmp_path / how) for how in ("rewound", "skipped"))
    poison(2, 3)
    assert train(rewinding, rewound)
    poison(2, 4, 5)
    assert train(load(f"{SMALL}:{texts}", ramp | {"train.on_nonfinite": "skip"}), skipped)
    with contextlib.closing(Loader(rewinding.data, num_steps=6, recall=6)) as loader:
        for _ in range(6):
            next(loader)
        third, fourth = (loader.records(n) + loader.records(n + 1) for n in (2, 4))
    assert third != fourth
    assert [(said["step"], said["records"]) for said in bad_steps(rewound)] == [(3, third)]
    assert [said["records"] for said in bad_steps(skipped)] == [third, fourth]
    for folder in (rewound, skipped):
        before, after, end = (weights_of(folder, step) for step in (2, 4, 6))
        assert all(np.array_equal(before[name], after[name]) for name in before)
        assert not all(np.array_equal(before[name], end[name]) for name in before)
    found, expected, plain = (losses(folder) for folder in (rewound, skipped, small_run))
    assert [found[n][0] for n in (3, 4)] == [expected[n][0] for n in (3, 4)] == [None, None]
    for n in (5, 6, 7, 8):
        np.testing.assert_allclose(found[n], expected[n], rtol=1e-6)
    assert [found[n][1] for n in (5, 6)] == [plain[n][1] for n in (7, 8)]  # the same rows
    assert found[5][0] != plain[7][0]  # seen by the parameters of step 2

    cut = as_after(rewound, 4, tmp_path / "cut")  # within the ramp
    assert train(rewinding, cut)
    assert losses(cut) == found
    assert bad_steps(cut) == bad_steps(rewound)


class Remembered:
    """A local tier in this process's memory."""

    folder = Path("memory")

    def __init__(self):
        self.saved: dict[int, tuple] = {}

    def save(self, step, state, data) -> None:
        self.saved[step] = (jax.tree.map(lambda a: a.copy(), state), json.dumps(data))

    def latest(self) -> int:
        return max(self.saved, default=0)

    def restore(self):
        state, data = self.saved[self.latest()]
        return self.latest(), jax.tree.map(lambda a: a.copy(), state), json.loads(data)

    def check(self) -> None: ...

    close = forget = check


@pytest.fixture
def tier(texts, begun, poison, monkeypatch) -> Remembered:
    """Of the begun run, which has ended in step 6: the tier has step 5, the run's folder step 2."""
    tier = Remembered()
    monkeypatch.setattr("apollo_jax.training.train.local_tier.open_tier", lambda *_: tier)
    poison(2, 6)
    with pytest.raises(ValueError, match="the loss of step 6 is nan"):
        train(load(f"{SMALL}:{texts}", LOCAL), begun)
    (begun / "bad_steps.jsonl").unlink()
    assert max(tier.saved) == 5
    return tier


LOCAL = {"train.local_every": "1", "train.checkpoint_every": "100"}


def test_rewind_begins_with_a_checkpoint_wherever_it_starts_from(texts, begun, tier, poison):
    shutil.rmtree(begun / "checkpoints" / "00000002")
    poison(5, 7)
    assert train(load(f"{SMALL}:{texts}", LOCAL | {"train.on_nonfinite": "rewind"}), begun)
    assert sorted(os.listdir(begun / "checkpoints")) == ["00000005", "00000008"]
    five, six, seven = (tier.saved[step][0].params for step in (5, 6, 7))
    assert all(np.array_equal(five[name], seven[name]) for name in five)
    assert not all(np.array_equal(five[name], six[name]) for name in five)


def test_the_local_tier_stands_in_where_no_checkpoint_can_be_read(
    texts, small_run, begun, tier, poison, capsys
):
    """Of step 6, which would go before it, and of step 2."""
    checkpoints = begun / "checkpoints"
    shutil.copytree(checkpoints / "00000002", checkpoints / "00000006")
    for step in checkpoints.iterdir():
        shutil.rmtree(step / "weights")
    poison(5)
    assert train(load(f"{SMALL}:{texts}", LOCAL), begun)
    out = " ".join(capsys.readouterr().out.split())
    assert f"no checkpoint in {begun} can be read: step 6: " in out
    assert "after step 5 (from memory)" in out
    assert sorted(os.listdir(begun / "torn")) == ["00000002", "00000006"]
    assert sorted(os.listdir(checkpoints)) == ["00000005", "00000008"]
    assert losses(begun) == losses(small_run)


def test_what_is_damaged_stays_until_the_local_tier_has_been_read(
    texts, begun, tier, poison, monkeypatch
):
    """Without it the next start would find nothing, and begin at the first step."""
    e, checkpoints = load(f"{SMALL}:{texts}", LOCAL), begun / "checkpoints"
    shutil.move(checkpoints / "00000002", checkpoints / "00000006")
    for step in checkpoints.iterdir():
        shutil.rmtree(step / "weights")
    before = losses(begun)

    def unreadable():
        raise Again("a disk is gone")

    monkeypatch.setattr(tier, "restore", unreadable)
    with pytest.raises(Again):
        train(e, begun)
    assert os.listdir(checkpoints) == ["00000006"]
    tier.saved.clear()
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read:\n  step 6: "):
        train(e, begun)
    (begun / "torn").mkdir()
    shutil.move(checkpoints / "00000006", begun / "torn")
    with pytest.raises(ValueError, match=r"has no checkpoint, only damaged ones in .*torn: bring"):
        train(e, begun)
    assert losses(begun) == before
