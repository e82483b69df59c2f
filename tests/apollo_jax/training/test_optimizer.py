# SPDX-License-Identifier: Apache-2.0
"""Per-component rates, the schedule, and AdamW against optax's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apollo_jax.config import LearningRates, OptimizerConfig
from apollo_jax.training.optimizer import ONE, make_optimizer, make_schedules, rates_by_batch
from apollo_jax.training.optimizers.options import ByRole, Lars, unread

RATES = LearningRates(connector=1e-2, llm=1e-3)
PARAMS = {"connector/a": jnp.ones(3), "llm/b/c": jnp.full(2, 2.0)}
GRADS = {"connector/a": jnp.array([3.0, 0.0, -1.0]), "llm/b/c": jnp.array([4.0, 2.0])}


@pytest.fixture(autouse=True)
def _optax_mixes_types():
    with jax.numpy_dtype_promotion("standard"):
        yield


def rate(config: OptimizerConfig, step: int, num_steps: int = 100) -> float:
    return float(make_schedules(config, num_steps)["connector"](jnp.int32(step)))


def test_what_is_set_in_vain_is_said():
    other = OptimizerConfig(RATES, name="lion", lars=Lars(trust=0.5), b2=0.9)
    assert list(unread(other)) == [
        "config.optimizer.lars.trust=0.5 has no effect: config.optimizer.name is lion",
        "config.optimizer.b2=0.9 has no effect: lion does not read it",
    ]
    assert rates_by_batch(other, ONE)[:2] == list(unread(other))
    for plain in (
        OptimizerConfig(RATES, name="lars", lars=Lars(trust=0.5)),
        OptimizerConfig(b2=0.9),
    ):
        assert not list(unread(plain))


def test_cosine_warms_up_from_zero_and_ends_at_zero():
    config = OptimizerConfig(RATES, warmup_ratio=0.1)
    assert rate(config, 0) == 0.0
    assert rate(config, 5) == pytest.approx(5e-3)
    assert rate(config, 10) == pytest.approx(1e-2)
    assert rate(config, 55) == pytest.approx(5e-3)
    assert rate(config, 100) == pytest.approx(0.0, abs=1e-9)


def test_constant_stays_and_no_warm_up_starts_at_the_peak():
    config = OptimizerConfig(RATES, schedule="constant", warmup_ratio=0.0)
    assert rate(config, 0) == rate(config, 99) == pytest.approx(1e-2)


def test_only_trained_components_have_a_schedule():
    assert set(make_schedules(OptimizerConfig(RATES), 10)) == {"connector", "llm"}


def run(config: OptimizerConfig, grads: list[dict]) -> Any:
    tx = make_optimizer(config, make_schedules(config, 100))
    params, state = PARAMS, tx.init(PARAMS)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_is_adamw_with_a_rate_per_component():
    config = OptimizerConfig(
        RATES, "constant", 0.0, clip_norm=0.0, weight_decay=0.1, decay_by_role=ByRole()
    )
    ours = run(config, [GRADS] * 3)
    for name, peak in (("connector/a", 1e-2), ("llm/b/c", 1e-3)):
        tx = optax.adamw(peak, config.b1, config.b2, config.eps, weight_decay=0.1)
        param: Any = PARAMS[name]
        state = tx.init(param)
        for _ in range(3):
            update, state = tx.update(GRADS[name], state, param)
            param = optax.apply_updates(param, update)
        np.testing.assert_allclose(ours[name], param, rtol=1e-6)


def test_clips_by_the_norm_of_all_that_trains():
    norm = float(optax.tree.norm(GRADS))
    config = OptimizerConfig(RATES, "constant", 0.0, clip_norm=1.0, eps=1.0)  # eps: scale matters
    unclipped = OptimizerConfig(RATES, "constant", 0.0, clip_norm=0.0, eps=1.0)
    scaled = {name: grad / norm for name, grad in GRADS.items()}
    ours, expected = run(config, [GRADS]), run(unclipped, [scaled])
    for name in PARAMS:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-6)
        assert not np.allclose(ours[name], run(unclipped, [GRADS])[name])
