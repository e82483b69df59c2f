# SPDX-License-Identifier: Apache-2.0
"""Processes for work that may crash or hang, such as decoding files from the wild."""

import multiprocessing
import signal
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

# function(task, beat) -> result, not an int; beat(n) says that it is alive and n steps further.
Task = Callable[[Any, Callable[[int], None]], Any]

_BATCHES_AHEAD = 2  # per worker: bounds the results that wait for a slow one before them
_START_SECONDS = 120.0  # a new process may take this long to import everything


@dataclass(frozen=True)
class Casualty:
    """Stands for the result of a task that took its process down; reason crashed or timeout."""

    reason: str
    detail: str


def run_isolated(
    function: Task,
    batches: Sequence[Sequence],
    workers: int,
    stall_seconds: float,
    report: Callable[[int], None] = lambda steps: None,
) -> Generator[Any]:
    """Yields function(task, beat) for every task of every batch, in order.

    A task whose process dies is tried once more; one during which nothing is heard for
    `stall_seconds` (neither a result nor a beat) is killed. Either becomes a Casualty. `report`
    is called with the steps of all beats at least once a second.
    """
    pool = _Pool(function, [batch for batch in batches if batch], workers, stall_seconds)
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
                connection.send(function(task, connection.send))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone


class _Worker:
    def __init__(self, function: Task):
        context = multiprocessing.get_context("spawn")  # forking is unsafe among threads
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.pending: deque[int] = deque()
        self.started = False
        self.heard = time.monotonic()

    def receive(self) -> Any:
        """The next message, an int for a beat; EOFError if the process is dead."""
        message = self.connection.recv()
        self.started, self.heard = True, time.monotonic()
        return message

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class _Pool:
    """Tasks are known by their numbers; batches of numbers wait, pend in a worker, have results."""

    def __init__(self, function: Task, batches: Sequence[Sequence], workers: int, stall: float):
        self.function, self.stall = function, stall
        self.tasks = [task for batch in batches for task in batch]
        numbers = iter(range(len(self.tasks)))
        self.waiting = deque([next(numbers) for _ in batch] for batch in batches)
        self.starts = [batch[0] for batch in self.waiting]
        self.workers = [_Worker(function) for _ in range(min(workers, len(batches)))]
        self.crashed: set[int] = set()
        self.done: dict[int, Any] = {}
        self.steps = 0

    def results(self, report: Callable[[int], None]) -> Iterator[Any]:
        for number in range(len(self.tasks)):
            while number not in self.done:
                self._hand_out(number)
                self._listen()
                report(self.steps)
            yield self.done.pop(number)

    def _hand_out(self, number: int) -> None:
        """Gives batches to idle workers, not too far beyond the result now waited for."""
        last = bisect_right(self.starts, number) - 1 + _BATCHES_AHEAD * len(self.workers)
        horizon = self.starts[min(last, len(self.starts) - 1)]
        for worker in self.workers:
            if not worker.pending and self.waiting and self.waiting[0][0] <= horizon:
                worker.pending.extend(self.waiting.popleft())
                worker.heard = time.monotonic()
                with suppress(BrokenPipeError, ConnectionResetError):  # _listen will notice
                    worker.connection.send([self.tasks[n] for n in worker.pending])

    def _listen(self) -> None:
        busy = [worker for worker in self.workers if worker.pending]
        ready = wait([worker.connection for worker in busy], timeout=min(1.0, self.stall))
        for worker in busy:
            silence = time.monotonic() - worker.heard
            if worker.connection in ready:
                try:
                    message = worker.receive()
                except (EOFError, ConnectionResetError):
                    self._crash(worker)
                    continue
                if isinstance(message, int):
                    self.steps += message
                else:
                    self.done[worker.pending.popleft()] = message
            elif silence > (self.stall if worker.started else _START_SECONDS):
                number = worker.pending.popleft()
                self.done[number] = Casualty("timeout", f"no progress in {self.stall:g} s")
                self._replace(worker)

    def _crash(self, worker: _Worker) -> None:
        worker.process.join()
        code = worker.process.exitcode
        if not worker.started:
            raise RuntimeError(
                f"a worker process ended with code {code} before it could start; a script that "
                'uses it must do so under `if __name__ == "__main__":`'
            )
        number = worker.pending.popleft()
        if number in self.crashed:
            self.done[number] = Casualty("crashed", f"its process ended with code {code}, twice")
        else:
            self.crashed.add(number)
            self.waiting.appendleft([number])
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        if worker.pending:
            self.waiting.appendleft(list(worker.pending))
        worker.end()
        self.workers[self.workers.index(worker)] = _Worker(self.function)
