# SPDX-License-Identifier: Apache-2.0
"""XProf traces of chosen steps, in the layout that TensorBoard's profile plugin and xprof read.

The first process traces its own devices and its host; a step looks alike on the others.
"""

import contextlib
import re
import signal
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from rich.console import Console

FOLDER = "profile"  # in the workdir
ON_SIGNAL = 3  # steps traced after SIGUSR1


def parse(text: str) -> tuple[int, int]:
    """(first step, number of steps) of "START:COUNT", (0, 0) of "". ValueError for other texts."""
    if not text:
        return 0, 0
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None or not all(map(int, found.groups())):
        raise ValueError(f"{text!r} is not START:COUNT, a step and how many, both from 1 on")
    return int(found[1]), int(found[2])


_signal = types.SimpleNamespace(asked=False)  # no lock: what sets it may interrupt who reads it


def listen() -> Any:
    """From here on SIGUSR1 asks for a trace of the next steps; what the signal did before.

    Who is sent a signal that nobody takes dies of it, and what comes before the steps takes long.
    """
    if threading.current_thread() is threading.main_thread():
        return signal.signal(signal.SIGUSR1, _ask)
    return None


def _ask(number: int, frame: FrameType | None) -> None:
    del number, frame
    _signal.asked = True


class Tracer:
    """Traces the steps that `profile` names ("START:COUNT"), and a few after every SIGUSR1."""

    def __init__(self, workdir: Path, profile: str = "", console: Console | None = None):
        self.folder, self.console = workdir / FOLDER, console or Console()
        self.first, count = parse(profile)
        self.end = self.first + count  # the first step that is not traced any more
        self.tracing = False
        self.primary = jax.process_index() == 0
        self.previous: Any = None

    def __enter__(self) -> "Tracer":
        self.previous = listen()
        return self

    @contextlib.contextmanager
    def step(self, step: int, before: Any) -> Iterator[None]:
        """Around the dispatch of `step`, which is traced if it is one of those.

        Args:
          before: arrays that are there when the step before it is over.
        """
        if self.tracing and step >= self.end:
            self._stop(step, before)
        if _signal.asked:
            _signal.asked = False
            if not self.tracing:
                self.first, self.end = step, step + ON_SIGNAL
        if self.primary and not self.tracing and self.first <= step < self.end:
            self._start(step, before)
        if not self.tracing:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _start(self, step: int, before: Any) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every call of every loader's thread is too much to read
        jax.block_until_ready(before)
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self.tracing = True
        self._say(f"tracing steps {step} to {self.end - 1}")

    def _stop(self, step: int, before: Any) -> None:
        jax.block_until_ready(before)
        jax.profiler.stop_trace()
        self.tracing = False
        self._say(f"traced up to step {step - 1}: tensorboard --logdir {self.folder}")

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def __exit__(self, *exc: object) -> None:
        if self.tracing:
            jax.profiler.stop_trace()
        if self.previous is not None:
            signal.signal(signal.SIGUSR1, self.previous)
