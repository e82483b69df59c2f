# SPDX-License-Identifier: Apache-2.0
"""Every shipped config is built; the recipes are the published ones (paper, Table 7)."""

import dataclasses
import re
from pathlib import Path

import pytest

from apollo_jax import config, sharding
from apollo_jax.config import unset_paths
from apollo_jax.config_values import differences
from apollo_jax.planning.topology import parse
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import checks, contrastive, stages, state

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES = ("align", "vision", "sft")
SIZES = ("1p5b", "3b", "7b")


def load(size: str, stage: str) -> config.Experiment:
    return config.load(f"{CONFIGS / f'apollo_{size}.py'}:{stage}")


SHIPPED = sorted(path for path in CONFIGS.glob("*.py") if path.stem != "apollo")  # what they share
SHIPPED += sorted((CONFIGS / "large_batch").glob("*.py"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_stage_is_built(path: Path):
    with pytest.raises(ValueError, match="known: ") as error:
        config.load(f"{path}:nonesuch")
    for stage in re.split(", ", str(error.value).partition("known: ")[2]):
        experiment = config.load(f"{path}:{stage}")
        assert stages.trained_components(experiment.optimizer.learning_rates)
        assert unset_paths(experiment) or path.stem == "demo"
    config.load(str(path))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stage", STAGES)
def test_slices_change_only_the_layout(size: str, stage: str):
    """On every slice the same recipe: as many tokens and clips a step, on a mesh that divides."""
    plain = load(size, stage)
    divisors = checks.weight_divisors(plain)
    for name in ("v5e-256", "v5p-128", "v6e-256", "tpu7x-64"):
        there, slice_ = load(size, f"{stage},{name}"), parse(name)
        assert there.topology == name
        mesh = sharding.mesh_sizes(there.mesh, slice_.chips * slice_.chip.devices)
        assert not list(checks.refusals(there, mesh, divisors))
        data = there.data
        assert data.batch_size * data.length == plain.data.batch_size * plain.data.length
        assert data.batch_size * data.clips == plain.data.batch_size * plain.data.clips
        kept = re.compile(r"mesh\.|topology|train\.remat|data\.(batch_size|length|clips):")
        assert all(kept.match(change) for change in differences(plain, there))
    with pytest.raises(ValueError, match="known: v5e-256, v5p-128, v6e-256, tpu7x-64; others: "):
        load(size, f"{stage},v4-8")


@pytest.mark.parametrize("load", [config.load, contrastive.load])
def test_what_configs_share_is_no_config(load):
    with pytest.raises(ValueError, match="has no get_config"):
        load(str(CONFIGS / "apollo.py"))


@pytest.mark.parametrize("size", SIZES)
def test_recipes_are_the_published_ones(size: str):
    rates = {stage: load(size, stage).optimizer.learning_rates for stage in STAGES}
    assert [(r.vision_tower, r.connector) for r in rates.values()] == [
        (0.0, 1e-4), (5e-6, 1e-4), (0.0, 1e-4)
    ]  # fmt: skip
    assert [r.llm for r in rates.values()] == [
        0.0,
        0.0,
        {"1p5b": 5e-5, "3b": 2e-5, "7b": 1e-5}[size],
    ]
    clips = [load(size, stage).data.max_clips for stage in STAGES]
    assert clips == [25, 25, 150 if size == "7b" else 200]
    assert [load(size, stage).train.num_steps for stage in STAGES] == [773, 1546, 12500]
    for stage in STAGES:
        optimizer = load(size, stage).optimizer
        assert (optimizer.schedule, optimizer.warmup_ratio, optimizer.clip_norm) == (
            "cosine",
            0.03,
            1.0,
        )


@pytest.mark.parametrize("size", SIZES)
def test_a_stage_starts_from_the_one_before(size: str):
    first, *others = (load(size, stage) for stage in STAGES)
    assert (first.init_from, first.init_parts.llm) == ("", config.REQUIRED)
    for before, after in zip((first, *others), others, strict=False):
        assert after.init_from == f"run:{before.name}"
        assert not [name for name in unset_paths(after) if name.startswith("init")]
    whole = dataclasses.replace(first, init_from="start")  # as `convert --to orbax` wrote it
    assert not [name for name in unset_paths(whole) if name.startswith("init")]


@pytest.mark.parametrize("name", ["lamb8", "muon8", "muon64", "muon64,v5p-128"])
def test_large_batches_see_the_samples_of_the_published_one(name: str):
    """In microbatches of its batch: a ramp from one to the size in the name, by doubling."""
    large = config.load(f"{CONFIGS / 'large_batch' / 'apollo_7b_sft.py'}:{name}")
    plain, ramp = load("7b", "sft"), large.train.ramp
    assert large.data.batch_size == plain.data.batch_size == large.optimizer.base_batch
    counts = [count for _, count in ramp.pieces]
    assert counts == [2**i for i in range(len(counts))]
    assert name.startswith(f"{large.optimizer.name}{counts[-1]}")
    assert large.train.num_steps > ramp.pieces[-1][0] + 50
    taken = ramp.before(large.train.num_steps)
    assert plain.train.num_steps - counts[-1] < taken <= plain.train.num_steps


# Trainable parameters in millions: the connector as released, the others as in Table 7.
TRAINED = {
    "1p5b": {"align": (38.36, 0.01), "vision": (1400, 50), "sft": (1600, 50)},
    "3b": {"align": (63.73, 0.01), "vision": (1500, 60), "sft": (3200, 60)},
    "7b": {"align": (177.58, 0.01), "vision": (1600, 50), "sft": (7800, 50)},
}


@pytest.mark.parametrize("size", SIZES)
def test_trainable_parameters(size: str):
    e = load(size, "align")
    _, shapes = state.abstract_model(e.model, e.train, (), sharding.make_mesh(MeshConfig(1, -1)))
    for stage, (millions, tolerance) in TRAINED[size].items():
        trained = stages.trained_components(load(size, stage).optimizer.learning_rates)
        count = sum(stages.count(shapes, component) for component in trained)
        assert count / 1e6 == pytest.approx(millions, abs=tolerance), stage
