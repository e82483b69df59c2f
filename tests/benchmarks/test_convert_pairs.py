# SPDX-License-Identifier: Apache-2.0
"""Conversions hold little more than their largest tensor, whatever the layouts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIDE = 16_384  # the largest tensor: 64 MiB
# Beside the tensor: what the libraries take once (80 MB, where largest tensors are far larger) and
# blocks. A second copy of the tensor would not fit.
ROOM = 100 << 20
MEASURE = """
import json, sys
from pathlib import Path
import convert_pairs
print(json.dumps(convert_pairs.measure(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says the peak")
def test_no_pair_holds_two_of_the_largest_tensor(tmp_path):
    names = ["hf -> orbax", "orbax -> big_vision", "npz, stacked -> orbax"]
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT)])
    job = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, str(SIDE), *names],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(job.stdout.splitlines()[-1])
    peaks = {name: took["peak_bytes"] for name, took in found.items()}
    assert all(peak < SIDE * 4096 + ROOM for peak in peaks.values()), peaks
