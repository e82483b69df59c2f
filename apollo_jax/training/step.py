# SPDX-License-Identifier: Apache-2.0
"""The train step: jax.jit over split state, a Batch in, scalars out.

B rows, L tokens, C clip slots per row, Q visual tokens per clip, D stream.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from apollo_jax import sharding
from apollo_jax.config import Experiment, TrainConfig
from apollo_jax.models import ring_attention
from apollo_jax.models.apollo import Apollo
from apollo_jax.models.pieces import Pieces
from apollo_jax.training import accumulate, losses, noise_scale, norm_noise, stages
from apollo_jax.training.accumulate import Accumulated
from apollo_jax.training.average import with_average
from apollo_jax.training.meeting import together
from apollo_jax.training.optimizer import Batches, Schedule, make_optimizer, make_schedules
from apollo_jax.training.optimizers.schedule_free import gradient_point
from apollo_jax.training.state import (
    Arrays,
    TrainState,
    abstract_model,
    abstract_state,
    component_of,
    merge,
    on_device,
)
from data_pipeline.batch import MODALITIES, Batch

Metrics = dict[str, jax.Array]
# The old state's memory is reused: drop it.
# (state, batch[, limits and what was accumulated, see `make_update`])
TrainStep = Callable[..., tuple[TrainState, Metrics]]
Lower = Callable[..., jax.stages.Lowered]
Add = Callable[..., Accumulated]  # (state, batch[, what was accumulated])
EvalStep = Callable[[TrainState, Batch], losses.Sums]
LossSums = Callable[..., losses.Sums]  # (model, batch[, probe, see norm_noise.py])
BY_POSITION = (
    "tokens", "targets", "loss_weights", "positions", "segment_ids", "visual_index", "groups",
)  # fmt: skip


def batch_sums(
    model: Apollo,
    batch: Batch,
    train: TrainConfig,
    attention: str = "ring",
    groups: int = 0,
    probe: jax.Array | None = None,
) -> losses.Sums:
    """Loss sums of a batch: encode the clips, splice them in, decode.

    `attention` is that of the mesh config. They are told by group if there are `groups` of them,
    see `groups_of`. The gradient of `probe` is told by norm_noise.py.
    """
    x = jax.tree.map(jnp.asarray, batch)
    zigzag = attention == "ring" and sharding.ways("length") > 1
    if zigzag:  # losses are sums over positions, in any order
        x = x._replace(**{f: ring_attention.zigzag(getattr(x, f)) for f in BY_POSITION})
    x = x._replace(**{f: sharding.constrain(getattr(x, f), "batch", "length") for f in BY_POSITION})
    rows, clips = batch.clip_mask.shape
    visual = None
    if clips:
        frames = x.frames.reshape(rows * clips, *x.frames.shape[2:])
        visual = model.encode_clips(frames, x.frame_geometry.reshape(-1, 4), remat=train.remat)
        visual = visual.reshape(rows, -1, visual.shape[-1])  # [B*C, Q, D] -> [B, C*Q, D]
    hidden = model.hidden(
        x.tokens,
        visual_tokens=visual,
        visual_index=x.visual_index,
        positions=x.positions,
        segment_ids=x.segment_ids,
        remat=train.remat,
        zigzag=zigzag,
        pieces=None if probe is None else Pieces(norm_noise.modality_of(x), probe),
    )
    return losses.cross_entropy(
        hidden,
        model.llm.head,
        x.targets,
        x.loss_weights,
        chunk=train.loss_chunk,
        cut=train.loss_cut,
        skip_below=train.loss_skip_below,
        groups=x.groups,
        num_groups=groups,
    )


class Program(NamedTuple):
    """What an experiment compiles to on a mesh.

    `train_step` is an update from one microbatch and, given `accumulated`, all those before it.
    """

    abstract: TrainState  # shapes and shardings of its state
    tx: optax.GradientTransformationExtraArgs
    train_step: TrainStep
    eval_step: EvalStep
    lower: Lower  # the train step, for a batch of shapes
    add: Add  # a microbatch that is not the last of its update; takes over what was accumulated
    lower_add: Lower


def build(experiment: Experiment, mesh: Mesh) -> Program:
    """The experiment's steps; nothing is allocated or compiled yet. Call them under the mesh."""
    train, rates = experiment.train, experiment.optimizer.learning_rates
    trained = stages.trained_components(rates)
    graphdef, shapes = abstract_model(experiment.model, train, trained, mesh)
    batches = Batches(experiment.data.batch_size, train.ramp)
    schedules = make_schedules(experiment.optimizer, train.num_steps, batches)
    tx = with_average(make_optimizer(experiment.optimizer, schedules), train.ema_decay)
    abstract = abstract_state(shapes, trained, tx, mesh, offload=train.offload_optimizer)
    groups = groups_of(experiment)
    sums = partial(batch_sums, train=train, attention=experiment.mesh.attention, groups=groups)
    options = sharding.compiler_options(mesh, experiment.mesh.sparse_cores)
    llm = experiment.model.llm
    gains = norm_noise.Gains(llm.norms, llm.hidden_size) if train.noise_scale_norms else None
    return make_program(train, graphdef, tx, schedules, sums, abstract, options, groups, gains)


def groups_of(experiment: Any) -> int:
    """Numbers below this stand in `Batch.groups`, of training and of held-out sources."""
    sources = (experiment.data.sources, experiment.evaluation.sources)
    return len(MODALITIES) * max(map(len, sources))


def make_program(
    train: TrainConfig,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    schedules: Mapping[str, Schedule],
    loss_sums: LossSums,
    abstract: TrainState,
    options: Mapping[str, str] | None = None,
    groups: int = 0,
    gains: norm_noise.Gains | None = None,
) -> Program:
    """The steps of a model with these loss sums."""
    update = make_update(graphdef, tx, schedules, loss_sums, abstract, options, gains)
    told = accumulate.Told(train.noise_scale, groups, gains)
    zeros: Callable[[], Accumulated] = accumulate.make_zeros(abstract, told)
    adder = accumulate.make_add(graphdef, loss_sums, abstract, options, told)
    shapes = accumulate.shapes_of(abstract, told)
    update_together, add_together = together(update), together(adder)

    def train_step(
        state: TrainState,
        batch: Batch,
        limits: np.ndarray | None = None,
        accumulated: Accumulated | None = None,
    ) -> tuple[TrainState, Metrics]:
        moving = _moving(state)
        moved, metrics = update_together(moving, state.frozen, batch, limits, accumulated)
        count, params, opt_state = moved
        return TrainState(count, params, state.frozen, opt_state), metrics

    def add(state: TrainState, batch: Batch, accumulated: Accumulated | None = None) -> Accumulated:
        if accumulated is None:
            jax.block_until_ready(state.step)  # what the update before accumulated is free again
            accumulated = zeros()
        grads, *sums = accumulated
        held = state.params, state.opt_state, state.frozen
        return add_together(grads, tuple(sums), *held, batch)

    def lower(batch: Batch, accumulated: bool = False) -> jax.stages.Lowered:
        skips = train.on_nonfinite == "skip"
        limits = jax.ShapeDtypeStruct((2,), jnp.float32) if skips else None
        before = shapes if accumulated else None
        return update.lower(_moving(abstract), abstract.frozen, batch, limits, before)

    def lower_add(batch: Batch) -> jax.stages.Lowered:
        held = abstract.params, abstract.opt_state, abstract.frozen
        return adder.lower(shapes.grads, tuple(shapes[1:]), *held, batch)

    evaluate = make_eval_step(graphdef, loss_sums)
    return Program(abstract, tx, train_step, evaluate, lower, add, lower_add)


def make_update(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformationExtraArgs,
    schedules: Mapping[str, Schedule],
    loss_sums: LossSums,
    abstract: TrainState,
    options: Mapping[str, str] | None = None,
    gains: norm_noise.Gains | None = None,
) -> Any:
    """Jitted (what moves, frozen, batch) -> (what moves, metrics); what moved is overwritten.

    `frozen` is an input only, so its arrays are never copied or rewritten and may be shared.
    Given `limits` f32[2], parameters and moments stay what they were, bit for bit, unless loss and
    gradient norm are below them (infinity: unless they are finite). Given what was `accumulated`,
    loss and gradient are means over its microbatches and this one together. With `gains`, metrics
    have the noise by modality.
    """
    places = jax.tree.map(lambda s: s.sharding, _moving(abstract))

    @partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(places, None),
        compiler_options=dict(options or {}),
    )
    def update(
        moving: tuple,
        frozen: Arrays,
        batch: Batch,
        limits: Any = None,
        accumulated: Accumulated | None = None,
    ):
        count, params, opt_state = moving
        opt_state = on_device(opt_state, abstract.opt_state)
        old = (params, opt_state)

        point, rows = gradient_point(params, opt_state), None
        inputs = graphdef, loss_sums, point, frozen, batch, gains
        if accumulated is None:
            grads, by_piece, metrics = accumulate.gradients(_measured, *inputs)
            if gains is not None:
                whole = jnp.maximum(metrics["target_tokens"], 1.0)  # the loss was a mean
                rows = norm_noise.norm_spread_of(by_piece * whole, batch)
        else:
            total = accumulate.added(accumulated, *inputs)
            grads, rows = accumulate.mean_gradients(total, params), total.norms
            _, metrics = _measured(total.sums)
            if total.spread is not None:
                metrics |= noise_scale.estimates(total.spread, total.grads, total.sums.weight)
        if rows is not None:
            metrics |= norm_noise.norm_estimates(rows)
        metrics |= norms("grad_norm", grads)  # before clipping
        metrics |= {f"learning_rate/{c}": s(count) for c, s in schedules.items()}
        # The plan tells its exchanges by this scope; optax raises floats to integer powers.
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(grads, opt_state, params, step=count)
        params = optax.apply_updates(params, updates)
        moved = norms("update_norm", updates)
        if limits is not None:
            good = jnp.all(jnp.stack([metrics["loss"], metrics["grad_norm"]]) < limits)
            new = (params, opt_state)
            params, opt_state = jax.tree.map(partial(jnp.where, good), new, old)
            moved = {name: jnp.where(good, norm, 0.0) for name, norm in moved.items()}
        metrics |= moved | norms("param_norm", params)
        return (count + 1, params, opt_state), metrics

    return update


def _measured(sums: losses.Sums) -> tuple[jax.Array, Metrics]:
    """The loss, and what is reported of it."""
    loss, accuracy = losses.mean(sums)
    metrics = {"loss": loss, "accuracy": accuracy, "target_tokens": sums.weight}
    return loss, metrics if sums.by_group is None else metrics | {losses.BY_GROUP: sums.by_group}


def _moving(state: TrainState) -> tuple:
    return state.step, state.params, state.opt_state


def make_eval_step(graphdef: nnx.GraphDef, loss_sums: LossSums) -> EvalStep:
    """(state, batch) -> loss sums."""

    @together
    @jax.jit
    def sums(params: Arrays, frozen: Arrays, batch: Batch) -> losses.Sums:
        return loss_sums(merge(graphdef, params, frozen), batch)

    return lambda state, batch: sums(state.params, state.frozen, batch)


def norms(what: str, arrays: Any) -> Metrics:
    """`what/COMPONENT`: the norm of each component's arrays; `what`: of all of them."""
    squares: dict[str, jax.Array] = {}
    for name, array in arrays.items():
        square = jnp.sum(jnp.square(array.astype(jnp.float32)))
        component = component_of(name)
        squares[component] = squares.get(component, jnp.zeros((), jnp.float32)) + square
    whole = sum(squares.values(), jnp.zeros((), jnp.float32))
    return {what: jnp.sqrt(whole)} | {f"{what}/{c}": jnp.sqrt(s) for c, s in squares.items()}
