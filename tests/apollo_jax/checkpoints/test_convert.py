# SPDX-License-Identifier: Apache-2.0
"""A run that began from a published folder goes back to it, with all that the model never used."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from apollo_jax.checkpoints import convert
from apollo_jax.checkpoints.manager import Checkpoints, write_run
from apollo_jax.checkpoints.run import read_experiment
from apollo_jax.config import Experiment, TrainConfig
from apollo_jax.training.state import TrainState, flatten
from data_pipeline.loader import DataConfig, SourceConfig
from data_pipeline.tokenizer import Tokenizer


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_untrained_run(workdir: Path, model, init_from: Path) -> None:
    config, tokenizer = model.config, Tokenizer.from_path(init_from)
    data = DataConfig(
        sources={"all": SourceConfig("train.jsonl")},
        frames=(),
        tokenizer=str(init_from),
        batch_size=1,
        length=64,
        clips=1,
        frame_size=config.frame_size,
        tokens_per_clip=config.connector.num_output_tokens,
    )
    experiment = Experiment(
        "tiny", config, data, TrainConfig(num_steps=1), init_from=str(init_from)
    )
    weights = {name: leaf[...] for name, leaf in flatten(nnx.state(model, nnx.Param)).items()}
    checkpoints = Checkpoints(workdir)
    state = TrainState(jnp.int32(1), weights, {}, (optax.EmptyState(),))
    checkpoints.save(1, state, {})
    checkpoints.close()
    write_run(workdir, experiment, tokenizer)


def test_a_run_goes_back_to_the_folder_it_began_from(tiny, model, tmp_path):
    official = tiny / "checkpoint"
    write_untrained_run(tmp_path / "first", model, official)
    write_untrained_run(tmp_path / "second", model, official)
    experiment = dataclasses.replace(
        read_experiment(tmp_path / "second"),
        init_from=str(tmp_path / "first"),
    )
    write_run(tmp_path / "second", experiment, Tokenizer.from_path(official))

    convert.main([str(tmp_path / "second"), str(tmp_path / "out")])
    assert files(tmp_path / "out") == files(official)


def test_a_missing_beginning_is_said(tiny, model, tmp_path):
    write_untrained_run(tmp_path / "run", model, tiny / "checkpoint")
    config = tmp_path / "run/config.json"
    config.write_text(config.read_text().replace(str(tiny), str(tmp_path / "gone")))
    with pytest.warns(UserWarning, match="gone.*zeros"):
        convert.main([str(tmp_path / "run"), str(tmp_path / "out")])


def test_an_existing_target_is_kept(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="out exists"):
        convert.main([str(tiny / "checkpoint"), str(tmp_path / "out")])
