# SPDX-License-Identifier: Apache-2.0
"""What a program for TPUs sums over the chips in stages that freeze parts, compiled here."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tpu

CHIPS = 16
SUMS = ("all-reduce", "reduce-scatter")


@pytest.mark.parametrize("fsdp", [CHIPS, 4, 1])
@pytest.mark.parametrize("stage", ["align", "vision"])
def test_frozen_parts_exchange_no_gradients(tmp_path, stage, fsdp):
    """At most an all-reduce in float32 of what trains, over replicas (`data`), `fsdp` or both."""
    overrides = {
        "mesh.data": CHIPS // fsdp,
        "mesh.fsdp": fsdp,
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
    trained, frozen = (fsdp * facts["memory"][part] for part in ("params", "frozen"))
    summed = sum(c["bytes"] for c in facts["collectives"] if c["kind"] in SUMS)
    most = 2.05 * share * trained  # with sums of the loss and of norms
    assert 0.5 * share * trained < summed < most
    replicas = CHIPS // fsdp  # scattered over fsdp, the parts summed over them
    least = (fsdp - 1) / fsdp + 2 * (replicas - 1) / replicas / fsdp
    assert summed + least * frozen > most  # what is frozen would show
