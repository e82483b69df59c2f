# SPDX-License-Identifier: Apache-2.0
"""A plan that stops before the machine code says what a whole one says."""

import json
import subprocess
import sys

import pytest

from apollo_jax.planning.buffers import GAPS

pytestmark = pytest.mark.tpu

COMMAND = [sys.executable, "-m", "apollo_jax", "plan", "--config", "configs/demo.py:sft"]
COMMAND += ["--topology", "v5e:4x4", "--config.data.length=256", "--config.data.clips=4"]

STATE = ("params", "frozen", "moments", "batch")


def plan(folder, rows: int, *flags: str) -> tuple[int, dict]:
    path = folder / "plan.json"
    command = [*COMMAND, f"--config.data.batch_size={rows}", *flags, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, json.loads(path.read_text())


def test_the_same_but_for_the_code(tmp_path):
    (code, short), (_, whole) = (plan(tmp_path, 1024, *flags) for flags in (["--no-code"], []))
    assert code == 0
    assert short["memory"]["code"] == 0
    for name in ("largest", "executed_flops", "collectives", "bound"):
        assert short[name] == whole[name]
    gaps = [facts["temporaries_at_peak"].pop(GAPS) for facts in (short, whole)]
    assert short["temporaries_at_peak"] == whole["temporaries_at_peak"]
    assert 0 <= gaps[0] <= gaps[1]  # with what the code adds
    of_state = {kind: size for kind, size in whole["memory"].items() if kind in STATE}
    assert short["memory"] | of_state == short["memory"]
    assert short["memory"]["peak"] >= sum(of_state.values())


def test_what_does_not_fit_is_refused_as_well(tmp_path):
    code, facts = plan(tmp_path, 262_144, "--no-code")
    assert code == 1
    assert not facts["fits"]
