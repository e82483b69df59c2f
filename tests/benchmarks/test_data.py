# SPDX-License-Identifier: Apache-2.0
"""The data benchmark's parts run and measure; how fast is no matter for a test."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = {
    "readers": "frames / CPU-s",
    "packing": "% of the lower bound",
    "start": "first batch, s",
    "mixture": "set-up, s",
    "memory": "MB at the end",
    "latency": "frames / s",
    "storage": "kB / s",
    "predecode": "x real time per CPU",
    "access": "median, ms",
}


@pytest.fixture
def data(monkeypatch):
    """The benchmark as a module, its jobs in this process."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    data, data_loader = map(importlib.import_module, ("data", "data_loader"))

    monkeypatch.setattr(
        data_loader,
        "_job",
        lambda name, config, _, state=None: data_loader.JOBS[name](config, state),
    )
    monkeypatch.setattr(data_loader, "DELAY", 0.001)
    return data


def test_every_part_measures(data, tmp_path, capsys):
    assert set(data.PARTS) == set(PARTS)
    bench = data.Bench(tmp_path, rounds=1, shorter=300, records=1000)
    results = data.run(bench, PARTS)
    printed = capsys.readouterr().out
    for part, column in PARTS.items():
        assert f"\n{part} " in printed
        assert results[part]
        for row in results[part].values():
            assert float(row[column]) > 0
    cases, ways = ({name.partition(": ")[i] for name in results["readers"]} for i in (0, 2))
    assert len(cases) == 4
    ours = {f"apollo-jax, complete: {layout}" for layout in ("rgb", "yuv420")}
    assert ours | {"shards alone: rgb", "PyAV, float32", "OpenCV, float32"} <= ways


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, ROOT / "benchmarks" / "data.py", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(line, env=env, capture_output=True, text=True)


def test_the_command_writes_what_a_fresh_process_measured(tmp_path):
    size = ("--records", "1000", "--shorter", "300", "--folder", tmp_path)
    job = command("--only", "memory", "--json", tmp_path / "out.json", *size)
    assert job.returncode == 0, job.stderr
    assert json.loads((tmp_path / "out.json").read_text())["memory"]


def test_an_unknown_part_is_named():
    job = command("--only", "speed")
    assert job.returncode == 2
    assert "no parts speed; known: readers, packing" in job.stderr
