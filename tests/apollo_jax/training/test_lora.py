# SPDX-License-Identifier: Apache-2.0
"""Low-rank updates: what trains, that nothing else moves, and that exports hold them."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import apollo_jax
from apollo_jax import config, sharding
from apollo_jax.checkpoints import convert, opening, run
from apollo_jax.config import LearningRates
from apollo_jax.models import apollo
from apollo_jax.models.lora import LoraConfig, Updates
from apollo_jax.training import stages, state, step, train
from apollo_jax.training.weights import initial_weights

RATES = LearningRates(vision_tower=1e-2, connector=1e-2, llm=1e-2)
LORA = (
    "--config.train.lora.llm.rank=4",
    "--config.train.lora.vision_tower.rank=2",
    "--config.train.lora.vision_tower.targets=qkv,fc1",
    *("--config.train.remat=full", "--config.train.num_steps=4", "--config.train.ema_decay=0.5"),
    *(f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")),
)


@pytest.fixture(scope="module")
def folder(command, tmp_path_factory) -> Path:
    """A run of four steps from random weights: the connector trains, and updates."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    train.main(command(folder, RATES, *LORA))
    return folder


@pytest.fixture(scope="module")
def first(folder) -> dict[str, np.ndarray]:
    """The weights that it began with."""
    e = run.read_experiment(folder)
    return jax.device_get(state.random_weights(e.model, e.train, model_of(e)[1], e.seed))


def test_the_base_stays_and_the_updates_move(folder, first, stored_weights):
    now = stored_weights(folder)
    added = {name for name in now if "/lora/" in name}
    llm = ("q", "k", "v", "out", "gate", "up", "down")
    layers = [f"llm/layers/{linear}" for linear in llm]
    layers += [f"vision_tower/towers/0/layers/{linear}" for linear in ("qkv", "fc1")]
    assert added == {f"{layer}/lora/{part}" for layer in layers for part in "ab"}
    assert now.keys() == first.keys()
    for name, value in now.items():
        trains = name in added or state.component_of(name) == "connector"
        assert np.array_equal(value, first[name]) != trains, name


def test_moments_norm_and_clip_are_of_what_trains(folder, check_moments):
    e = run.read_experiment(folder)
    params, _ = state.split(model_of(e)[1], apollo.COMPONENTS)
    assert all("/lora/" in name or name.startswith("connector/") for name in params)
    check_moments(folder, set(params))


def test_they_are_cut_as_their_weights_are(folder, stored_weights):
    e = run.read_experiment(folder)
    abstract = step.build(e, sharding.make_mesh(e.mesh)).abstract
    own = {n for n in abstract.params if state.component_of(n) != "connector"}
    assert own == {n for n in stored_weights(folder) if "/lora/" in n}
    places = {name: s.sharding.spec for name, s in abstract.params.items()}
    assert places["llm/layers/q/lora/a"] == P(None, "fsdp", None)
    assert places["llm/layers/q/lora/b"] == P(None, None, "tensor")


def test_interrupted_it_continues_bit_for_bit(folder, command, stored_weights, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "00000004")
    train.main(command(copy, RATES, *LORA))
    first, again = stored_weights(folder), stored_weights(copy)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    lines = [(folder / "metrics.jsonl").read_text() for folder in (folder, copy)]
    assert len(lines[0].splitlines()) == len(lines[1].splitlines()) == 4


@pytest.fixture(scope="module")
def logits():
    """logits(model): of a few tokens and one clip."""

    @jax.jit
    def compute(graphdef, weights):
        model = state.merge(graphdef, weights)
        rng = np.random.default_rng(0)
        frames = jnp.asarray(rng.integers(0, 255, (1, 4, 32, 32, 3)), jnp.uint8)
        visual = model.encode_clips(frames, jnp.array([[0, 0, 32, 32]]))
        tokens = jnp.asarray(rng.integers(0, 300, (1, 12)))
        return model(tokens, visual_tokens=visual, visual_index=jnp.arange(12)[None] - 4)

    return compute


def model_of(e: config.Experiment, **changes: Any):
    """(graph, shapes) as the run has them, on one device."""
    one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    trained = stages.trained_components(e.optimizer.learning_rates)
    return state.abstract_model(e.model, dataclasses.replace(e.train, **changes), trained, one)


@pytest.fixture(scope="module")
def exports(folder, tmp_path_factory) -> dict[str, Path]:
    target = tmp_path_factory.mktemp("exports")
    for to in ("apollo", "orbax"):
        convert.main([str(folder), str(target / to), "--to", to])
    return {to: target / to for to in ("apollo", "orbax")}


def test_the_export_answers_as_the_run(folder, first, exports, logits, stored_weights):
    e = run.read_experiment(folder)
    graphdef, _ = model_of(e)
    plain, without = model_of(e, lora=LoraConfig())
    expected = logits(graphdef, stored_weights(folder))
    began = logits(graphdef, first)
    assert np.array_equal(began, logits(plain, {name: first[name] for name in without}))
    frozen_again = {n: w for n, w in stored_weights(folder).items() if n in without}
    assert np.abs(logits(plain, frozen_again) - expected).max() > 1e-2  # the updates matter
    for path in exports.values():
        merged = state.flatten(nnx.state(apollo_jax.from_pretrained(path), nnx.Param))
        assert {n: leaf.shape for n, leaf in merged.items()} == {
            n: s.shape for n, s in without.items()
        }
        found = logits(plain, {name: leaf[...] for name, leaf in merged.items()})
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_averages_are_of_the_updates(folder, stored_weights, stored_moments):
    e = run.read_experiment(folder)
    kept = {
        k.partition(".ema.")[2]: a for k, a in stored_moments(folder, 4).items() if ".ema." in k
    }
    merged, name = opening.run_weights(folder, e, "ema"), "llm/layers/gate"
    product = kept[f"{name}/lora/a"] @ kept[f"{name}/lora/b"]
    expected = stored_weights(folder)[f"{name}/kernel"] + e.train.lora.llm.scale * product
    np.testing.assert_allclose(merged.read(f"{name}/kernel"), expected, rtol=1e-6, atol=1e-7)
    assert "llm/layers/gate/kernel" not in kept


def test_the_next_stage_starts_from_the_merged_weights(folder, exports):
    """All of it trains; or it has updates of its own, which are new."""
    e = run.read_experiment(folder)
    whole = dataclasses.replace(e, init_from=str(folder))
    whole = dataclasses.replace(whole, train=dataclasses.replace(e.train, lora=LoraConfig()))
    shapes = model_of(whole)[1]
    weights, _ = initial_weights(whole, shapes)
    exported, _ = initial_weights(
        dataclasses.replace(whole, init_from=str(exports["orbax"])), shapes
    )
    assert weights.keys() == exported.keys() == shapes.keys()
    assert all(np.array_equal(weights[name], exported[name]) for name in shapes)
    other = dataclasses.replace(e.train, lora=LoraConfig(llm=Updates(3, targets=("q",))))
    again = dataclasses.replace(whole, train=other, seed=1)
    new, _ = initial_weights(again, model_of(again)[1])
    assert set(new) - set(weights) == {"llm/layers/q/lora/a", "llm/layers/q/lora/b"}
    assert all(np.array_equal(new[name], weights[name]) for name in weights)
    assert np.asarray(new["llm/layers/q/lora/a"]).std() == pytest.approx(96**-0.5, rel=0.2)
    assert not np.asarray(new["llm/layers/q/lora/b"]).any()


def products(e: config.Experiment, **changes: Any) -> set[str]:
    """The shapes of all products in the gradient of what trains in the decoder: "96,192"."""
    graphdef, shapes = model_of(e, **changes)
    params, frozen = state.split(shapes, ("llm",))

    def loss(params, frozen):
        return state.merge(graphdef, params, frozen)(jnp.ones((2, 5), jnp.int32)).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(params, frozen))
    return set(re.findall(r":f32\[([\d,]+)\] = dot_general", text))


def test_no_gradient_has_the_shape_of_a_weight(folder):
    """And A is never multiplied with B."""
    e = run.read_experiment(folder)
    d, wide = e.model.llm.hidden_size, e.model.llm.intermediate_size
    weights = {f"{d},{d}", f"{d},{wide}", f"{wide},{d}"}
    assert weights <= products(e, lora=LoraConfig())
    low = products(e)
    assert {f"{d},4", f"4,{wide}"} <= low
    assert not low & weights


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"llm.rank": "-1"}, r"lora\.llm\.rank is -1, must be at least 0"),
        ({"llm.rank": "2", "llm.alpha": "0"}, r"lora\.llm\.alpha is 0\.0, must be above 0"),
        (
            {"llm.rank": "2", "llm.targets": ""},
            r"lora\.llm\.targets is empty, .* layers/\* is usual",
        ),
        ({"vision_tower.rank": "2"}, r"nothing of it trains: .*vision_tower is 0"),
    ],
)
def test_wrong_updates_are_named(experiment, overrides, said):
    with pytest.raises(ValueError, match=said):
        experiment({f"train.lora.{name}": value for name, value in overrides.items()})


def test_a_rank_above_the_sides_of_a_linear(experiment):
    """Before anything of that size is made; k and v are the narrowest."""
    e = experiment({"train.lora.llm.rank": "1000000"})
    with pytest.raises(
        ValueError, match=r"rank is 1000000, but layers/\w+ is .*: take at most \d+"
    ):
        step.build(e, sharding.make_mesh(e.mesh))
    most = e.model.llm.num_key_value_heads * e.model.llm.head_dim
    fits = experiment({"train.lora.llm.rank": str(most), "train.lora.llm.targets": "k"})
    step.build(fits, sharding.make_mesh(fits.mesh))
    above = experiment({"train.lora.llm.rank": str(most + 1), "train.lora.llm.targets": "q,k"})
    with pytest.raises(
        ValueError, match=rf"layers/k is \d+ x {most}: take at most {most}, or leave"
    ):
        step.build(above, sharding.make_mesh(above.mesh))


def test_a_linear_that_is_not_there(experiment):
    e = experiment({"train.lora.llm.rank": "2", "train.lora.llm.targets": "q_proj"})
    with pytest.raises(ValueError, match=r"targets: no linear is called 'q_proj'; .*layers/q, "):
        step.build(e, sharding.make_mesh(e.mesh))
