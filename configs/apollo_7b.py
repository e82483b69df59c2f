# SPDX-License-Identifier: Apache-2.0
"""The published recipe of Apollo-7B, stages `:align`, `:vision`, `:sft`; see configs/apollo.py.

    apollo-jax train --config configs/apollo_7b.py:align --workdir runs/align \\
        --config.data.tokenizer=weights/Qwen2.5-7B-Instruct ...

`:sft,v5p-128` lays the stage out for that TPU slice: mesh and rematerialisation are those that
`apollo-jax plan search` found for it, and docs/fit.md shows what they need. `:sft` alone shards
everything over whatever devices are there.
"""

from pathlib import Path

from ml_collections import ConfigDict

from apollo_jax.config import load_module
from apollo_jax.models import apollo
from apollo_jax.sharding import MeshConfig

LLM_RATE = 1e-5  # of the decoder in the last stage
MAX_CLIPS = 150  # there too; as published, though 150 x 128 tokens exceed the released context

SLICES = {
    "align": {
        "v5e-256": dict(mesh=MeshConfig(data=1, fsdp=128, tensor=2), remat="dots"),
        "v5p-128": dict(mesh=MeshConfig(data=1, fsdp=64), remat="dots"),
        "v6e-256": dict(mesh=MeshConfig(data=1, fsdp=128, context=2), remat="dots"),
        "tpu7x-64": dict(mesh=MeshConfig(data=1, fsdp=128), remat="dots"),
    },
    "vision": {
        "v5e-256": dict(mesh=MeshConfig(data=2, fsdp=128), remat="full"),
        "v5p-128": dict(mesh=MeshConfig(data=1, fsdp=64), remat="full"),
        "v6e-256": dict(mesh=MeshConfig(data=4, fsdp=64), remat="save_attention"),
        "tpu7x-64": dict(mesh=MeshConfig(data=1, fsdp=128), remat="save_attention"),
    },
    "sft": {
        "v5e-256": dict(mesh=MeshConfig(data=1, fsdp=64, context=2, tensor=2), remat="save_qkv"),
        "v5p-128": dict(mesh=MeshConfig(data=1, fsdp=64), remat="dots"),
        "v6e-256": dict(mesh=MeshConfig(data=1, fsdp=64, context=4), remat="dots"),
        "tpu7x-64": dict(mesh=MeshConfig(data=1, fsdp=64, context=2), remat="dots"),
    },
}


def get_config(arg: str = "align") -> ConfigDict:
    """The experiment of one stage, or of one stage on one slice: "sft,v5p-128"."""
    return load_module(Path(__file__).with_name("apollo.py")).recipe(
        "apollo_7b",
        arg,
        model=apollo.Config.apollo_7b(),
        llm_rate=LLM_RATE,
        max_clips=MAX_CLIPS,
        slices=SLICES,
    )
