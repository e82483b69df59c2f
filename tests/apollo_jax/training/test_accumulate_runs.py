# SPDX-License-Identifier: Apache-2.0
"""Runs whose updates are made of microbatches: the same rows, resumed exactly, in processes too."""

import json
import signal
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from apollo_jax.config import load
from apollo_jax.training import accumulate, step
from apollo_jax.training.processes import AGAIN
from apollo_jax.training.step import batch_sums
from apollo_jax.training.train import train

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


def test_resumed_it_goes_on_bit_for_bit(twos, trained, as_after, tmp_path):
    copy = as_after(twos, 2, tmp_path / "copy")
    trained({"train.accumulate": "2"}, copy)
    names = ("loss", "accuracy", "grad_norm", "target_tokens")
    assert lines(copy, *names) == lines(twos, *names)


def test_the_noise_scale_is_logged_and_resumed_exactly(twos, trained, as_after, tmp_path):
    """Beside the same losses; its running means are part of the checkpoint."""
    on = {"train.accumulate": "2", "train.noise_scale": "true"}
    whole = trained(on)
    assert lines(whole, "loss", "grad_norm") == lines(twos, "loss", "grad_norm")
    names = ("noise_scale", "noise_scale/llm", "noise/variance", "noise/signal")
    found = lines(whole, *names)
    assert found[0][1] == pytest.approx(found[0][3] / found[0][4], rel=1e-6)
    assert found[-1][1] != found[-1][3] / found[-1][4]
    copy = as_after(whole, 2, tmp_path / "copy")
    trained(on, copy)
    assert lines(copy, *names) == found


def test_one_microbatch_has_no_noise_scale(texts):
    with pytest.raises(
        ValueError, match=r"noise_scale compares .* set config\.train\.accumulate, or"
    ):
        load(f"{SMALL}:{texts}", {"train.noise_scale": "true"})


def arrays(workdir: Path, step: int) -> list[np.ndarray]:
    """All of a checkpoint: weights, moments, counts."""
    folder = workdir / "checkpoints" / f"{step:08d}"
    with warnings.catch_warnings():  # that the devices may be others now
        warnings.simplefilter("ignore")
        restored = [ocp.PyTreeCheckpointer().restore(folder / p) for p in ("weights", "optimizer")]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


RULE = {"optimizer.rate_rule": "sqrt", "optimizer.base_batch": "8"}
RAMP = RULE | {"train.batch_ramp": "0:1,2:2"}


class Ramped(NamedTuple):
    """A run of two updates from one microbatch, then two from two."""

    folder: Path
    traced: list  # one for each time that a loss was
    jitted: list


@pytest.fixture(scope="module")
def ramped(trained) -> Ramped:
    traced, jitted = [], []

    def counted(*args, **kwargs):
        traced.append(1)
        return batch_sums(*args, **kwargs)

    def kept(make):
        return lambda *args: jitted.append(make(*args)) or jitted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "batch_sums", counted)
        patch.setattr(step, "make_update", kept(step.make_update))
        patch.setattr(accumulate, "make_add", kept(accumulate.make_add))
        return Ramped(trained(RAMP), traced, jitted)


def test_a_ramp_compiles_nothing_twice(ramped):
    assert [one._cache_size() for one in ramped.jitted] == [2, 1]  # updates, what comes before
    assert len(ramped.traced) == 3


def test_a_ramp_is_its_runs_one_after_the_other(trained, ramped, as_after, tmp_path, capsys):
    """Bit for bit, their batches and rates too."""
    names = ("loss", "accuracy", "grad_norm", "target_tokens", "learning_rate/llm")
    ones, whole = trained(RULE), ramped.folder
    parts = as_after(ones, 2, tmp_path / "parts")
    with pytest.raises(ValueError, match=r"2 microbatches for its first 2 updates.* says 4; it"):
        trained(RULE | {"train.accumulate": "2"}, parts)
    capsys.readouterr()
    trained(RAMP, parts)
    said = capsys.readouterr().out
    assert "from update 0: 8 rows (1 x 8), peak rates llm 0.001 " in said
    assert "from update 2: 16 rows (2 x 8), peak rates llm 0.00141 = 1.41 x (sqrt, base 8)" in said
    assert lines(whole, *names) == lines(parts, *names)
    assert lines(whole, *names)[:2] == lines(ones, *names)[:2]
    assert lines(whole, *names)[2:] != lines(ones, *names)[2:]
    found, expected = arrays(whole, 4), arrays(parts, 4)
    assert len(found) > 20
    assert all(map(np.array_equal, found, expected))
    (seen,) = lines(whole, "data/all/seen")[-1:]
    assert seen[1] > lines(ones, "data/all/seen")[-1][1]


@pytest.fixture(scope="module")
def two(texts, company):
    """two(workdir, first={}): exit statuses and words of two processes of the ramp."""
    flags = [f"--config.{name}={value}" for name, value in (STEPS | RAMP).items()]
    hurry = "--xla_backend_optimization_level=0"  # compiling is the work

    def two(workdir: Path, **more) -> tuple[list[int], list[str]]:
        return company(f"{SMALL}:{texts}", workdir, 2, *flags, xla_flags=hurry, **more).end()

    return two


@pytest.fixture(scope="module")
def of_two(two, tmp_path_factory) -> Path:
    """The folder of a run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    statuses, said = two(folder)
    assert statuses == [0, 0], said
    return folder


def test_two_processes_are_the_run_of_one(ramped, of_two):
    names = ("loss", "grad_norm", "target_tokens", "learning_rate/llm", "data/all/seen")
    expected = lines(ramped.folder, *names)
    assert len(expected) == 4
    np.testing.assert_allclose(lines(of_two, *names), expected, rtol=TOLERANCE)


def test_killed_within_an_update_it_takes_it_again(of_two, two, as_after, mishap, tmp_path):
    """One dies between the two microbatches of update 4; continued, both go on bit for bit."""
    names = ("loss", "accuracy", "grad_norm", "target_tokens")
    copy = as_after(of_two, 2, tmp_path / "copy")
    statuses, said = two(copy, first={1: mishap(signal.SIGKILL, nth=4)})
    assert statuses == [AGAIN, -signal.SIGKILL], said
    assert "process 0 lost the others of the run and stops" in said[0]
    assert [line[0] for line in lines(copy)] in ([1, 2], [1, 2, 3])
    statuses, said = two(copy)
    assert statuses == [0, 0], said
    assert "continuing" in said[0]
    assert lines(copy, *names) == lines(of_two, *names)
