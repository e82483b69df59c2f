# SPDX-License-Identifier: Apache-2.0
"""Contrastive runs of several processes, and those that begin with a published tower."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from apollo_jax import sharding
from apollo_jax.checkpoints.pretrained import config_from_pretrained, from_pretrained
from apollo_jax.models import apollo
from apollo_jax.training import contrastive
from apollo_jax.training.contrastive import TowerPaths
from apollo_jax.training.state import flatten

PAIRS = Path(__file__).parent / "pairs.py"
PUBLISHED = Path(__file__).parents[2] / "fixtures" / "apollo-tiny-a" / "checkpoint"


@pytest.fixture
def two(world, company):
    """two(workdir, *last): exit statuses and words of two processes; flags of the last one."""

    def two(workdir: Path, *last: str) -> tuple[list[int], list[str]]:
        hurry = "--xla_backend_optimization_level=0"  # compiling is the work
        both = {"command": "contrastive", "own": [(), last], "xla_flags": hurry}
        return company(f"{PAIRS}:{world}", workdir, 2, **both).end()

    return two


def losses(workdir: Path) -> list[tuple]:
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["accuracy"], line["grad_norm"]) for line in lines]


def test_two_processes_are_the_run_of_one(world, two, tmp_path):
    statuses, said = two(tmp_path / "two")
    assert statuses == [0, 0], said
    assert "trained, 3 of 3 steps" in said[0]
    assert "trained, 3 of 3 steps" not in said[1]  # process 0 speaks for both
    assert contrastive.train(contrastive.load(f"{PAIRS}:{world}"), tmp_path / "one")
    expected = losses(tmp_path / "one")
    assert len(expected) == 3
    np.testing.assert_allclose(losses(tmp_path / "two"), expected, rtol=1e-5)


def test_another_loss_of_one_process_is_refused_by_name(two, tmp_path):
    statuses, said = two(tmp_path / "run", "--config.loss=softmax")
    assert statuses == [2, 2], said
    for text in said:
        assert "config.loss is 'softmax', process 0 has 'sigmoid'" in text
    assert not (tmp_path / "run").exists()


def test_a_tower_from_a_published_folder(world):
    """It is what the folder holds; all else is as random as without it."""
    published, folder = config_from_pretrained(PUBLISHED), PUBLISHED / "vision_tower"
    assert isinstance(published, apollo.Config)
    name, path = "siglip-so400m-patch14-384", str(folder / "siglip-so400m-patch14-384")
    plain = contrastive.load(f"{PAIRS}:{world}")
    model = replace(plain.model, towers={name: published.towers[name]})
    size = replace(plain.data, frame_size=model.frame_size)
    plain = replace(plain, model=model, data=size, init_parts=TowerPaths({name: ""}))
    given = replace(plain, init_parts=TowerPaths({name: path}))
    mesh = sharding.make_mesh(plain.mesh)
    with jax.set_mesh(mesh):
        abstract = contrastive.build(plain, mesh).abstract
        before, _ = contrastive.initial_weights(plain, abstract)
        after, origin = contrastive.initial_weights(given, abstract)
    assert f"random, vision_tower/towers/0/ from {path}" in origin
    tower = flatten(nnx.state(from_pretrained(path)))
    for key, value in tower.items():
        np.testing.assert_array_equal(after[f"vision_tower/towers/0/{key}"], value[...])
    moved = {key for key in before if not np.array_equal(before[key], after[key])}
    assert moved
    assert all(key.startswith("vision_tower/towers/0/") for key in moved)


def test_a_path_for_no_tower_is_named(world):
    plain = contrastive.load(f"{PAIRS}:{world}")
    with pytest.raises(ValueError, match=r"names \['dino'\]; the model has siglip"):
        replace(plain, init_parts=TowerPaths({"dino": "somewhere"}))
