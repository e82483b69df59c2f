# SPDX-License-Identifier: Apache-2.0
"""Meshes as sizes, and what is said about one that does not work."""

import math

import pytest
from flax import nnx

from apollo_jax import meshes, sharding
from apollo_jax.models import layers
from apollo_jax.sharding import MeshConfig


def test_every_mesh_is_there_once():
    found = list(meshes.every(12, ("a", "b", "c")))
    assert len(found) == len({tuple(m.values()) for m in found}) == 6 * 3  # 2^2 and 3^1 in 3 axes
    assert all(math.prod(m.values()) == 12 for m in found)
    assert meshes.divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


def test_the_nearest_differ_least():
    every = list(meshes.every(64, ("data", "fsdp", "tensor")))
    best = meshes.nearest({"data": 1, "fsdp": 48, "tensor": 1}, every, 2)
    assert best[0] == {"data": 1, "fsdp": 64, "tensor": 1}
    assert best[1]["fsdp"] == 32
    assert meshes.listed(best[:1]) == "fsdp=64"
    assert meshes.text({"data": 1, "fsdp": 1}) == "data=1"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            MeshConfig(fsdp=6),
            "mesh fsdp=6 on 8 devices .* nearest that work: fsdp=8 or data=2 fsdp=4",
        ),
        (MeshConfig(data=3, tensor=4), "data=3 tensor=4 on 8 .* tensor=4"),
        (MeshConfig(data=1, fsdp=16), "fsdp=16 on 8 .* fsdp=8"),
        (
            MeshConfig(data=-1, fsdp=-1, tensor=2),
            "config.mesh.data=-1, config.mesh.fsdp=-1: at most one .*: fsdp=4 tensor=2 or",
        ),
        (
            MeshConfig(fsdp=4, tensor=0),
            "config.mesh.tensor=0: an axis has one device or more, .*: data=2 fsdp=4 or",
        ),
        (MeshConfig(fsdp=-2), "^config.mesh.fsdp=-2: an axis has one"),
    ],
)
def test_a_mesh_that_does_not_use_the_devices(config, said):
    with pytest.raises(ValueError, match=said) as error:
        sharding.make_mesh(config)
    assert "\n" not in str(error.value)


def test_sizes_are_filled_in():
    sizes = sharding.mesh_sizes(MeshConfig(data=-1, fsdp=4, tensor=2), 64)
    assert sizes == {"data": 8, "fsdp": 4, "context": 1, "tensor": 2}


def test_slices_lie_along_data():
    assert sharding.mesh_sizes(MeshConfig(fsdp=4), 8, slices=2)["data"] == 2
    said = "mesh data=1 does not divide over 2 slices, .*: data=2 fsdp=4 or data=4 fsdp=2$"
    with pytest.raises(ValueError, match=said):
        sharding.mesh_sizes(MeshConfig(data=1, fsdp=8), 8, slices=2)
    with pytest.raises(ValueError, match=r"fsdp=6 on 8 .*: data=2 fsdp=4 or"):  # and not fsdp=8
        sharding.mesh_sizes(MeshConfig(data=1, fsdp=6), 8, slices=2)


def test_a_weight_that_the_mesh_does_not_divide():
    init = nnx.initializers.zeros
    model = nnx.Dict(
        wide=layers.param((96, 8), ("embed", None), init, dtype="float32", rngs=nnx.Rngs(0)),
        narrow=layers.param((36, 8), ("embed", None), init, dtype="float32", rngs=nnx.Rngs(0)),
    )
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    with pytest.raises(ValueError, match=r"narrow .*\(36, 8\)") as error:
        sharding.param_shardings(nnx.state(model), mesh)
    assert "nearest that divide every weight: fsdp=6 or fsdp=12" in str(error.value)
