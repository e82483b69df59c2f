# SPDX-License-Identifier: Apache-2.0
"""Contrastive pretraining of a SigLIP encoder: `configs/contrastive/siglip.py:{images,videos}`.

The loss, its first temperature and bias, Adam's second beta and the warm-up are SigLIP's (arXiv
2303.15343); the batch is the one beyond which it found little (32k). `videos` shows four frames,
spread over the clip, and has one query pool them all; its batch is our choice. The source is
captioned media in Apollo's own format, the answer being the caption.
"""

from ml_collections import ConfigDict

from apollo_jax.config import REQUIRED, OptimizerConfig, TrainConfig, to_config
from apollo_jax.models import siglip, two_towers
from apollo_jax.training.contrastive import Contrastive, TowerPaths
from data_pipeline.loader import DataConfig, SourceConfig

BATCHES = {"images": 32768, "videos": 8192}
VOCABULARY = 151936  # rows of Qwen2.5's tokenizer, which Apollo uses


def get_config(arg: str = "images") -> ConfigDict:
    """The experiment for one kind of pairs."""
    if arg not in BATCHES:
        raise ValueError(f"configs/contrastive/siglip.py has no {arg!r}; known: images, videos")
    model = two_towers.Config(
        towers={"siglip-so400m-patch14-384": siglip.Config.so400m_384()},
        text=two_towers.TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
        ),
        embedding_size=1152,
        frames_per_clip=1 if arg == "images" else 4,
    )
    data = DataConfig(
        sources={"captions": SourceConfig(REQUIRED)},
        frames=(REQUIRED,),
        tokenizer=REQUIRED,
        batch_size=BATCHES[arg],
        length=256,
        clips=1,
        max_clips=1,
        frame_size=model.frame_size,
        tokens_per_clip=1,
        frames_per_clip=model.frames_per_clip,
    )
    return to_config(
        Contrastive(
            name=f"siglip-{arg}",
            model=model,
            data=data,
            train=TrainConfig(num_steps=100_000, remat="full"),
            init_parts=TowerPaths(dict.fromkeys(model.towers, "")),  # random, as published
            optimizer=OptimizerConfig(b2=0.95, weight_decay=1e-4, warmup_ratio=0.1),
        )
    )
