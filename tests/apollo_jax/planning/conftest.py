# SPDX-License-Identifier: Apache-2.0
"""Plans that nothing was compiled for: the demo's config with made-up buffers and totals."""

from pathlib import Path

import pytest

from apollo_jax.config import load
from apollo_jax.planning.ahead_of_time import Compiled, Memory
from apollo_jax.planning.buffers import BACKWARD, SAVED, Buffer
from apollo_jax.planning.hlo import Collective, Totals
from apollo_jax.planning.plan import Plan
from apollo_jax.planning.topology import parse

GIB = 2**30
ROOT = Path(__file__).parents[3]
TOTALS = Totals(
    flops=4e12,
    kernel_flops=1e12,
    unknown_kernels={"mystery"},
    collectives=[
        Collective("all-gather", ("fsdp",), 30, 2 * GIB, GIB, "ici", 0.02, 0.01),
        Collective("all-reduce", ("data",), 1, GIB, 0.0, "dcn", 0.3, 0.3),
    ],
    hbm_bytes=8e9,
    work_seconds=0.03,
    seconds=0.34,
)
BUFFERS = [
    Buffer(6 * GIB, "bf16[24,8,16384]", SAVED, "qwen2.py:7 Qwen2.__call__", "qwen2"),
    Buffer(4 * GIB, "f32[448,729,64]", BACKWARD, "siglip.py:9 SigLIP.__call__", "siglip"),
]


@pytest.fixture
def example():
    """A function that makes a plan; keywords change it."""
    return _example


def _example(*, temporaries=11 * GIB, fits=True, price=0.0):
    memory = Memory(GIB, GIB // 2, 2 * GIB, GIB // 4, temporaries, 0, 14 * GIB)
    experiment = load(f"{ROOT}/configs/demo.py:sft")
    return Plan(
        experiment=experiment.name,
        topology=parse("2*v5e:4x4"),
        mesh={"data": 2, "fsdp": 8, "context": 1, "tensor": 2},
        compiled=Compiled(fits, memory, TOTALS if fits else None, BUFFERS),
        needed_flops=2e12,
        rows=32,
        tokens=32 * 192,
        frames=32 * 24,
        config=experiment,
        price=price,
        input_bytes=10**7,
    )
