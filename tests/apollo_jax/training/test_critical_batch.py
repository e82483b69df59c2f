# SPDX-License-Identifier: Apache-2.0
"""Forks of a run: the same run but for their batch, done once, and what is made of their losses."""

import json
from pathlib import Path

import pytest

from apollo_jax.__main__ import run as command
from apollo_jax.config import load
from apollo_jax.training import critical_batch
from apollo_jax.training.train import train

SMALL = Path(__file__).parent / "small.py"
# 8 rows of 96 positions are a microbatch.
TOKENS = 8 * 8 * 96
FIELDS = {"optimizer.schedule": "constant", "train.num_steps": "10", "train.keep": "9"} | {
    "optimizer.warmup_ratio": "0.1"  # one update
}


@pytest.fixture(scope="module")
def begun(texts, tmp_path_factory) -> Path:
    """The folder of a run of ten updates of one microbatch; from the second on rates stay."""
    workdir = tmp_path_factory.mktemp("begun") / "run"
    assert train(load(f"{SMALL}:{texts}", FIELDS), workdir)
    return workdir


def fork(begun: Path, output: Path, *flags: str) -> dict:
    arguments = ["--workdir", str(begun), "--output", str(output), "--batches", "1,2"]
    command("critical-batch", [*arguments, "--rule", "none", *flags])
    return json.loads((output / "critical_batch.json").read_text())


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_forks_go_on_from_the_checkpoint_and_are_done_once(begun, tmp_path, monkeypatch, capsys):
    flags = ("--step", "2", f"--tokens={TOKENS}", "--tolerance=100")
    before = sorted(begun.rglob("*"))
    found = fork(begun, tmp_path, *flags)
    assert sorted(begun.rglob("*")) == before
    whole, ones, twos = (lines(p) for p in (begun, tmp_path / "x1", tmp_path / "x2"))
    # With one microbatch, as the run has it, a fork is that run.
    assert [x["loss"] for x in ones] == [x["loss"] for x in whole[2:]]
    assert [x["step"] for x in twos] == [3, 4, 5, 6]
    pairs = [ones[i]["target_tokens"] + ones[i + 1]["target_tokens"] for i in (0, 2, 4, 6)]
    assert [x["target_tokens"] for x in twos] == pairs
    last = whole[-2:]
    mean = sum(x["loss"] * x["target_tokens"] for x in last) / pairs[-1]
    assert found["forks"]["1"]["loss"] == pytest.approx(mean, rel=1e-9)
    assert found["forks"]["2"] == {"microbatches": 2, "rows": 16, "updates": 4} | {
        "loss": pytest.approx(twos[-1]["loss"], rel=1e-9)
    }
    assert (found["critical_rows"], found["at_least"]) == (16, True)
    assert found["batch_ramp"] == "0:1,2:2"
    said = " ".join(capsys.readouterr().out.split())
    assert "16 rows or more: no fork was too large" in said
    assert "--config.train.batch_ramp=0:1,2:2" in said
    assert not list(tmp_path.rglob("checkpoints"))

    def again(*args):
        raise AssertionError("a fork that is done is not repeated")

    monkeypatch.setattr(critical_batch, "train", again)
    narrow = fork(begun, tmp_path, "--step", "2", f"--tokens={TOKENS}", "--tolerance=0")
    assert narrow["forks"] == found["forks"]
    assert narrow["critical_rows"] == (8 if mean < twos[-1]["loss"] else 16)
    with pytest.raises(ValueError, match=r"is of step 2, now 4: take another --output"):
        fork(begun, tmp_path, "--step", "4", f"--tokens={TOKENS}")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--step", "3"), "--step 3: .* has checkpoints of 2, 4, 6, 8, 10$"),
        (("--step", "2", "--tokens", "768"), "updates of the largest batch need 6144"),
        (("--batches", "4"), "at least two numbers"),
        (("--batches", "1,x"), "at least two numbers"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(begun, tmp_path, flags, said):
    with pytest.raises(ValueError, match=said):
        fork(begun, tmp_path / "out", f"--tokens={TOKENS}", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("losses", "critical", "at_least"),
    [
        ((2.00, 2.001, 2.005, 2.10), 32, False),
        ((2.10, 2.00, 2.02, 2.00), 16, False),  # what comes after one that is too large is chance
        ((2.00, 2.005, 2.009, 2.01), 64, True),
        ((2.00, 2.50, 2.50, 2.50), 8, False),
    ],
)
def test_the_critical_batch_is_the_last_before_the_loss_rises(losses, critical, at_least):
    sizes = (1, 2, 4, 8)
    forks = [
        dict(microbatches=b, rows=8 * b, updates=1, loss=loss)
        for b, loss in zip(sizes, losses, strict=True)
    ]
    found = critical_batch.summary(forks, 0.011, ((0, 1), (50, 2)), 100)
    assert (found["critical_rows"], found["at_least"]) == (critical, at_least)
    assert found["batch_ramp"] == f"0:1,50:2,100:{critical // 8}"
