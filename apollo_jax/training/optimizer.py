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
from apollo_jax.training.ramp import Ramp
from apollo_jax.training.state import Arrays, component_of


class Batches(NamedTuple):
    """The rows of a microbatch, and the microbatches of each update."""

    rows: int = 1
    ramp: Ramp = Ramp(((0, 1),))


ONE = Batches()  # of one row

Schedule = Callable[[jax.Array], jax.Array]  # updates so far, i32[] -> learning rate, f32[]


def make_schedules(
    config: OptimizerConfig, num_steps: int, batch: Batches = ONE
) -> dict[str, Schedule]:
    """Learning rate of each trained component as a function of the updates so far.

    Linear warm-up from 0 over warmup_ratio of the run, then cosine to 0 (or constant); the run is
    counted in updates or in what they consume. Times the rule for the batch of the update.
    """
    rates = dataclasses.asdict(config.learning_rates)
    return {n: partial(_rate, config, num_steps, batch, r) for n, r in rates.items() if r > 0}


def _rate(
    config: OptimizerConfig, num_steps: int, batch: Batches, peak: float, count: jax.Array
) -> jax.Array:
    total, done = num_steps, count
    # In a run without a ramp every update consumes the same: its shares are those of the updates.
    if config.schedule_by != "steps" and len(batch.ramp.pieces) > 1:
        total, done = batch.ramp.before(num_steps), batch.ramp.traced_before(count)
    warmup = math.ceil(config.warmup_ratio * total)
    step = done.astype(jnp.float32)
    rate = peak * jnp.minimum(step / max(1, warmup), 1.0) if warmup else jnp.full_like(step, peak)
    if config.rate_rule != "none":
        rows = batch.rows * batch.ramp.traced_at(count).astype(jnp.float32)
        rate = rate * rule_factor(config, rows)
    if config.schedule == "constant":
        return rate
    progress = jnp.clip((step - warmup) / max(1, total - warmup), 0.0, 1.0)
    return rate * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def rule_factor(config: OptimizerConfig, rows: Any) -> Any:
    """What rates are multiplied with for an update from `rows` rows."""
    if config.rate_rule == "none":
        return 1.0
    return (rows / config.base_batch) ** (0.5 if config.rate_rule == "sqrt" else 1.0)


def rates_by_batch(config: OptimizerConfig, batch: Batches) -> list[str]:
    """What to tell of the rows of the updates, their peak rates, and what is set in vain."""
    rates = {n: r for n, r in dataclasses.asdict(config.learning_rates).items() if r > 0}
    lines = list(options.unread(config))
    for first, count in batch.ramp.pieces:
        rows = batch.rows * count
        factor = rule_factor(config, rows)
        peaks = ", ".join(f"{name} {rate * factor:.3g}" for name, rate in rates.items())
        rule = f" = {factor:.3g} x ({config.rate_rule}, base {config.base_batch})"
        lines.append(
            f"from update {first}: {rows} rows ({count} x {batch.rows}), peak rates {peaks}"
            + rule * (config.rate_rule != "none")
        )
    return lines


def make_optimizer(
    config: OptimizerConfig, schedules: Mapping[str, Schedule]
) -> optax.GradientTransformationExtraArgs:
    """The optimizer over a flat dict of the trainable arrays.

    Its update takes `step`, the updates so far of the run: after some that were left out or taken
    back they are more than it has seen.
    """
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts = optax.chain(*clip, *_after_clip(config, schedules))
    return optax.with_extra_args_support(parts)


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
            # Where a projection is not smaller than the gradient, Adam is exact and keeps less.
            apollo = scale_by_apollo(low, *moments)
            return [by_role(apollo, adam, roles, above=low.rank), *decay, rate]


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
    """Multiply each array's update by minus the current rate of its component and role.

    `step` of the update: the run's updates so far, if they are others than those seen here.
    """

    def init(params: optax.Params) -> ScaleByComponentState:
        del params
        return ScaleByComponentState(jnp.zeros((), jnp.int32))

    def update(
        updates: Arrays,
        state: ScaleByComponentState,
        params: optax.Params | None = None,
        *,
        step: jax.Array | None = None,
        **others: Any,
    ):
        del params, others
        count = state.count if step is None else step
        rate = partial(_rate_of, schedules, factors)
        scaled = {n: -rate(n, u.ndim, count).astype(u.dtype) * u for n, u in updates.items()}
        return scaled, ScaleByComponentState(state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
