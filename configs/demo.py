# SPDX-License-Identifier: Apache-2.0
"""The demo's tiny Apollo on ApolloBench-mini: `configs/demo.py:{images,warmup,align,vision,sft}`.

Paths are relative to the demo's workdir. The paper starts from SigLIP, InternVideo2 and Qwen2.5;
here every part starts random, so all of them are trained first: `images` on text and captioned
images (which halves the steps that clips take), `warmup` on captioned clips too. Then come the
paper's three stages with its freezing (Table 7): connector; encoders and connector on video alone;
connector and decoder on the mixture. Rates are our choice for a model of this size.
"""

from ml_collections import ConfigDict

from apollo_jax.config import (
    Experiment,
    LearningRates,
    OptimizerConfig,
    TrainConfig,
    to_config,
)
from apollo_jax.models import apollo
from data_pipeline.loader import DataConfig, SourceConfig

VOCABULARY = 704

# Per stage: steps, rows, the sources' weights, peak rates, and the stage it starts from.
STAGES = {
    "images": (
        800,
        8,
        {"text": 0.25, "captions_image": 0.75},
        LearningRates(vision_tower=3e-3, connector=3e-3, llm=3e-3),
        "",
    ),
    "warmup": (
        1100,
        16,
        {"text": 0.15, "captions_image": 0.15, "captions_video": 0.7},
        LearningRates(vision_tower=3e-3, connector=3e-3, llm=3e-3),
        "images",
    ),
    "align": (
        40,
        16,
        {"captions_image": 0.5, "captions_video": 0.5},
        LearningRates(connector=2e-3),
        "warmup",
    ),
    "vision": (
        60,
        16,
        {"captions_video": 1.0},
        LearningRates(vision_tower=2e-4, connector=2e-3),
        "align",
    ),
    "sft": (
        1700,
        16,
        {
            "text": 0.1,
            "captions_image": 0.04,
            "multi_image": 0.04,
            "captions_video": 0.08,
            "qa_video": 0.74,
        },
        LearningRates(connector=2e-3, llm=2e-3),
        "vision",
    ),
}
# The last stage with nothing frozen, for comparison: the encoders at a tenth, as in `vision`.
STAGES["sft_unfrozen"] = (
    *STAGES["sft"][:3],
    LearningRates(vision_tower=2e-4, connector=2e-3, llm=2e-3),
    "vision",
)


def get_config(arg: str = "images") -> ConfigDict:
    """The experiment of one stage."""
    if arg not in STAGES:
        raise ValueError(f"configs/demo.py has no stage {arg!r}; known: {', '.join(STAGES)}")
    steps, rows, weights, rates, start = STAGES[arg]
    model = apollo.Config.debug(VOCABULARY)
    return to_config(
        Experiment(
            name=f"demo-{arg}",
            model=model,
            init_from=f"run:demo-{start}" if start else "",
            data=DataConfig(
                sources={
                    name: SourceConfig(f"world/train/{name}.jsonl", weight)
                    for name, weight in weights.items()
                },
                frames=("frames",),
                tokenizer="tokenizer.model",
                batch_size=rows,
                length=192,
                clips=6,
                max_clips=6,
                frame_size=model.frame_size,
                tokens_per_clip=model.connector.num_output_tokens,
            ),
            optimizer=OptimizerConfig(learning_rates=rates, warmup_ratio=0.1, b2=0.98),
            train=TrainConfig(
                num_steps=steps,
                dtype="float32",
                frozen_dtype="float32",
                log_every=10,
                checkpoint_every=500,
            ),
        )
    )
