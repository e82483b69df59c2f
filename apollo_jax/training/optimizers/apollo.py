# SPDX-License-Identifier: Apache-2.0
"""APOLLO: AdamW's step sizes from moments of a random projection (arXiv 2412.05270, Algorithm 1).

Nothing to do with the model but the name. L layers; m rows and n columns of a matrix of which the
longer side is kept, k; r rank.
"""

import zlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_jax.training.optimizers import options
from apollo_jax.training.optimizers.roles import is_stacked

_TINY = 1e-8  # added to norms that divide


class LowRank(NamedTuple):
    """Of one matrix, or of each layer of a stack: then everything has a leading axis L."""

    mu: Any  # [m, r] or [r, n], moments of the projected gradient
    nu: Any
    norm: Any  # [], of the previous scaled gradient; 0 = there was none


class ScaleByApolloState(NamedTuple):
    """Updates so far, and moments by parameter. The projections are drawn anew when needed."""

    count: Any
    moments: dict[str, LowRank]


def scale_by_apollo(
    config: options.Apollo, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Gradients times AdamW's scaling factors per channel or tensor, for matrices by name.

    As in the authors' PyTorch code, Adam's bias correction follows the limiter of growth.
    """

    def init(params: Any) -> ScaleByApolloState:
        start = partial(_start, config.rank)
        moments = {n: (jax.vmap(start) if is_stacked(n) else start)(p) for n, p in params.items()}
        return ScaleByApolloState(jnp.zeros((), jnp.int32), moments)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        count = state.count + 1
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        step = partial(_step, config, b1, b2, eps, config.alpha * correction)
        out, moments = {}, {}
        for name, grad in updates.items():
            key = projection_key(config.seed, name, state.count // config.every)
            if is_stacked(name):
                keys = jax.random.split(key, grad.shape[0])
                out[name], moments[name] = jax.vmap(step)(keys, grad, state.moments[name])
            else:
                out[name], moments[name] = step(key, grad, state.moments[name])
        return out, ScaleByApolloState(count, moments)

    return optax.GradientTransformation(init, update)


def projection_key(seed: int, name: str, period: Any) -> jax.Array:
    """The key from which a parameter's projections of this period are drawn."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, period)


def projection(key: jax.Array, rank: int, size: int, dtype: Any) -> jax.Array:
    """[r, size], normal with variance 1/r."""
    return jax.random.normal(key, (rank, size), dtype) * jnp.asarray(rank**-0.5, dtype)


def _keeps_columns(shape: tuple[int, ...]) -> bool:
    """Of a square kernel [in, out] the outputs are kept, as of the authors' [out, in]."""
    return shape[-1] >= shape[-2]


def _start(rank: int, param: jax.Array) -> LowRank:
    m, n = param.shape
    shape = (rank, n) if _keeps_columns(param.shape) else (m, rank)
    zeros = jnp.zeros(shape, param.dtype)
    return LowRank(zeros, zeros.copy(), jnp.zeros((), jnp.float32))


def _step(
    config: options.Apollo,
    b1: float,
    b2: float,
    eps: float,
    alpha: jax.Array,
    key: jax.Array,
    grad: jax.Array,
    old: LowRank,
) -> tuple[jax.Array, LowRank]:
    """One matrix's update [m, n] and its state."""
    columns = _keeps_columns(grad.shape)
    p = projection(key, config.rank, min(grad.shape), grad.dtype)
    low = p @ grad if columns else grad @ p.T
    mu = b1 * old.mu + (1 - b1) * low
    nu = b2 * old.nu + (1 - b2) * jnp.square(low)
    adam = mu / (jnp.sqrt(nu) + eps)
    axis = None if config.each == "tensor" else (0 if columns else 1)
    norms = (jnp.linalg.norm(x, axis=axis, keepdims=True) for x in (adam, low))
    scaled = grad * (next(norms) / (next(norms) + _TINY))
    norm = jnp.linalg.norm(scaled).astype(jnp.float32)
    if config.growth:
        growth = norm / (old.norm + _TINY)
        limit = jnp.where(old.norm > 0, jnp.maximum(growth / config.growth, 1.0), 1.0)
        scaled, norm = scaled / limit, norm / limit
    kept = LowRank(mu.astype(old.mu.dtype), nu.astype(old.nu.dtype), norm)
    return (alpha * scaled).astype(grad.dtype), kept
