# SPDX-License-Identifier: Apache-2.0
"""The official-layout fixture `apollo-tiny-a` (float32, random weights) and what its authors' code
computes from it; `meta.json` there says how it is made up."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apollo_jax.checkpoints.pretrained import from_pretrained

TINY = Path(__file__).parents[1] / "fixtures" / "apollo-tiny-a"
TOLERANCE = 2e-5  # absolute or relative, whichever is larger; never loosened


def channels_last(pixels: dict) -> dict:
    """Official pixel values to {tower: [N, F, H, W, 3]}."""
    siglip = pixels["pixel_values_siglip"].transpose(0, 1, 3, 4, 2)
    internvideo2 = pixels["pixel_values_internvideo2"].transpose(0, 2, 3, 4, 1)
    both = {"siglip-so400m-patch14-384": siglip, "internvideo2": internvideo2}
    return {name: jnp.asarray(value) for name, value in both.items()}


def visual_index(tokens: np.ndarray) -> np.ndarray:
    """0, 1, ... over each row's placeholders, -1 on text."""
    there = tokens == -200
    return np.where(there, np.cumsum(there, axis=1) - 1, -1)


@pytest.fixture(scope="session")
def tiny() -> Path:
    return TINY


@pytest.fixture(scope="session")
def load():
    """load("fixture.npz") -> {name: array}; load("x.json") -> object."""

    def load(name: str):
        if name.endswith(".json"):
            return json.loads((TINY / name).read_text())
        with np.load(TINY / name) as arrays:
            return dict(arrays)

    return load


@pytest.fixture(scope="session")
def official(load) -> dict:
    """fixture.npz, with our forms of the pixels and the visual indices beside it."""
    z = load("fixture.npz")
    return z | dict(
        pixels=channels_last(z),
        visual_index=visual_index(z["input_ids"]),
        batch_visual_index=visual_index(z["batch_input_ids"]),
    )


@pytest.fixture(scope="session")
def model():
    """The fixture's checkpoint, loaded. Tests must not write to it."""
    return from_pretrained(TINY / "checkpoint")


@pytest.fixture(scope="session")
def close():
    def close(actual, expected) -> None:
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert actual.shape == expected.shape
        assert np.isfinite(actual).all()
        error = np.abs(actual - expected) / np.maximum(1.0, np.abs(expected))
        assert error.max() <= TOLERANCE, f"largest error {error.max():.2e}"

    return close


@partial(jax.jit, static_argnums=(0, 1))
def _call(f, graphdef, state, *args):
    return f(nnx.merge(graphdef, state), *args)


@pytest.fixture(scope="session")
def run():
    """run(f, model, *args): f(model, *args), compiled as a whole and once for each f."""
    return lambda f, model, *args: _call(f, *nnx.split(model), *args)


@pytest.fixture(scope="session")
def build():
    """build(make): the module that `make()` gives, its weights normal, from numpy."""

    def build(make):
        graphdef, state = nnx.split(nnx.eval_shape(make))
        rng = np.random.default_rng(0)

        def draw(leaf):
            return jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

        return nnx.merge(graphdef, jax.tree.map(draw, state))

    return build
