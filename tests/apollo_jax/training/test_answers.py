# SPDX-License-Identifier: Apache-2.0
"""Held-out samples are answered by the weights of the state and shown beside the reference."""

import json

import jax
import pytest

from apollo_jax import sharding
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import answers, stages, state
from apollo_jax.training.boards import Boards


@pytest.fixture
def asked(experiment, tmp_path):
    """The folder after two evaluations of random weights."""
    e = experiment({"evaluation.samples": "2"})
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    trained = stages.trained_components(e.optimizer.learning_rates)
    boards = Boards(tmp_path)
    with jax.set_mesh(mesh):
        _, shapes = state.abstract_model(e.model, e.train, trained, mesh)
        weights = state.random_weights(e.model, e.train, shapes, seed=0)
        now = state.TrainState(0, *state.split(weights, trained), ())
        opened = answers.open_answers(e, tmp_path, mesh, start=0)
        assert opened is not None
        for step in (4, 8):
            opened.write(step, now, boards)
    assert not any(array.is_deleted() for array in weights.values())
    boards.close()
    return tmp_path


def test_they_stand_beside_the_reference(asked):
    rows = list(map(json.loads, (asked / "samples.jsonl").read_text().splitlines()))
    found = [(row["step"], row["source"], row["id"], row["reference"]) for row in rows]
    assert found == [(step, "held out", "v0", "Level 0.") for step in (4, 8)]
    assert "How bright?" in rows[0]["asked"]
    assert "Level" not in rows[0]["asked"], "the answer is not in the prompt"
    assert rows[0]["answer"] == rows[1]["answer"], "greedy: the same weights say the same"
    page = (asked / "samples.html").read_text()
    assert "data:image/jpeg" in page
    assert page.index("step 8") < page.index("step 4")
    files = [path.read_bytes() for path in (asked / "tensorboard").iterdir()]
    assert any(b"samples/0" in file for file in files)


def test_an_answer_may_hold_other_line_separators(experiment, tmp_path, monkeypatch):
    e = experiment({"evaluation.samples": "1"})
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    opened = answers.open_answers(e, tmp_path, mesh, start=0)
    assert opened is not None
    monkeypatch.setattr(opened, "_ask", lambda model: ["one\u2028two\x85three"])
    monkeypatch.setattr(answers, "merge", lambda *_: None)
    for step in (4, 8):
        opened.write(step, state.TrainState(0, {}, {}, ()), Boards(tmp_path, primary=False))
    assert (tmp_path / "samples.html").read_text().count("one\u2028two\x85three") == 2


def test_none_are_asked_for_by_default(experiment, tmp_path):
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    assert answers.open_answers(experiment(), tmp_path, mesh, start=0) is None
