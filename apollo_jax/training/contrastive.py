# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax contrastive`: pretrains encoders on clips and captions, on the data path of Apollo.

A row of the loader's batch is one pair: it has one clip slot, and what its conversation teaches
(`loss_weights`) is the caption. All else is the loop of `apollo-jax train`. `init_parts.towers` of
an Apollo's config accepts the folder of such a run.

B pairs, T caption tokens.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from apollo_jax import sharding
from apollo_jax.checkpoints import local_tier, manager, run
from apollo_jax.config import EvalConfig, OptimizerConfig, TrainConfig, read, shared_problems
from apollo_jax.config_values import from_dict, parse_overrides
from apollo_jax.models import two_towers
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import checks, contrastive_loss, losses, processes
from apollo_jax.training import train as training
from apollo_jax.training.boards import find_wandb
from apollo_jax.training.goodput import Goodput
from apollo_jax.training.guard import Guard
from apollo_jax.training.held_out import check_held_out
from apollo_jax.training.loading import open_loader, records_of, resume
from apollo_jax.training.meeting import meet
from apollo_jax.training.noise_scale import NoiseScale
from apollo_jax.training.optimizer import (
    Batches,
    make_optimizer,
    make_schedules,
    rates_by_batch,
)
from apollo_jax.training.profiling import listen
from apollo_jax.training.ramp import left_out
from apollo_jax.training.shared_folder import refuse_apart
from apollo_jax.training.state import (
    Arrays,
    TrainState,
    abstract_model,
    abstract_state,
    random_weights,
)
from apollo_jax.training.step import Program, groups_of, make_program
from apollo_jax.training.throughput import peak_seconds
from apollo_jax.training.weights import load_part, tower_parts
from data_pipeline.batch import Batch
from data_pipeline.loader import DataConfig

console = training.console


@dataclass(frozen=True)
class Rates:
    """Peak learning rate of each component; 0 freezes it."""

    vision_tower: float = 1e-3
    text: float = 1e-3
    heads: float = 1e-3  # pooling, projections, temperature and bias


@dataclass(frozen=True)
class TowerPaths:
    """Published folders to start towers from, the others being random."""

    towers: dict[str, str] = field(default_factory=dict)  # by their names in config.model.towers


@dataclass(frozen=True)
class Contrastive:
    """All that determines a contrastive run; `optimizer.learning_rates` is not read, `rates` is."""

    name: str
    model: two_towers.Config
    data: DataConfig
    train: TrainConfig
    rates: Rates = Rates()
    loss: Literal["sigmoid", "softmax"] = "sigmoid"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init_parts: TowerPaths = field(default_factory=TowerPaths)
    seed: int = 0

    def __post_init__(self):
        if problems := list(_problems(self)):
            raise ValueError("config does not fit together:\n  " + "\n  ".join(problems))


def _problems(c: Contrastive) -> Iterator[str]:
    if c.data.clips != 1:
        yield f"config.data.clips is {c.data.clips}, a row of a contrastive batch is one pair: 1"
    if c.data.frame_size != c.model.frame_size:
        size = c.model.frame_size
        yield f"config.data.frame_size is {c.data.frame_size}, the towers take {size}"
    if c.data.frames_per_clip != c.model.frames_per_clip:
        count = c.model.frames_per_clip
        yield f"config.data.frames_per_clip is {c.data.frames_per_clip}, the model takes {count}"
    if c.evaluation.samples:
        yield "config.evaluation.samples is of apollo-jax train: towers answer nothing"
    yield from shared_problems(c)
    if c.train.lora.chosen() or c.train.ema_decay:
        yield "config.train.lora and config.train.ema_decay are of apollo-jax train alone"
    if c.train.noise_scale_norms:
        yield (
            "config.train.noise_scale_norms reads the norms of a decoder, and there is none here: "
            "take config.train.noise_scale"
        )
    if unknown := set(c.init_parts.towers) - set(c.model.towers):
        known = ", ".join(c.model.towers)
        yield f"config.init_parts.towers names {sorted(unknown)}; the model has {known}"
    if not any(asdict(c.rates).values()):
        yield f"config.rates are {asdict(c.rates)}; one must be positive"


def main(argv: list[str]) -> None:
    """Pretrain encoders on pairs as a config file says; the same command continues a run."""
    parser = argparse.ArgumentParser(
        "apollo-jax contrastive",
        description=main.__doc__,
        epilog="Any field of the config can be set: --config.train.num_steps=100",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]")
    parser.add_argument("--workdir", required=True, type=Path)
    processes.add_flag(parser)
    args, rest = parser.parse_known_args(argv)
    listen()
    experiment = load(args.config, parse_overrides(rest))
    if args.distributed:
        processes.join(args.distributed, experiment)
    with processes.parting():
        train(experiment, args.workdir)


def load(spec: str, overrides: dict[str, str] | None = None) -> Contrastive:
    """As `config.load`: the experiment of `FILE[:arg]` with overrides applied."""
    return from_dict(Contrastive, read(spec, overrides))


def train(experiment: Contrastive, workdir: Path) -> bool:
    """Train to the end or to a stop signal; True if all steps are done. Errors as `train.train`."""
    goodput = Goodput()
    find_wandb(experiment.train.wandb)  # or say so now
    table = experiment.model.text.vocab_size
    tokenizer = checks.tokenizer_of(experiment, table, "model.text.vocab_size")
    begun = _continues(experiment, workdir)
    mesh = sharding.make_mesh(experiment.mesh)
    if experiment.data.batch_size % mesh.size:
        raise ValueError(
            f"config.data.batch_size {experiment.data.batch_size} does not divide over the "
            f"{mesh.size} devices that share the pairs; take a multiple of {mesh.size}"
        )
    sizes = experiment.train.ramp
    loader = open_loader(experiment.data, experiment.train.num_steps, mesh, sizes)
    seconds = experiment.train.join_seconds
    processes.same("data", loader.get_state()["data"], seconds)
    check_held_out(experiment, mesh)
    refuse_apart(workdir, seconds)
    processes.same("begun", {f"whether {workdir} holds the run": begun}, seconds)
    console.quiet = jax.process_index() != 0
    needs = peak_seconds(experiment, pair_flops)
    with contextlib.closing(loader), jax.set_mesh(mesh):
        program = build(experiment, mesh)
        check_memory(experiment, program.abstract, mesh.shape)
        batches = Batches(experiment.data.batch_size, sizes)
        late = left_out(experiment.train.batch_ramp, experiment.train.num_steps)
        for line in (*late, *rates_by_batch(_rated(experiment), batches)):
            console.print(line, soft_wrap=True, highlight=False)
        with goodput.during("checkpoint" if begun else "start"):
            first = partial(initial_weights, experiment, program.abstract)
            tier = local_tier.open_tier(experiment.train, workdir, mesh, program.abstract, begun)
            held = workdir if begun else None
            step, state, saved = training.start(experiment, held, program, first, tier)
        if saved is not None:
            resume(loader, saved, sizes, step)
        meet()  # all have seen what the folder held
        manager.write_run(workdir, experiment, tokenizer)  # pyright: ignore[reportArgumentType]
        whole: Any = experiment  # has the fields of an Experiment that the loop reads
        judged = None if saved is None else saved.get("guard")
        guard = Guard(whole.train, workdir, records_of(loader, sizes), judged)
        noise = NoiseScale(None if saved is None else saved.get("noise"))
        begun_run = training.Run(
            whole, workdir, mesh, program, loader, guard, goodput, noise, tier, needs
        )
        return training.loop(begun_run, step, state)


def check_memory(
    experiment: Contrastive, state: TrainState, mesh: Mapping[str, int], limit: float | None = None
) -> None:
    """As `checks.memory`; pairs are spread over all devices of any mesh, weights are not."""
    checks.memory(experiment, state, mesh, limit, refusals=_refusals)


def _refusals(
    experiment: Contrastive, mesh: Mapping[str, int], divisors: Any, machine: Any
) -> Iterator[str]:
    del experiment, machine
    return checks.indivisible(mesh, divisors)


def pair_flops(experiment: Contrastive) -> float:
    """FLOPs that a microbatch needs: both towers' gradients, three products of clips with captions.

    Counted as `planning.flops.model_flops` does.
    """
    from apollo_jax.planning.flops import flops_of_a_row  # nobody else needs the planner

    rows, width = experiment.data.batch_size, experiment.model.embedding_size
    return (
        flops_of_a_row(experiment, _trained(experiment), pair_sums) * rows + 6.0 * rows**2 * width
    )


def _continues(experiment: Contrastive, workdir: Path) -> bool:
    if not run.is_run(workdir):
        return False
    held = from_dict(Contrastive, json.loads((workdir / run.CONFIG).read_text()))
    checks.refuse_changes(workdir, held, experiment)
    return True


def initial_weights(experiment: Contrastive, abstract: TrainState) -> tuple[Arrays, str]:
    """The weights of step 0: random, but for towers from published folders; where they are from."""
    shapes = {**abstract.params, **abstract.frozen}
    parts = tower_parts(experiment.model.towers, experiment.init_parts.towers)
    loaded = [load_part(prefix, path, config, shapes) for prefix, path, config in parts]
    weights = random_weights(experiment.model, experiment.train, shapes, experiment.seed)
    for part in loaded:
        weights |= part
    origin = ", ".join(["random", *(f"{prefix} from {path}" for prefix, path, _ in parts)])
    return weights, f"{origin}; {', '.join(_trained(experiment))} train"


def _trained(experiment: Contrastive) -> tuple[str, ...]:
    return tuple(c for c, rate in asdict(experiment.rates).items() if rate > 0)


def _rated(experiment: Contrastive) -> OptimizerConfig:
    return replace(experiment.optimizer, learning_rates=experiment.rates)  # pyright: ignore


def build(experiment: Contrastive, mesh: Mesh) -> Program:
    """As `step.build`, with the loss of pairs."""
    config, trained = experiment.train, _trained(experiment)
    graphdef, shapes = abstract_model(experiment.model, config, trained, mesh)
    rated, batches = _rated(experiment), Batches(experiment.data.batch_size, config.ramp)
    schedules = make_schedules(rated, config.num_steps, batches)
    tx = make_optimizer(rated, schedules)
    abstract = abstract_state(shapes, trained, tx, mesh, offload=config.offload_optimizer)
    groups = groups_of(experiment)
    sums: Any = partial(pair_sums, loss=experiment.loss, remat=config.remat, groups=groups)
    return make_program(config, graphdef, tx, schedules, sums, abstract, groups=groups)


def pair_sums(
    model: two_towers.TwoTowers,
    batch: Batch,
    *,
    loss: str = "sigmoid",
    remat: str = "none",
    groups: int = 0,
) -> losses.Sums:
    """Loss, pairs that find each other (R@1 in the batch, mean of both directions), and pairs.

    A row whose record could not be read is a pair of zeros, that pulls at nothing but the bias.
    Given `groups`, loss and pairs are told by the group of the caption, without such rows.
    """
    x = jax.tree.map(jnp.asarray, batch)
    tokens, there = captions(x.targets, x.loss_weights, model.config.text.max_tokens)
    clips = model.embed_clips(x.frames[:, 0], x.frame_geometry[:, 0], remat=remat)
    texts = model.embed_captions(tokens, there, remat=remat)
    whole = (x.clip_mask[:, 0] & there[:, 0])[:, None]
    clips, texts = (jnp.where(whole, e, jnp.zeros((), e.dtype)) for e in (clips, texts))
    scale, bias = jnp.exp(model.heads.log_scale[...]), model.heads.bias[...]
    if loss == "sigmoid":
        value = contrastive_loss.sigmoid_loss(clips, texts, scale, bias)
    else:
        value = contrastive_loss.softmax_loss(clips, texts, scale)
    pairs, by_group = jnp.asarray(clips.shape[0], jnp.float32), None
    if groups:
        group = jnp.max(jnp.where(x.loss_weights > 0, x.groups, 0), axis=1)
        mine = (group == jnp.arange(groups)[:, None]) & whole[:, 0]  # [G, B]
        by_row = jax.lax.stop_gradient(value.rows)
        sums = [jnp.sum(jnp.where(mine, v, 0.0), axis=1) for v in (by_row, jnp.ones_like(by_row))]
        by_group = jnp.stack(sums, axis=1)
    found = contrastive_loss.retrieved(clips, texts)
    return losses.Sums(value.mean * pairs, found, pairs, by_group)


def captions(
    targets: Int[Array, "B L"], weights: Array, most: int
) -> tuple[Int[Array, "B {most}"], Bool[Array, "B {most}"]]:
    """The first `most` tokens that a row teaches, one after the other, and where they are."""
    learnt = weights > 0
    order = jnp.argsort(~learnt, axis=1, stable=True)[:, :most]
    order = jnp.pad(order, ((0, 0), (0, most - order.shape[1])))
    there = jnp.arange(most) < jnp.sum(learnt, axis=1, keepdims=True)
    return jnp.where(there, jnp.take_along_axis(targets, order, axis=1), 0), there
