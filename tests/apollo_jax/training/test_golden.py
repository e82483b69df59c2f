# SPDX-License-Identifier: Apache-2.0
"""The golden curves: every kind of stage takes its first steps with the losses it always had.

Bit for bit where they were recorded with this jax on a CPU with these instructions (how many
threads it has does not matter), to TOLERANCE elsewhere. A change that is meant to move them says so
in its commit, and records them anew: `make golden`, and `make golden PYTHON=python3.12`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden_curves.json"
ROOT = Path(__file__).parents[3]
RUNS = Path(__file__).parent / "golden_runs.py"
# Relative, of losses and gradient norms. Between two versions of jax they differ by up to 4e-7.
TOLERANCE = 1e-5
# One device and a hurried compiler: the steps are few, compiling them is the work.
FLAGS = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
ONE = {"NPROC": "1"}  # thread for XLA, however many processors there are: sums are cut by them


@pytest.fixture(scope="module")
def found(world, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("golden")
    command = [sys.executable, str(RUNS), str(world), str(folder)]
    environ = os.environ | {"XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT)} | ONE
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "curves.json").read_text())


def place(recording: dict) -> tuple[str, str]:
    return recording["jax"], recording["cpu"]


@pytest.fixture(scope="module")
def expected(found) -> dict:
    """The recording made in a place like this one, or else the first."""
    recordings = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else []
    if os.environ.get("APOLLO_GOLDEN") == "record":
        others = [r for r in recordings if place(r) != place(found)]
        recordings = sorted([*others, found], key=place)
        GOLDEN.write_text(json.dumps(recordings, indent=1) + "\n")
    return next((r for r in recordings if place(r) == place(found)), recordings[0])


@pytest.mark.parametrize("stage", ["align", "vision", "sft", "contrastive"])
def test_curves_are_golden(found, expected, stage):
    for name, values in expected["curves"][stage].items():
        new = found["curves"][stage][name]
        if place(found) == place(expected):
            assert new == values, f"{name} moved: see the head of this file"
        np.testing.assert_allclose(new, values, rtol=TOLERANCE, err_msg=name)


def test_stages_differ(found):
    """They start from the same weights and see the same rows; what trains is what differs."""
    curves = [found["curves"][stage]["loss"] for stage in ("align", "vision", "sft")]
    firsts = [losses[0] for losses in curves]
    np.testing.assert_allclose(firsts, firsts[0], rtol=1e-6)
    assert len({losses[-1] for losses in curves}) == 3
