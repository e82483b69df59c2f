# SPDX-License-Identifier: Apache-2.0
"""What a program for TPUs sums over the chips in stages that freeze parts, compiled here."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tpu

CHIPS = 16
SUMS = ("all-reduce", "reduce-scatter")


@pytest.mark.parametrize("stage", ["align", "vision"])
def test_frozen_parts_exchange_no_gradients_over_fsdp(tmp_path, stage):
    """At most an all-reduce in float32 of what trains."""
    overrides = {
        "mesh.data": 1,
        "mesh.fsdp": CHIPS,
        "data.batch_size": CHIPS,
        "train.remat": "full",
    }
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "-m", "apollo_jax", "plan", "--config", f"configs/demo.py:{stage}"]
    done = subprocess.run(
        [*command, "--topology", "v5e:4x4", "--no-code", *flags, "--json", tmp_path / "plan.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "plan.json").read_text())
    share = (CHIPS - 1) / CHIPS
    trained, frozen = (CHIPS * facts["memory"][part] for part in ("params", "frozen"))
    summed = sum(c["bytes"] for c in facts["collectives"] if c["kind"] in SUMS)
    assert 0.5 * share * trained < summed < 2 * share * trained
    assert summed + share * frozen > 2 * share * trained  # what is frozen would show
