# SPDX-License-Identifier: Apache-2.0
"""What the forks of `critical_batch` came to: kept in a file, judged, reported."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from apollo_jax.training.critical_batch_fit import fit
from data_pipeline.frame_shard_writer import write_atomic

RESULTS = "critical_batch.json"
TAIL = 4  # the loss is that of the last 1/TAIL of the window
console = Console()


class Results:
    """The file of results; what it holds already is not done again. Process 0 writes it."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings, self.forks = path, settings, {}
        if path.exists():
            held = json.loads(path.read_text())
            wrong = [f"{k} {held.get(k)}, now {v}" for k, v in settings.items() if held.get(k) != v]
            if wrong:
                raise ValueError(f"{path} is of {'; '.join(wrong)}: take another --output")
            self.forks = held["forks"]

    def add(self, microbatches: int, rows: int, tail: Float[np.ndarray, "u 2"], size: int) -> None:
        """Take a fork's loss, and that of every `size` microbatches, from the end of its window.

        Args:
          microbatches: to an update, each of so many `rows`.
          tail: loss and targets of each update; loss NaN if it diverged.
        """
        loss, targets = tail.reshape(-1, size // microbatches, 2).transpose(2, 0, 1)
        weights = targets.sum(axis=1)
        blocks = (loss * targets).sum(axis=1) / weights
        mean = float(blocks @ weights / weights.sum())
        diverged = not math.isfinite(mean)
        self.forks[str(microbatches)] = {
            "microbatches": microbatches,
            "rows": microbatches * rows,
            "updates": self.settings["window"] // microbatches,
            "loss": None if diverged else mean,
            "diverged": diverged,
            "blocks": [] if diverged else blocks.tolist(),
        }
        self.write({})

    def write(self, found: dict[str, Any]) -> None:
        """All of it, at once."""
        if jax.process_index() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.settings, "forks": self.forks, **found}, indent=1) + "\n"
        write_atomic(self.path, text.encode())


def summary(forks: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """The critical batch among forks from small to large, and that of a curve through them.

    The best loss is that of any fork; a fork too small to reach it is no reason to stop. One that
    diverged is too large. ValueError if all have.
    """
    finite = [fork for fork in forks if not fork["diverged"]]
    if not finite:
        raise ValueError(
            "every fork diverged: lower --config.optimizer.learning_rates, or fork where the run "
            "is stable (--step); take another --output"
        )
    best = min(finite, key=lambda fork: fork["loss"])
    critical = best
    for fork in forks[forks.index(best) :]:
        if fork["diverged"] or fork["loss"] > best["loss"] + tolerance:
            break
        critical = fork
    rows, losses = (np.array([fork[name] for fork in finite], float) for name in ("rows", "loss"))
    # Forks that were added later may have larger blocks: of all, those that begin together.
    count = math.gcd(*(len(fork["blocks"]) for fork in finite))
    blocks = np.array([np.reshape(fork["blocks"], (count, -1)).mean(axis=1) for fork in finite])
    return {
        "tolerance": tolerance,
        "critical_rows": critical["rows"],
        "critical_microbatches": critical["microbatches"],
        "at_least": critical is forks[-1],  # no fork was too large
        "fit": fit(rows, losses, blocks),
    }


def report(
    forks: list[dict[str, Any]], found: dict[str, Any], following: dict[str, str], where: str = ""
) -> None:
    """The table, and what to do with it: flags to go on with, and `where` if not in the run."""
    table = Table("microbatches", "rows", "updates", "loss", "above the best")
    best = min(fork["loss"] for fork in forks if not fork["diverged"])
    for fork in forks:
        cells = (str(fork[name]) for name in ("microbatches", "rows", "updates"))
        loss = fork["loss"]
        judged = ("diverged", "") if loss is None else (f"{loss:.4f}", f"{loss - best:.4f}")
        table.add_row(*cells, *judged)
    console.print(table)
    flags = " ".join(f"--config.{name}={text}" for name, text in following.items())
    more = " or more: no fork was too large" if found["at_least"] else ""
    curve, fitted = found["fit"], "{rows:g} rows ({low:g} to {high:g}, about 95 %)"
    if curve["rows"] is None:
        fitted = "not determined; {reason}"
    for line in (
        f"critical batch: {found['critical_rows']} rows{more}",
        f"of the curve through all losses: {fitted.format(**curve)}",
        f"{where}go on with {flags}",
    ):
        console.print(line, soft_wrap=True, highlight=False)
