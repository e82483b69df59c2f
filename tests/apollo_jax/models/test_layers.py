# SPDX-License-Identifier: Apache-2.0
"""The two verbs for stacked layers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apollo_jax.models import layers


class Layer(nnx.Module):
    """x + W x, returning the layer's own output beside it."""

    def __init__(self, rngs: nnx.Rngs):
        kw = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=rngs)
        self.linear = layers.linear(4, 4, ("embed", "mlp"), bias=False, **kw)

    def __call__(self, x, scale=None):
        y = self.linear(x)
        return x + (y if scale is None else y * scale), y


def test_fold_runs_stacked_layers_in_order():
    stacked = layers.stack(Layer, 3, nnx.Rngs(0))
    kernels = stacked.linear.kernel[...]
    assert kernels.shape == (3, 4, 4)
    assert len({k.tobytes() for k in np.asarray(kernels)}) == 3  # each layer its own draw
    x = expected = jax.random.normal(jax.random.key(1), (2, 4))
    scales = jnp.array([1.0, 2.0, 3.0])
    for kernel, scale in zip(kernels, scales, strict=True):
        expected = expected + expected @ kernel * scale
    for remat, unroll in (("none", 1), ("none", 3), ("full", 1)):
        out, ys = layers.fold(stacked, x, per_layer=(scales,), remat=remat, unroll=unroll)
        error = np.abs(out - expected).max()  # entries are sums in which much cancels
        assert error <= 1e-6 * np.abs(expected).max()
        assert ys.shape == (3, 2, 4)


def test_stacked_parameters_name_their_axes():
    stacked = layers.stack(Layer, 3, nnx.Rngs(0))
    assert stacked.linear.kernel.get_metadata()["out_sharding"] == ("layers", "embed", "mlp")


def test_rms_norm_computes_in_float32():
    norm = layers.RMSNorm(4, 1e-6, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.full((1, 4), 300.0, jnp.bfloat16)  # 300**2 is exact in float32 only
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(norm(x).astype(jnp.float32), 1.0)
