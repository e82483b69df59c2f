# SPDX-License-Identifier: Apache-2.0
"""The conversion benchmark runs and measures every way; how fast is no matter for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parity
def test_the_benchmark_runs(tmp_path):
    pytest.importorskip("transformers")
    command = [sys.executable, ROOT / "benchmarks" / "convert.py", "--size", "debug"]
    command += ["--rounds", "1", "--folder", tmp_path, "--json", tmp_path / "out.json"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    job = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert "times ours" in job.stdout
    results = json.loads((tmp_path / "out.json").read_text())["load_and_save"]
    assert set(results) == {"whole", "decoder"}
    for ways in results.values():
        for took in ways.values():
            assert min(took["seconds"], took["cpu_seconds"]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
