# SPDX-License-Identifier: Apache-2.0
"""The hand-over of weights: from a run, a published folder, its parts; and what does not fit."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from apollo_jax import sharding
from apollo_jax.checkpoints import convert, manager
from apollo_jax.checkpoints.pretrained import config_from_pretrained
from apollo_jax.config import PartPaths
from apollo_jax.models import apollo
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import state, step
from apollo_jax.training.weights import initial_weights
from data_pipeline.tokenizer import Tokenizer, train_sentencepiece

PUBLISHED = Path(__file__).parents[2] / "fixtures" / "apollo-tiny-a" / "checkpoint"


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig())


def shapes_of(experiment, mesh):
    with jax.set_mesh(mesh):
        abstract = step.build(experiment, mesh).abstract
    return {**abstract.params, **abstract.frozen}


@pytest.fixture(scope="module")
def run(experiment, mesh, tmp_path_factory) -> Path:
    """The folder of a run with a checkpoint after step 5, all of it float32."""
    folder = tmp_path_factory.mktemp("earlier")
    e = experiment()
    program = step.build(e, mesh)
    shapes = {**program.abstract.params, **program.abstract.frozen}
    rng = np.random.default_rng(0)
    weights = {
        name: jax.device_put(rng.normal(size=s.shape).astype(s.dtype), s.sharding)
        for name, s in shapes.items()
    }
    manager.write_run(folder, e, Tokenizer.from_path(e.data.tokenizer))
    checkpoints = manager.Checkpoints(folder)
    checkpoints.save(5, state.create(weights, program.abstract, program.tx), {})
    checkpoints.close()
    return folder


def test_from_a_run(experiment, mesh, run):
    """The next stage trains other parts and keeps the frozen ones in bfloat16."""
    rates = {"optimizer.learning_rates.llm": "0", "train.frozen_dtype": "bfloat16"}
    e = experiment(rates | {"init_from": str(run)})
    shapes = shapes_of(e, mesh)
    weights, origin = initial_weights(e, shapes)
    assert origin == f"{run} (tiny) after step 5 of 8"
    stored = manager.Checkpoints(run, read_only=True).restore_weights(
        shapes_of(experiment(), mesh)
    )[1]
    assert set(weights) == set(stored)
    for name, value in weights.items():
        assert value.dtype == shapes[name].dtype
        assert value.sharding == shapes[name].sharding
        assert np.array_equal(value, stored[name].astype(value.dtype))


def test_a_run_of_another_model(experiment, run):
    e = experiment({"init_from": str(run), "model.llm.num_hidden_layers": "2"})
    with pytest.raises(
        ValueError, match=r"is not the one in config\.model:\n  llm\.num_hidden_layers: 3 -> 2"
    ):
        initial_weights(e, {})


def test_a_run_with_another_tokenizer(experiment, run, tmp_path):
    train_sentencepiece(["other words"], tmp_path / "other.model", 300)
    e = experiment({"init_from": str(run), "data.tokenizer": str(tmp_path / "other.model")})
    with pytest.raises(
        ValueError,
        match=r"was trained with another tokenizer .* and \d+ tokens, \d+ of them only in one",
    ):
        initial_weights(e, {})


def test_a_run_that_lacks_weights(experiment, mesh, run):
    e = experiment({"init_from": str(run)})
    shapes = shapes_of(e, mesh)
    name, like = next(iter(shapes.items()))
    wrong = shapes | {"llm/extra": like, name: jax.ShapeDtypeStruct((1, 2), like.dtype)}
    del wrong["connector/resampler/latents"]
    with pytest.raises(ValueError, match="do not fit this model") as error:
        initial_weights(e, wrong)
    assert f"missing llm/extra {like.shape}" in str(error.value)
    assert f"{name} is {like.shape}, must be (1, 2)" in str(error.value)
    assert "unexpected connector/resampler/latents" in str(error.value)


def test_a_run_without_checkpoints(experiment, mesh, run, tmp_path):
    empty = shutil.copytree(run, tmp_path / "empty")
    shutil.rmtree(empty / "checkpoints" / "00000005")
    e = experiment({"init_from": str(empty)})
    with pytest.raises(FileNotFoundError, match="holds no finished checkpoint"):
        initial_weights(e, shapes_of(e, mesh))


def test_a_path_that_holds_nothing(experiment):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        initial_weights(experiment({"init_from": "nowhere"}), {})


@pytest.fixture
def published(experiment):
    """The tiny experiment with the model of the published fixture."""
    model = config_from_pretrained(PUBLISHED)
    assert isinstance(model, apollo.Config)
    e = experiment()
    data = dataclasses.replace(
        e.data,
        frame_size=model.frame_size,
        tokens_per_clip=model.connector.num_output_tokens,
        clip_duration=model.clip_duration,
        frames_per_clip=model.frames_per_clip,
        tokenizer=str(PUBLISHED),
    )
    return dataclasses.replace(e, model=model, data=data)


def test_from_a_published_folder_and_from_its_parts(published, mesh):
    shapes = shapes_of(published, mesh)
    whole, _ = initial_weights(dataclasses.replace(published, init_from=str(PUBLISHED)), shapes)
    towers = {name: str(PUBLISHED / "vision_tower" / name) for name in published.model.towers}
    parts = PartPaths(towers=towers, llm=str(PUBLISHED / "llm"))
    mixed, origin = initial_weights(dataclasses.replace(published, init_parts=parts), shapes)
    assert origin.startswith("random, vision_tower/towers/0/ from ")
    for name, value in whole.items():
        fresh = state.component_of(name) == "connector"
        assert value.sharding == mixed[name].sharding == shapes[name].sharding
        assert fresh or np.array_equal(value, mixed[name])
    assert not np.array_equal(
        whole["connector/resampler/layers/q/kernel"], mixed["connector/resampler/layers/q/kernel"]
    )


def test_wrong_parts(published, experiment):
    llm = str(PUBLISHED / "llm")
    wrong = {
        r"names \['dino'\]; the model has ": PartPaths(towers={"dino": llm}),
        "holds qwen2 but connectors is wanted": PartPaths(connector=llm),
    }
    for said, parts in wrong.items():
        with pytest.raises(ValueError, match=said):
            initial_weights(dataclasses.replace(published, init_parts=parts), {})
    with pytest.raises(ValueError, match=r"is not a whole Apollo; use config\.init_parts"):
        initial_weights(dataclasses.replace(published, init_from=llm), {})
    with pytest.raises(ValueError, match=r"is not the one in config\.model:\n  towers"):
        initial_weights(experiment({"init_from": str(PUBLISHED)}), {})
    both = dataclasses.replace(published, init_from=llm, init_parts=PartPaths(llm=llm))
    with pytest.raises(ValueError, match=r"clear it or config\.init_parts"):
        initial_weights(both, {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The published fixture as `convert --to orbax` writes it, and its decoder alone."""
    folder = tmp_path_factory.mktemp("exported")
    convert.main(["--to", "orbax", str(PUBLISHED), str(folder / "whole")])
    convert.main(["--to", "orbax", str(PUBLISHED / "llm"), str(folder / "llm")])
    return folder


def test_published_folders_of_another_tokenizer(published, mesh, exported, world, tmp_path):
    """Also as Orbax's export, which is how averages are handed over."""
    other = dataclasses.replace(published.data, tokenizer=f"{world}/tokenizer.model")
    for whole in (PUBLISHED, exported / "whole"):
        e = dataclasses.replace(published, init_from=str(whole))
        initial_weights(e, shapes_of(e, mesh))
        said = r"config\.init_from .* another tokenizer than .*tokenizer\.model: 404 and \d+ tokens"
        with pytest.raises(ValueError, match=said) as error:
            initial_weights(dataclasses.replace(e, data=other), {})
        assert Tokenizer.from_path(str(error.value).rpartition("its own is ")[2])
    for llm in (PUBLISHED / "llm", exported / "llm"):
        e = dataclasses.replace(published, data=other, init_parts=PartPaths(llm=str(llm)))
        with pytest.raises(ValueError, match=r"config\.init_parts\.llm .* another tokenizer"):
            initial_weights(e, {})
    silent = shutil.copytree(PUBLISHED / "llm", tmp_path / "llm")  # holds no tokenizer
    for file in ("vocab.json", "merges.txt"):
        (silent / file).unlink()
    parts = PartPaths(llm=str(silent))
    e = dataclasses.replace(published, data=other, init_parts=parts)
    initial_weights(e, shapes_of(e, mesh))
