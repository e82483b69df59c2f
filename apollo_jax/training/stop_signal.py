# SPDX-License-Identifier: Apache-2.0
"""Being asked to stop: by a signal to one of a run's processes, for all of them."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from apollo_jax.training import processes


class StopSignal:
    """SIGTERM or Ctrl-C ask the loop to stop after this step; a second one ends it at once.

    Of many processes only SIGTERM, to any of them; outside the loop it ends them, see processes.py.
    """

    def __init__(self, console: Console):
        self.console, self.received = console, False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        # Many processes must stop after the same step: there jax's own service listens.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._receive)
        processes.heeded.set()
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = True
        self.console.print(
            f"\n{signal.Signals(number).name}: saving after this step, then stopping"
        )
        self._restore()

    def requested(self, step: int) -> bool:
        """Whether to stop before `step`; the same answer in all processes."""
        if jax.process_count() > 1:
            self.received = multihost_utils.reached_preemption_sync_point(step)
        return self.received

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exc: object) -> None:
        self._restore()
