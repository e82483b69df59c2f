# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a run: a clip by the global norm of what trains, a direction, decay, a rate.

Rates are by component; they and the decay have factors by role. docs/optimizers.md has the table.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_jax.config import OptimizerConfig
from apollo_jax.training.optimizers import options
from apollo_jax.training.optimizers.apollo import scale_by_apollo
from apollo_jax.training.optimizers.muon import scale_by_muon
from apollo_jax.training.optimizers.roles import Role, by_role, per_layer, role_of
from apollo_jax.training.optimizers.schedule_free import schedule_free
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
    return optax.chain(*clip, *_after_clip(config, schedules))


def _after_clip(
    config: OptimizerConfig, schedules: Mapping[str, Schedule]
) -> list[optax.GradientTransformation]:
    moments = config.b1, config.b2, config.eps
    adam = optax.scale_by_adam(*moments)
    decay = [_add_decay(config)] if config.weight_decay else []
    rate = scale_by_component(schedules, config.rate_by_role)
    match config.name:
        case "adamw":
            return [adam, *decay, rate]
        case "adafactor":
            return [per_layer(_adafactor(config.adafactor)), *decay, rate]
        case "lamb":
            return [adam, *decay, _trust_ratio(1.0), rate]
        case "lars":
            lars = config.lars
            return [*decay, _trust_ratio(lars.trust), rate, optax.trace(lars.momentum)]
        case "lion":
            lion = config.lion
            return [optax.scale_by_lion(lion.b1, lion.b2, lion.momentum_dtype), *decay, rate]
        case "muon":
            return [by_role(scale_by_muon(config.muon), adam), *decay, rate]
        case "schedule_free":
            clock = next(iter(schedules.values()))
            rate_of = partial(_rate_of, schedules, config.rate_by_role)
            return [schedule_free(clock, rate_of, partial(_decay_of, config), *moments)]
        case "apollo" | "apollo_mini":
            low = getattr(config, config.name)
            roles: tuple[Role, ...] = ("matrix",)
            roles += ("embedding", "head") if low.tables else ()
            return [by_role(scale_by_apollo(low, *moments), adam, roles), *decay, rate]


def _adafactor(config: options.Adafactor) -> optax.GradientTransformation:
    """Of one array."""
    capped = lambda i, power: jnp.minimum(config.b2_cap, 1.0 - (i + 1.0) ** -power)  # noqa: E731
    rms = optax.scale_by_factored_rms(
        decay_rate=config.decay,
        min_dim_size_to_factor=config.min_dim,
        epsilon=config.eps,
        decay_rate_fn=capped,
    )
    clip = [optax.clip_by_block_rms(config.clip_rms)] if config.clip_rms else []
    mean = optax.ema(config.momentum, debias=False, accumulator_dtype=config.momentum_dtype)
    return optax.chain(rms, *clip, *([mean] if config.momentum else []))


def _trust_ratio(coefficient: float) -> optax.GradientTransformation:
    """Each layer's update times |weights| / |update|, but for norms and biases."""
    ratio = optax.scale_by_trust_ratio(trust_coefficient=coefficient)
    return per_layer(ratio, skip=("norm", "bias"))


def _add_decay(config: OptimizerConfig) -> optax.GradientTransformation:
    def add(updates: Any, params: Any) -> Any:
        rates = {n: _decay_of(config, n, u.ndim) for n, u in updates.items()}
        return {n: u + rates[n] * params[n] if rates[n] else u for n, u in updates.items()}

    return optax.stateless(add)


def _decay_of(config: OptimizerConfig, name: str, ndim: int) -> float:
    role = getattr(config.decay_by_role, role_of(name, ndim))
    return config.weight_decay * role * getattr(config.decay_by_component, component_of(name), 1.0)


def _rate_of(
    schedules: Mapping[str, Schedule], factors: options.ByRole, name: str, ndim: int, count: Any
) -> jax.Array:
    return schedules[component_of(name)](count) * getattr(factors, role_of(name, ndim))


class ScaleByComponentState(NamedTuple):
    """Updates so far."""

    count: jax.Array


def scale_by_component(
    schedules: Mapping[str, Schedule], factors: options.ByRole
) -> optax.GradientTransformation:
    """Multiply each array's update by minus the current rate of its component and role."""

    def init(params: optax.Params) -> ScaleByComponentState:
        del params
        return ScaleByComponentState(jnp.zeros((), jnp.int32))

    def update(updates: Arrays, state: ScaleByComponentState, params: optax.Params | None = None):
        del params
        rate = partial(_rate_of, schedules, factors)
        scaled = {n: -rate(n, u.ndim, state.count).astype(u.dtype) * u for n, u in updates.items()}
        return scaled, ScaleByComponentState(state.count + 1)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
