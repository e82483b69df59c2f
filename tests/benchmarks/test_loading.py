# SPDX-License-Identifier: Apache-2.0
"""The loading benchmark runs and measures every way; how fast is no matter for a test."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "loading.py", "--seconds", "1"]
    command += ["--rounds", "1", "--json", tmp_path / "out.json"]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "shards are faster by" in job.stdout
    results = json.loads((tmp_path / "out.json").read_text())["frames_per_cpu_second"]
    for speeds in results.values():
        assert {"shards -> uint8 canvas", "PyAV seek + float32"} <= speeds.keys()
        assert all(speed > 0 for speed in speeds.values())
