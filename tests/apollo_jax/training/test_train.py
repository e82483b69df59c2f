# SPDX-License-Identifier: Apache-2.0
"""Whole runs: interrupted in any way they continue bit for bit; what does not fit is refused."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from apollo_jax.checkpoints import run
from apollo_jax.training.stop_signal import StopSignal
from apollo_jax.training.train import train
from data_pipeline.tokenizer import Tokenizer

TINY = Path(__file__).parent / "tiny.py"
MEASURED = ("loss", "accuracy", "grad_norm", "grad_norm/connector", "eval/loss")


def losses(workdir: Path) -> list[tuple]:
    """Every line of metrics.jsonl without the times."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], *(line.get(name) for name in MEASURED)) for line in lines]


@pytest.fixture(scope="module")
def whole(experiment, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train(experiment({"train.profile": "3:2"}), workdir)
    return workdir


def test_learns_and_leaves_everything_behind(whole):
    found = losses(whole)
    assert [line[0] for line in found] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]  # twice: evaluated
    assert [line[0] for line in found if line[-1]] == [4, 8]
    assert found[-2][1] < 0.7 * found[0][1]
    assert found[-1][-1] < found[4][-1]
    assert sorted(os.listdir(whole / "checkpoints")) == ["00000006", "00000008"]
    e = run.read_experiment(whole)
    assert e.name == "tiny"
    ours, kept = (Tokenizer.from_path(p) for p in (e.data.tokenizer, whole / "tokenizer"))
    assert ours.fingerprint == kept.fingerprint


def test_says_by_which_names_it_went(whole):
    lines = list(map(json.loads, (whole / "metrics.jsonl").read_text().splitlines()))
    steps = [line for line in lines if "loss" in line]
    for line in steps:  # each is of one step here
        for kind in ("dataset", "modality"):
            of_kind = {n: v for n, v in line.items() if n.startswith(f"target_tokens/{kind}/")}
            assert sum(of_kind.values()) == line["target_tokens"]
            parts = [v * line[n.replace("target_tokens", "loss")] for n, v in of_kind.items()]
            assert sum(parts) == pytest.approx(line["loss"] * line["target_tokens"], rel=1e-5)
        for component in ("connector", "llm"):
            sizes = [line[f"{what}_norm/{component}"] for what in ("update", "param")]
            assert (sizes[0] > 0) == (line["step"] > 1), "the rate of the first step is 0"
            assert sizes[1] > sizes[0]
        assert not any("norm/vision_tower" in name for name in line), "it is frozen"
        assert line["samples_per_second"] > 0
        assert not any("mfu" in name or "memory" in name for name in line), "on a CPU"
    assert {"loss/modality/text", "loss/modality/video", "loss/dataset/all"} <= set(steps[-1])
    held_out = [line for line in lines if "eval/loss" in line]
    for line in held_out:
        assert line["eval/loss/dataset/held out"] == pytest.approx(line["eval/loss"], rel=1e-5)
    (trace,) = whole.glob("**/*.xplane.pb")
    assert trace.match("profile/plugins/profile/*/*.xplane.pb")


@pytest.fixture(scope="module")
def start(world, company):
    """start(workdir, ..): processes of the run on eight devices; the flag `last` is the last's."""

    def start(workdir: Path, *flags: str, count: int = 1, last: str = ""):
        flags = ("--config.evaluation.every=0",) * (count > 1) + flags
        own = [*[()] * (count - 1), (last,) * bool(last)]
        return company(f"{TINY}:{world}", workdir, count, *flags, own=own, devices=8 // count)

    return start


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Until `step` is in metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    while not path.exists() or f'"step": {step},' not in path.read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_killed_and_terminated_it_continues_bit_for_bit(start, whole, experiment, tmp_path):
    (first,) = start(tmp_path).all
    wait_for_step(first, tmp_path, 4)  # one step after the first checkpoint, or while it is written
    first.kill()
    first.communicate()
    (second,) = start(tmp_path).all
    wait_for_step(second, tmp_path, 5)
    second.send_signal(signal.SIGTERM)
    said, _ = second.communicate()
    assert second.returncode == 0, said
    assert "the same command continues" in said or "trained, 8 of 8 steps" in said
    assert train(experiment(), tmp_path)
    assert losses(tmp_path) == losses(whole)
    assert train(experiment(), tmp_path)  # nothing left to do
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize("what", ["train.evaluate", "answers.Answers.write"])
def test_an_evaluation_that_fails_costs_no_step_and_is_made_up_for(
    whole, experiment, tmp_path, monkeypatch, what
):
    """The step is saved before, and the run goes on with the evaluation that it owes."""

    def fails(*_: object) -> dict:
        raise ValueError("no memory for it")

    e = experiment({"train.checkpoint_every": "4", "evaluation.samples": "1"})
    with monkeypatch.context() as patched:
        patched.setattr(f"apollo_jax.training.{what}", fails)
        with pytest.raises(ValueError, match="no memory"):
            train(e, tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["00000004"]
    assert train(e, tmp_path)
    assert losses(tmp_path) == losses(whole)
    rows = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows] == [4, 8]


def test_a_signal_in_the_last_step_leaves_nothing_out(whole, experiment, tmp_path, monkeypatch):
    def last(self: StopSignal, step: int) -> bool:
        return step == 8

    monkeypatch.setattr(StopSignal, "requested", last)
    assert train(experiment(), tmp_path)
    assert losses(tmp_path) == losses(whole)


def test_goes_back_to_the_last_whole_checkpoint(whole, experiment, tmp_path, capsys):
    copy = shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "00000008" / "weights")
    assert train(experiment(), copy)
    assert "going on from step 6" in " ".join(capsys.readouterr().err.split())
    assert losses(copy) == losses(whole)


@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, {}),  # each feeds its half of the rows to its four devices
        (2, {"data": 1, "context": 8}),  # the ring goes through both, which read the same rows
        (4, {"data": 1, "fsdp": 2, "context": 2, "tensor": 2, "attention": "ulysses"}),
    ],
    ids=str,
)
def test_processes_continue_the_run_of_one(start, whole, tmp_path, count, mesh):
    copy = shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "00000008")
    flags = [f"--config.mesh.{axis}={value}" for axis, value in mesh.items()]
    statuses, said = start(copy, *flags, count=count).end()
    assert statuses == [0] * count, said
    expected = [line[:2] for line in losses(whole) if line[0] > 6 and line[1]]
    found = [line[:2] for line in losses(copy) if line[0] > 6]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert sorted(os.listdir(copy / "checkpoints")) == ["00000006", "00000008"]


@pytest.fixture
def damaged(world, tmp_path) -> Path:
    """The shards of the world, with no picture in them that can be decoded."""
    shards = shutil.copytree(world / "shards", tmp_path / "shards")
    for file in shards.glob("*.array_record"):
        file.write_bytes(file.read_bytes().replace(b"\xff\xd8\xff", b"---"))
    return shards


def test_bad_data_of_one_process_stop_both_with_the_same_message(start, damaged, tmp_path):
    both = start(tmp_path / "run", count=2, last=f"--config.data.frames={damaged}")
    statuses, said = both.end()
    assert statuses == [2, 2], said
    stopped = [text[text.index(" samples could not be read") :] for text in said]
    assert stopped[0] == stopped[1]
    assert "max_bad_share=0.01; the latest: process 1: v" in stopped[0]
    assert "bad record" in said[1]
    assert "bad record" not in said[0]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_processes_that_share_rows_must_read_the_same(start, damaged, tmp_path):
    """Of one process a video cannot be decoded: it is masked there and not in the other."""
    flags = ("--config.mesh.data=1", "--config.mesh.context=8", "--config.data.max_bad_share=1")
    last = f"--config.data.frames={damaged}"
    both = start(tmp_path / "run", *flags, count=2, last=last)
    statuses, said = both.end()
    assert statuses == [2, 2], said
    for text in said:
        assert "processes 0, 1 hold parts of the same rows but have read different" in text
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_data_that_one_process_cannot_open_stop_both(start, tmp_path):
    path = tmp_path / "none.jsonl"
    both = start(tmp_path / "run", count=2, last=f"--config.data.sources.all.path={path}")
    statuses, said = both.end()
    assert statuses == [2, 2], said
    for text in said:
        assert f"process 1: annotation file {path} does not exist" in text
    assert not (tmp_path / "run").exists()


def test_another_config_is_refused(whole, experiment):
    before = sorted(whole.rglob("*"))
    changed = {"optimizer.learning_rates.llm": "1e-4", "train.log_every": "2", "data.seed": "1"}
    with pytest.raises(ValueError, match="holds a run with another config") as error:
        train(experiment(changed), whole)
    assert "optimizer.learning_rates.llm: 0.001 -> 0.0001" in str(error.value)
    assert "data.seed: 0 -> 1" in str(error.value)
    assert "log_every" not in str(error.value)
    assert sorted(whole.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data.tokenizer": ""}, r"leaves these paths to you:\n  --config\.data\.tokenizer=PATH"),
        ({"data.sources.all.path": ""}, r"--config\.data\.sources\.all\.path=PATH"),
        ({"data.tokenizer": "nowhere"}, "tokenizer nowhere does not exist"),
        ({"data.sources.all.path": "nowhere"}, "nowhere does not exist"),
        (
            {"data.batch_size": "12"},
            "batch_size=12 does not divide .* that work: config.data.batch_size=16 or mesh ",
        ),
        ({"mesh.tensor": "3"}, "tensor=3 on 8 devices .* nearest that work: "),
        (
            {"mesh.tensor": "8"},
            "4 heads do not divide over mesh tensor=8; nearest that work: mesh ",
        ),
        ({"model.llm.vocab_size": "100"}, r"config\.model\.llm\.vocab_size\) only 100"),
        ({f"optimizer.learning_rates.{c}": "0" for c in ("llm", "connector")}, "nothing trains"),
        ({"init_from": "nowhere"}, "nowhere"),
        ({"evaluation.sources.held out.path": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_refuses_what_does_not_fit_and_writes_nothing(experiment, tmp_path, overrides, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        train(experiment(overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
