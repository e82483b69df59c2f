# SPDX-License-Identifier: Apache-2.0
"""Every optimizer, step by step, against the formulas of its paper, restated here in numpy.

A stack of two layers must move as two matrices do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apollo_jax.config import LearningRates, OptimizerConfig
from apollo_jax.training.optimizer import make_optimizer, make_schedules
from apollo_jax.training.optimizers import apollo, muon, options
from apollo_jax.training.optimizers.schedule_free import gradient_point

Array = np.ndarray
RATE, B1, B2, EPS, DECAY, STEPS = 1e-2, 0.9, 0.98, 1e-6, 0.1, 7
STACK, MATRIX, TALL, TABLE, NORM = (
    "llm/layers/q/kernel", "llm/q/kernel", "llm/down/kernel", "llm/embedding", "llm/norm/scale"
)  # fmt: skip
SHAPES = {STACK: (2, 6, 9), MATRIX: (5, 5), TALL: (8, 3), TABLE: (7, 4), NORM: (5,)}


@pytest.fixture(autouse=True)
def _optax_mixes_types():
    with jax.numpy_dtype_promotion("standard"):
        yield


def draw(seed: int, scale: float = 1.0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in SHAPES.items()}


# Now and then a gradient far larger than the one before, as the limiter of growth expects.
GRADS = [draw(1 + i, 10.0 if i in (2, 5) else 1.0) for i in range(STEPS)]


def optimizer(name: Any, **changes: Any) -> OptimizerConfig:
    return OptimizerConfig(
        LearningRates(llm=RATE), "constant", 0.0, 0.0, B1, B2, EPS, DECAY, name, **changes
    )


def trained(config: OptimizerConfig) -> dict[str, Array]:
    """The parameters after the steps."""
    tx = make_optimizer(config, make_schedules(config, 100))
    params: Any = jax.tree.map(jnp.asarray, draw(0))
    state, update = tx.init(params), jax.jit(tx.update)
    for grads in GRADS:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return jax.device_get(params)


Formula = Callable[[str, int, Array, list[Array]], Array]  # name, layer, weights, gradients


def agrees(config: OptimizerConfig, formula: Formula, rtol: float = 2e-5) -> None:
    ours, start = trained(config), draw(0)
    for name in SHAPES:
        layers = range(2) if name == STACK else [...]
        for i, at in enumerate(layers):
            expected = formula(name, i, start[name][at], [g[name][at] for g in GRADS])
            np.testing.assert_allclose(ours[name][at], expected, rtol, 2e-6, err_msg=name)


def decays(name: str) -> float:
    return 0.0 if name == NORM else DECAY


def adam_directions(grads: list[Array]):
    """m-hat / (sqrt(v-hat) + eps) of each step."""
    m = v = np.zeros_like(grads[0], np.float64)
    for t, g in enumerate(grads, 1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        yield m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS)


def adamw(name: str, layer: int, w: Array, grads: list[Array]) -> Array:
    del layer
    for u in adam_directions(grads):
        w = w - RATE * (u + decays(name) * w)
    return w


def norm(x: Array) -> float:
    return float(np.sqrt(np.sum(np.square(x))))


def test_adamw():
    agrees(optimizer("adamw"), adamw)


def test_lamb():
    """arXiv 1904.00962, Algorithm 2, with phi(x) = x."""

    def formula(name: str, layer: int, w: Array, grads: list[Array]) -> Array:
        del layer
        for u in adam_directions(grads):
            step = u + decays(name) * w
            w = w - RATE * (1.0 if name == NORM else norm(w) / norm(step)) * step
        return w

    agrees(optimizer("lamb"), formula)


def test_lars():
    """arXiv 1708.03888, Algorithm 1, the ratio taken of the gradient with its decay."""

    def formula(name: str, layer: int, w: Array, grads: list[Array]) -> Array:
        del layer
        velocity = np.zeros_like(w)
        for g in grads:
            step = g + decays(name) * w
            ratio = 1.0 if name == NORM else 0.02 * norm(w) / norm(step)
            velocity = 0.8 * velocity + RATE * ratio * step
            w = w - velocity
        return w

    agrees(optimizer("lars", lars=options.Lars(trust=0.02, momentum=0.8)), formula)


def test_lion():
    """arXiv 2302.06675, Algorithm 2."""

    def formula(name: str, layer: int, w: Array, grads: list[Array]) -> Array:
        del layer
        m = np.zeros_like(w)
        for g in grads:
            u = np.sign(0.9 * m + 0.1 * g)
            w, m = w - RATE * (u + decays(name) * w), 0.99 * m + 0.01 * g
        return w

    agrees(optimizer("lion"), formula)


def test_adafactor():
    """arXiv 1804.04235, Algorithm 4, and momentum; two axes from 5 up are factored."""
    settings = options.Adafactor(min_dim=5, b2_cap=0.7, clip_rms=0.9, momentum_dtype="float32")

    def formula(name: str, layer: int, w: Array, grads: list[Array]) -> Array:
        del layer
        factored = w.ndim == 2 and min(w.shape) >= 5
        rows = columns = full = mean = 0.0
        for t, g in enumerate(grads, 1):
            b2, square = min(0.7, 1 - t**-0.8), g.astype(np.float64) ** 2 + 1e-30
            full = b2 * full + (1 - b2) * square
            v = full
            if factored:
                rows = b2 * rows + (1 - b2) * square.mean(1, keepdims=True)
                columns = b2 * columns + (1 - b2) * square.mean(0, keepdims=True)
                v = rows * columns / rows.mean()
            u = g / np.sqrt(v)
            u = u / max(1.0, np.sqrt(np.mean(u**2)) / 0.9)
            mean = 0.9 * mean + 0.1 * u
            w = w - RATE * (mean + decays(name) * w)
        return w

    agrees(optimizer("adafactor", adafactor=settings), formula)


def test_adafactor_keeps_little_and_its_momentum_in_bfloat16():
    config = optimizer("adafactor")
    shapes = {"llm/layers/q/kernel": jax.ShapeDtypeStruct((40, 64, 96), jnp.float32)}
    state = jax.eval_shape(make_optimizer(config, make_schedules(config, 9)).init, shapes)
    kept = sorted((s.shape, str(s.dtype)) for s in jax.tree.leaves(state) if len(s.shape) > 1)
    assert kept == [
        ((40, 1), "float32"), ((40, 64), "float32"), ((40, 64, 96), "bfloat16"),
        ((40, 96), "float32"),
    ]  # fmt: skip


@pytest.mark.parametrize("scale", ["rms", "width"])
def test_muon(scale):
    """Five quintic iterations on the Nesterov momentum of a matrix; Adam for tables and norms."""

    def orthogonal(x: Array) -> Array:
        x = x / norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x

    def formula(name: str, layer: int, w: Array, grads: list[Array]) -> Array:
        if name in (TABLE, NORM):
            return adamw(name, layer, w, grads)
        m, (rows, columns) = np.zeros_like(w, np.float64), w.shape
        size = 0.2 * max(w.shape) ** 0.5 if scale == "rms" else max(1, columns / rows) ** 0.5
        for g in grads:
            m = 0.95 * m + 0.05 * g
            u = size * orthogonal(0.95 * m + 0.05 * g)
            w = w - RATE * (u + DECAY * w)
        return w

    agrees(optimizer("muon", muon=options.Muon(scale=scale, dtype="float32")), formula)


def test_muon_iterates_as_optax_and_its_singular_values_are_near_one():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 24, 16)), jnp.float32)
    ours = muon.orthogonalize(x, 5, jnp.float32)
    axes = optax.contrib.MuonDimensionNumbers(1, 2)
    tx = optax.contrib.scale_by_muon(nesterov=False, weight_dimension_numbers=axes)
    theirs, _ = tx.update(x, tx.init(x))
    np.testing.assert_allclose(ours, np.asarray(theirs), rtol=1e-4, atol=1e-5)
    values = np.linalg.svd(ours, compute_uv=False)
    assert 0.6 < values.min() < values.max() < 1.3


def test_schedule_free():
    """arXiv 2405.15682, Eq. 3-5 and Algorithm 1: rates as weights, decay at y."""
    config = dataclasses.replace(optimizer("schedule_free"), warmup_ratio=0.04)
    tx = make_optimizer(config, make_schedules(config, 100))
    params: Any = jax.tree.map(jnp.asarray, draw(0))
    state = tx.init(params)
    x, z = draw(0), draw(0)
    v, total = {n: np.zeros_like(w) for n, w in x.items()}, 0.0
    for t, grads in enumerate(GRADS, 1):
        y = {n: (1 - B1) * z[n] + B1 * x[n] for n in x}
        for name, point in gradient_point(params, state).items():
            np.testing.assert_allclose(point, y[name], 1e-5, 1e-6)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        rate = RATE * min((t - 1) / 4, 1.0)
        total += rate**2
        share = rate**2 / total if total else 0.0
        for n, g in grads.items():
            v[n] = B2 * v[n] + (1 - B2) * g**2
            step = g / (np.sqrt(v[n] / (1 - B2**t)) + EPS) + decays(n) * y[n]
            z[n] = z[n] - rate * step
            x[n] = (1 - share) * x[n] + share * z[n]
    for name, w in params.items():
        np.testing.assert_allclose(w, x[name], 1e-5, 1e-6)


def test_schedule_free_is_that_of_optax():
    """At a constant rate, and with what optax calls the parameters being our point y."""
    config = dataclasses.replace(optimizer("schedule_free"), weight_decay=0.0)
    tx = optax.contrib.schedule_free_adamw(RATE, b1=B1, b2=B2, eps=EPS)
    params: Any = jax.tree.map(jnp.asarray, draw(0))
    state = tx.init(params)
    for grads in GRADS:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    theirs, ours = optax.contrib.schedule_free_eval_params(state, params), trained(config)
    for name in SHAPES:
        np.testing.assert_allclose(ours[name], theirs[name], 1e-4, 2e-6)


@pytest.mark.parametrize("name", ["apollo", "apollo_mini"])
def test_apollo(name):
    """arXiv 2412.05270, Algorithm 1; bias correction after the limiter as in the authors' code."""
    rank, every, limit = 1 if name == "apollo_mini" else 2, 3, 1.05
    defaults = getattr(OptimizerConfig(), name)
    low = dataclasses.replace(defaults, rank=rank, every=every, growth=limit)

    def formula(name: str, layer: int, w: Array, grads: list[Array]) -> Array:
        if name in (TABLE, NORM):
            return adamw(name, layer, w, grads)
        before, m, v = 0.0, 0.0, 0.0
        for t, g in enumerate(grads, 1):
            key = apollo.projection_key(low.seed, name, (t - 1) // every)
            key = jax.random.split(key, 2)[layer] if name == STACK else key
            p = np.asarray(jax.random.normal(key, (rank, min(g.shape)))) / rank**0.5
            wide = g.shape[1] >= g.shape[0]
            r = p @ g if wide else g @ p.T
            m, v = B1 * m + (1 - B1) * r, B2 * v + (1 - B2) * r**2
            adam = m / (np.sqrt(v) + EPS)
            axis = None if low.each == "tensor" else 0 if wide else 1
            sizes = [np.sqrt(np.sum(x**2, axis, keepdims=True)) for x in (adam, r)]
            u = g * sizes[0] / sizes[1]
            if t > 1 and norm(u) > limit * before:
                u = u * limit * before / norm(u)
            before = norm(u)
            corrected = np.sqrt(1 - B2**t) / (1 - B1**t) * u
            w = w - RATE * (low.alpha * corrected + DECAY * w)
        return w

    agrees(optimizer(name, **{name: low}), formula, rtol=5e-5)


def test_apollo_goes_on_after_a_step_without_gradient():
    """A norm of zero limits nothing, or an empty batch would hold the weights for ever."""
    config = dataclasses.replace(optimizer("apollo"), weight_decay=0.0)
    tx = make_optimizer(config, make_schedules(config, 100))
    params: Any = {MATRIX: jnp.ones((4, 6))}
    state, updates = tx.init(params), params
    for grad in (jnp.ones((4, 6)), jnp.zeros((4, 6)), jnp.ones((4, 6))):
        updates, state = tx.update({MATRIX: grad}, state, params)
    moved: Any = updates
    assert float(jnp.abs(moved[MATRIX]).max()) > RATE / 10


def test_apollo_leaves_to_adam_what_a_projection_makes_no_smaller():
    """As the factors of low-rank updates; their moments would be larger than the gradient."""
    agrees(optimizer("apollo", apollo=options.Apollo(rank=9)), adamw)
    config = optimizer("apollo", apollo=options.Apollo(rank=3))
    state: Any = make_optimizer(config, make_schedules(config, 100)).init(draw(0))
    (low, _), *_ = (s for s in state if isinstance(s, tuple) and len(s) == 2)
    assert sorted(low.moments) == [STACK, MATRIX]


def test_apollo_projects_no_vectors():
    config = optimizer("apollo", apollo=options.Apollo(rank=2, tables=True))
    params = {"llm/cls_token": jnp.ones(9), TABLE: jnp.ones((7, 4))}
    state: Any = make_optimizer(config, make_schedules(config, 100)).init(params)
    (low, adam), *_ = (s for s in state if isinstance(s, tuple) and len(s) == 2)
    assert ([*low.moments], [*adam.mu]) == ([TABLE], ["llm/cls_token"])


def test_apollo_projects_tables_where_it_is_told_to():
    config = optimizer("apollo", apollo=options.Apollo(rank=2, tables=True))
    state: Any = make_optimizer(config, make_schedules(config, 100)).init(draw(0))
    (low, _), *_ = (s for s in state if isinstance(s, tuple) and len(s) == 2)
    assert low.moments[TABLE].mu.shape == (7, 2)
    assert low.moments[STACK].nu.shape == (2, 2, 9)
