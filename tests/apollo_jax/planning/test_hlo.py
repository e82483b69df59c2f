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

# A loop of a TPU program: unrolled by two, its products written as convolutions inside fusions.
TPU_LOOP = (Path(__file__).parents[2] / "fixtures/hlo/tpu_loop.txt").read_text()


def test_a_tpu_loop():
    total = hlo.totals(TPU_LOOP, {"data": 1, "fsdp": 4, "tensor": 1})
    assert total.flops == 4 * 2 * (2 * 16 * 32 * 16)  # 4 iterations, 2 products [16,32]x[32,16]
    assert total.unknown_kernels == {"k"}
    kinds = {c.kind: c for c in total.collectives}
    permute, gather = kinds["collective-permute"], kinds["all-gather"]
    assert (permute.axes, permute.count, permute.bytes) == (("fsdp",), 4, 4 * 2 * 32 * 8 * 2)
    assert permute.asynchronous == permute.bytes
    assert (gather.bytes, gather.asynchronous) == (64 * 32 * 2 * 3 / 4, 0)


def test_attention_kernels_are_counted():
    text = TPU_LOOP.replace("%k = ", "%splash_mha_fwd_segmented.3 = ")
    whole = 2 * 2 * 2 * 256 * 256 * 128  # two products of 2 heads
    assert hlo.totals(text, {"fsdp": 4}).kernel_flops == whole
    causal = text.replace("s32[256,128]{1,0}}", ", ".join(["s32[256,128]{1,0}"] * 3) + "}")
    assert hlo.totals(causal, {"fsdp": 4}).kernel_flops == whole * 3 / 4  # 3 of 2 x 2 blocks
    backward = text.replace("splash_mha_fwd", "splash_mha_dkv")
    assert hlo.totals(backward, {"fsdp": 4}).kernel_flops == 2 * whole


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
