# SPDX-License-Identifier: Apache-2.0
"""What a run reports: metrics.jsonl, TensorBoard and a progress line.

A step's metrics are read when the next step has been dispatched, so that reading never holds up
the device, and before a checkpoint is saved, so that no saved step lacks its line.
"""

import datetime
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from tensorboardX import SummaryWriter

from apollo_jax.training import agreement
from apollo_jax.training.goodput import Goodput
from apollo_jax.training.guard import BAD_STEPS, Guard, Measured, finite
from apollo_jax.training.noise_scale import NoiseScale
from data_pipeline.loader import Counts, LoadStats

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
PRINT_SECONDS = 2.0  # between progress lines
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
        self.primary = jax.process_index() == 0
        if self.primary:
            for name in (METRICS, BAD_STEPS):
                forget_after(workdir / name, start)
            self.file = open(workdir / METRICS, "a")  # noqa: SIM115  closed by close()
            self.board = SummaryWriter(str(workdir / TENSORBOARD), purge_step=start + 1)
        self.pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self.named, self.latest = 0, ""
        self.printed = 0.0
        self._restart_clock(start)

    def _restart_clock(self, step: int) -> None:
        self.since, self.since_step = time.perf_counter(), step
        self.tokens = self.frames = 0
        self.waited = 0.0
        self.fill: list[tuple[float, float]] = []

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
        self.tokens, self.frames = self.tokens + stats.tokens, self.frames + stats.frames
        self.waited += waited
        self.fill.append((stats.fill_tokens, stats.fill_clips))
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
        metrics = self.noise.see(metrics)
        loss, norm = map(float, jax.device_get((metrics["loss"], metrics["grad_norm"])))
        if self.guard is not None and step > self.judged:
            self.guard.see(Measured(step, loss, norm))
        if self._is_logged(step):
            self._judge()
            values = {name: float(v) for name, v in jax.device_get(dict(metrics)).items()}
            values |= self._rates(step)
            self.write(step, values)
            self._progress(step, values)
            self._restart_clock(step)
        elif step == self.start + 1:
            self._restart_clock(step)  # the first step's time is the compiler's

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard."""
        if self.primary:
            known = {name: finite(value) for name, value in values.items()}
            self.file.write(json.dumps({"step": step, **known}) + "\n")
            self.file.flush()
            for name, value in known.items():
                if value is not None:
                    self.board.add_scalar(name, value, step)

    def _rates(self, step: int) -> dict[str, float]:
        seconds = time.perf_counter() - self.since
        processes = jax.process_count()
        fill_tokens, fill_clips = np.mean(self.fill, axis=0).tolist()
        data = {
            f"data/{name}/{what}": int(count)
            for name, counts in self.counts.items()
            for what, count in zip(Counts._fields, counts, strict=True)
        }
        return {
            "tokens_per_second": self.tokens * processes / seconds,
            "frames_per_second": self.frames * processes / seconds,
            "data_wait": self.waited / seconds,
            "seconds_per_step": seconds / (step - self.since_step),
            "fill_tokens": fill_tokens,
            "fill_clips": fill_clips,
            "bad_records": self.bad,
            **({"bad_steps": self.guard.bad} if self.guard else {}),
            **self.goodput.shares(),
            **data,
        }

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

    def _progress(self, step: int, values: Mapping[str, float]) -> None:
        """The progress line: rewritten on a terminal, else a line every few seconds."""
        last, now = step == self.num_steps, time.perf_counter()
        if not self.primary or (now - self.printed < PRINT_SECONDS and not last):
            return
        self.printed = now
        left = datetime.timedelta(
            seconds=round((self.num_steps - step) * values["seconds_per_step"])
        )
        line = (
            f"step {step}/{self.num_steps}  loss {values['loss']:.4f}  "
            f"accuracy {values['accuracy']:.3f}  grad norm {values['grad_norm']:.3g}  "
            f"{values['tokens_per_second']:,.0f} tokens/s  "
            f"{values['frames_per_second']:,.0f} frames/s  "
            f"data wait {values['data_wait']:.0%}  {left} left"
        )
        rewrite = self.console.is_terminal and not last
        self.console.print(line, end="\r" if rewrite else "\n", soft_wrap=True, highlight=False)

    def _name_bad(self, step: int, stats: LoadStats) -> None:
        for record, reason in stats.bad:
            self.named += 1
            self.latest = f"{record}: {reason}"
            if self.named <= BAD_NAMED:
                text = f"bad record {record} left out at step {step}: {reason}"
                self.console.print(text, style="yellow", soft_wrap=True, markup=False)

    def close(self) -> None:
        """Close the files; what is pending is not written."""
        if self.primary:
            self.file.close()
            self.board.close()


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of `path` beyond `step`: a resumed run writes those steps again."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if (n := _step_of(line)) is not None and n <= step]
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)


def _step_of(line: str) -> int | None:
    """The step of a whole line, None of one that was cut off while it was written."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else None
    except ValueError:
        return None
