# SPDX-License-Identifier: Apache-2.0
"""Clips of the `world` fixture and what is said of them: `--config .../pairs.py:FOLDER`."""

from dataclasses import replace

from ml_collections import ConfigDict

from apollo_jax.config import OptimizerConfig, TrainConfig, to_config
from apollo_jax.models import apollo, two_towers
from apollo_jax.training.contrastive import Contrastive, Rates, TowerPaths
from data_pipeline.loader import DataConfig, SourceConfig


def get_config(arg: str = "") -> ConfigDict:
    """Both towers train for 3 steps in float32; the rows of texts alone are pairs of zeros."""
    tower = replace(apollo.Config.debug().towers["siglip"], num_hidden_layers=2)
    text = two_towers.TextConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_tokens=16,
    )
    model = two_towers.Config({"siglip": tower}, text, embedding_size=32, frames_per_clip=4)
    data = DataConfig(
        sources={"all": SourceConfig(f"{arg}/train.jsonl")},
        frames=(f"{arg}/shards",),
        tokenizer=f"{arg}/tokenizer.model",
        batch_size=8,
        length=192,
        clips=1,
        max_clips=1,
        frame_size=32,
        tokens_per_clip=1,
    )
    train = TrainConfig(
        num_steps=3, dtype="float32", frozen_dtype="float32", log_every=1, checkpoint_every=100
    )
    # Adam's first steps are signs: a large eps keeps them as smooth as gradients are.
    optimizer = OptimizerConfig(warmup_ratio=0.0, eps=1e-2)
    paths = TowerPaths({"siglip": ""})
    rates = Rates(1e-3, 1e-3, 1e-3)
    e = Contrastive("pairs", model, data, train, rates, optimizer=optimizer, init_parts=paths)
    return to_config(e)
