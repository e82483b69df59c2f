# SPDX-License-Identifier: Apache-2.0
"""The loss head at Qwen2.5-7B's vocabulary, compiled for TPUs: temporaries and FLOPs per chip."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.tpu

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "loss_head.py"


def measured(folder, **flags) -> dict:
    words = [w for name, value in flags.items() for w in (f"--{name}", value)]
    command = [sys.executable, BENCHMARK, *words, "--json", folder / "rows.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((folder / "rows.json").read_text())
    return row


@pytest.mark.parametrize(
    ("cut", "topology", "tokens", "most"),
    [
        ("positions", "v5p:2x2x4", "8192", 1.05),
        ("positions", "v5p:2x2x4", "32768", 1.05),
        ("positions", "v5e:4x4", "32768", 1.05),
        ("vocabulary", "v5e:4x4", "32768", 1.34),
    ],
)
def test_neither_logits_nor_table_exist_whole(tmp_path, topology, cut, tokens, most):
    row = measured(tmp_path, topologies=topology, tokens=tokens, heads=cut, tables="trained")
    assert row["temp_gib"] <= 0.6
    assert 1.0 <= row["flops"] <= most


def test_a_frozen_table_costs_two_products(tmp_path):
    row = measured(tmp_path, topologies="v5e:4x4", tokens="8192", heads="positions",
                   tables="frozen")  # fmt: skip
    assert row["temp_gib"] <= 0.6
    assert 1.0 <= row["flops"] <= 1.05
