# SPDX-License-Identifier: Apache-2.0
"""Stage after stage as a user runs them: each starts from the one before, which lies beside it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from apollo_jax.checkpoints import run
from apollo_jax.config import LearningRates
from apollo_jax.training import train
from apollo_jax.training.stages import trained_components
from apollo_jax.training.state import component_of
from data_pipeline.tokenizer import train_sentencepiece

RATES = {  # Table 7's freezing
    "align": LearningRates(connector=1e-2),
    "vision": LearningRates(vision_tower=1e-3, connector=1e-2),
    "sft": LearningRates(connector=1e-2, llm=1e-3),
}


def stage(name: str, before: str) -> list[str]:
    """What a recipe says of its stages."""
    start = [f"--config.init_from=run:small-{before}"] if before else []
    return [f"--config.name=small-{name}", *start]


@pytest.fixture(scope="module")
def runs(command, tmp_path_factory) -> Path:
    """The folder with the three stages' runs."""
    folder = tmp_path_factory.mktemp("runs")
    for name, before in zip(RATES, ("", *RATES), strict=False):
        train.main(command(folder / name, RATES[name], *stage(name, before)))
    return folder


def test_a_stage_has_what_the_one_before_left(runs, stored_weights):
    for before, after in (("align", "vision"), ("vision", "sft")):
        trained = trained_components(RATES[after])
        was, now = stored_weights(runs / before), stored_weights(runs / after)
        assert was.keys() == now.keys()
        for name in was:
            moved = not np.array_equal(was[name], now[name])
            assert moved == (component_of(name) in trained), name
        assert run.read_experiment(runs / after).init_from == str(runs / before)


def test_moments_norm_and_clip_are_of_what_trains(runs, stored_weights, check_moments):
    for name, rates in RATES.items():
        trained = trained_components(rates)
        everything = stored_weights(runs / name)
        check_moments(runs / name, {n for n in everything if component_of(n) in trained})


def test_the_same_command_continues_whatever_lies_there_now(
    runs, command, stored_weights, tmp_path, capsys
):
    copy = shutil.copytree(runs / "sft", tmp_path / "sft")
    for saved in (copy / "checkpoints").iterdir():  # stopped before its first one
        shutil.rmtree(saved)
    train.main(command(copy, RATES["sft"], *stage("sft", "vision")))
    assert f"{runs / 'vision'} (small-vision) after step 2 of 2" in capsys.readouterr().out
    again, first = stored_weights(copy), stored_weights(runs / "sft")
    assert all(np.array_equal(again[name], first[name]) for name in first)


@pytest.fixture
def refused(command, tmp_path, monkeypatch):
    """refused(match, *more): `:sft` beside tmp_path/vision ends with that error, not compiled."""

    def compiled(*_: object, **__: object):
        raise AssertionError("it got as far as the loop")

    def refused(match: str, *more: str, error: type[Exception] = ValueError) -> None:
        monkeypatch.setattr(train, "loop", compiled)
        with pytest.raises(error, match=match):
            train.main(command(tmp_path / "sft", RATES["sft"], *stage("sft", "vision"), *more))
        assert not (tmp_path / "sft").exists()

    return refused


def test_nothing_to_start_from(runs, refused, tmp_path):
    refused(
        "small-sft starts from a finished run of small-vision .* has\n  no run at all\ntrain or "
        "finish that one first, or name one with --config.init_from=PATH",
        error=FileNotFoundError,
    )
    shutil.copytree(runs / "align", tmp_path / "align")
    unfinished = shutil.copytree(runs / "vision", tmp_path / "vision")
    said = json.loads((unfinished / "config.json").read_text())
    said["train"]["num_steps"] = 3
    (unfinished / "config.json").write_text(json.dumps(said))
    refused(
        "align: small-align, 2 of 2 steps\n  .*vision: small-vision, 2 of 3 steps\n",
        error=FileNotFoundError,
    )


def test_two_to_start_from(runs, refused, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(runs / "vision", tmp_path / name)
    refused(r"could be .*one, .*two; name one with --config\.init_from=PATH")


def test_another_model_or_tokenizer(runs, refused, tmp_path):
    shutil.copytree(runs / "vision", tmp_path / "vision")
    refused(
        r"is not the one in config\.model:\n  llm\.intermediate_size: 192 -> 64",
        "--config.model.llm.intermediate_size=64",
    )
    train_sentencepiece(["other words"], tmp_path / "other.model", 300)
    refused(
        r"another tokenizer than .*other\.model: \d+ and \d+ tokens, \d+ of them only in one",
        f"--config.data.tokenizer={tmp_path / 'other.model'}",
    )


def test_a_run_whose_last_checkpoint_is_damaged(runs, refused, tmp_path):
    """What it has before that is not what it ended with, whether found by name or by path."""
    copy = shutil.copytree(runs / "vision", tmp_path / "vision")
    said = json.loads((copy / "config.json").read_text())
    said["train"]["num_steps"] = 3
    (copy / "config.json").write_text(json.dumps(said))
    last = shutil.copytree(copy / "checkpoints" / "00000002", copy / "checkpoints" / "00000003")
    for file in last.glob("weights/ocdbt.process_0/d/*"):
        os.truncate(file, file.stat().st_size // 2)
    wrong = r"of step 3 is damaged, and the one of step 2 of 3 is not .*or,.* move .*00000003 away"
    refused(rf"vision \(small-vision\): its checkpoint {wrong}")
    refused(rf"vision \(small-vision\): its checkpoint {wrong}", f"--config.init_from={copy}")


def test_a_part_is_missing(runs, refused, tmp_path, monkeypatch):
    """A checkpoint whose weights are not those that its config speaks of."""
    shutil.copytree(runs / "vision", tmp_path / "vision")
    stored = train.manager.Checkpoints.stored_shapes

    def lacking(self):
        return {n: s for n, s in stored(self).items() if not n.startswith("connector/")}

    monkeypatch.setattr(train.manager.Checkpoints, "stored_shapes", lacking)
    refused("do not fit this model:\n  missing connector/")
