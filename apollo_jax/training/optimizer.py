# SPDX-License-Identifier: Apache-2.0
"""AdamW with one learning rate per component, after a clip by the global norm of what trains."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_jax.config import OptimizerConfig
from apollo_jax.training.state import Arrays, component_of

Schedule = Callable[[jax.Array], jax.Array]  # updates so far, i32[] -> learning rate, f32[]


def make_schedules(config: OptimizerConfig, num_steps: int) -> dict[str, Schedule]:
    """Learning rate of each trained component as a function of the updates so far.

    Linear warm-up from 0 over warmup_ratio of the steps, then cosine to 0 (or constant).
    """
    rates = dataclasses.asdict(config.learning_rates)
    return {name: partial(_rate, config, num_steps, r) for name, r in rates.items() if r > 0}


def _rate(config: OptimizerConfig, num_steps: int, peak: float, count: jax.Array) -> jax.Array:
    warmup = math.ceil(config.warmup_ratio * num_steps)
    step = count.astype(jnp.float32)
    rate = peak * jnp.minimum(step / max(1, warmup), 1.0) if warmup else jnp.full_like(step, peak)
    if config.schedule == "constant":
        return rate
    progress = jnp.clip((step - warmup) / max(1, num_steps - warmup), 0.0, 1.0)
    return rate * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def make_optimizer(
    config: OptimizerConfig, schedules: Mapping[str, Schedule]
) -> optax.GradientTransformation:
    """The optimizer over a flat dict of the trainable arrays."""
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    decay = [optax.add_decayed_weights(config.weight_decay)] if config.weight_decay else []
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return optax.chain(*clip, adam, *decay, scale_by_component(schedules))


class ScaleByComponentState(NamedTuple):
    """Updates so far."""

    count: jax.Array


def scale_by_component(schedules: Mapping[str, Schedule]) -> optax.GradientTransformation:
    """Multiply each array's update by minus the current rate of its component."""

    def init(params: optax.Params) -> ScaleByComponentState:
        del params
        return ScaleByComponentState(jnp.zeros((), jnp.int32))

    def update(updates: Arrays, state: ScaleByComponentState, params: optax.Params | None = None):
        del params
        rates = {c: s(state.count) for c, s in schedules.items()}
        scaled = {n: -rates[component_of(n)].astype(u.dtype) * u for n, u in updates.items()}
        return scaled, ScaleByComponentState(state.count + 1)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
