# SPDX-License-Identifier: Apache-2.0
"""A small world, and the tiny official checkpoint, which knows nothing of it."""

from pathlib import Path

import pytest

from apollo_jax.evaluation.apollobench_mini import write_world
from apollo_jax.inference.generate import load

TINY = Path(__file__).parents[2] / "fixtures" / "apollo-tiny-a" / "checkpoint"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    write_world(out, train_scenes=48, test_scenes_per_family=4, seed=3, workers=1)
    return out


@pytest.fixture(scope="session")
def loaded():
    return load(str(TINY))


@pytest.fixture(scope="session")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="session")
def processor(loaded):
    return loaded[1]
