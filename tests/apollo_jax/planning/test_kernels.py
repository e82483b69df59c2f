# SPDX-License-Identifier: Apache-2.0
"""The attention kernel, compiled for TPUs with the shapes of the decoders and of the encoders."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tpu

COMPILE = """
import sys
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from apollo_jax import sharding
from apollo_jax.models.attention import Causal, attention
from apollo_jax.planning import topology

topology.use_compiler_only()
mesh = sharding.make_mesh(sharding.MeshConfig(), topology.parse(sys.argv[1]).devices())
everywhere = NamedSharding(mesh, PartitionSpec("data"))
for text in sys.argv[2:]:
    length, heads, kv_heads, width, causal = map(int, text.split(","))

    def loss(q, k, v, segments):
        out = attention(q, k, v, Causal(segments) if causal else None)
        return out.astype(jnp.float32).sum()

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((mesh.size, length, *dims), dtype, sharding=everywhere)

    operands = shape(heads, width), shape(kv_heads, width), shape(kv_heads, width)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        compiled = step.lower(*operands, shape(dtype=jnp.int32)).compile()
    print(compiled.memory_analysis().temp_size_in_bytes, heads * length * length * 4)
"""
SHAPES = {
    "Qwen2.5-7B": (8192, 28, 4, 128, 1),
    "Qwen2.5-1.5B": (8192, 12, 2, 128, 1),
    "SigLIP": (729, 16, 16, 72, 0),
    "InternVideo2": (1025, 16, 16, 88, 0),
    "width 96": (2048, 8, 8, 96, 0),
}


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_no_scores_are_stored(topology):
    shapes = [",".join(map(str, shape)) for shape in SHAPES.values()]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, topology, *shapes],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    found = [[int(n) for n in line.split()] for line in done.stdout.splitlines()]
    for name, (temporaries, scores) in zip(SHAPES, found, strict=True):
        assert temporaries < scores, name
