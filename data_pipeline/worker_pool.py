# SPDX-License-Identifier: Apache-2.0
"""Processes for work that may crash, hang or grow, such as decoding files from the wild."""

import math
import multiprocessing
import os
import signal
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# function(task, beat) -> result, not an int; beat(n) says that it is alive and n steps further.
Task = Callable[[Any, Callable[[int], None]], Any]

_BATCHES_AHEAD = 2  # per worker: bounds the results that wait for a slow one before them
_START_SECONDS = 120.0  # a new process may take this long to import everything
_LOOK_SECONDS = 0.25  # between two looks at how large the processes are


@dataclass(frozen=True)
class Casualty:
    """Stands for the result of a task that took its process down: crashed, timeout or memory."""

    reason: str
    detail: str


@dataclass(frozen=True)
class TaskLimits:
    """What a task may take before its process is killed.

    `stall_seconds` without a result or a beat, `task_seconds` in all, `memory_bytes` resident in
    its process at any moment (0: any; known where /proc tells, which is Linux).
    """

    stall_seconds: float = 120.0
    task_seconds: float = math.inf
    memory_bytes: int = 0


def run_isolated(
    function: Task,
    batches: Sequence[Sequence],
    workers: int,
    limits: TaskLimits = TaskLimits(),
    report: Callable[[int], None] = lambda steps: None,
) -> Generator[Any]:
    """Yields function(task, beat) for every task of every batch, in order.

    A task whose process dies or grows too large is tried once more, alone; one that takes too long
    is killed. Either becomes a Casualty. `report` is called with the steps of all beats at least
    once a second.
    """
    pool = _Pool(function, [batch for batch in batches if batch], workers, limits)
    try:
        yield from pool.results(report)
    finally:
        for worker in pool.workers:
            worker.end()


def _serve(connection: Connection, function: Task) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    try:
        connection.send(0)  # ready
        while True:
            for task in connection.recv():
                _forget_peak()
                result = function(task, connection.send)
                connection.send((result, _peak_bytes(os.getpid())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone


def _forget_peak() -> None:
    """From now on this process's peak is that of what it does next."""
    with suppress(OSError):  # it stays that of all before: then a task gets its second chance
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes(process: int | None) -> int:
    """The most that a process had resident, between two looks as well; 0 where that is unknown."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


class _Worker:
    def __init__(self, function: Task):
        context = multiprocessing.get_context("spawn")  # forking is unsafe among threads
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.pending: deque[int] = deque()
        self.started = False
        self.heard = self.task_start = time.monotonic()

    def receive(self) -> Any:
        """The next message, an int for a beat; EOFError if the process is dead."""
        message = self.connection.recv()
        self.heard = time.monotonic()
        if not self.started or not isinstance(message, int):
            self.task_start = self.heard
        self.started = True
        return message

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class _Pool:
    """Tasks are known by their numbers; batches of numbers wait, pend in a worker, have results."""

    def __init__(
        self, function: Task, batches: Sequence[Sequence], workers: int, limits: TaskLimits
    ):
        self.function, self.limits = function, limits
        self.tasks = [task for batch in batches for task in batch]
        numbers = iter(range(len(self.tasks)))
        self.waiting = deque([next(numbers) for _ in batch] for batch in batches)
        self.starts = [batch[0] for batch in self.waiting]
        self.ends = [batch[-1] + 1 for batch in self.waiting]
        self.workers = [_Worker(function) for _ in range(min(workers, len(batches)))]
        self.suspects: set[int] = set()
        self.done: dict[int, Any] = {}
        self.steps = 0
        self.looked = 0.0

    def results(self, report: Callable[[int], None]) -> Iterator[Any]:
        for number in range(len(self.tasks)):
            while number not in self.done:
                self._hand_out(number)
                self._listen()
                self._watch()
                report(self.steps)
            yield self.done.pop(number)

    def _hand_out(self, number: int) -> None:
        """Gives batches to idle workers, not too far beyond the result now waited for."""
        last = bisect_right(self.starts, number) - 1 + _BATCHES_AHEAD * len(self.workers)
        horizon = self.ends[min(last, len(self.ends) - 1)]
        for worker in self.workers:
            if not worker.pending and self.waiting and self.waiting[0][0] < horizon:
                worker.pending.extend(self.waiting.popleft())
                worker.heard = worker.task_start = time.monotonic()
                with suppress(BrokenPipeError, ConnectionResetError):  # _listen will notice
                    worker.connection.send([self.tasks[n] for n in worker.pending])

    def _listen(self) -> None:
        busy = {worker.connection: worker for worker in self.workers if worker.pending}
        for connection in wait(list(busy), timeout=min(_LOOK_SECONDS, self.limits.stall_seconds)):
            worker = busy[connection]  # pyright: ignore[reportArgumentType]
            try:
                message = worker.receive()
            except (EOFError, ConnectionResetError):
                self._crash(worker)
                continue
            if isinstance(message, int):
                self.steps += message
                continue
            result, peak = message
            if excess := self._too_large(peak):  # a task is judged alike, whoever was busy when
                self._second_chance(worker, excess)
            else:
                self.done[worker.pending.popleft()] = result

    def _watch(self) -> None:
        """Kills what is beyond its limits."""
        now = time.monotonic()
        weigh = bool(self.limits.memory_bytes) and now - self.looked >= _LOOK_SECONDS
        self.looked = now if weigh else self.looked
        for worker in [worker for worker in self.workers if worker.pending]:
            casualty = self._excess(worker, now, weigh)
            if casualty and casualty.reason == "memory":  # it may be of the tasks before
                self._second_chance(worker, casualty)
            elif casualty:
                self.done[worker.pending.popleft()] = casualty
                self._replace(worker)

    def _excess(self, worker: _Worker, now: float, weigh: bool) -> Casualty | None:
        limits = self.limits
        if worker.connection.poll():  # a busy parent has yet to hear of it
            return None
        if now - worker.heard > (limits.stall_seconds if worker.started else _START_SECONDS):
            return Casualty("timeout", f"no progress in {limits.stall_seconds:g} s")
        if worker.started and now - worker.task_start > limits.task_seconds:
            return Casualty("timeout", f"not done after {limits.task_seconds:g} s")
        return self._too_large(_peak_bytes(worker.process.pid)) if weigh else None

    def _too_large(self, peak: int) -> Casualty | None:
        most = self.limits.memory_bytes
        if not most or peak <= most:
            return None
        return Casualty("memory", f"needs more than {most / 1e9:.2f} GB")

    def _crash(self, worker: _Worker) -> None:
        worker.process.join()
        code = worker.process.exitcode
        if not worker.started:
            raise RuntimeError(
                f"a worker process ended with code {code} before it could start; a script that "
                'uses it must do so under `if __name__ == "__main__":`'
            )
        self._second_chance(
            worker, Casualty("crashed", f"its process ended with code {code}, twice")
        )

    def _second_chance(self, worker: _Worker, casualty: Casualty) -> None:
        """A process of its own, where nothing else can be to blame."""
        number = worker.pending.popleft()
        if number in self.suspects:
            self.done[number] = casualty
            self._replace(worker)
        else:
            self.suspects.add(number)
            self._replace(worker)
            self.waiting.appendleft([number])

    def _replace(self, worker: _Worker) -> None:
        if worker.pending:
            self.waiting.appendleft(list(worker.pending))
        worker.end()
        self.workers[self.workers.index(worker)] = _Worker(self.function)
