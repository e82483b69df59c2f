# SPDX-License-Identifier: Apache-2.0
"""Forks of a run: the same run but for their batch, done once; with what the run goes on."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from apollo_jax.__main__ import run as command
from apollo_jax.config import Experiment, LearningRates, load
from apollo_jax.training import critical_batch
from apollo_jax.training.optimizer import Batches, make_schedules
from apollo_jax.training.processes import AGAIN, STOPPED
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
        "loss": pytest.approx(twos[-1]["loss"], rel=1e-9),
        "blocks": [pytest.approx(twos[-1]["loss"], rel=1e-9)],
        "diverged": False,
    }
    assert (found["critical_rows"], found["at_least"]) == (16, True)
    ramp = {"train.batch_ramp": "0:1,2:2", "train.num_steps": "6"}
    assert found["continue_with"] == ramp | {"optimizer.schedule_by": "samples"}
    assert found["fit"]["rows"] is None
    said = " ".join(capsys.readouterr().out.split())
    assert "16 rows or more: no fork was too large" in said
    copy = f"the run has done its 10 updates; a copy of {begun} without the checkpoints after 2 may"
    flags_said = "--config.train.batch_ramp=0:1,2:2 --config.train.num_steps=6"
    assert f"{copy} go on with {flags_said}" in said
    assert "curve through all losses: not determined; it takes 4 forks" in said
    assert not list(tmp_path.rglob("checkpoints"))

    def again(*args):
        raise AssertionError("a fork that is done is not repeated")

    monkeypatch.setattr(critical_batch, "train", again)
    narrow = fork(begun, tmp_path, "--step", "2", f"--tokens={TOKENS}", "--tolerance=0")
    assert narrow["forks"] == found["forks"]
    assert narrow["critical_rows"] == (8 if mean < twos[-1]["loss"] else 16)
    with pytest.raises(ValueError, match=r"is of step 2, now 4: take another --output"):
        fork(begun, tmp_path, "--step", "4", f"--tokens={TOKENS}")
    with pytest.raises(ValueError, match=r"is of overrides {}, now {'data.threads': '1'}: take"):
        fork(begun, tmp_path, *flags, "--config.data.threads=1")
    with pytest.raises(ValueError, match=r"; window 8, now 12: take another --output"):
        fork(begun, tmp_path, "--step", "2", f"--tokens={12 * 8 * 96}", "--batches=1,3")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--step", "3"), "--step 3: .* has checkpoints of 2, 4, 6, 8, 10$"),
        (
            ("--step", "2", "--tokens", "768"),
            "4 updates of 2 microbatches, of which all batches are parts, need 6144",
        ),
        (("--step", "0"), "--step 0: .* has checkpoints of 2, 4, 6, 8, 10$"),
        (("--batches", "4"), "at least two numbers"),
        (("--batches", "1,2,x4"), "--batches 1,2,x4: 'x4' is no number of microbatches"),
        (("--batches", "0,1,2"), "'0' is no number of microbatches"),
        (("--batches", "1,-2,4"), "'-2' is no number of microbatches"),
        (("--tolerance", "nan"), "--tolerance nan: nats above the best loss, 0 or more"),
        (("--tolerance", "-1"), "--tolerance -1.0: nats"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(begun, tmp_path, flags, said):
    with pytest.raises(ValueError, match=said):
        fork(begun, tmp_path / "out", f"--tokens={TOKENS}", *flags)
    assert not (tmp_path / "out").exists()


def run_of(texts: Path, **fields: str) -> Experiment:
    return load(f"{SMALL}:{texts}", FIELDS | {k.replace("__", "."): v for k, v in fields.items()})


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_fork_that_diverges_is_too_large_and_done(begun, tmp_path, monkeypatch, capsys, policy):
    forked = critical_batch.forked

    def too_fast(e: Experiment, step: int, microbatches: int, *args) -> Experiment:
        fork = forked(e, step, microbatches, *args)
        rates = LearningRates(llm=1e30 if microbatches == 2 else 1e-3)
        return replace(fork, optimizer=replace(fork.optimizer, learning_rates=rates))

    monkeypatch.setattr(critical_batch, "forked", too_fast)
    flags = ("--step=2", f"--tokens={TOKENS}", f"--config.train.on_nonfinite={policy}")
    found = fork(begun, tmp_path, *flags)
    assert found["forks"]["2"] == {"microbatches": 2, "rows": 16, "updates": 4} | {
        "loss": None,
        "blocks": [],
        "diverged": True,
    }
    assert not found["forks"]["1"]["diverged"]
    assert (found["critical_rows"], found["at_least"]) == (8, False)
    assert "diverged" in capsys.readouterr().out.split("above the best")[1]
    assert not list(tmp_path.rglob("checkpoints"))
    monkeypatch.setattr(critical_batch, "train", None)  # it is not repeated
    assert fork(begun, tmp_path, *flags) == found


def test_only_the_guard_says_that_a_fork_diverged(begun, tmp_path, monkeypatch):
    def fails(e: Experiment, folder: Path):
        raise ValueError("the loss of step 3 is nan; its records: r3")

    monkeypatch.setattr(critical_batch, "train", fails)
    with pytest.raises(ValueError, match="step 3 is nan"):
        fork(begun, tmp_path, "--step=2", f"--tokens={TOKENS}")
    assert not (tmp_path / "critical_batch.json").exists()


# What a process of this command runs first: --config is what its company gives to all commands.
PROCESS = """
at = sys.argv.index("--config")
del sys.argv[at : at + 2]
"""
TOO_FAST = """
from dataclasses import replace
from apollo_jax.config import LearningRates
from apollo_jax.training import critical_batch
forked = critical_batch.forked
def too_fast(e, step, microbatches, *args):
    fork = forked(e, step, microbatches, *args)
    if microbatches != 2:
        return fork
    return replace(fork, optimizer=replace(fork.optimizer, learning_rates=LearningRates(llm=1e30)))
critical_batch.forked = too_fast
"""
FAILS = """
train = critical_batch.train
def fails(experiment, folder):
    if folder.name == "x4":
        raise OSError("its disk is gone")
    return train(experiment, folder)
critical_batch.train = fails
"""


@pytest.fixture(scope="module")
def two(begun, company):
    """two(output, flags, .., own=(), first=("", "")): statuses and words of two processes."""

    def two(output: Path, *flags: str, own=(), first=("", "")) -> tuple[list[int], list[str]]:
        said = [f"--output={output}", "--step=2", f"--tokens={2 * TOKENS}", "--rule=none", *flags]
        before = {i: PROCESS + lines for i, lines in enumerate(first)}
        return company("", begun, 2, *said, command="critical-batch", own=own, first=before).end()

    return two


def test_two_processes_find_what_one_does_whatever_befalls_them(begun, two, tmp_path, monkeypatch):
    """A fork diverges and both go on; one fails in the next, and the other hears of it."""
    statuses, said = two(tmp_path / "two", "--batches=2,4", first=(TOO_FAST, TOO_FAST + FAILS))
    assert statuses == [AGAIN, 2], said
    for text in said:
        assert "its disk is gone" in text
    statuses, said = two(tmp_path / "two", "--batches=2,4")
    assert statuses == [0, 0], said
    assert "diverged" in said[0].split("above the best")[1]
    assert "above the best" not in said[1]
    assert not list(tmp_path.rglob("checkpoints"))
    flags = ("--step=2", f"--tokens={2 * TOKENS}", "--batches=2,4")
    expected = fork(begun, tmp_path / "one", *flags)["forks"]["4"]
    near = {name: pytest.approx(expected[name], rel=1e-5) for name in ("loss", "blocks")}
    monkeypatch.setattr(critical_batch, "train", None)  # they are not repeated
    found = fork(begun, tmp_path / "two", *flags)["forks"]
    assert found["2"]["diverged"]
    assert found["4"] == expected | near


STOPPED_BETWEEN = """
import os, signal, time
from apollo_jax.training import critical_batch
meet, calls = critical_batch.meet, []
def waits():
    calls.append(1)
    if len(calls) == 3:  # the first fork is closed, and its result is kept
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(300)
    meet()
critical_batch.meet = waits
"""


def test_told_to_stop_between_two_forks_all_end(two, tmp_path):
    statuses, said = two(tmp_path / "two", "--batches=1,2", first=("", STOPPED_BETWEEN))
    assert statuses == [STOPPED, STOPPED], said
    for i, text in enumerate(said):
        assert f"process {i} stops on a signal; there is nothing to save" in text
    held = json.loads((tmp_path / "two/critical_batch.json").read_text())
    assert list(held["forks"]) == ["1"]


def test_processes_with_other_flags_are_refused(two, tmp_path):
    out = tmp_path / "out"
    other = ["--tolerance=1", f"--output={tmp_path / 'elsewhere'}"]
    statuses, said = two(out, "--batches=1,2", own=[[], other])
    assert statuses == [2, 2], said
    for text in said:
        assert "process 1 (" in text
        assert f"output is '{tmp_path / 'elsewhere'}', process 0 has '{out}'" in text
        assert "tolerance is 1.0, process 0 has 0.01" in text
    assert not list(tmp_path.iterdir())


def test_forks_leave_out_what_is_of_the_run_alone(texts):
    own = dict(evaluation__every="2", evaluation__samples="1", train__profile="1:2")
    e = run_of(texts, **own, train__wandb="mine")
    one = critical_batch.forked(e, 8, 2, 8, "none")
    assert (one.evaluation.every, one.evaluation.samples) == (0, 0)
    assert (one.train.profile, one.train.wandb) == ("", "")


def test_the_last_part_of_the_window_is_the_same_rows_for_all_forks(texts):
    e, batches = run_of(texts), [1, 2, 3, 8]
    window = critical_batch.window_of(e, batches, 250 * 8 * 96)
    assert window == 192
    for b in batches:
        updates = critical_batch.forked(e, 8, b, window, "none").train.num_steps - 8
        assert updates // critical_batch.TAIL * b == window // critical_batch.TAIL


def test_forks_take_the_rule_that_the_run_keeps(texts):
    def rule(asked: str | None, own: str) -> str:
        fields = {"optimizer__rate_rule": own, "optimizer__base_batch": "8"}
        return critical_batch.rule_of(run_of(texts, **(fields if own != "none" else {})), asked)

    assert [rule(None, "none"), rule("linear", "none"), rule("none", "none")] == [
        "sqrt",
        "linear",
        "none",
    ]
    assert rule(None, "linear") == rule("linear", "linear") == "linear"
    for asked in ("sqrt", "none"):
        with pytest.raises(ValueError, match=rf"--rule {asked}: .*rate_rule, linear, .* leave"):
            rule(asked, "linear")


def test_where_no_samples_are_left_the_number_of_steps_is_left_open(texts):
    fields = critical_batch.continuation(
        run_of(texts), critical_batch.forked(run_of(texts), 10, 2, 8, "sqrt").optimizer, 10, 2
    )
    assert fields["train.batch_ramp"] == "0:1,10:2"
    assert "train.num_steps" not in fields


def schedule(e: Experiment):
    batches = Batches(e.data.batch_size, e.train.ramp)
    return make_schedules(e.optimizer, e.train.num_steps, batches)["llm"]


def test_the_run_goes_on_at_the_rates_of_the_fork_along_the_schedule_that_it_had(texts):
    own = {"optimizer__schedule": "cosine", "train__accumulate": "2", "train__num_steps": "100"}
    e = run_of(texts, **own)
    fork = critical_batch.forked(e, 40, 8, 64, "sqrt")
    fields = critical_batch.continuation(e, fork.optimizer, 40, 8)
    assert fields == {
        "train.batch_ramp": "0:2,40:8",
        "train.num_steps": "55",  # 15 of 8 in place of 60 of 2
        "train.accumulate": "1",
        "optimizer.schedule_by": "samples",
        "optimizer.rate_rule": "sqrt",
        "optimizer.base_batch": "16",
    }
    new = run_of(texts, **own | {k.replace(".", "__"): v for k, v in fields.items()})
    old_rate, rate, fork_rate = schedule(e), schedule(new), schedule(fork)
    assert rate(jnp.int32(40)) == pytest.approx(float(fork_rate(jnp.int32(40))), rel=1e-6)
    for before in (5, 20, 39):
        assert rate(jnp.int32(before)) == pytest.approx(float(old_rate(jnp.int32(before))))
    for k in (0, 5, 14):
        same_samples = 2 * float(old_rate(jnp.int32(40 + 4 * k)))
        assert rate(jnp.int32(40 + k)) == pytest.approx(same_samples, rel=1e-6)
    odd = critical_batch.continuation(e, fork.optimizer, 39, 8)
    assert odd["train.num_steps"] == "55"  # no less than the samples, and less than an update more


def test_the_run_takes_what_it_is_told_to_go_on_with(texts, begun, as_after, tmp_path):
    copy = as_after(begun, 4, tmp_path / "run")
    e = run_of(texts)
    optimizer = critical_batch.forked(e, 4, 2, 8, "sqrt").optimizer
    fields = critical_batch.continuation(e, optimizer, 4, 2)
    assert (fields["train.batch_ramp"], fields["train.num_steps"]) == ("0:1,4:2", "7")
    with pytest.raises(ValueError, match=r"num_steps=3: .*run has done 4 already"):
        train(run_of(texts, train__num_steps="3"), copy)
    assert train(load(f"{SMALL}:{texts}", FIELDS | fields), copy)
    whole, found = lines(begun), lines(copy)
    assert [x["step"] for x in found] == [1, 2, 3, 4, 5, 6, 7]
    assert found[:4] == whole[:4]
    tokens = [sum(x["target_tokens"] for x in run) for run in (whole, found)]
    assert tokens[0] == tokens[1]


def ends(*losses: float | None) -> list[dict]:
    """Forks of 8, 16, .. rows with these losses."""
    return [
        dict(microbatches=2**i, rows=8 * 2**i, updates=1, loss=loss)
        | dict(blocks=[loss] * 4, diverged=loss is None)
        for i, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "critical", "at_least"),
    [
        ((2.00, 2.001, 2.005, 2.10), 32, False),
        ((2.10, 2.00, 2.02, 2.00), 16, False),  # what comes after one that is too large is chance
        ((2.00, 2.005, 2.009, 2.01), 64, True),
        ((2.00, 2.50, 2.50, 2.50), 8, False),
        ((2.00, 2.001, None, 2.001), 16, False),
        ((None, None, 2.001, 2.00), 64, True),
    ],
)
def test_the_critical_batch_is_the_last_before_the_loss_rises(losses, critical, at_least):
    found = critical_batch.summary(ends(*losses), 0.011)
    assert (found["critical_rows"], found["at_least"]) == (critical, at_least)
    assert found["critical_microbatches"] == critical // 8


def test_forks_that_all_diverged_have_none():
    with pytest.raises(ValueError, match="every fork diverged: lower"):
        critical_batch.summary(ends(None, None), 0.01)


def test_the_curve_stands_beside_it_without_the_forks_that_diverged(capsys):
    losses = 2.0 - 0.2 / (1 + 8.0 * 2.0 ** np.arange(5) / 50.0)
    forks = ends(*losses.tolist(), None)
    forks[0]["blocks"] *= 2  # of an earlier command, whose batches had a smaller multiple
    found = critical_batch.summary(forks, 0.011)
    assert found["critical_rows"] == 8
    assert found["fit"]["rows"] == pytest.approx(50.0, rel=0.01)
    critical_batch.report(forks, found, {"train.num_steps": "9"})
    said = " ".join(capsys.readouterr().out.split())
    assert f"curve through all losses: {found['fit']['rows']:g} rows (" in said
