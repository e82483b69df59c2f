# SPDX-License-Identifier: Apache-2.0
"""A config over the folder that the `world` fixture makes: `--config .../tiny.py:FOLDER`."""

from ml_collections import ConfigDict

from apollo_jax.config import (
    EvalConfig,
    Experiment,
    LearningRates,
    OptimizerConfig,
    TrainConfig,
    to_config,
)
from apollo_jax.models import apollo
from data_pipeline.loader import DataConfig, SourceConfig


def get_config(arg: str = "") -> ConfigDict:
    """Connector and decoder train for 8 steps in float32, on text, images and videos."""
    model = apollo.Config.debug()
    data = DataConfig(
        sources={"all": SourceConfig(f"{arg}/train.jsonl")},
        frames=(f"{arg}/shards",),
        tokenizer=f"{arg}/tokenizer.model",
        batch_size=8,
        length=192,
        clips=2,
        frame_size=model.frame_size,
        tokens_per_clip=model.connector.num_output_tokens,
    )
    train = TrainConfig(
        num_steps=8, dtype="float32", frozen_dtype="float32", log_every=1, checkpoint_every=3
    )
    rates = LearningRates(connector=1e-3, llm=1e-3)
    optimizer = OptimizerConfig(rates, warmup_ratio=0.25)
    evaluation = EvalConfig({"held out": SourceConfig(f"{arg}/eval.jsonl")}, every=4, batches=1)
    return to_config(Experiment("tiny", model, data, train, optimizer, evaluation))
