# SPDX-License-Identifier: Apache-2.0
"""Runs whose updates are made of microbatches: the same rows, resumed exactly, all records told."""

import contextlib
import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from apollo_jax.config import load
from apollo_jax.training import accumulate, step
from apollo_jax.training.rows import place
from apollo_jax.training.step import batch_sums
from apollo_jax.training.train import train
from data_pipeline.loader import Loader

SMALL = Path(__file__).parent / "small.py"
STEPS = {"train.num_steps": "4", "train.checkpoint_every": "1"}
TOLERANCE = 1e-5  # relative, of losses whose sums are in another order


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """trained({"train.accumulate": "2"}[, folder]): the folder of such a run."""

    def trained(overrides: dict[str, str], workdir: Path | None = None) -> Path:
        workdir = workdir or tmp_path_factory.mktemp("run")
        assert train(load(f"{SMALL}:{texts}", STEPS | overrides), workdir)
        return workdir

    return trained


@pytest.fixture(scope="module")
def twos(trained) -> Path:
    """The folder of a run of four updates from two microbatches each."""
    return trained({"train.accumulate": "2"})


def lines(workdir: Path, *names: str) -> list[tuple]:
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [tuple(line[name] for name in ("step", *names)) for line in found]


def test_it_is_the_run_with_twice_the_rows(twos, trained):
    names = ("loss", "target_tokens", "grad_norm", "learning_rate/llm", "data/all/seen")
    expected = lines(trained({"data.batch_size": "16"}), *names)
    np.testing.assert_allclose(lines(twos, *names), expected, rtol=TOLERANCE)
    assert len(expected) == 4


def before(workdir: Path, step: int, to: Path) -> Path:
    """A copy of a run as it was when it was killed after the checkpoint of `step`."""
    copy = shutil.copytree(workdir, to)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return copy


def test_resumed_it_goes_on_bit_for_bit(twos, trained, tmp_path):
    copy = before(twos, 2, tmp_path / "copy")
    trained({"train.accumulate": "2"}, copy)
    names = ("loss", "accuracy", "grad_norm", "target_tokens")
    assert lines(copy, *names) == lines(twos, *names)


def test_the_noise_scale_is_logged_and_resumed_exactly(twos, trained, tmp_path):
    """Beside the same losses; its running means are part of the checkpoint."""
    on = {"train.accumulate": "2", "train.noise_scale": "true"}
    whole = trained(on)
    assert lines(whole, "loss", "grad_norm") == lines(twos, "loss", "grad_norm")
    names = ("noise_scale", "noise_scale/llm", "noise/variance", "noise/signal")
    found = lines(whole, *names)
    assert found[0][1] == pytest.approx(found[0][3] / found[0][4], rel=1e-6)
    assert found[-1][1] != found[-1][3] / found[-1][4]
    copy = before(whole, 2, tmp_path / "copy")
    trained(on, copy)
    assert lines(copy, *names) == found


def test_one_microbatch_has_no_noise_scale(texts):
    with pytest.raises(
        ValueError, match=r"noise_scale compares .* set config\.train\.accumulate to 2"
    ):
        load(f"{SMALL}:{texts}", {"train.noise_scale": "true"})


def arrays(workdir: Path, step: int) -> list[np.ndarray]:
    """All of a checkpoint: weights, moments, counts."""
    folder = workdir / "checkpoints" / f"{step:08d}"
    with warnings.catch_warnings():  # that the devices may be others now
        warnings.simplefilter("ignore")
        restored = [ocp.PyTreeCheckpointer().restore(folder / p) for p in ("weights", "optimizer")]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


def test_a_ramp_is_its_runs_one_after_the_other(trained, monkeypatch, tmp_path, capsys):
    """Two updates from one microbatch, then two from two, bit for bit; nothing compiles twice."""
    names = ("loss", "accuracy", "grad_norm", "target_tokens", "learning_rate/llm")
    rule = {"optimizer.rate_rule": "sqrt", "optimizer.base_batch": "8"}
    ones = trained(rule)
    parts = before(ones, 2, tmp_path / "parts")
    with pytest.raises(ValueError, match=r"2 microbatches for its first 2 updates.* says 4; it"):
        trained(rule | {"train.accumulate": "2"}, parts)
    ramp = rule | {"train.batch_ramp": "0:1,2:2"}
    trained(ramp, parts)
    traced, jitted = [], []

    def counted(*args, **kwargs):
        traced.append(1)
        return batch_sums(*args, **kwargs)

    def kept(make):
        return lambda *args: jitted.append(make(*args)) or jitted[-1]

    monkeypatch.setattr(step, "batch_sums", counted)
    monkeypatch.setattr(step, "make_update", kept(step.make_update))
    monkeypatch.setattr(accumulate, "make_add", kept(accumulate.make_add))
    capsys.readouterr()
    whole = trained(ramp)
    said = capsys.readouterr().out
    assert "from update 0: 8 rows (1 x 8), peak rates llm 0.001 " in said
    assert "from update 2: 16 rows (2 x 8), peak rates llm 0.00141 = 1.41 x (sqrt, base 8)" in said
    assert [one._cache_size() for one in jitted] == [2, 1]  # of updates and of what comes before
    assert len(traced) == 3
    assert lines(whole, *names) == lines(parts, *names)
    assert lines(whole, *names)[:2] == lines(ones, *names)[:2]
    assert lines(whole, *names)[2:] != lines(ones, *names)[2:]
    found, expected = arrays(whole, 4), arrays(parts, 4)
    assert len(found) > 20
    assert all(map(np.array_equal, found, expected))
    (seen,) = lines(whole, "data/all/seen")[-1:]
    assert seen[1] > lines(ones, "data/all/seen")[-1][1]


def test_all_records_of_a_bad_update_are_told(texts, twos, trained, monkeypatch, tmp_path):
    """The first of its microbatches has weights that are no numbers."""
    calls = []

    def placed(rows, mesh):
        calls.append(rows)
        factor = np.float32(np.nan if len(calls) == 1 else 1)
        return place(rows._replace(loss_weights=rows.loss_weights * factor), mesh)

    monkeypatch.setattr("apollo_jax.training.train.place", placed)
    copy = before(twos, 2, tmp_path / "copy")
    trained({"train.accumulate": "2", "train.on_nonfinite": "skip"}, copy)
    assert len(calls) == 4
    (said,) = map(json.loads, (copy / "bad_steps.jsonl").read_text().splitlines())
    assert said["step"] == 3
    with contextlib.closing(Loader(load(f"{SMALL}:{texts}").data, num_steps=6)) as loader:
        for _ in range(6):
            next(loader)
        assert said["records"] == loader.records(4) + loader.records(5) != []
    assert lines(copy, "loss")[2] == (3, None)
    assert lines(copy, "target_tokens")[3] == lines(twos, "target_tokens")[3]
