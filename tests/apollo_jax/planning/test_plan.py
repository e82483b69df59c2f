# SPDX-License-Identifier: Apache-2.0
"""Real compilation for TPUs, on this machine: the command as a user runs it."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tpu

OVERRIDES = {
    "data.batch_size": "16",
    "data.length": "256",
    "data.clips": "4",
}


def run(folder, *arguments, config="configs/demo.py:sft", **overrides):
    flags = [f"--config.{k}={v}" for k, v in (OVERRIDES | overrides).items()]
    command = [sys.executable, "-m", "apollo_jax", "plan", "--config", config, *flags]
    return subprocess.run(
        [*command, *arguments, "--json", folder / "plan.json"], capture_output=True, text=True
    )


def test_the_real_step_is_compiled_for_two_slices(tmp_path):
    mesh = {"mesh.data": "4", "mesh.fsdp": "4"}
    page = "--html", tmp_path / "plan.html", "--price", "1.5", "--config.positions_per_sample=128"
    done = run(tmp_path, "--topology", "2*v5e:2x4", *page, **mesh)
    assert done.returncode == 0, done.stderr
    assert "16 chips, data 4 x fsdp 4 x context 1 x tensor 1" in done.stdout
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert facts["fits"]
    memory = facts["memory"]
    assert sum(facts["temporaries_at_peak"].values()) == memory["temporaries"]
    assert memory["params"] < memory["peak"] < sum(memory.values()) - memory["peak"]
    assert (
        1.0 <= facts["executed_flops"] / facts["model_flops"] < 5
    )  # heads of 12 are padded to 128
    assert facts["kernel_flops"] > 0  # 256 queries: the decoder's attention is splash
    assert not facts["kernels_not_counted"]
    axes = {axis for c in facts["collectives"] for axis in c["axes"]}
    assert axes == {"data", "fsdp"}
    between = [c for c in facts["collectives"] if c["network"] == "dcn"]
    assert [(c["kind"], c["axes"]) for c in between] == [("all-reduce", ["data"])]
    # Halves of the gradients of what trains, which fsdp has cut into four.
    assert memory["params"] < 2 * between[0]["bytes"] < 8 * memory["params"]
    assert facts["bound"]["step_seconds"] >= facts["bound"]["compute_seconds"] > 0
    cost = facts["cost"]
    assert cost["usd_per_million_samples"] == cost["usd_per_million_rows"] / 2 > 0
    assert "</html>" in (tmp_path / "plan.html").read_text()


def test_a_step_from_microbatches_is_planned_whole(tmp_path):
    """Four microbatches of as many rows take four times as long, and the sums of gradients."""
    facts = {}
    for count in (1, 4):
        more = {"mesh.data": "2", "mesh.fsdp": "4", "train.accumulate": str(count)}
        done = run(tmp_path, "--topology", "v5e:2x4", "--no-code", **more)
        assert done.returncode == 0, done.stderr
        facts[count] = json.loads((tmp_path / "plan.json").read_text())
    one, four = facts[1], facts[4]
    assert "an update from 4 microbatches, 64 rows" in done.stdout
    assert four["batch"]["rows"] == 4 * one["batch"]["rows"] == 64
    assert four["model_flops"] == 4 * one["model_flops"]
    assert four["executed_flops"] == pytest.approx(4 * one["executed_flops"], rel=0.02)
    assert 3 < four["bound"]["step_seconds"] / one["bound"]["step_seconds"] < 4.5
    assert (one["memory"]["accumulated"], four["memory"]["accumulated"]) == (
        0,
        four["memory"]["params"],
    )
    for kind in ("params", "frozen", "moments", "batch"):
        assert four["memory"][kind] == one["memory"][kind]
    assert four["memory"]["peak"] > one["memory"]["peak"]


def test_what_does_not_fit_is_an_answer(tmp_path):
    """Sixteen thousand rows of a toy: their activations exceed the chip."""
    done = run(tmp_path, "--topology", "v5e:4x4", **{"data.batch_size": "262144"})
    assert done.returncode == 1, done.stderr
    assert "does not fit" in done.stdout
    assert "data.batch_size" in done.stdout
    facts = json.loads((tmp_path / "plan.json").read_text())
    assert not facts["fits"]
    assert facts["memory"]["temporaries"] > facts["hbm_bytes"]
    assert "qwen2.py" in done.stdout or "attention.py" in done.stdout  # what is largest
    assert facts["advice"][0].startswith("config.train.remat=full")
    assert any(a.startswith("config.data.batch_size=131072") for a in facts["advice"])


@pytest.mark.parametrize(
    ("arguments", "overrides", "said"),
    [
        (("--topology", "v5e-250"), {}, "did you mean v5e-256"),
        (("--topology", "v5e:4x4"), {"mesh.data": "3"}, "mesh data=3 on 16 devices"),
        (
            ("--topology", "v5e:4x4"),
            {"data.batch_size": "12"},
            "batch_size=12 does not divide over the 16",
        ),
        (
            ("--topology", "2*v5e:4x4"),
            {"mesh.data": "2", "mesh.fsdp": "16"},
            "nearest that work: config.data.batch_size=32 or mesh data=2 fsdp=8 tensor=2 or",
        ),
        (
            ("--topology", "v5e:4x4"),
            {"mesh.data": "4", "mesh.context": "4"},
            "length=256 does not divide into the 8 pieces of a multiple of 128 positions",
        ),
    ],
)
def test_errors_are_one_line(tmp_path, arguments, overrides, said):
    done = run(tmp_path, *arguments, **overrides)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
