# SPDX-License-Identifier: Apache-2.0
"""Experiments survive ConfigDict and JSON; wrong fields and values are named with what is known."""

import dataclasses
import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest

from apollo_jax import config
from apollo_jax.config import Experiment, to_config
from apollo_jax.config_ranges import RANGES
from apollo_jax.config_values import differences, from_dict, leaves, parse_overrides
from apollo_jax.training import contrastive

TINY = str(Path(__file__).parent / "training" / "tiny.py")
PAIRS = str(Path(__file__).parent / "training" / "pairs.py")


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
        ("--config.train.loss_skip_below=1e-3", "needs config.train.loss_cut=vocabulary"),
        ("--config.train.batch_ramp=0:1,5000", "takes 2: '5000' (text: 0:1, in a list 0:1,1000:2)"),
        ("--confg.seed=3", "unknown argument '--confg.seed'"),
        ("--config.seed", "has no value"),
    ],
)
def test_wrong_overrides_are_named(argument: str, said: str):
    with pytest.raises(ValueError, match="config") as error:
        load(argument)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("data.batch_size=0", "0, must be at least 1"),
        ("train.num_steps=0", "0, must be at least 1"),
        ("train.log_every=0", "0, must be at least 1"),
        ("train.keep=0", "0, must be at least 1"),
        ("train.loss_chunk=-7", "-7, must be at least 0"),
        ("train.spike_factor=0.5", "0.5, must be exactly 0 or above 1"),
        ("optimizer.clip_norm=-1", "-1.0, must be at least 0"),
        ("optimizer.warmup_ratio=1.5", "1.5, must be at least 0 and at most 1"),
        ("optimizer.b1=-0.5", "-0.5, must be at least 0 and below 1"),
        ("optimizer.weight_decay=-0.1", "-0.1, must be at least 0"),
        ("optimizer.decay_by_role.head=-1", "-1.0, must be at least 0"),
        ("optimizer.rate_by_role.norm=nan", "nan, must be at least 0"),
        ("optimizer.lion.b2=1", "1.0, must be at least 0 and below 1"),
        ("optimizer.apollo.rank=0", "0, must be at least 1"),
        ("optimizer.apollo_mini.every=0", "0, must be at least 1"),
    ],
)
@pytest.mark.parametrize(("of", "file"), [(config, TINY), (contrastive, PAIRS)])
def test_numbers_are_refused_with_the_range_they_may_have(of: Any, file, argument, said):
    overrides = parse_overrides([f"--config.{argument}"])
    with pytest.raises(ValueError, match="does not fit together") as error:
        of.load(f"{file}:folder", overrides)
    assert f"config.{argument.partition('=')[0]} is {said}" in str(error.value).split("\n  ")


@pytest.mark.parametrize("rate", ["-1.0", "nan", "inf"])
def test_a_rate_is_a_number_from_0_on(rate: str):
    with pytest.raises(ValueError, match="does not fit together") as error:
        load(f"--config.optimizer.learning_rates.llm={rate}", "--config.train.lora.llm.rank=2")
    _, *said = str(error.value).split("\n  ")
    assert said == [f"config.optimizer.learning_rates.llm is {rate}, must be at least 0"]


def test_every_range_is_of_a_field():
    runs = load(), contrastive.load(f"{PAIRS}:folder")
    fields = {name for run in runs for name in leaves(dataclasses.asdict(run))}
    for pattern in RANGES:
        assert fnmatch.filter(fields, pattern), pattern


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
