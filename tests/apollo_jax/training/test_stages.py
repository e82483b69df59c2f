# SPDX-License-Identifier: Apache-2.0
"""What trains is said in a table, and that nothing trains is an error."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from apollo_jax.config import LearningRates
from apollo_jax.training import stages

SHAPES = {
    "vision_tower/a": jax.ShapeDtypeStruct((10, 10), jnp.bfloat16),
    "connector/b": jax.ShapeDtypeStruct((7,), jnp.float32),
    "connector/c": jax.ShapeDtypeStruct((3, 1), jnp.float32),
    "llm/d": jax.ShapeDtypeStruct((2000,), jnp.bfloat16),
}


def test_a_stage_is_what_has_a_rate():
    assert stages.trained_components(LearningRates(connector=1e-4)) == ("connector",)
    vision = LearningRates(vision_tower=5e-6, connector=1e-4)
    assert stages.trained_components(vision) == ("vision_tower", "connector")


def test_nothing_trains_is_an_error():
    with pytest.raises(ValueError, match=r"nothing trains: .* vision_tower, connector, llm"):
        stages.trained_components(LearningRates())


def test_the_table_counts_and_names():
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(stages.start_up_table(SHAPES, LearningRates(connector=1e-4)))
    lines = console.export_text().splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert ["vision_tower", "100", "frozen", "-", "bfloat16"] in rows
    assert ["connector", "10", "yes", "0.0001", "float32"] in rows
    assert ["all", "2,110", "10", "", ""] in rows
