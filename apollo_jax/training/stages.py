# SPDX-License-Identifier: Apache-2.0
"""A stage is which components have a learning rate above zero (paper Sec 5.1, Table 7)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from apollo_jax.config import LearningRates
from apollo_jax.models import apollo
from apollo_jax.training.state import component_of


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
    return sum(math.prod(s.shape) for n, s in shapes.items() if component_of(n) == component)


def start_up_table(shapes: Mapping[str, Any], rates: LearningRates) -> Table:
    """What trains, how many parameters it has, at which rate and in which dtype it is kept."""
    table = Table("component", "parameters", "trains", "peak rate", "kept as")
    total = trainable = 0
    for component in apollo.COMPONENTS:
        rate, size = getattr(rates, component), count(shapes, component)
        dtypes = {str(s.dtype) for n, s in shapes.items() if component_of(n) == component}
        trains = ("yes", f"{rate:g}") if rate > 0 else ("frozen", "-")
        table.add_row(component, f"{size:,}", *trains, ", ".join(sorted(dtypes)))
        total, trainable = total + size, trainable + size * (rate > 0)
    table.add_section()
    table.add_row("all", f"{total:,}", f"{trainable:,}", "", "")
    return table
