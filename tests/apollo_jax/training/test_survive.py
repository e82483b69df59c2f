# SPDX-License-Identifier: Apache-2.0
"""What docs/survive.md says, by real processes that are killed, told to stop, or do not fit.

A run of one process is the measure; all others continue copies of it.
"""

import json
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from apollo_jax.config import load
from apollo_jax.training.processes import AGAIN, STOPPED

SMALL = Path(__file__).parent / "small.py"
ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-5  # relative, of losses on another number of processes or devices


@pytest.fixture(scope="module")
def small(texts) -> str:
    """FILE:ARG of the config of all of them."""
    return f"{SMALL}:{texts}"


def losses(workdir: Path) -> dict[int, tuple[float, float]]:
    """Loss and number of targets by step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["target_tokens"]) for line in lines}


def survivors(four, small: str) -> list[str]:
    """What the others say where process 2 is killed; they end before its heartbeat would tell."""
    four.all[2].wait(timeout=300)
    killed = time.monotonic()
    statuses, said = four.end()
    assert statuses == [AGAIN, AGAIN, -signal.SIGKILL, AGAIN], said
    assert time.monotonic() - killed < load(small).train.heartbeat_seconds
    for i in (0, 1, 3):
        assert f"process {i} lost the others of the run and stops" in said[i]
    return [said[i] for i in (0, 1, 3)]


def test_killed_told_to_stop_and_continued_by_fewer(small, small_run, begun, company, mishap):
    """4 processes, one killed; 2, one told to stop; 1 to the end: as if nothing had been."""
    four = company(small, begun, 4, devices=2, first={2: mishap(signal.SIGKILL, nth=3)})
    for text in survivors(four, small):
        assert "Start all of them again with the same command" in text
    statuses, said = company(small, begun, 2, first={1: mishap(signal.SIGTERM, nth=2)}).end()
    assert statuses == [0, 0], said
    assert "continuing" in said[0]
    assert "stopped on a signal, saved; the same command continues" in said[0]
    assert "goodput: " in said[0]
    statuses, said = company(small, begun, 1, devices=4).end()
    assert statuses == [0], said
    assert "trained, 8 of 8 steps" in said[0]
    found, expected = losses(begun), losses(small_run)
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=TOLERANCE)


def test_killed_while_the_others_wait_for_it(small, begun, company, mishap):
    """At a meeting, where no collective fails: the others wait until it has compiled."""
    four = company(small, begun, 4, first={2: mishap(signal.SIGKILL, nth=1)})
    for text in survivors(four, small):
        assert "lost the others of the run and stops: process 2 is gone" in text


LATE = """
import time
from apollo_jax.training import train
place = train.place
def late(*args):
    train.place = place
    time.sleep(33)
    return place(*args)
train.place = late
"""


def test_waits_for_a_process_that_comes_late_to_its_first_step(small, begun, company):
    """Later than Gloo by itself waits, which is 30 s."""
    statuses, said = company(small, begun, 2, first={1: LATE}).end()
    assert statuses == [0, 0], said


WAITS = """
import os, signal, time
from apollo_jax.training import train
def waits():
    print("begins to wait", flush=True)
    time.sleep(300)
train.meet = waits
"""


def test_told_to_stop_before_the_loop_all_end_soon(small, begun, company):
    """One waits at a meeting for the other; jax takes the signal from whoever gets it."""
    two = company(small, begun, 2, first={1: WAITS})
    while "begins to wait" not in two.all[1].stdout.readline():
        assert two.all[1].poll() is None
    before = sorted(begun.rglob("*"))
    two.all[0].send_signal(signal.SIGTERM)
    statuses, said = two.end()
    assert statuses == [STOPPED, STOPPED], said
    for i, text in enumerate(said):
        assert f"process {i} stops on a signal; there is nothing to save" in text
    assert sorted(begun.rglob("*")) == before


def test_a_signal_for_a_trace_before_the_loop_is_kept(small, begun, company):
    early = "import os, signal\nfrom apollo_jax.training import train\n"
    early += "locate = train.located\n"
    early += "train.located = lambda *a: (os.kill(os.getpid(), signal.SIGUSR1), locate(*a))[1]"
    statuses, said = company(small, begun, 1, first={0: early}).end()
    assert statuses == [0], said
    assert "tracing steps 3 to 5" in said[0]


def test_other_code_and_another_config_are_refused_by_name(small, begun, company, tmp_path):
    other = tmp_path / "other"
    for package in ("apollo_jax", "data_pipeline"):
        shutil.copytree(ROOT / package, other / package)
    with open(other / "apollo_jax" / "sharding.py", "a") as file:
        file.write("# changed\n")
    before = sorted(begun.rglob("*"))
    own = [[], ["--config.optimizer.b1=0.5"], []]
    statuses, said = company(small, begun, 3, own=own, roots=[ROOT, ROOT, other]).end()
    assert statuses == [2, 2, 2], said
    for text in said:
        assert "the processes of this run are not the same" in text
        assert "config.optimizer.b1 is 0.5, process 0 has 0.9" in text
        assert f"process 1 ({socket.gethostname()}): config" in text
        assert f"process 2 ({socket.gethostname()}): apollo-jax code is" in text
    assert sorted(begun.rglob("*")) == before


def test_a_folder_of_its_own_is_refused(small, begun, company, tmp_path):
    """Where the run lies on a disk that the processes do not share."""
    own = [[], ["--workdir", str(tmp_path / "own")]]
    before = sorted(begun.rglob("*"))
    statuses, said = company(small, begun, 2, "--config.train.join_seconds=20", own=own).end()
    assert statuses == [2, 2], said
    for text in said:
        assert f"--workdir is '{tmp_path}/own, where nothing is that process 0 writes" in text
        assert f"process 0 has '{begun}'" in text
    assert sorted(begun.rglob("*")) == before


def test_a_process_that_is_alone_gives_up(small, begun, company):
    alone = company(small, begun, 2, "--config.train.join_seconds=4", alone=True)
    statuses, said = alone.end()
    assert statuses == [AGAIN], said
    assert "process 0 of 2 at localhost:" in said[0]
    assert "waited 4 s and not all processes of the run have come" in said[0]


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(small, small_run, begun, company):
    """No file may grow beyond 100 kB: what a write then says stands for a full disk's answer."""

    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))"
    before = {p: p.read_bytes() for p in (begun / "checkpoints").rglob("*") if p.is_file()}
    statuses, said = company(small, begun, 1, first={0: limited}).end()
    assert statuses == [2], said
    assert "a checkpoint could not be written" in said[0], said
    assert "the checkpoint of step 2 stays saved. Make room" in said[0]
    for path, content in before.items():
        assert path.read_bytes() == content
    statuses, said = company(small, begun, 1).end()
    assert statuses == [0], said
    np.testing.assert_allclose(
        list(losses(begun).values()), list(losses(small_run).values()), rtol=TOLERANCE
    )
