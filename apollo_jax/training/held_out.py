# SPDX-License-Identifier: Apache-2.0
"""How a run does on its held-out sources."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from apollo_jax.training import agreement, losses
from apollo_jax.training.agreement import Feed
from apollo_jax.training.average import averaged
from apollo_jax.training.loading import open_loader
from apollo_jax.training.metrics import by_group
from apollo_jax.training.rows import place, share
from apollo_jax.training.state import TrainState
from apollo_jax.training.step import EvalStep
from data_pipeline.batch import MODALITIES
from data_pipeline.loader import Loader


def check_held_out(experiment: Any, mesh: Mesh) -> None:
    """Open the held-out sources of a run that evaluates. ValueError or OSError if that fails."""
    if experiment.evaluation.every:
        _open(experiment, mesh).close()


def _open(experiment: Any, mesh: Mesh) -> Loader:
    evaluation = experiment.evaluation
    data = dataclasses.replace(experiment.data, sources=evaluation.sources)
    return open_loader(data, evaluation.batches, mesh)


def evaluate(
    experiment: Any, mesh: Mesh, eval_step: EvalStep, state: TrainState
) -> dict[str, float]:
    """Loss and accuracy over the first batches of the held-out sources, as eval/NAME.

    Those of the averages as well, as eval/ema/NAME, if the run keeps them.
    """
    evaluation, bad_share = experiment.evaluation, experiment.data.max_bad_share
    states = {"eval": state}
    if experiment.train.ema_decay:
        states["eval/ema"] = averaged(state)
    totals: dict[str, losses.Sums] = {}
    with contextlib.closing(_open(experiment, mesh)) as loader:
        feed, counts, latest = Feed(loader, share(mesh)), np.zeros(2, np.int32), ""
        for _ in range(evaluation.batches):
            rows, stats = next(feed)
            counts += (len(stats.bad), stats.samples + len(stats.bad))
            latest = ": ".join(stats.bad[-1]) if stats.bad else latest
            batch = place(rows, mesh)
            for name, one in states.items():
                sums = eval_step(one, batch)
                totals[name] = jax.tree.map(jnp.add, totals[name], sums) if name in totals else sums
        agreement.stop_if_any(feed.error)
        bad, seen = np.asarray(agreement.total(counts)).tolist()
        agreement.stop_if_too_many(bad, seen, bad_share, latest)
    found = {}
    for name, total in totals.items():
        loss, accuracy = losses.mean(total)
        groups = np.asarray(total.by_group)[: len(MODALITIES) * len(evaluation.sources)]
        values = {"loss": float(loss), "accuracy": float(accuracy)}
        values |= by_group(groups, list(evaluation.sources))
        found |= {f"{name}/{what}": value for what, value in values.items()}
    return found
