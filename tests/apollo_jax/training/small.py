# SPDX-License-Identifier: Apache-2.0
"""A config that compiles in seconds, for runs of several processes: one layer each, text only."""

from dataclasses import replace

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
    """The decoder trains for 8 steps in float32 on `arg`/text.jsonl, 8 rows a step."""
    debug = apollo.Config.debug()
    model = replace(
        debug,
        towers={"internvideo2": replace(debug.towers["internvideo2"], depth=2)},
        connector=replace(
            debug.connector, vision_hidden_size=64, token_input_shape=(4, 2, 2), resampler_depth=1
        ),
        llm=replace(debug.llm, num_hidden_layers=1),
    )
    data = DataConfig(
        sources={"all": SourceConfig(f"{arg}/text.jsonl")},
        frames=(),
        tokenizer=f"{arg}/tokenizer.model",
        batch_size=8,
        length=96,
        clips=0,
        frame_size=model.frame_size,
        tokens_per_clip=model.connector.num_output_tokens,
    )
    train = TrainConfig(
        num_steps=8,
        dtype="float32",
        frozen_dtype="float32",
        log_every=1,
        checkpoint_every=2,
        keep=4,
    )
    optimizer = OptimizerConfig(LearningRates(llm=1e-3), warmup_ratio=0.25)
    evaluation = EvalConfig({"held_out": SourceConfig(f"{arg}/eval.jsonl")}, batches=1)
    return to_config(Experiment("small", model, data, train, optimizer, evaluation))
