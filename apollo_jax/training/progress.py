# SPDX-License-Identifier: Apache-2.0
"""The progress of a run: a live bar on a terminal, elsewhere a line every few seconds."""

import datetime
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn

PRINT_SECONDS = 2.0  # between progress lines


class ProgressLine:
    """Says how far a run is, how it does, and when it will be done.

    What is left is reckoned from all steps so far but the first, which compiles; evaluations and
    checkpoints are part of it.
    """

    def __init__(self, console: Console, start: int, num_steps: int):
        self.console, self.num_steps = console, num_steps
        self.began: tuple[float, int] | None = None  # when, and after which step
        self.printed = 0.0
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("step"), MofNCompleteColumn(), BarColumn(12), TaskProgressColumn(),
                TextColumn("{task.fields[left]}", style="bold"), TextColumn("{task.description}"),
            )  # fmt: skip
            self.bar = Progress(*columns, console=console, refresh_per_second=4)
            self.task = self.bar.add_task(
                "compiling the first step", total=num_steps, completed=start, left=""
            )
            self.bar.start()

    def compiled(self, step: int) -> None:
        """The first step is over."""
        self.began = (time.perf_counter(), step)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Tell of the metrics of `step`."""
        last, now = step == self.num_steps, time.perf_counter()
        words, left = _words(values), self._left(step)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=words, left=left)
        elif last or now - self.printed >= PRINT_SECONDS:
            self.printed = now
            line = f"step {step}/{self.num_steps}  {words}  {left}"
            self.console.print(line, soft_wrap=True, highlight=False)

    def _left(self, step: int) -> str:
        if self.began is None:
            return "compiled"
        since, first = self.began
        took = (time.perf_counter() - since) / max(step - first, 1)
        return f"{datetime.timedelta(seconds=round((self.num_steps - step) * took))} left"

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self.bar is not None:
            self.bar.stop()


def _words(values: Mapping[str, float]) -> str:
    mfu = f"MFU {values['mfu']:.1%}  " if "mfu" in values else ""
    return (
        f"loss {values['loss']:.4f}  accuracy {values['accuracy']:.3f}  "
        f"grad norm {values['grad_norm']:.3g}  {values['tokens_per_second']:,.0f} tokens/s  "
        f"{values['frames_per_second']:,.0f} frames/s  {mfu}data wait {values['data_wait']:.0%}"
    )
