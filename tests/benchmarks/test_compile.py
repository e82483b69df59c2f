# SPDX-License-Identifier: Apache-2.0
"""The benchmark of compilation: what it compiles, and how it reads what MaxText prints."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """HloModule step, num_partitions=64

ENTRY %main (a: f32[16,32], b: f32[32,16]) -> f32[16,16] {
  %a = f32[16,32]{1,0} parameter(0)
  %b = f32[32,16]{1,0} parameter(1)
  %d = f32[16,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %n = f32[16,16]{1,0} negate(%d)
}
"""
PEER = """#!{python}
import pathlib, sys
if sys.argv[1] == "-c":
    print("noise about the machine")
    print("/somewhere/configs/base.yml")
    raise SystemExit
said = " ".join(sys.argv)
assert "train_compile /somewhere/configs/base.yml" in said, said
assert "compile_topology=v5p-128" in said, said
assert "max_target_length=8192" in said, said
dump = pathlib.Path(said.split("--xla_dump_to=")[1].split()[0])
dump.mkdir()
(dump / "module_0001.jit_step.after_optimizations.txt").write_text({program!r})
print("Memory analysis: CompiledMemoryStats(argument_size_in_bytes=1073741824, "
      "temp_size_in_bytes=2147483648, host_argument_size_in_bytes=0, host_temp_size_in_bytes=0)")
"""


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("compile")
    del sys.modules["compile"]


def test_what_is_compiled_is_the_decoder_alone(bench):
    shape = bench.Shape(model="qwen2.5-1.5b", topology="v5e:4x4", tokens=4096, layers=2)
    experiment = bench.decoder_only(shape, "nested")
    assert experiment.model.llm.num_hidden_layers == 2
    assert (experiment.data.batch_size, experiment.data.length, experiment.data.clips) == (
        16, 4096, 0,
    )  # fmt: skip
    rates = experiment.optimizer.learning_rates
    assert (rates.vision_tower, rates.connector) == (0, 0)
    assert rates.llm > 0
    assert experiment.train.remat == "nested"


def test_the_peer_is_run_and_read(bench, tmp_path):
    python = tmp_path / "python"
    python.write_text(PEER.format(python=sys.executable, program=PROGRAM))
    python.chmod(0o755)
    found = bench.maxtext(python, bench.Shape())
    assert (found.arguments, found.temporaries) == (1.0, 2.0)
    assert found.tflop == 2 * 16 * 32 * 16 / 1e12
    product, plain = 2 * 16 * 32 + 16 * 16, 2 * 16 * 16  # elements moved: both are bound by memory
    assert found.plain == pytest.approx(100 * plain / (product + plain))
    assert found.cpu_seconds > 0
    python.write_text(f"#!{sys.executable}\nimport sys\nprint('no such model')\nsys.exit(1)\n")
    with pytest.raises(RuntimeError, match="no such model"):
        bench.maxtext(python, bench.Shape())


def test_a_row_has_ratios_to_the_peer(bench):
    peer = bench.REFERENCE[bench.Shape()]
    ours = bench.Result(1.33, peer.temporaries / 2, 502.0, 3.9, 48.0)
    assert bench.row("ours", ours, peer).split()[1:] == [
        "1.33", "1.00x", "3.73", "0.50x", "502.00", "1.00x", "3.90", "-", "48.00", "0.50x",
    ]  # fmt: skip
    assert "x" not in bench.row("Us", ours, None)
