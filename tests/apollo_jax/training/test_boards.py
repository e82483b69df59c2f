# SPDX-License-Identifier: Apache-2.0
"""The same numbers go to every board; a resumed run writes its steps again."""

import json
import sys
import time
import types
from typing import Any

import numpy as np
import pytest

from apollo_jax.training.boards import (
    METRICS,
    Boards,
    evaluated,
    find_wandb,
    forget_after,
    open_boards,
    whole_lines,
)


class FakeRun:
    def __init__(self, **kwargs):
        self.kwargs, self.logged, self.finished = kwargs, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A package of that name; `runs` are those it started."""
    package: Any = types.ModuleType("wandb")
    package.runs = []

    def init(**kwargs):
        package.runs.append(FakeRun(**kwargs))
        return package.runs[-1]

    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_weights_and_biases_gets_the_scalars(tmp_path, wandb, experiment):
    assert find_wandb("") is None
    for _ in range(2):  # started, and continued
        boards = open_boards(experiment({"train.wandb": "apollo"}), tmp_path, 0)
        boards.write(3, {"loss": 1.5, "grad_norm": float("nan")})
        boards.close()
    first, second = wandb.runs
    assert first.logged == [(3, {"loss": 1.5})]
    assert first.finished
    assert first.kwargs == second.kwargs, "a continued run goes on in the same W&B run"
    assert (first.kwargs["project"], first.kwargs["name"]) == ("apollo", "tiny")
    assert first.kwargs["config"]["seed"] == 0


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb=apollo .* pip install wandb"):
        find_wandb("apollo")


def test_only_the_first_process_writes(tmp_path):
    boards = Boards(tmp_path, primary=False)
    boards.write(1, {"loss": 1.0})
    boards.show(1, "sample/0", np.zeros((2, 2, 3), np.uint8), "text")
    boards.close()
    assert not list(tmp_path.iterdir())


def test_a_line_that_was_cut_off_is_forgotten(tmp_path):
    whole = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / METRICS).write_text("".join(whole) + '{"step": 2, "lo')
    forget_after(tmp_path / METRICS, 2)
    assert (tmp_path / METRICS).read_text() == "".join(whole[:2])
    (tmp_path / "samples.jsonl").write_bytes(
        whole[0].encode() + '{"step": 2, "said": "é'.encode()[:-1]
    )
    forget_after(tmp_path / "samples.jsonl", 2)
    assert (tmp_path / "samples.jsonl").read_text() == whole[0]
    forget_after(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_what_is_said_may_hold_other_line_separators(tmp_path, separator):
    rows = [{"step": step, "answer": f"one{separator}two"} for step in (1, 2, 3)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_text(text)
    forget_after(tmp_path / "samples.jsonl", 2)
    assert list(map(json.loads, whole_lines(tmp_path / "samples.jsonl"))) == rows[:2]


def test_an_evaluation_is_found_by_its_step(tmp_path):
    assert not evaluated(tmp_path, 4)
    boards = Boards(tmp_path)
    boards.write(4, {"loss": 1.0})
    boards.write(4, {"eval/loss": 2.0})
    boards.write(8, {"loss": 1.0})
    boards.close()
    assert [evaluated(tmp_path, step) for step in (4, 8, 12)] == [True, False, False]


def test_tensorboard_is_not_far_behind(tmp_path):
    """A process that is killed closes nothing."""
    boards = Boards(tmp_path)
    for step in range(1, 9):
        boards.write(step, {f"loss/{step}": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    until = time.monotonic() + 60
    while b"loss/8" not in events.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    assert b"loss/8" in events.read_bytes()
    boards.close()
