# SPDX-License-Identifier: Apache-2.0
"""One sequence of rows, whatever processes read it: real ones, stopped and continued by others."""

import dataclasses
import os
import pickle
import subprocess
import sys
from collections import Counter
from itertools import count
from json import loads
from pathlib import Path

import pytest

from data_pipeline.loader import DataConfig, SourceConfig
from data_pipeline.sizes import compute

PLAY = Path(__file__).parent / "play_hosts.py"
STEPS = 14
_runs = count()


def play(folder: Path, hosts: list[dict]) -> list[dict]:
    """What each of the processes saw."""
    out = folder / f"run{next(_runs)}"
    out.mkdir()
    (out / "hosts").write_bytes(pickle.dumps(hosts))
    command = [sys.executable, str(PLAY), str(out / "hosts"), str(out)]
    env = os.environ | {"PYTHONPATH": str(PLAY.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert not done.returncode, done.stderr
    return [loads((out / f"{number}.json").read_text()) for number in range(len(hosts))]


def pod(config: DataConfig, processes: int, stop: int = STEPS, state: dict | None = None) -> list:
    return [
        dict(config=config, steps=STEPS, process_index=i, process_count=processes)
        | dict(stop=stop, state=state)
        for i in range(processes)
    ]


def joined(hosts: list[dict], what: str) -> list[list]:
    """Rows of the global batch by step."""
    steps = zip(*(host[what] for host in hosts), strict=True)
    return [[row for part in parts for row in part] for parts in steps]


@pytest.fixture
def mixed(tiny_data) -> DataConfig:
    """Three sources of which one is drawn more often than it is long, measured already or not."""
    sizes = {"text": 40, "image": 11, "video": 23}
    sources = {kind: tiny_data.records(kind, n) for kind, n in sizes.items()}
    config = tiny_data.config(sources, clips=12, max_clips=3)
    weights = {"text": 0.3, "image": 0.4, "video": 0.3}
    weighted = {n: SourceConfig(s.path, weights[n]) for n, s in config.sources.items()}
    return dataclasses.replace(config, sources=weighted)


def test_hosts_and_threads_share_one_sequence(mixed, tiny_data):
    measured = dataclasses.replace(mixed, sizes=str(tiny_data.folder / "sizes"), threads=3)
    for name in mixed.sources:
        compute(measured, name)
    eight = pod(measured, 8)
    eight[3]["config"] = dataclasses.replace(mixed, threads=1, prefetch=1)
    found = play(tiny_data.folder, pod(mixed, 1) + pod(mixed, 2) + eight)
    one, two, eight = found[:1], found[1:3], found[3:]
    assert joined(two, "digests") == joined(one, "digests")
    assert joined(eight, "digests") == joined(one, "digests")
    assert len({host["digests"][0][0] for host in eight}) == 8

    # Rows before the first of the present window hold all earlier windows whole.
    first, names = one[0]["state"]["window_first_row"], Counter()
    rows = [row for step in joined(eight, "answers") for row in step]
    for row in rows[:first]:
        names.update(row)
    assert first > 4 * 8
    for kind, size in (("text", 40), ("image", 11), ("video", 23)):
        seen = [names[f"{kind} {n}"] for n in range(size)]
        assert min(seen) > 0
        assert max(seen) - min(seen) <= 1  # no record again before all have been
    assert max(names[f"image {n}"] for n in range(11)) > 4


@pytest.mark.parametrize("stop", [1, 9])
def test_stopped_anywhere_and_continued_elsewhere(mixed, tiny_data, stop):
    whole, *first = play(tiny_data.folder, pod(mixed, 1) + pod(mixed, 2, stop))
    states = [host["state"] for host in first]
    assert states[0] == states[1]
    assert states[0]["next_step"] == stop
    other = dataclasses.replace(mixed, threads=1, prefetch=0)
    found = play(
        tiny_data.folder,
        pod(other, 4, STEPS - stop, states[0]) + pod(mixed, 1, STEPS - stop, states[1]),
    )
    rest = joined([whole], "digests")[stop:]
    assert joined(found[:4], "digests") == rest
    assert joined(found[4:], "digests") == rest


def test_memory_stays_flat(tiny_data):
    config = tiny_data.config(
        {"text": tiny_data.records("text", 3000), "video": tiny_data.records("video", 500)},
        length=1024,
        clips=24,
        max_clips=1,
    )
    steps = 45
    host = dict(config=config, steps=steps, process_index=0, process_count=1, stop=steps)
    (found,) = play(tiny_data.folder, [host | dict(look=False)])
    resident = found["resident"]
    assert max(resident[25:]) - min(resident[15:25]) < 8 << 20
    assert resident[-1] < 600 << 20


def test_forty_sources_need_no_more_threads_and_little_memory(tiny_data):
    def host(sources: int) -> dict:
        records = tiny_data.records("video", 400)
        size = len(records) // sources
        parts = {f"s{sources}-{n}": records[n * size : (n + 1) * size] for n in range(sources)}
        config = tiny_data.config(parts)
        return dict(config=config, steps=9, process_index=0, process_count=1, stop=5)

    one, forty = play(tiny_data.folder, [host(1), host(40)])
    assert forty["threads"] == one["threads"]
    assert forty["resident"][-1] - one["resident"][-1] < 16 << 20
