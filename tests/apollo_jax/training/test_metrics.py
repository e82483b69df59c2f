# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl has one line per logged step, also after a resume; a loss of nan stops the run."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from apollo_jax.config import TrainConfig
from apollo_jax.training.boards import METRICS, forget_after
from apollo_jax.training.guard import BAD_STEPS, Guard, Measured
from apollo_jax.training.metrics import MetricLog
from data_pipeline.loader import Counts, LoadStats

STATS = LoadStats(
    samples=2, tokens=100, clips=3, frames=12, bad=(), fill_tokens=0.5, fill_clips=0.5
)


def metrics(loss: float) -> dict:
    return {name: jnp.float32(loss) for name in ("loss", "accuracy", "grad_norm", "grad_norm/llm")}


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]


@pytest.fixture
def log(tmp_path: Path):
    opened = []

    def log(**kwargs) -> MetricLog:
        opened.append(MetricLog(tmp_path, **kwargs))
        return opened[-1]

    yield log
    for one in opened:
        one.close()


def test_writes_the_previous_step(log, tmp_path):
    log = log(start=0, num_steps=5, every=2)
    for step in range(1, 6):
        log.push(step, metrics(step), STATS, waited=0.0)
        assert [line["step"] for line in lines(tmp_path)] == [2, 4][: (step - 1) // 2]
    log.flush()
    log.flush()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (2, 2.0),
        (4, 4.0),
        (5, 5.0),
    ]
    last = lines(tmp_path)[-1]
    assert last["tokens_per_second"] / last["frames_per_second"] == pytest.approx(100 / 12)
    assert {"grad_norm/llm", "data_wait", "seconds_per_step", "bad_records"} <= set(last)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_loss_that_is_no_number_stops(log, tmp_path):
    log = log(start=0, num_steps=5, every=2, guard=Guard(TrainConfig(5), tmp_path))
    log.push(1, metrics(float("nan")), STATS, waited=0.0)
    with pytest.raises(ValueError, match="the loss of step 1 is nan"):
        log.flush()


def test_a_loss_that_is_no_number_is_null_where_the_run_goes_on(log, tmp_path):
    guard = Guard(TrainConfig(5, on_nonfinite="skip"), tmp_path, lambda step: ["a", "b"])
    log = log(start=0, num_steps=5, every=1, guard=guard)
    log.push(1, metrics(float("nan")), STATS, waited=0.0)
    log.flush()
    (line,) = lines(tmp_path)
    assert (line["loss"], line["bad_steps"]) == (None, 1)
    assert sum(value for name, value in line.items() if "goodput" in name) == pytest.approx(1)
    assert log.summary().endswith("; 1 bad steps")
    (said,) = map(json.loads, (tmp_path / BAD_STEPS).read_text().splitlines())
    assert said["records"] == ["a", "b"]
    log.close()
    resumed = MetricLog(tmp_path, start=0, num_steps=5, every=1)
    resumed.close()
    assert not (tmp_path / BAD_STEPS).read_text()


def test_steps_that_are_taken_back_are_in_no_loss_by_group(log, tmp_path):
    """Of the four steps of a line the second is bad; the third was under way when that was seen."""
    guard = Guard(TrainConfig(5, on_nonfinite="rewind"), tmp_path)
    log = log(start=0, num_steps=4, every=4, sources=("web",), guard=guard)
    losses = (2.0, float("nan"), float("nan"), 5.0)
    for step, loss in enumerate(losses, 1):
        sums = np.zeros((3, 2), np.float32)
        sums[0] = (loss, 1.0)
        log.push(step, metrics(loss) | {"by_group": jnp.asarray(sums)}, STATS, waited=0.0)
        if guard.rewind:  # as the loop does
            log.judged, guard.rewind = step, False
    log.flush()
    (line,) = lines(tmp_path)
    assert (line["loss/modality/text"], line["target_tokens/modality/text"]) == (3.5, 2.0)
    assert line["bad_steps"] == 1


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_steps_that_are_left_out_are_in_no_noise_scale(log, tmp_path, policy):
    """A spike of finite numbers: its estimates are shown, the running means stay as they were."""
    guard = Guard(TrainConfig(3, on_nonfinite=policy, spike_factor=2.0), tmp_path)
    guard.good = [Measured(-step, 1.0, 1.0) for step in range(20)]
    log = log(start=0, num_steps=3, every=1, guard=guard)
    for step, loss in enumerate((1.0, 100.0), 1):
        noise = {"noise/variance": jnp.float32(6 * loss**3), "noise/signal": jnp.float32(2 * loss)}
        log.push(step, metrics(loss) | noise, STATS, waited=0.0)
        log.flush()
    first, spike = lines(tmp_path)
    assert spike["bad_steps"] == 1
    assert (spike["noise/variance"], spike["noise_scale"]) == (6e6, 3.0)
    assert log.noise.ratios() == {"noise_scale": first["noise_scale"]}


def test_bad_records_are_named_and_counted(log, tmp_path, capsys):
    log = log(start=0, num_steps=1, every=1, sources=("web", "ours"))
    bad = (("clip-7", "cut off"), ("clip-[9]", "empty"))
    stats = dataclasses.replace(STATS, bad=bad, sources={"web": Counts(9, 3, 1, 1)})
    log.push(1, metrics(1.0), stats, waited=0.0)
    log.flush()
    said = capsys.readouterr().out
    assert "bad record clip-7 left out at step 1: cut off" in said
    assert "bad record clip-[9] left out at step 1: empty" in said
    (line,) = lines(tmp_path)
    assert line["bad_records"] == 2
    assert [line[f"data/web/{what}"] for what in Counts._fields] == [9, 3, 1, 1]
    assert line["data/ours/seen"] == 0
    assert (line["fill_tokens"], line["fill_clips"]) == (0.5, 0.5)
    assert log.summary() == "samples: web 9 (3 trimmed, 1 dropped, 1 corrupt), ours 0"


def test_losses_by_dataset_and_modality_are_of_all_steps_since_the_last_line(log, tmp_path):
    """Groups 0 to 5: texts, images and videos of `web`, then of `ours`."""
    log = log(start=0, num_steps=4, every=2, sources=("web", "ours"))
    sums = np.zeros((4, 6, 2), np.float32)
    sums[0, 0], sums[1, 0], sums[1, 5] = (4.0, 2.0), (2.0, 1.0), (9.0, 3.0)
    sums[3, 1] = (5.0, 10.0)
    for step in range(4):
        log.push(step + 1, metrics(1.0) | {"by_group": jnp.asarray(sums[step])}, STATS, waited=0.0)
    log.flush()
    kinds = ("/dataset/", "/modality/")
    found = [
        {k: v for k, v in line.items() if any(kind in k for kind in kinds)}
        for line in lines(tmp_path)
    ]
    assert found[0] == {
        "loss/dataset/web": 2.0, "target_tokens/dataset/web": 3.0,
        "loss/dataset/ours": 3.0, "target_tokens/dataset/ours": 3.0,
        "loss/modality/text": 2.0, "target_tokens/modality/text": 3.0,
        "loss/modality/video": 3.0, "target_tokens/modality/video": 3.0,
    }  # fmt: skip
    assert found[1]["loss/dataset/web"] == found[1]["loss/modality/image"] == 0.5
    assert "loss/dataset/ours" not in found[1]


def test_too_many_bad_records_stop(log):
    log = log(start=0, num_steps=9, every=2, sources=("web",), max_bad_share=0.1)
    stats = dataclasses.replace(
        STATS, bad=(("a", "cut off"),) * 5, sources={"web": Counts(6, 0, 2, 3)}
    )
    log.push(1, metrics(1.0), stats, waited=0.0)
    log.push(2, metrics(1.0), stats, waited=0.0)
    with pytest.raises(ValueError, match=r"10 of 12 samples .*=0\.1; the latest:\na: cut off"):
        log.flush()


def test_a_resumed_run_writes_its_steps_again(log, tmp_path):
    whole = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3, 4)]
    (tmp_path / METRICS).write_text("".join(whole) + '{"step": 5, "lo')
    resumed = log(start=2, num_steps=4, every=1)
    for step in (3, 4):
        resumed.push(step, metrics(0.5), STATS, waited=0.0)
    resumed.flush()
    found = [(line["step"], line["loss"]) for line in lines(tmp_path)]
    assert found == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5)]


def test_nothing_to_forget(tmp_path):
    forget_after(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()
