# SPDX-License-Identifier: Apache-2.0
"""Experiments: frozen dataclasses, and the files that write them; see config_values.py.

A config file is `configs/NAME.py` with `get_config(arg: str = "") -> ConfigDict`; it writes a typed
`Experiment` and returns `to_config(experiment)`. `load("configs/NAME.py:arg", overrides)` reads it.
"""

import dataclasses
import difflib
import importlib.util
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from apollo_jax.config_ranges import out_of_range
from apollo_jax.config_values import from_dict, leaves, override
from apollo_jax.config_values import to_config as to_config  # config files write it
from apollo_jax.models import apollo
from apollo_jax.models.lora import LoraConfig
from apollo_jax.sharding import MeshConfig
from apollo_jax.training import profiling, ramp
from apollo_jax.training.optimizers import options
from data_pipeline.loader import DataConfig, SourceConfig

REQUIRED = "REQUIRED"  # a path that a config file leaves to its user

DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "save_qkv", "save_attention", "full", "offload", "nested"]


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rate of each component; 0 freezes it. A stage is which of them train."""

    vision_tower: float = 0.0
    connector: float = 0.0
    llm: float = 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """A clip by global norm over what trains, then one of the optimizers in docs/optimizers.md.

    AdamW, the schedule and the clip are the paper's (App C); betas and decay our own.
    """

    learning_rates: LearningRates = LearningRates()
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.03  # share of the run, in what schedule_by counts
    clip_norm: float = 1.0  # 0 = no clipping
    b1: float = 0.9  # these three: of AdamW and all that is derived from it
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # times the rate
    name: Literal[
        "adamw", "adafactor", "lamb", "lars", "lion", "muon", "schedule_free", "apollo",
        "apollo_mini",
    ] = "adamw"  # fmt: skip
    rate_by_role: options.ByRole = field(
        default_factory=options.ByRole
    )  # times the component's rate
    decay_by_role: options.ByRole = field(default_factory=options.no_decay)  # times weight_decay
    decay_by_component: options.ByComponent = field(default_factory=options.ByComponent)
    # What the schedule follows: they differ where the batch does, see docs/large_batch.md.
    schedule_by: Literal["steps", "samples", "tokens"] = "steps"
    # learning_rates are those of a batch of base_batch rows; others get them times this rule.
    rate_rule: Literal["none", "linear", "sqrt"] = "none"
    base_batch: int = 0
    adafactor: options.Adafactor = field(default_factory=options.Adafactor)
    lars: options.Lars = field(default_factory=options.Lars)
    lion: options.Lion = field(default_factory=options.Lion)
    muon: options.Muon = field(default_factory=options.Muon)
    apollo: options.Apollo = field(default_factory=options.Apollo)
    apollo_mini: options.Apollo = field(default_factory=options.apollo_mini)


@dataclass(frozen=True)
class TrainConfig:
    """The loop: how long, in which precision, and what it leaves behind."""

    num_steps: int  # a step is one update
    accumulate: int = 1  # microbatches (of data.batch_size rows) to an update
    # Instead: (first update, microbatches from there on), from 0 on: 0:1,1000:2,5000:8
    batch_ramp: tuple[tuple[int, int], ...] = ()
    noise_scale: bool = False  # estimate it from the microbatches of an update
    noise_scale_norms: bool = False  # and by modality from its rows, by the decoder's norms
    dtype: DType = "bfloat16"  # of the computation
    param_dtype: DType = "float32"  # of what trains, and of its optimizer moments
    frozen_dtype: DType = "bfloat16"  # of what does not train
    remat: Remat = "none"  # what the backward pass keeps of each layer, see models/layers.py: fold
    lora: LoraConfig = field(default_factory=LoraConfig)  # low-rank updates, see docs/stages.md
    ema_decay: float = 0.0  # per update, of an average of what trains; 0 = none
    offload_optimizer: bool = False  # its moments in the host's memory, brought in for each update
    loss_chunk: int = 0  # positions per device whose logits exist at a time; 0 = all
    # What the logits are cut along: "positions" computes least, "vocabulary" sends least of many
    # positions, see linear_cross_entropy.py.
    loss_cut: Literal["positions", "vocabulary"] = "positions"
    # Gradient filtering: blocks of the vocabulary of which no probability (less one at the target)
    # reaches it are left out of the gradients; 0 = none, the exact gradient.
    loss_skip_below: float = 0.0
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2  # checkpoints
    local_checkpoints: str = ""  # folder on each machine's own disk, see docs/survive.md
    local_every: int = 50  # steps from one that is saved there to the next
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"  # what bad steps do, see guard.py
    spike_factor: float = 0.0  # times the median loss or gradient norm: bad as well; 0 = never
    max_bad_steps: int = 10  # in a row, with skip and rewind
    join_seconds: int = 300  # that a process waits for the others at the start
    heartbeat_seconds: int = 60  # of silence after which a process counts as dead
    profile: str = ""  # steps to trace for XProf, START:COUNT; see docs/seeing.md
    wandb: str = ""  # project of Weights & Biases that gets the scalars too

    @property
    def ramp(self) -> ramp.Ramp:
        """How many microbatches each update has."""
        pieces = self.batch_ramp or ((0, self.accumulate),)
        return ramp.Ramp(ramp.reached(pieces, self.num_steps))


@dataclass(frozen=True)
class EvalConfig:
    """Loss on held-out sources during training, on the data settings of the experiment."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    every: int = 0  # steps; 0 = never
    batches: int = 8
    samples: int = 0  # that the model answers at every evaluation, see docs/seeing.md


@dataclass(frozen=True)
class PartPaths:
    """Published folders to start single parts from, the others being random; "" = random."""

    towers: dict[str, str] = field(default_factory=dict)  # by their names in config.model.towers
    connector: str = ""
    llm: str = ""


@dataclass(frozen=True)
class Experiment:
    """All that determines a training run."""

    name: str
    model: apollo.Config
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvalConfig = EvalConfig()
    mesh: MeshConfig = field(default_factory=MeshConfig)
    topology: str = (
        ""  # the TPU slice that mesh and batch are laid out for; "" = none in particular
    )
    # What a sample takes of packed rows, on average; 0 = not known. The plan's costs go by it.
    positions_per_sample: float = 0.0
    # Folder of a run or a published model; "run:NAME": the finished run of that name beside the
    # workdir; "" = init_parts.
    init_from: str = ""
    init_parts: PartPaths = field(default_factory=PartPaths)
    seed: int = 0

    def __post_init__(self):
        problems = list(_problems(self))
        if problems:
            raise ValueError("config does not fit together:\n  " + "\n  ".join(problems))


def _problems(e: Experiment) -> Iterator[str]:
    same = {
        "data.tokens_per_clip": (e.data.tokens_per_clip, e.model.connector.num_output_tokens),
        "data.frame_size": (e.data.frame_size, e.model.frame_size),
        "data.frames_per_clip": (e.data.frames_per_clip, e.model.frames_per_clip),
        "data.clip_duration": (e.data.clip_duration, e.model.clip_duration),
    }
    for name, (value, wanted) in same.items():
        if value != wanted:
            yield f"config.{name} is {value}, the model takes {wanted}"
    if not 0 <= e.positions_per_sample < math.inf:
        yield f"config.positions_per_sample is {e.positions_per_sample}, must be at least 0"
    if e.data.length > e.model.llm.max_position_embeddings:
        limit = e.model.llm.max_position_embeddings
        yield f"config.data.length is {e.data.length}, the decoder's positions end at {limit}"
    for name in ("vision_tower", "connector", "llm"):
        updates, rate = getattr(e.train.lora, name), getattr(e.optimizer.learning_rates, name)
        if updates.rank > 0 and not updates.targets:
            yield (
                f"config.train.lora.{name}.targets is empty, with rank {updates.rank} it names "
                "the linears that get updates: layers/* is usual, all in the blocks"
            )
        if updates.rank > 0 and not rate:
            yield (
                f"config.train.lora.{name}.rank is {updates.rank} but nothing of it trains: "
                f"config.optimizer.learning_rates.{name} is 0"
            )
    if e.train.noise_scale_norms:
        if not e.optimizer.learning_rates.llm or e.train.lora.llm.rank:
            yield (
                "config.train.noise_scale_norms reads the gradients of the decoder's norms, which "
                "do not train here: take config.train.noise_scale"
            )
        if e.data.batch_size * e.train.ramp.most < 2:
            yield (
                "config.train.noise_scale_norms compares the rows of an update, which has only one "
                "here: set config.data.batch_size or config.train.accumulate to 2 or more"
            )
    yield from shared_problems(e)


def shared_problems(e: Any) -> Iterator[str]:
    """What can be wrong with `train`, `optimizer` and `evaluation` of any kind of run."""
    yield from out_of_range(e)
    train, optimizer, evaluation = e.train, e.optimizer, e.evaluation
    if optimizer.name == "schedule_free":
        if train.ema_decay:
            yield (
                "config.optimizer.name schedule_free averages by itself: config.train.ema_decay "
                f"must be 0, is {train.ema_decay}"
            )
        if optimizer.schedule != "constant":
            yield (
                "config.optimizer.name schedule_free needs config.optimizer.schedule=constant, "
                f"which is {optimizer.schedule}"
            )
    if train.loss_skip_below and train.loss_cut != "vocabulary":
        yield "config.train.loss_skip_below skips blocks: it needs config.train.loss_cut=vocabulary"
    yield from ramp.problems(train.accumulate, train.batch_ramp, train.num_steps, train.noise_scale)
    yield from options.rate_problems(optimizer.rate_rule, optimizer.base_batch)
    try:
        first, _ = profiling.parse(train.profile)
        if first > train.num_steps:
            last = train.num_steps
            yield f"config.train.profile begins at step {first}, the run ends at {last}"
    except ValueError as error:
        yield f"config.train.profile: {error}"
    if evaluation.samples and not evaluation.every:
        yield "config.evaluation.samples are answered at evaluations: set config.evaluation.every"
    if evaluation.every and not evaluation.sources:
        yield "config.evaluation.every is set but config.evaluation.sources is empty"


def load(spec: str, overrides: Mapping[str, str] | None = None) -> Experiment:
    """The Experiment of `FILE[:arg]` with `{"a.b": "text"}` overrides applied.

    Raises FileNotFoundError or ValueError naming the file or field, and what is known there.
    """
    return from_dict(Experiment, read(spec, overrides))


def read(spec: str, overrides: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The values that `load` makes an Experiment of; a file may write others. Raises as `load`."""
    path, _, arg = spec.partition(":")
    get_config = getattr(load_module(Path(path)), "get_config", None)
    if get_config is None:
        raise ValueError(f"{path} has no get_config: it is what other configs share")
    config = get_config(arg) if arg else get_config()
    for name, text in (overrides or {}).items():
        override(config, name, text)
    return config.to_dict()


def load_module(path: Path) -> types.ModuleType:
    """The Python file of a config, or of what several configs share. FileNotFoundError."""
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        guess = difflib.get_close_matches(path.name, near, n=1) or near
        there = f"; {path.parent} has {', '.join(guess)}" if guess else ""
        raise FileNotFoundError(f"config file {path} does not exist{there}")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unset_paths(experiment: Any) -> list[str]:
    """`a.b` of every path that still has to be given, in any kind of experiment."""
    values = leaves(dataclasses.asdict(experiment))
    if values.get("init_from"):  # in place of the parts
        values = {k: v for k, v in values.items() if not k.startswith("init_parts.")}
    empty = (k for k, v in values.items() if k.endswith((".path", ".tokenizer")) and not v)
    return [k for k, v in values.items() if v in (REQUIRED, (REQUIRED,))] + list(empty)
