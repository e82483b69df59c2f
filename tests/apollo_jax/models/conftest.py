# SPDX-License-Identifier: Apache-2.0
"""What every vision tower has to do in an Apollo."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apollo_jax.config_values import from_dict, to_config
from apollo_jax.models import apollo
from apollo_jax.models.vision_tower import common_grid


@pytest.fixture(scope="session")
def with_towers():
    """with_towers(name=config, ..): the debug model with other towers."""

    def with_towers(**towers) -> apollo.Config:
        debug = apollo.Config.debug(vocab_size=40)
        width = sum(t.hidden_size for t in towers.values())
        connector = dataclasses.replace(
            debug.connector, vision_hidden_size=width, token_input_shape=common_grid(towers)
        )
        return dataclasses.replace(debug, towers=towers, connector=connector)

    return with_towers


def encode(model, frames, geometry):
    return model.encode_clips(frames, geometry)


@pytest.fixture(scope="session")
def check_in_apollo(with_towers, build, run):
    """check_in_apollo(towers): clips become visual tokens, and the config survives its plain form.

    With shapes_only nothing is computed. Gives the config.
    """

    def check_in_apollo(towers: dict, shapes_only: bool = False) -> apollo.Config:
        config = with_towers(**towers)
        assert from_dict(apollo.Config, to_config(config).to_dict()) == config
        side = config.frame_size
        frames = np.random.default_rng(0).integers(0, 256, (2, 4, side, side, 3), np.uint8)
        geometry = jnp.array([[0, 0, side, side], [2, 0, side - 4, side]])
        if shapes_only:
            model = nnx.eval_shape(lambda: apollo.Apollo(config, rngs=nnx.Rngs(0)))
            assert nnx.eval_shape(encode, model, frames, geometry).shape == (2, 8, 96)
            return config
        model = build(lambda: apollo.Apollo(config, rngs=nnx.Rngs(0)))
        tokens = run(encode, model, jnp.asarray(frames), geometry)
        assert tokens.shape == (2, 8, 96)
        assert np.isfinite(tokens).all()
        assert not np.allclose(tokens[0], tokens[1])
        return config

    return check_in_apollo
