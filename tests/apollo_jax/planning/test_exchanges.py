# SPDX-License-Identifier: Apache-2.0
"""Whose exchanges they are: those of the optimizer stand apart in a plan."""

import json
import subprocess
import sys

import pytest

from apollo_jax.planning import hlo

TEXT = """HloModule step, num_partitions=4

ENTRY %main (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  %a = f32[32]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, metadata={op_name="jit(update)/optimizer/while/body/dot_general"}
  ROOT %b = f32[32]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, metadata={op_name="jit(update)/jvp()/optimizers/dot_general"}
}
"""  # noqa: E501  an instruction is a line


def test_those_in_the_optimizers_scope_are_its():
    found = hlo.totals(TEXT, {"fsdp": 4}).collectives
    assert sorted(c.kind for c in found) == ["all-gather", "all-gather of the optimizer"]
    assert {c.bytes for c in found} == {96.0}


@pytest.mark.tpu
def test_what_muon_sends_is_in_the_plan(tmp_path):
    """Products of matrices, where AdamW sends the norm for the clip."""
    overrides = {
        "data.batch_size": 16,
        "data.length": 256,
        "data.clips": 4,
        "mesh.data": 2,
        "mesh.fsdp": 4,
        "optimizer.name": "muon",
    }
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, "-m", "apollo_jax", "plan", "--config", "configs/demo.py:sft"]
    done = subprocess.run(
        [*command, "--topology", "v5e:2x4", "--no-code", *flags, "--json", tmp_path / "plan.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "plan.json").read_text())
    own = [c for c in facts["collectives"] if "of the optimizer" in c["kind"]]
    assert sum(c["bytes"] for c in own) > facts["memory"]["params"]
    assert len(own) < len(facts["collectives"])
