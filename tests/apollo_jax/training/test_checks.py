# SPDX-License-Identifier: Apache-2.0
"""Layouts that cannot run are refused with the nearest that can."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from apollo_jax import sharding
from apollo_jax.config import load
from apollo_jax.training import checks
from apollo_jax.training.step import build

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def sft():
    return load(f"{CONFIGS}/apollo_7b.py:sft")  # 64 rows of 16,384; 28 heads


def mesh(data=1, fsdp=1, context=1, tensor=1):
    return dict(data=data, fsdp=fsdp, context=context, tensor=tensor)


@pytest.mark.parametrize(
    ("sizes", "said", "instead"),
    [
        (
            mesh(fsdp=256),
            "config.data.batch_size=64 does not divide over the 256 row shards of mesh fsdp=256",
            "mesh fsdp=64 tensor=4 or fsdp=64 context=4",  # 128 divides the weights, not 256
        ),
        (
            mesh(fsdp=32, tensor=8),
            "28 heads do not divide over mesh tensor=8",
            "mesh fsdp=64 tensor=4",
        ),
        (
            mesh(fsdp=128),
            "config.data.batch_size=64 does not divide over the 128 row shards",
            "config.data.batch_size=128 or mesh fsdp=64 tensor=2 or",
        ),
        (
            mesh(context=3),
            "length=16384 does not divide into the 6 pieces that ring attention takes",
            "config.data.length=16386",
        ),
        (mesh(tensor=3), "28 heads do not divide over mesh tensor=3", "no mesh over 3 devices"),
    ],
)
def test_refused_with_the_nearest_that_works(sft, sizes, said, instead):
    with pytest.raises(ValueError, match=said) as error:
        checks.layout(sft, sizes)
    where = str(error.value).partition("nearest that work: ")[2]
    assert where.startswith(instead)
    assert "\n" not in str(error.value)


def test_what_is_proposed_for_slices_lies_along_data(demo):
    """2*v5e:4x4: every mesh that is named has a multiple of two along data."""
    rows = replace_rows(demo, 16)
    machine = checks.Machine(slices=2)
    with pytest.raises(ValueError, match="16 does not divide over the 32 row shards") as error:
        checks.layout(rows, mesh(data=2, fsdp=16), machine)
    where = str(error.value).partition("nearest that work: ")[2]
    assert (
        where
        == "config.data.batch_size=32 or mesh data=2 fsdp=8 tensor=2 or data=2 fsdp=8 context=2"
    )
    with pytest.raises(ValueError, match="mesh data=1 does not divide over 2 slices"):
        checks.layout(rows, mesh(fsdp=16, tensor=2), machine)


def test_the_rows_that_ring_attention_takes(demo):
    """Two pieces for each device, on TPUs in blocks of 128; whole rows are Ulysses' own matter."""
    cpu, tpu = checks.Machine(), checks.Machine(tpu=True)

    def rows_of(length, **mesh):
        data = replace(demo.data, length=length)
        return replace(demo, data=data, mesh=sharding.MeshConfig(**mesh))

    sizes = mesh(data=4, context=2)
    checks.layout(rows_of(640), sizes, cpu)
    checks.layout(rows_of(512), sizes, tpu)
    said = r"length=640 .* 4 pieces of a multiple of 128 .*: config.data.length=512 or mesh data=8"
    with pytest.raises(ValueError, match=said):
        checks.layout(rows_of(640), sizes, tpu)
    checks.layout(rows_of(641, attention="ulysses"), sizes, tpu)
    checks.layout(rows_of(641), mesh(data=8), tpu)


def test_ulysses_needs_heads_for_both_axes(sft):
    ulysses = replace(sft, mesh=sharding.MeshConfig(attention="ulysses"))
    sizes = mesh(fsdp=8, context=4, tensor=2)
    checks.layout(sft, sizes)
    with pytest.raises(ValueError, match="28 heads do not divide over mesh context=4 tensor=2"):
        checks.layout(ulysses, sizes)


def test_what_is_proposed_can_run(sft):
    """Every proposal for a batch that is too small passes all checks, those of the weights too."""
    divisors = checks.weight_divisors(sft)
    assert divisors == {"fsdp": 128, "tensor": 16}
    assert not list(checks.refusals(sft, mesh(fsdp=64, tensor=4), divisors))
    (why,) = checks.refusals(replace_rows(sft, 256), mesh(fsdp=256), divisors)
    assert why == "the weights do not divide over mesh fsdp=256, only over 128"


def replace_rows(experiment, rows):
    return replace(experiment, data=replace(experiment.data, batch_size=rows))


@pytest.fixture(scope="module")
def demo():
    return load(f"{CONFIGS}/demo.py:sft")


def test_held_bytes_are_those_of_the_abstract_state(demo):
    devices = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    state = build(demo, devices).abstract
    leaves = [*jax.tree.leaves(state), *state.params.values()]
    sizes = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves]
    held = checks.held_bytes(state, state.params)
    assert checks.on_device(held, devices.shape) == sum(sizes)


def test_what_cannot_fit_is_refused_with_what_does(demo):
    sizes = mesh(data=8)
    state = build(demo, sharding.make_mesh(sharding.MeshConfig())).abstract
    needed = checks.on_device(checks.held_bytes(state, state.params), sizes)
    checks.memory(demo, state, sizes, limit=needed)
    with pytest.raises(
        ValueError, match="nearest that work: mesh data=4 tensor=2 or data=4 fsdp=2"
    ):
        checks.memory(demo, state, sizes, limit=needed * 0.8)
    with pytest.raises(ValueError, match="no mesh over them works"):
        checks.memory(demo, state, sizes, limit=needed / 100)
    with pytest.raises(ValueError, match="no mesh over them works"):  # that has 8 along data
        checks.memory(demo, state, sizes, limit=needed * 0.8, machine=checks.Machine(slices=8))


def test_gradients_of_microbatches_are_held_in_float32_with_a_clip_or_without(demo):
    """Those of one batch in the dtype of the parameters, and only for a clip."""
    state = build(demo, sharding.make_mesh(sharding.MeshConfig())).abstract
    half = {n: jax.ShapeDtypeStruct(p.shape, "bfloat16") for n, p in state.params.items()}
    state = state._replace(
        params={n: p.update(sharding=state.step.sharding) for n, p in half.items()}
    )

    def held(**train):
        changed = replace(demo, train=replace(demo.train, **train))
        return sum(
            p.size * p.dtype.itemsize for p in checks.gradients_held(changed, state).values()
        )

    assert held(accumulate=2) == held(batch_ramp=((0, 1), (9, 4))) == 2 * held() > 0
    unclipped = replace(demo, optimizer=replace(demo.optimizer, clip_norm=0.0))
    assert not checks.gradients_held(unclipped, state)
    many = replace(unclipped, train=replace(demo.train, accumulate=2))
    assert len(checks.gradients_held(many, state)) == len(state.params)
