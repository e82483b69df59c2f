# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a run, said before anything is compiled or written."""

import fnmatch
from pathlib import Path

from jax.sharding import Mesh

from apollo_jax.checkpoints import run
from apollo_jax.config import Experiment, differences, unset_paths
from data_pipeline.loader import DataConfig
from data_pipeline.tokenizer import Tokenizer

# What may differ between a run and its continuation (the loader checks the data themselves).
FREE = (
    "name", "train.log_every", "train.checkpoint_every", "train.keep", "train.remat",
    "evaluation.*", "mesh.*", "init_from", "init_parts.*", "data.frames", "data.tokenizer",
    "data.threads", "data.prefetch", "data.max_bad_share", "data.sources.*.path", "data.sizes",
    "data.sources.*.data_dir", "data.layout",
)  # fmt: skip


def continues(experiment: Experiment, workdir: Path) -> bool:
    """Whether `workdir` holds this run already.

    Raises ValueError if its run has a config that differs in more than FREE fields.
    """
    if not run.is_run(workdir):
        return False
    changes = differences(run.read_experiment(workdir), experiment)
    wrong = [c for c in changes if not any(fnmatch.fnmatch(c.split(": ")[0], f) for f in FREE)]
    if wrong:
        lines = "\n  ".join(wrong)
        raise ValueError(
            f"{workdir} holds a run with another config (then -> now):\n  {lines}\n"
            "continue it with the config it has, or start in another --workdir "
            f"(config.init_from={workdir} takes over the weights)"
        )
    return True


def tokenizer_of(experiment: Experiment) -> Tokenizer:
    """The experiment's tokenizer. ValueError for a path that is not set or too many tokens."""
    unset = [f"--config.{name}=PATH" for name in unset_paths(experiment)]
    if unset:
        raise ValueError(f"the config leaves these paths to you:\n  {' '.join(unset)}")
    data = experiment.data
    tokenizer = Tokenizer.from_path(data.tokenizer)
    size, rows = tokenizer.vocab_size, experiment.model.llm.vocab_size
    if size > rows:
        raise ValueError(
            f"tokenizer {data.tokenizer} has {size} tokens, the decoder's table "
            f"(config.model.llm.vocab_size) only {rows}"
        )
    return tokenizer


def divides(data: DataConfig, mesh: Mesh) -> None:
    """ValueError if the rows of a batch cannot be spread over the mesh."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if data.batch_size % ways:
        raise ValueError(
            f"config.data.batch_size {data.batch_size} does not divide over the {ways} devices of "
            "mesh data x fsdp"
        )
