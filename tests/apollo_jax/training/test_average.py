# SPDX-License-Identifier: Apache-2.0
"""The moving average of what trains: its formula, its places, and a run that keeps it."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apollo_jax import sharding
from apollo_jax.checkpoints import convert
from apollo_jax.checkpoints.orbax_arrays import OrbaxArrays
from apollo_jax.config import LearningRates
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import state, step, train
from apollo_jax.training.average import AverageState, averaged, with_average

DECAY = 0.75


def test_the_formula_in_float32():
    sgd = optax.sgd(1.0)
    assert with_average(sgd, 0.0) is sgd
    tx = with_average(sgd, DECAY)
    params: Any = {"llm/a": jnp.array([1.0, 2.0], jnp.bfloat16)}
    expected = np.array([1.0, 2.0])
    opt_state: Any = tx.init(params)
    assert opt_state[-1].ema["llm/a"].dtype == jnp.float32
    for grad in (0.5, -0.25):
        updates, opt_state = tx.update(
            {"llm/a": jnp.full(2, grad, jnp.bfloat16)}, opt_state, params
        )
        params = dict(optax.apply_updates(params, updates))  # pyright: ignore
        expected = DECAY * expected + (1 - DECAY) * np.asarray(params["llm/a"], np.float64)
    np.testing.assert_allclose(opt_state[-1].ema["llm/a"], expected, rtol=1e-6)
    now = averaged(state.TrainState(0, params, {}, opt_state))
    assert now.params["llm/a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        now.params["llm/a"], opt_state[-1].ema["llm/a"].astype("bfloat16")
    )


@pytest.mark.parametrize("offload", [False, True])
def test_it_lies_where_the_parameters_lie(experiment, offload):
    """Or, with the other moments, in the host's memory; the plan counts moments by these shapes."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    fields = {"train.offload_optimizer": str(offload), "optimizer.learning_rates.llm": "0"}
    without = step.build(experiment(fields), mesh).abstract
    abstract = step.build(experiment(fields | {"train.ema_decay": "0.9"}), mesh).abstract
    average: Any = abstract.opt_state[-1]  # pyright: ignore[reportIndexIssue]
    assert isinstance(average, AverageState)
    assert average.ema.keys() == abstract.params.keys() == without.params.keys()
    for name, param in abstract.params.items():
        kind = state.HOST if offload else param.sharding.memory_kind
        assert average.ema[name].sharding == param.sharding.with_memory_kind(kind)
        assert average.ema[name].shape == param.shape
    leaves = (len(jax.tree.leaves(s.opt_state)) for s in (abstract, without))
    assert next(leaves) - next(leaves) == len(abstract.params)


@pytest.fixture(scope="module")
def arguments(command, world, tmp_path_factory):
    """arguments(workdir): four steps of the decoder on text, each of them saved."""
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
    text.write_text("".join(line for line in lines if '"video"' not in line))
    more = ("data.clips=0", f"data.sources.all.path={text}", "train.num_steps=4",
            "train.checkpoint_every=1", "data.length=96", f"train.ema_decay={DECAY}",
            "evaluation.every=2", f"evaluation.sources.held_out.path={text}")  # fmt: skip
    flags = [f"--config.{field}" for field in more]
    return lambda workdir: command(workdir, LearningRates(llm=1e-2), *flags)


@pytest.fixture(scope="module")
def folder(arguments, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("average") / "run"
    train.main(arguments(folder))
    return folder


@pytest.fixture(scope="module")
def averages(stored_moments):
    """averages(folder, step): by the names of the parameters."""

    def averages(folder: Path, step: int) -> dict[str, np.ndarray]:
        kept = stored_moments(folder, step)
        return {k.partition(".ema.")[2]: a for k, a in kept.items() if ".ema." in k}

    return averages


def test_a_run_averages_its_parameters(folder, averages):
    expected = averages(folder, 1)
    for i in range(2, 5):
        weights = OrbaxArrays(folder / f"checkpoints/{i:08d}/weights")
        assert set(expected) == {name for name in weights.stored if name.startswith("llm/")}
        expected = {n: DECAY * e + (1 - DECAY) * weights.read(n) for n, e in expected.items()}
    for name, found in averages(folder, 4).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-6)


def test_both_are_evaluated(folder):
    lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    losses = [(line["eval/loss"], line["eval/ema/loss"]) for line in lines if "eval/loss" in line]
    assert len(losses) == 2
    assert all(now < average for now, average in losses)  # it lags behind, and the loss falls


def test_interrupted_it_continues_bit_for_bit(folder, arguments, stored_moments, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    for step_ in (3, 4):
        shutil.rmtree(copy / f"checkpoints/{step_:08d}")
    train.main(arguments(copy))
    first, again = stored_moments(folder, 4), stored_moments(copy, 4)
    assert any(".ema." in key for key in first)
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[key], again[key]) for key in first)


def test_the_average_is_exported(folder, stored_weights, averages, tmp_path):
    convert.main([str(folder), str(tmp_path / "ema"), "--to", "orbax", "--key", "ema"])
    exported = OrbaxArrays(tmp_path / "ema" / "weights")
    kept = averages(folder, 4)
    trained = stored_weights(folder)
    assert set(exported.stored) == set(trained)
    for name, value in trained.items():
        expected = {**trained, **kept}[name]
        assert np.array_equal(exported.read(name), expected)
        assert np.array_equal(expected, value) == (name not in kept)


def test_what_a_run_does_not_have(folder, tmp_path):
    with pytest.raises(ValueError, match="--key averages: of a run there is only ema"):
        convert.main([str(folder), str(tmp_path / "out"), "--key", "averages"])
    copy = shutil.copytree(folder, tmp_path / "copy")
    said = json.loads((copy / "config.json").read_text())
    said["train"]["ema_decay"] = 0.0
    (copy / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"small was trained with train\.ema_decay=0"):
        convert.main([str(copy), str(tmp_path / "out"), "--key", "ema"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"train.ema_decay": "1"}, "must be at least 0 and below 1"),
        (
            {"train.ema_decay": "0.9", "optimizer.name": "schedule_free"},
            r"schedule_free averages by itself: config\.train\.ema_decay must be 0, is 0\.9",
        ),
    ],
)
def test_wrong_decays_are_named(experiment, overrides, said):
    with pytest.raises(ValueError, match=said):
        experiment(overrides)
