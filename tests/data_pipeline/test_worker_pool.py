# SPDX-License-Identifier: Apache-2.0
"""The pool gives every task a result, in order, whatever tasks do to their process."""

import importlib
import os
import signal
import time
from typing import Any

import pytest

from data_pipeline.worker_pool import Casualty, TaskLimits, run_isolated

LIMITS = TaskLimits(stall_seconds=2.0, task_seconds=6.0, memory_bytes=400 << 20)


def work(task, beat):
    kind, value = task
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "crash once" and not os.path.exists(value):
        open(value, "w").close()
        os._exit(3)
    if kind == "hang":
        time.sleep(60)
    if kind == "grow":
        data = [bytearray(os.urandom(1 << 20)) * 50 for _ in range(value)]
        time.sleep(1)
        return kind, len(data)
    if kind == "for a moment":
        bytearray(value << 20)[:: 1 << 12] = b"x" * (value << 8)  # touches every page
    if kind == "endless":
        while True:
            time.sleep(0.1)
            beat(0)
    if kind == "slow":
        for _ in range(12):
            time.sleep(0.2)
            beat(1)
    return kind, value


def test_results_come_in_order_and_casualties_take_their_place(tmp_path):
    once = ("crash once", str(tmp_path / "crashed"))
    tasks: list[Any] = [("ok", k) for k in range(20)]
    tasks[2], tasks[5], tasks[9], tasks[11] = ("crash", 0), once, ("hang", 0), ("slow", 0)
    batches = [tasks[k : k + 4] for k in range(0, 20, 4)]
    steps = []
    results = list(run_isolated(work, batches, 2, LIMITS, report=steps.append))
    assert steps[-1] == 12
    assert results[2] == Casualty("crashed", "its process ended with code -11, twice")
    assert results[9] == Casualty("timeout", "no progress in 2 s")
    for number in set(range(20)) - {2, 9}:
        assert results[number] == tasks[number]


def test_what_takes_too_much_is_stopped_and_the_others_go_on():
    tasks = [("grow", 100), ("ok", 1), ("endless", 0), ("ok", 2), ("grow", 1)]
    results = list(run_isolated(work, [tasks], 1, LIMITS))
    assert results[0] == Casualty("memory", "needs more than 0.42 GB")
    assert results[2] == Casualty("timeout", "not done after 6 s")
    assert [results[1], *results[3:]] == [("ok", 1), ("ok", 2), ("grow", 1)]


def test_what_was_too_large_between_two_looks_is_known_all_the_same():
    """Which files are taken must not depend on how busy a machine is."""
    tasks = [("for a moment", 500), ("ok", 1), ("for a moment", 10)]
    results = list(run_isolated(work, [tasks], 1, LIMITS))
    assert results == [Casualty("memory", "needs more than 0.42 GB"), *tasks[1:]]


def test_a_crash_in_the_only_batch_does_not_lose_the_rest():
    results = list(run_isolated(work, [[("ok", 0), ("crash", 0), ("ok", 1)]], workers=1))
    assert [results[0], results[2]] == [("ok", 0), ("ok", 1)]


def test_a_crash_before_many_finished_batches_does_not_block_them():
    batches = [[("crash", 0), ("ok", 0)], *([("ok", k)] for k in range(100))]
    results = list(run_isolated(work, batches, workers=2))
    assert isinstance(results[0], Casualty)
    assert results[2:] == [("ok", k) for k in range(100)]


def test_a_process_that_cannot_start_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "only_in_parent.py").write_text(
        "import multiprocessing\n"
        "if multiprocessing.current_process().name != 'MainProcess':\n"
        "    raise SystemExit(5)\n"
        "def work(task, beat): return task\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module("only_in_parent").work
    with pytest.raises(RuntimeError, match="code 5 before it could start"):
        list(run_isolated(function, [[1]], workers=1))
