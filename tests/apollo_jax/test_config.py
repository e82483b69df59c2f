# SPDX-License-Identifier: Apache-2.0
"""Experiments survive ConfigDict and JSON; wrong fields and values are named with what is known."""

import dataclasses
import json
from pathlib import Path

import pytest

from apollo_jax import config
from apollo_jax.config import Experiment, to_config
from apollo_jax.config_values import differences, from_dict, parse_overrides

TINY = str(Path(__file__).parent / "training" / "tiny.py")


def load(*overrides: str) -> Experiment:
    return config.load(f"{TINY}:folder", parse_overrides(overrides))


def test_survives_configdict_and_json():
    experiment = load()
    assert from_dict(Experiment, to_config(experiment).to_dict()) == experiment
    stored = json.loads(json.dumps(dataclasses.asdict(experiment)))
    assert from_dict(Experiment, stored) == experiment


def test_towers_keep_their_order():
    """ConfigDict sorts by default, but the order of towers is the order of channels."""
    experiment = load()
    towers = dict(reversed(experiment.model.towers.items()))
    turned = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, towers=towers)
    )
    for e in (experiment, turned):
        again = from_dict(Experiment, to_config(e).to_dict())
        assert list(again.model.towers) == list(e.model.towers)
    assert differences(experiment, turned)


def test_overrides_are_read_by_the_type_of_the_field():
    e = load(
        "--config.train.num_steps=7",
        "--config.optimizer.learning_rates.llm",
        "2e-5",
        "--config.data.frames=/a,/b",
        "--config.data.sources.all.path=3",
        "--config.model.llm.tie_word_embeddings=false",
        "--config.model.towers.siglip.image_mean=0.1,0.2,0.3",
    )
    assert e.train.num_steps == 7
    assert e.optimizer.learning_rates.llm == 2e-5
    assert e.data.frames == ("/a", "/b")
    assert e.data.sources["all"].path == "3"
    assert e.model.llm.tie_word_embeddings is False
    assert e.model.towers["siglip"].frame_spec.mean == (0.1, 0.2, 0.3)
    assert len(differences(load(), e)) == 6


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--config.train.num_stepz=7", "did you mean config.train.num_steps?"),
        ("--config.num_steps=7", "did you mean config.train.num_steps?"),
        ("--config.optimzer.clip_norm=7", "did you mean config.optimizer.clip_norm?"),
        ("--config.data.length=1.5", "config.data.length is '1.5', must be of type int"),
        ("--config.model.llm.tie_word_embeddings=maybe", "must be of type bool"),
        ("--config.train.dtype=float16", "known: 'float32', 'bfloat16'"),
        ("--config.optimizer=3", "is a group with the fields learning_rates, schedule"),
        ("--config.model.towers.siglip.kind=resnet", "known: siglip, internvideo2"),
        ("--config.model.towers.siglip.image_mean=1,2", "has 2 values, takes 3"),
        ("--config.data.frame_size=64", "config.data.frame_size is 64, the model takes 32"),
        ("--config.data.length=4096", "positions end at 1024"),
        ("--config.train.loss_chunk=-7", "config.train.loss_chunk is -7"),
        ("--config.train.loss_skip_below=1e-3", "needs config.train.loss_cut=vocabulary"),
        ("--config.optimizer.learning_rates.llm=-1", "negative is wrong"),
        ("--config.train.keep=0", "must be at least 1"),
        ("--confg.seed=3", "unknown argument '--confg.seed'"),
        ("--config.seed", "has no value"),
    ],
)
def test_wrong_overrides_are_named(argument: str, said: str):
    with pytest.raises(ValueError, match="config") as error:
        load(argument)
    assert said in str(error.value)


def test_evaluation_needs_sources():
    evaluation = config.EvalConfig(every=5)
    with pytest.raises(ValueError, match=r"config\.evaluation\.sources is empty"):
        dataclasses.replace(load(), evaluation=evaluation)


def test_stored_configs_are_checked_too():
    stored = dataclasses.asdict(load())
    stored["train"]["steps"] = 3
    with pytest.raises(ValueError, match=r"config\.train: steps is not a field; did you mean"):
        from_dict(Experiment, stored)
    del stored["train"]["steps"], stored["train"]["num_steps"]
    with pytest.raises(ValueError, match=r"config\.train lacks num_steps"):
        from_dict(Experiment, stored)
    stored["train"] = 3
    with pytest.raises(ValueError, match=r"config\.train is 3, must be a group"):
        from_dict(Experiment, stored)


def test_a_missing_file_names_its_neighbours():
    with pytest.raises(FileNotFoundError, match=r"tinny\.py does not exist; .* has tiny\.py"):
        config.load(TINY.replace("tiny.py", "tinny.py"))
