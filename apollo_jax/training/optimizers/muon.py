# SPDX-License-Identifier: Apache-2.0
"""Muon: momentum made orthogonal, layer by layer (kellerjordan.github.io/posts/muon).

L layers; m rows in, n columns out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_jax import sharding
from apollo_jax.training.optimizers import options

# Of the quintic iteration: chosen for speed, they leave singular values between about 0.7 and 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_RMS = 0.2  # of AdamW's updates, as arXiv 2502.16982 found


class ScaleByMuonState(NamedTuple):
    """The momentum by name."""

    mu: Any


def scale_by_muon(config: options.Muon) -> optax.GradientTransformation:
    """Orthogonal directions for matrices [m, n] and stacks of them [L, m, n]."""

    def init(params: Any) -> ScaleByMuonState:
        return ScaleByMuonState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        beta = config.momentum
        mix = lambda m, g: beta * m + (1 - beta) * g  # noqa: E731
        mu = jax.tree.map(mix, state.mu, updates)
        ahead = jax.tree.map(mix, mu, updates) if config.nesterov else mu
        return jax.tree.map(lambda x: _direction(config, x), ahead), ScaleByMuonState(mu)

    return optax.GradientTransformation(init, update)


def _direction(config: options.Muon, x: jax.Array) -> jax.Array:
    m, n = x.shape[-2:]
    scale = _RMS * max(m, n) ** 0.5 if config.scale == "rms" else max(1.0, n / m) ** 0.5
    return scale * orthogonalize(x, config.steps, jnp.dtype(config.dtype)).astype(x.dtype)


def orthogonalize(x: jax.Array, steps: int, dtype: Any) -> jax.Array:
    """The nearest matrix with orthonormal rows or columns, roughly: [..., m, n], in `dtype`."""
    wide = x.shape[-1] >= x.shape[-2]  # the Gram matrix is that of the shorter side
    x = x if wide else x.mT
    x = (x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)).astype(dtype)
    # Cut along the longer side, chips exchange products of the shorter one and never x itself.
    stack = (None,) * (x.ndim - 2)
    rows, columns = (*stack, "embed", None), (*stack, None, "embed")
    x = sharding.constrain(x, *columns)
    for _ in range(steps):
        gram = sharding.constrain(x @ x.mT, *rows)
        polynomial = sharding.constrain(_B * gram + _C * (gram @ gram), *rows)
        x = sharding.constrain(_A * x + polynomial @ x, *columns)
    return x if wide else x.mT
