# SPDX-License-Identifier: Apache-2.0
"""The same numbers go to every board; a resumed run writes its steps again."""

import json
import sys
import types
from typing import Any

import numpy as np
import pytest

from apollo_jax.training.boards import METRICS, Boards, find_wandb, forget_after, open_boards


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
    forget_after(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()
