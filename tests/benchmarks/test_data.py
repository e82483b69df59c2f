# SPDX-License-Identifier: Apache-2.0
"""The data benchmark's parts run and measure; how fast is no matter for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}
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


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, dict[str, float | str]]]:
    folder = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, ROOT / "benchmarks" / "data.py", "--folder", folder / "films"]
    command += ["--shorter", "300", "--records", "1000", "--rounds", "1"]
    command += ["--json", folder / "out.json"]
    job = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    for part in PARTS:
        assert f"\n{part} " in job.stdout
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("part", PARTS)
def test_a_part_measures(results, part):
    assert results[part]
    for row in results[part].values():
        assert float(row[PARTS[part]]) > 0


def test_every_case_is_read_in_our_ways_and_theirs(results):
    ways = {name.partition(": ")[2] for name in results["readers"]}
    assert {"apollo-jax, complete: rgb", "shards alone: rgb", "PyAV, float32"} <= ways
    assert len({name.partition(": ")[0] for name in results["readers"]}) == 4


def test_an_unknown_part_is_named():
    command = [sys.executable, ROOT / "benchmarks" / "data.py", "--only", "speed"]
    job = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert job.returncode == 2
    assert "no parts speed; known: readers, packing" in job.stderr
