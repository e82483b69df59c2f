# SPDX-License-Identifier: Apache-2.0
"""What compilers are asked for."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from apollo_jax import sharding

FUSED = "xla_tpu_enable_async_collective_fusion_fuse_all_gather"


OFFLOADED = "xla_tpu_enable_sparse_core_collective_offload_all_gather"


def options(platform: str, kind: str, **asked: bool) -> dict[str, str]:
    device: Any = SimpleNamespace(platform=platform, device_kind=kind)
    mesh: Any = SimpleNamespace(devices=np.array([[device]]))
    return sharding.compiler_options(mesh, **asked)


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_gathers_are_fused_on_v5e_alone(kind):
    found = options("tpu", kind)
    assert found["xla_tpu_prefer_async_allgather_to_allreduce"] == "true"
    assert (FUSED in found) == (kind == "TPU v5 lite")
    # v5e has no such cores, tpu7x uses them by itself
    assert found.get(OFFLOADED) == ("true" if kind in ("TPU v5", "TPU v6 lite") else None)


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v6 lite", "TPU7x"])
def test_exchanges_leave_the_sparse_cores_when_asked_to(kind):
    assert options("tpu", kind, sparse_cores=False)[OFFLOADED] == "false"


def test_nothing_is_asked_of_other_compilers():
    assert options("cpu", "cpu") == {}
