# SPDX-License-Identifier: Apache-2.0
"""Totals of compiled programs: against what is known of them, and of TPU programs' own idioms."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_jax import sharding
from apollo_jax.planning import hlo
from apollo_jax.planning.hlo_module import Module
from apollo_jax.planning.hlo_work import work
from apollo_jax.planning.rates import Rates

FIXTURES = Path(__file__).parents[2] / "fixtures/hlo"
# A loop of a TPU program: unrolled by two, its products written as convolutions inside fusions.
TPU_LOOP = (FIXTURES / "tpu_loop.txt").read_text()
# How TPU programs write exchanges: in parts, wrapped, as something else, through the hosts.
TPU_EXCHANGES = (FIXTURES / "tpu_exchanges.txt").read_text()
SLICES = {"data": 2, "fsdp": 4}
MIB = 2**20


def rates(ici=1e9, dcn=1e9):
    """A device whose product of two [1024, 1024] takes a second, at any speed of its memory."""
    return Rates(flops=2 * 1024**3, hbm=1e30, ici=ici, dcn=dcn)


def collectives(text, mesh, **kw):
    return {(c.kind, c.network): c for c in hlo.totals(text, mesh, rates(**kw)).collectives}


def test_a_tpu_loop():
    total = hlo.totals(TPU_LOOP, {"data": 1, "fsdp": 4, "tensor": 1})
    assert total.flops == 4 * 2 * (2 * 16 * 32 * 16)  # 4 iterations, 2 products [16,32]x[32,16]
    assert total.unknown_kernels == {"k"}
    kinds = {c.kind: c for c in total.collectives}
    permute, gather = kinds["collective-permute"], kinds["all-gather"]
    assert (permute.axes, permute.count, permute.bytes) == (("fsdp",), 4, 4 * 2 * 32 * 8 * 2)
    assert permute.asynchronous == 0  # nothing runs between its start and its end
    assert (gather.bytes, gather.asynchronous) == (64 * 32 * 2 * 3 / 4, 0)
    assert total.seconds == pytest.approx(
        total.work_seconds + permute.waited_seconds + gather.waited_seconds
    )


def test_an_exchange_hides_behind_what_runs_beside_it_and_no_longer():
    lines = TPU_LOOP.splitlines()
    two = next(n for n, line in enumerate(lines) if line.startswith("  %two"))
    lines[two], lines[two + 1] = lines[two + 1], lines[two]
    flops = 2 * 16 * 32 * 16
    sent = 2 * 32 * 8 * 2
    for share in (1.0, 0.5):  # of the exchange, while the second product runs
        speed = Rates(flops=flops, hbm=1e30, ici=sent * share, dcn=1.0)
        (permute, _) = sorted(
            hlo.totals("\n".join(lines), {"fsdp": 4}, speed).collectives, key=lambda c: -c.bytes
        )
        assert permute.kind == "collective-permute"
        assert permute.asynchronous == pytest.approx(share * permute.bytes)
        assert permute.waited_seconds == pytest.approx((1 - share) * permute.seconds)


def test_an_exchange_in_parts_is_one():
    half = 2 * MIB * 3 / 4 / 2
    found = collectives(TPU_EXCHANGES, SLICES, ici=half)["all-gather", "ici"]
    assert (found.count, found.axes, found.bytes) == (1, ("fsdp",), 2 * half)
    assert found.asynchronous == half  # it takes two seconds, the product one of them
    assert (found.seconds, found.waited_seconds) == (2, 1)


def test_a_reduce_scatter_written_as_all_reduce_and_slice():
    found = collectives(TPU_EXCHANGES, SLICES)["reduce-scatter", "ici"]
    assert (found.count, found.bytes, found.asynchronous) == (1, 4 * MIB * 3 / 4, 0)


def test_a_gather_written_as_all_reduce_costs_one():
    found = collectives(TPU_EXCHANGES, SLICES)["all-gather by all-reduce", "ici"]
    assert found.bytes == 2 * 1024 * 64 * 2 * 3 / 4


def test_a_wrapped_exchange():
    found = collectives(TPU_EXCHANGES, SLICES)["all-to-all", "ici"]
    assert (found.count, found.bytes) == (1, 4 * 256 * 64 * 2 * 3 / 4)


def test_an_exchange_handed_to_another_core():
    found = collectives(TPU_EXCHANGES, SLICES)["all-reduce", "ici"]
    assert (found.count, found.bytes) == (1, 2 * 512 * 128 * 4 * 3 / 4)


def test_between_slices():
    found = collectives(TPU_EXCHANGES, SLICES, dcn=MIB)["all-reduce", "dcn"]
    assert (found.axes, found.bytes, found.asynchronous) == (("data",), MIB, 0)
    assert found.seconds == found.waited_seconds == 1
    four = collectives(TPU_EXCHANGES, {"data": 4, "fsdp": 4})["all-reduce", "dcn"]
    assert four.bytes == 2 * MIB * 3 / 4


def test_traffic_counts_the_layer_that_is_used():
    module = Module(TPU_EXCHANGES)
    main = module.computations["main"]
    part = 16 * 64 * 2
    index = 4
    assert work(module, main, main["own"]).bytes == 2 * part + index  # from a stack, in place
    assert work(module, main, main["middle"]).bytes == 3 * 2 * MIB + MIB / 2
    copies = Module(TPU_LOOP.replace("collective-permute-start", "copy-start"))
    body = copies.computations["body"]
    assert work(copies, body, body["s"]).bytes == 2 * 32 * 8 * 2  # to vector memory: half of it


def test_operations_know_where_they_were_written():
    module = Module(TPU_EXCHANGES)
    own = module.computations["main"]["own"]
    assert own.op_name == "jit(update)/jvp()/frozen['w']"
    assert module.source(own) == "qwen2.py:7 Qwen2.__call__"
    assert module.source(module.computations["main"]["start"]) == ""


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ("training/step training/accumulate models/apollo models/qwen2 models/attention", "qwen2"),
        ("training/step training/new models/apollo models/vision_tower models/siglip models/layers",
         "vision_tower"),
        ("training/step training/losses training/linear_cross_entropy", "losses"),
        ("training/step training/optimizer", ""),
        ("training/step models/apollo models/layers", ""),
    ],
)  # fmt: skip
def test_the_part_is_the_outermost_whoever_calls_it(files, part):
    rows = list(enumerate(files.split(), 1))
    tables = {
        "FileNames": [f'{n} "/somewhere/apollo_jax/{file}.py"' for n, file in rows],
        "FunctionNames": ['1 "f"'],
        "FileLocations": [f"{n} {{file_name_id={n} function_name_id=1 line=1}}" for n, _ in rows],
        "StackFrames": [f"{n} {{file_location_id={n} parent_frame_id={n}}}" for n, _ in rows],
    }
    lines = [line for name, table in tables.items() for line in (name, *table)]
    made = f"  %x = f32[] constant(0), metadata={{stack_frame_id={len(rows)}}}"
    module = Module("\n".join([*lines, "ENTRY %main () -> f32[] {", made, "}"]))
    assert module.part(module.computations["main"]["x"]) == part


def test_attention_kernels_are_counted():
    text = TPU_LOOP.replace("%k = ", "%splash_mha_fwd_segmented.3 = ")
    whole = 2 * 2 * 2 * 256 * 256 * 128  # two products of 2 heads
    assert hlo.totals(text, {"fsdp": 4}).kernel_flops == whole
    causal = text.replace("s32[256,128]{1,0}}", ", ".join(["s32[256,128]{1,0}"] * 3) + "}")
    assert hlo.totals(causal, {"fsdp": 4}).kernel_flops == whole * 3 / 4  # 3 of 2 x 2 blocks
    backward = text.replace("splash_mha_fwd", "splash_mha_dkv")
    assert hlo.totals(backward, {"fsdp": 4}).kernel_flops == 2 * whole
    config = '\\"use_fused_bwd_kernel\\": true, '
    fused = backward.replace("operand_layout", f"metadata={{{config}}}, operand_layout")
    assert hlo.totals(fused, {"fsdp": 4}).kernel_flops == 2.5 * whole


def test_other_kernels_count_what_their_authors_say():
    said = 'target="tpu_custom_call", backend_config={"cost_estimate":{"bytes_accessed":"7",'
    text = TPU_LOOP.replace('target="tpu_custom_call"', said + '"flops":"1234"}}')
    total = hlo.totals(text, {"fsdp": 4})
    assert (total.kernel_flops, total.unknown_kernels) == (1234, set())


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_exchanges_name_their_axis(axis):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    place = NamedSharding(mesh, P(axis))
    whole = NamedSharding(mesh, P())
    step = jax.jit(lambda x: (x * 2).sum(0), in_shardings=place, out_shardings=whole)
    text = step.lower(jnp.ones((4, 6))).compile().as_text() or ""
    (found,) = hlo.totals(text, dict(mesh.shape)).collectives
    assert (found.kind, found.axes, found.count) == ("all-reduce", (axis,), 1)
    assert found.bytes == 2 * 6 * 4 / 2  # a ring of two: half of it there and back


def test_no_module():
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.totals("nothing", {"data": 1})


def test_programs_one_after_the_other():
    gather = hlo.Collective("all-gather", ("fsdp",), 2, 8.0, 4.0, "ici", 0.5, 0.25)
    reduce = hlo.Collective("all-reduce", ("data",), 1, 64.0, 0.0, "dcn", 1.0, 1.0)
    last = hlo.Totals(10.0, 1.0, {"a"}, [gather, reduce], 100.0, 1.0, seconds=2.0)
    others = hlo.Totals(20.0, 2.0, {"b"}, [gather], 200.0, 1.5, seconds=3.0)
    whole = hlo.together([(last, 1), (others, 3)])
    assert (whole.flops, whole.kernel_flops, whole.hbm_bytes) == (70.0, 7.0, 700.0)
    assert (whole.work_seconds, whole.seconds) == (5.5, 11.0)
    assert whole.unknown_kernels == {"a", "b"}
    assert whole.collectives == [
        reduce,
        hlo.Collective("all-gather", ("fsdp",), 8, 32.0, 16.0, "ici", 2.0, 1.0),
    ]
