# SPDX-License-Identifier: Apache-2.0
"""Every connector variant against the official code's output."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apollo_jax.checkpoints.pretrained import from_pretrained
from apollo_jax.models import connectors

VARIANTS = ("checkpoint", "conv2d_2x2_avg", "mlp1x_gelu_d1", "mlp2x_gelu_d3", "perceiver_mlp_avg")
TINY = connectors.Config(
    vision_hidden_size=6,
    text_hidden_size=8,
    token_input_shape=(2, 5, 5),
    num_output_tokens=8,
    resampler_n_heads=2,
    resampler_head_dim=4,
    num_key_value_heads=1,
    ff_multi=2,
)


def apply(connector, x):
    return connector(x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_variant(variant, tiny, load, run, close, tmp_path):
    shutil.copy(tiny / "connectors" / f"{variant}.json", tmp_path / "config.json")
    shutil.copy(tiny / "connectors" / f"{variant}.safetensors", tmp_path / "model.safetensors")
    connector = from_pretrained(tmp_path)
    z = load(f"connectors/{variant}.npz")
    close(run(apply, connector, jnp.asarray(z["x"])), z["y"])


def test_official_visual_tokens(model, official, run, close):
    x = jnp.asarray(official["concat_features"])
    close(run(apply, model.connector, x), official["connector_out"])


@pytest.mark.parametrize("resampler", connectors.RESAMPLERS)
@pytest.mark.parametrize("projector", ["mlp1x_gelu", "mlp2x_gelu", "perceiver_mlp", "conv2d_2x2"])
def test_every_pair_of_projector_and_resampler(projector, resampler, build, run):
    config = dataclasses.replace(TINY, projector_type=projector, resampler_type=resampler)
    if resampler == "avg" and projector == "conv2d_2x2":
        config = dataclasses.replace(config, num_output_tokens=2)  # 5x5 becomes 1x1
    connector = build(lambda: connectors.Connector(config, rngs=nnx.Rngs(0)))
    out = run(apply, connector, jax.random.normal(jax.random.key(1), (3, 50, 6)))
    assert out.shape == (3, config.num_output_tokens, 8)
    assert np.isfinite(out).all()


def test_clips_do_not_see_each_other(build, run):
    connector = build(lambda: connectors.Connector(TINY, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (3, 50, 6))
    alone = run(apply, connector, x[1:2])
    np.testing.assert_allclose(run(apply, connector, x)[1:2], alone, atol=1e-6)


def test_average_pool_is_exact_on_even_and_uneven_grids():
    matrix = connectors.pooling_matrix(5, 2)
    np.testing.assert_allclose(matrix, [[1 / 3] * 3 + [0] * 2, [0] * 2 + [1 / 3] * 3])
    x = jnp.arange(16.0).reshape(1, 1, 4, 4, 1)
    np.testing.assert_allclose(connectors.average_pool(x, 2)[0, :, 0], [2.5, 4.5, 10.5, 12.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(projector_type="mlp3x_gelu"), "projector_type 'mlp3x_gelu' is unknown; known: mlp1x"),
        (
            dict(resampler_type="perceiver"),
            "'perceiver' is unknown; known: perciver",
        ),
        (dict(resampler_type="avg", num_output_tokens=6), "must be 2 .* times a square"),
    ],
)
def test_unknown_parts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
