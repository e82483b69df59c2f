# SPDX-License-Identifier: Apache-2.0
"""What a run reports, step by step; docs/seeing.md has the names.

A step's metrics are read when the next step has been dispatched, so that reading never holds up
the device, and before a checkpoint is saved, so that no saved step lacks its line.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from apollo_jax.training import agreement
from apollo_jax.training.boards import Boards, forget_after
from apollo_jax.training.goodput import Goodput
from apollo_jax.training.guard import BAD_STEPS, Guard, Measured
from apollo_jax.training.losses import BY_GROUP
from apollo_jax.training.noise_scale import NoiseScale
from apollo_jax.training.progress import ProgressLine
from apollo_jax.training.throughput import Throughput, memory
from data_pipeline.batch import MODALITIES
from data_pipeline.loader import Counts, LoadStats

_EVERY_STEP = ("loss", "grad_norm")  # are read at every step, the others where they are written
BAD_NAMED = 20  # bad records named on the console, then only counted


class MetricLog:
    """Takes every step's metrics, writes those of every `every`-th step and of the last.

    What became of the samples of each of `sources` is summed over all processes then, and more of
    them bad than `max_bad_share` stop all processes with the same ValueError. Each step's loss and
    gradient norm are shown to `guard`, which raises ValueError where they must stop the run.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start: int,
        num_steps: int,
        every: int,
        sources: Sequence[str] = (),
        max_bad_share: float = 1.0,
        guard: Guard | None = None,
        goodput: Goodput | None = None,
        noise: NoiseScale | None = None,
        boards: Boards | None = None,
        throughput: Throughput | None = None,
    ):
        self.start, self.num_steps, self.every = start, num_steps, every
        self.max_bad_share, self.guard = max_bad_share, guard
        self.goodput = Goodput() if goodput is None else goodput
        self.noise = NoiseScale() if noise is None else noise
        self.judged = start  # the step up to which the guard has seen all, or is not to
        self.counts = {name: np.zeros(len(Counts._fields), np.int64) for name in sources}
        self.new = np.zeros((len(sources), len(Counts._fields)), np.int32)  # of this process
        self.summed: jax.Array | np.ndarray | None = None  # new ones of all, not added yet
        self.error = ""  # that ended this process's data
        self.console = Console()
        primary = jax.process_index() == 0
        if primary:
            forget_after(workdir / BAD_STEPS, start)
        self.boards = boards or Boards(workdir, start=start, primary=primary)
        self.throughput = throughput or Throughput(self.goodput, start)
        self.progress = ProgressLine(self.console, start, num_steps) if primary else None
        self.groups = np.zeros((len(sources) * len(MODALITIES), 2))  # since the last line
        self.pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self.named, self.latest = 0, ""

    def push(
        self,
        step: int,
        metrics: Mapping[str, jax.Array],
        stats: LoadStats,
        waited: float,
        error: str = "",
    ) -> None:
        """Take the metrics of `step`, just dispatched, and write those of the step before.

        Args:
          stats: what its batch held.
          waited: seconds the loop waited for that batch.
          error: why this process has no data any more.
        """
        self.flush()
        self.pending, self.error = (step, metrics), error
        self.throughput.add(stats, waited)
        for row, name in enumerate(self.counts):
            self.new[row] += stats.sources.get(name, Counts())
        self._name_bad(step, stats)
        if self._is_logged(step):
            self._sum()

    def _is_logged(self, step: int) -> bool:
        return step % self.every == 0 or step == self.num_steps

    def _sum(self) -> None:
        self.summed = agreement.total(np.append(self.new.ravel(), np.int32(bool(self.error))))
        self.new = np.zeros_like(self.new)

    def agree(self) -> None:
        """Flush, and wait until all processes know of each other's data up to this step."""
        self.flush()
        self._sum()
        self._judge()

    def _judge(self) -> None:
        """Adds what was summed; ValueError, in all processes, if the data are too bad."""
        assert self.summed is not None
        *new, failed = np.asarray(self.summed).tolist()
        self.summed = None
        width = len(Counts._fields)
        for row, counts in enumerate(self.counts.values()):
            counts += new[row * width : (row + 1) * width]
        if failed:
            agreement.stop(self.error)
        seen = sum(int(counts[0]) for counts in self.counts.values())
        agreement.stop_if_too_many(self.bad, seen, self.max_bad_share, self.latest)

    @property
    def bad(self) -> int:
        """Samples of all processes that were left out."""
        return sum(int(c[2] + c[3]) for c in self.counts.values())

    def flush(self) -> None:
        """Wait for the pending step, have it judged and write its metrics."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        seen = {name: metrics[name] for name in (*_EVERY_STEP, BY_GROUP) if name in metrics}
        seen = jax.device_get(seen)
        left_out = step <= self.judged  # it was taken back with the bad one before it
        if self.guard is not None and not left_out:
            left_out = self.guard.see(Measured(step, *(float(seen[name]) for name in _EVERY_STEP)))
        metrics = self.noise.see(metrics, counts=not left_out)
        if BY_GROUP in seen and not left_out:
            self.groups += seen[BY_GROUP][: len(self.groups)]
        if self._is_logged(step):
            self._judge()
            rest = {name: value for name, value in metrics.items() if name != BY_GROUP}
            values = {name: float(value) for name, value in jax.device_get(rest).items()}
            values |= by_group(self.groups, list(self.counts))
            values |= self.throughput.values(step) | memory(jax.local_devices()) | self._data()
            self.boards.write(step, values)
            if self.progress is not None:
                self.progress.update(step, values)
            self.throughput.restart(step)
            self.groups[:] = 0
        if step == self.start + 1:  # its time is the compiler's
            self.throughput.restart(step)
            if self.progress is not None:
                self.progress.compiled(step)

    def _data(self) -> dict[str, float]:
        counts = {
            f"data/{name}/{what}": int(count)
            for name, counts in self.counts.items()
            for what, count in zip(Counts._fields, counts, strict=True)
        }
        bad = {"bad_steps": self.guard.bad} if self.guard else {}
        return {"bad_records": self.bad, **bad, **self.goodput.shares(), **counts}

    def summary(self) -> str:
        """What became of the samples, by source, since this run was started or continued."""
        parts = []
        for name, counts in self.counts.items():
            seen, *others = (int(count) for count in counts)
            fates = zip(Counts._fields[1:], others, strict=True)
            told = ", ".join(f"{count:,} {what}" for what, count in fates if count)
            parts.append(f"{name} {seen:,}" + f" ({told})" * bool(told))
        bad = self.guard.bad if self.guard else 0
        return "samples: " + ", ".join(parts) + f"; {bad:,} bad steps" * bool(bad)

    def _name_bad(self, step: int, stats: LoadStats) -> None:
        for record, reason in stats.bad:
            self.named += 1
            self.latest = f"{record}: {reason}"
            if self.named <= BAD_NAMED:
                text = f"bad record {record} left out at step {step}: {reason}"
                self.console.print(text, style="yellow", soft_wrap=True, markup=False)

    def close(self) -> None:
        """Close the files; what is pending is not written."""
        if self.progress is not None:
            self.progress.close()
        self.boards.close()


def by_group(sums: np.ndarray, sources: Sequence[str]) -> dict[str, float]:
    """Loss per unit of weight and the weight, of each source and modality that has any.

    Args:
      sums: f[G, 2], loss and weight of each group as `Batch.groups` numbers them.
    """
    table = np.asarray(sums, np.float64).reshape(len(sources), len(MODALITIES), 2)
    kinds = {"dataset": (sources, table.sum(1)), "modality": (MODALITIES, table.sum(0))}
    found = {}
    for kind, (names, pairs) in kinds.items():
        for name, (loss, weight) in zip(names, pairs.tolist(), strict=True):
            if weight:
                found[f"loss/{kind}/{name}"] = loss / weight
                found[f"target_tokens/{kind}/{name}"] = weight
    return found
