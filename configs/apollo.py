# SPDX-License-Identifier: Apache-2.0
"""What the recipes of Apollo-1.5B, 3B and 7B share (Section 6, Table 7); their files read this one.

The connector; then encoders and connector on video alone; then connector and decoder on the
mixture. A stage starts from the run of the one before that lies beside its own. What the paper does
not say is marked "ours", with the reason. What is REQUIRED is where your data and weights lie.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ml_collections import ConfigDict

from apollo_jax.config import (
    REQUIRED,
    Experiment,
    LearningRates,
    OptimizerConfig,
    PartPaths,
    TrainConfig,
    to_config,
)
from apollo_jax.models import apollo
from apollo_jax.sharding import MeshConfig
from data_pipeline.loader import DataConfig, SourceConfig

STAGES: dict[str, dict[str, Any]] = {
    "align": dict(
        sources={"image_captions": 0.5, "video_captions": 0.5},
        rates=LearningRates(connector=1e-4),
        samples=198_000,
        max_clips=25,
        rows=128,  # ours: packed, with two samples to a row a step sees the published 256
        length=4096,  # ours: 25 clips of 128 tokens, their timestamps and the caption
        clips=28,  # ours: 25 and a few images
    ),
    "vision": dict(
        sources={"video_captions": 1.0},
        rates=LearningRates(vision_tower=5e-6, connector=1e-4),
        samples=396_000,
        max_clips=25,
        rows=256,
        length=4096,
        clips=28,
    ),
    "sft": dict(
        # The final mixture (Figure 7); which share is whose is not printed beside it but for text:
        # ours is the order of the best ablation (Table 13), video > image > multi-image.
        sources={"text": 0.144, "image": 0.330, "multi_image": 0.166, "video": 0.360},
        rates=LearningRates(connector=1e-4),  # and the decoder's, by size
        samples=3_200_000,
        rows=64,  # ours: about four samples to a row
        length=16_384,  # the released model_max_length
        clips=112,  # ours: what fits that length at 128 tokens and a timestamp per clip
    ),
}


def recipe(
    name: str,
    arg: str,
    *,
    model: apollo.Config,
    llm_rate: float,
    max_clips: int,
    slices: Mapping[str, Mapping[str, dict[str, Any]]],
) -> ConfigDict:
    """The experiment STAGE or STAGE,SLICE of one size.

    Args:
      llm_rate, max_clips: of the last stage.
      slices: by stage and TPU slice: `mesh`, and what else differs there of remat, rows, length
        and clips.
    """
    stage_name, _, slice_name = arg.partition(",")
    if stage_name not in STAGES:
        known = ", ".join(STAGES)
        raise ValueError(f"configs/{name}.py has no stage {stage_name!r}; known: {known}")
    if slice_name and slice_name not in slices[stage_name]:
        known = ", ".join(slices[stage_name])
        raise ValueError(
            f"configs/{name}.py has no mesh for the slice {slice_name!r}; known: {known}; others: "
            f"apollo-jax plan search --config configs/{name}.py:{stage_name} --topology ..."
        )
    stage = dict(STAGES[stage_name])
    if stage_name == "sft":
        stage |= dict(rates=replace(stage["rates"], llm=llm_rate), max_clips=max_clips)
    # Without a slice: what runs on any number of devices that divides the rows.
    stage |= dict(mesh=MeshConfig(data=1, fsdp=-1), remat="full")  # ours: the least memory
    if slice_name:
        stage |= slices[stage_name][slice_name]
    before = dict(zip(list(STAGES)[1:], STAGES, strict=False)).get(stage_name)
    experiment = name.replace("_", "-")
    parts = PartPaths(towers=dict.fromkeys(model.towers, REQUIRED), llm=REQUIRED)
    return to_config(
        Experiment(
            name=f"{experiment}-{stage_name}",
            model=model,
            init_from=f"run:{experiment}-{before}" if before else "",
            init_parts=PartPaths() if before else parts,
            data=DataConfig(
                sources={n: SourceConfig(REQUIRED, w) for n, w in stage["sources"].items()},
                frames=(REQUIRED,),
                tokenizer=REQUIRED,
                batch_size=stage["rows"],
                length=stage["length"],
                clips=stage["clips"],
                max_clips=stage["max_clips"],
                frame_size=model.frame_size,
                # 128 for 4 frames, as released and in section 6; table 7 has half of that.
                tokens_per_clip=model.connector.num_output_tokens,
                threads=16,  # ours: decoding keeps up with a TPU host's chips
            ),
            optimizer=OptimizerConfig(
                learning_rates=stage["rates"],
                schedule="cosine",
                warmup_ratio=0.03,
                clip_norm=1.0,
                b1=0.9,  # betas and decay ours: the defaults of the trainer that such code uses
                b2=0.999,
                weight_decay=0.0,
            ),
            train=TrainConfig(
                num_steps=stage["samples"] // 256,  # one epoch
                dtype="bfloat16",  # the released precision
                param_dtype="float32",  # ours: steps of 1e-5 are lost in bfloat16 parameters
                frozen_dtype="bfloat16",
                remat=stage["remat"],
                loss_chunk=256,  # ours: bounds the memory of the logits
            ),
            mesh=stage["mesh"],  # published: ZeRO-2; fsdp also shards parameters
            topology=slice_name,
            # of the stage as published: 256 samples fill the rows of a step
            positions_per_sample=STAGES[stage_name]["rows"] * STAGES[stage_name]["length"] / 256,
        )
    )
