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


def rows(shapes: dict, rates: LearningRates) -> list[list[str]]:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(stages.start_up_table(shapes, rates))
    lines = console.export_text().splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


def test_the_table_counts_and_names():
    found = rows(SHAPES, LearningRates(connector=1e-4))
    assert ["vision_tower", "100", "frozen", "-", "bfloat16"] in found
    assert ["connector", "10", "yes", "0.0001", "float32"] in found
    assert ["all", "2,110", "10", "", ""] in found


def test_the_table_tells_updates_from_what_they_update():
    low = {
        "llm/layers/q/lora/a": jax.ShapeDtypeStruct((2, 5, 1), jnp.float32),
        "llm/layers/q/lora/b": jax.ShapeDtypeStruct((2, 1, 5), jnp.float32),
    }
    found = rows(SHAPES | low, LearningRates(llm=1e-3))
    assert ["llm", "2,000", "frozen", "-", "bfloat16"] in found
    assert ["llm: updates", "20", "yes", "0.001", "float32"] in found
    assert ["all", "2,130", "20", "", ""] in found
