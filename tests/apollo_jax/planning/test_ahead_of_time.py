# SPDX-License-Identifier: Apache-2.0
"""What a compiler says that did not make a program."""

import jax
import pytest

from apollo_jax.planning import ahead_of_time, topology

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
