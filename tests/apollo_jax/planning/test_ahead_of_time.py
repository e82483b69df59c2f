# SPDX-License-Identifier: Apache-2.0
"""What a compiler says that did not make a program, and what is made of it."""

import json
import os
import subprocess
import sys

import jax
import pytest

from apollo_jax.planning import ahead_of_time, topology
from apollo_jax.planning.buffers import GAPS, SAVED, Buffer

CRASH = "INTERNAL: RET_CHECK failure (x.cc:1) async-update instruction should have 1 operands"
TOO_LARGE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(1.5G) exceeds available HBM (1.0G)."
)


class Lowered:
    """Fails with these messages, one after the other, then compiles."""

    def __init__(self, *messages):
        self.messages, self.asked = list(messages), []

    def compile(self, compiler_options):
        self.asked.append(compiler_options)
        if self.messages:
            raise jax.errors.JaxRuntimeError(self.messages.pop(0))
        return "program"


def test_a_step_that_does_not_fit(tmp_path):
    found = ahead_of_time._compile(Lowered(TOO_LARGE), str(tmp_path))
    assert found == (None, 1.5 * 2**30, "")


def test_what_the_compiler_calls_temporaries_of_a_step_that_does_not_fit_are_its_arguments_too():
    held = {"params": 1, "frozen": 2, "moments": 3, "batch": 4, "accumulated": 5}
    memory = ahead_of_time._memory(held, None, 100)
    assert (memory.temporaries, memory.peak) == (85, 100)


def test_temporaries_add_up(example):
    compiled = example().compiled
    assert sum(compiled.temporaries.values()) == compiled.memory.temporaries
    assert list(compiled.temporaries)[-1] == GAPS


DEEP = """
import json
from dataclasses import asdict
from apollo_jax.config import load
from apollo_jax.planning import plan, topology

topology.use_compiler_only()
batch = {"data.batch_size": "8192", "data.length": "256", "data.clips": "4"}
experiment = load("configs/demo.py:sft", batch | {"model.llm.num_hidden_layers": "8"})
found = plan.plan(experiment, topology.parse("v5e:2x2"))
print(json.dumps([found.facts(), [asdict(b) for b in found.compiled.buffers]]))
"""


@pytest.mark.tpu
def test_a_decoder_of_eight_layers_whose_rows_are_too_many():
    done = subprocess.run(
        [sys.executable, "-c", DEEP],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    facts, buffers = json.loads(done.stdout.splitlines()[-1])
    buffers = [Buffer(**b) for b in buffers]
    at_peak = sum(b.bytes for b in buffers)
    assert sum(b.bytes for b in buffers if b.part == "qwen2") > 0.9 * at_peak
    assert sum(b.bytes for b in buffers if b.kind == SAVED) > 0.8 * at_peak
    for change in (
        "config.data.batch_size=4096, half the rows per device",
        "config.mesh.context=2",
    ):
        assert any(a.startswith(change) for a in facts["advice"]), change
    assert facts["temporaries_at_peak"][GAPS] < 0.01 * at_peak
    memory = facts["memory"]
    assert sum(v for k, v in memory.items() if k != "peak") == memory["peak"]


def test_a_crash_that_is_known_gets_a_plainer_program(tmp_path):
    lowered = Lowered(CRASH)
    program, _, note = ahead_of_time._compile(lowered, str(tmp_path))
    assert program == "program"
    assert note == "--xla_tpu_enable_async_collective_fusion=false"
    assert [set(ahead_of_time.PLAINER) <= set(o) for o in lowered.asked] == [False, True]


@pytest.mark.parametrize("messages", [(CRASH, CRASH), ("INTERNAL: something else\nat x.cc",)])
def test_other_faults_are_called_the_compilers(tmp_path, messages):
    with pytest.raises(ValueError, match="a fault of the compiler, not of the config") as error:
        ahead_of_time._compile(Lowered(*messages), str(tmp_path))
    assert "\n" not in str(error.value)
    assert "LIBTPU_INIT_ARGS" in str(error.value)


@pytest.mark.parametrize(
    "message",
    ["JAX TPU support not installed; cannot generate TPU topology.", "libtpu.so: cannot open"],
)
def test_without_libtpu(monkeypatch, message):
    def fail(**_):
        raise RuntimeError(message)

    monkeypatch.setattr(topology.topologies, "get_topology_desc", fail)
    with pytest.raises(ValueError, match="needs the libtpu package"):
        topology.parse("v5e:4x4").devices()
