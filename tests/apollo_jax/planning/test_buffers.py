# SPDX-License-Identifier: Apache-2.0
"""What lies in memory at the peak, read from a dump as the compiler writes it."""

import shutil
from pathlib import Path

import pytest

from apollo_jax.planning import buffers
from apollo_jax.planning.hlo_module import Module

# Cut from the dump of configs/apollo_1p5b.py:sft,v5p-128: what the scan over the decoder's layers
# keeps is allocated before the vision encoders run, one of whose padded arrays lives meanwhile.
SCAN_OUTPUT = Path(__file__).parents[2] / "fixtures/hlo/scan_output"
PROGRAM = """HloModule jit_f, is_scheduled=true

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %kept = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, metadata={op_name="jit(f)/jvp()/dot"}
  %brief = f32[8,8]{1,0} add(%kept, %a), metadata={op_name="jit(f)/jvp()/add"}
  %loss = f32[8,8]{1,0} add(%brief, %brief), metadata={op_name="jit(f)/jvp()/add"}
  %whole = f32[8,8]{1,0} all-gather(%loss), replica_groups={{0}}, dimensions={0}
  %back = f32[8,8]{1,0} dot(%whole, %kept), lhs_contracting_dims={1}, BACKWARD
  %last = f32[8,8]{1,0} dot(%back, %kept), lhs_contracting_dims={1}, BACKWARD
  ROOT %new = f32[8,8]{1,0} subtract(%a, %last), metadata={op_name="jit(f)/sub"}
}
""".replace("BACKWARD", 'metadata={op_name="jit(f)/transpose(jvp())/dot"}')
NAMES = ("a", "kept", "brief", "loss", "whole", "back", "last", "new")
LIVES = {"kept": (1, 6), "brief": (2, 3), "loss": (3, 4), "whole": (4, 5), "back": (5, 6)}
LIVES |= {"last": (6, 7)}
OFFSETS = {"kept": 0, "brief": 256, "loss": 512, "whole": 768, "back": 256, "last": 512}


def dump(folder: Path, lives):
    lines = ["HloLiveRange (max 8):", "  InstructionSequence:"]
    lines += [f"    {n}:{name}" for n, name in enumerate(NAMES)]
    lines += ["  BufferLiveRange:", *(f"    {n}{{}}:{b}-{d}" for n, (b, d) in lives.items())]
    (folder / "m.x-live-range.txt").write_text("\n".join([*lines, "  Live ranges at 5 (peak):"]))
    values = [
        f" value: <{n} {name} @0> (size=256,offset={OFFSETS[name]}): f32[8,8]{{1,0:T(8,128)}}"
        for n, name in enumerate(lives)
    ]
    other = " value: <9 a @0> (size=999999,offset=0): f32[8,8]{1,0:S(1)}"
    text = ["BufferAssignment:", "allocation 1: size 1024, preallocated-temp:", *values]
    text += ["allocation 2: size 999999, color 1, preallocated-temp:", other]
    (folder / "m.x-buffer-assignment.txt").write_text("\n".join(text))


@pytest.mark.parametrize(
    ("longer", "kinds"),
    [
        ({"brief": (2, 4)}, {buffers.SAVED: 256, buffers.FORWARD: 512, buffers.EXCHANGED: 256}),
        ({"whole": (4, 7)}, {buffers.SAVED: 256, buffers.EXCHANGED: 256, buffers.BACKWARD: 256,
                             buffers.GRADIENTS: 256}),
    ],
)  # fmt: skip
def test_the_fullest_moment(tmp_path, longer, kinds):
    dump(tmp_path, LIVES | longer)
    found = buffers.at_peak(tmp_path, Module(PROGRAM))
    sums: dict[str, int] = {}
    for b in found:
        sums[b.kind] = sums.get(b.kind, 0) + b.bytes
    assert sums == kinds
    assert {b.shape for b in found} == {"f32[8,8]"}


@pytest.mark.parametrize(
    ("peak", "kind", "source"),
    [
        ("628-639", buffers.FORWARD, "qwen2.py:206 Block.__call__"),
        ("1738-1738", buffers.BACKWARD, "qwen2.py:278 Qwen2.__call__"),
    ],
)
def test_what_a_loop_keeps_is_one_array_from_its_allocation_on(tmp_path, peak, kind, source):
    """Though no more than allocated in the first case, and the loop's result in the second."""
    folder = shutil.copytree(SCAN_OUTPUT, tmp_path / "dump")
    lives = folder / "update-live-range.txt"
    lives.write_text(lives.read_text().replace("pad.370{}:628-639", f"pad.370{{}}:{peak}"))
    kept, pad = buffers.at_peak(folder, Module((folder / "update.txt").read_text()))
    assert (kept.kind, pad.kind) == (buffers.SAVED, kind)
    assert (kept.bytes, kept.shape) == (28 * 16384 * 8960 * 2, "bf16[28,1,16384,8960]")
    assert (kept.source, pad.source) == (source, "splash_attention.py:141 padded")
    assert (kept.part, pad.part) == ("qwen2", "siglip")


def test_without_a_dump_nothing_is_said(tmp_path):
    assert buffers.at_peak(tmp_path, Module(PROGRAM)) == []
