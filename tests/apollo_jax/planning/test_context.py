# SPDX-License-Identifier: Apache-2.0
"""Long rows cut over TPUs, compiled here: what goes round, what is exchanged, what it takes."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tpu

LENGTH, CONTEXT = 16_384, 4


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_rows_of_sixteen_thousand_over_four_chips(tmp_path, attention):
    overrides = {
        "data.batch_size": 4,
        "data.length": LENGTH,
        "data.clips": 8,
        "model.llm.max_position_embeddings": LENGTH,
        "mesh.data": 1,
        "mesh.fsdp": 4,
        "mesh.context": CONTEXT,
        "mesh.attention": attention,
        "train.remat": "full",
    }
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "-m", "apollo_jax", "plan", "--config", "configs/demo.py:sft"]
    done = subprocess.run(
        [*command, "--topology", "v5e:4x4", *flags, "--json", tmp_path / "plan.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "plan.json").read_text())
    kinds = {c["kind"] for c in facts["collectives"] if c["axes"] == ["context"]}
    assert ("collective-permute" if attention == "ring" else "all-to-all") in kinds
    assert facts["kernel_flops"] > 0.5 * facts["executed_flops"]  # long rows: mostly attention
    assert not facts["kernels_not_counted"]
    heads = 4
    scores = heads * (LENGTH // CONTEXT) * LENGTH * 4  # bytes of one layer's, were they stored
    assert facts["memory"]["temporaries"] < scores
