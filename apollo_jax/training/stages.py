# SPDX-License-Identifier: Apache-2.0
"""A stage is which components have a learning rate above zero (paper Sec 5.1, Table 7)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from apollo_jax.config import LearningRates
from apollo_jax.models import apollo, lora
from apollo_jax.training.state import component_of, split


def trained_components(rates: LearningRates) -> tuple[str, ...]:
    """The components this stage trains. ValueError if it trains none."""
    trained = tuple(c for c in apollo.COMPONENTS if getattr(rates, c) > 0)
    if not trained:
        fields = ", ".join(f.name for f in dataclasses.fields(rates))
        raise ValueError(
            f"nothing trains: config.optimizer.learning_rates is 0 for {fields}; raise one of them"
        )
    return trained


def count(shapes: Mapping[str, Any], component: str) -> int:
    """Parameters of a component among named arrays or shapes."""
    return _size({n: s for n, s in shapes.items() if component_of(n) == component})


def start_up_table(shapes: Mapping[str, Any], rates: LearningRates) -> Table:
    """What trains, how many parameters it has, at which rate and in which dtype it is kept.

    A component with low-rank updates has two lines: its own weights, and the updates.
    """
    table = Table("component", "parameters", "trains", "peak rate", "kept as")
    params, frozen = split(shapes, trained_components(rates))
    for component in apollo.COMPONENTS:
        for part, trains in ((frozen, False), (params, True)):
            own = {n: s for n, s in part.items() if component_of(n) == component}
            if not own:
                continue
            said = ("yes", f"{getattr(rates, component):g}") if trains else ("frozen", "-")
            what = f"{component}: updates" if any(map(lora.is_update, own)) else component
            dtypes = ", ".join(sorted({str(s.dtype) for s in own.values()}))
            table.add_row(what, f"{_size(own):,}", *said, dtypes)
    table.add_section()
    table.add_row("all", f"{_size(shapes):,}", f"{_size(params):,}", "", "")
    return table


def _size(shapes: Mapping[str, Any]) -> int:
    return sum(math.prod(s.shape) for s in shapes.values())
