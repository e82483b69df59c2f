# SPDX-License-Identifier: Apache-2.0
"""A run's loader: opened by all processes together, its microbatches counted by update."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from apollo_jax.training import agreement
from apollo_jax.training.ramp import Ramp
from apollo_jax.training.rows import share
from data_pipeline.loader import DataConfig, Loader


def open_loader(data: DataConfig, updates: int, mesh: Mesh, ramp: Ramp | None = None) -> Loader:
    """This process's loader of all microbatches of so many updates; without a ramp one to each.

    ValueError in all processes if one of them cannot open its data.
    """
    ramp = ramp or Ramp(((0, 1),))
    mine = share(mesh)
    loader, error = None, ""
    try:
        loader = Loader(
            data,
            num_steps=ramp.before(updates),
            process_index=mine.index,
            process_count=mine.count,
            recall=4 * ramp.most,  # a bad update is told of when the next has been loaded
        )
    except (ValueError, OSError) as failure:
        if jax.process_count() == 1:
            raise
        error = str(failure) or repr(failure)
    agreement.stop_if_any(error)
    assert loader is not None
    return loader


def resume(loader: Loader, saved: dict[str, Any], ramp: Ramp, update: int) -> None:
    """Continue after `update` updates. ValueError for other data, or another ramp up to there."""
    taken, asked = saved["next_step"], ramp.before(update)
    if taken != asked:
        raise ValueError(
            f"the run has taken {taken} microbatches for its first {update} updates, "
            f"config.train.batch_ramp (or accumulate) says {asked}; it may change what follows "
            f"alone: keep the pieces up to there and add one from {update} on"
        )
    loader.set_state(saved)


def records_of(loader: Loader, ramp: Ramp) -> Callable[[int], list[str]]:
    """Step -> ids of the records in all microbatches of that update, if it was one of the last."""

    def records(step: int) -> list[str]:
        batches = range(ramp.before(step - 1), ramp.before(step))
        return [record for batch in batches for record in loader.records(batch)]

    return records
