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


@pytest.mark.parametrize("tokens", ["8192", "32768"])
@pytest.mark.parametrize("topology", ["v5p:2x2x4", "v5e:4x4"])
def test_along_the_vocabulary_nothing_as_large_as_the_table_exists(tmp_path, topology, tokens):
    row = measured(tmp_path, topologies=topology, tokens=tokens, heads="vocabulary",
                   tables="trained")  # fmt: skip
    assert row["temp_gib"] <= 0.6
    assert 1.0 < row["flops"] <= 1.34


@pytest.mark.parametrize("table", ["trained", "frozen"])
def test_along_positions_no_product_is_computed_twice(tmp_path, table):
    row = measured(tmp_path, topologies="v5e:4x4", tokens="8192", heads="positions", tables=table)
    assert 1.0 <= row["flops"] <= 1.05
