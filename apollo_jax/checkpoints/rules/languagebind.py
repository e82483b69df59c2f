# SPDX-License-Identifier: Apache-2.0
"""LanguageBind video tower <-> the authors' LanguageBindVideo, or its vision half alone."""

from collections.abc import Mapping
from typing import Any

from apollo_jax.checkpoints.rules import clip
from apollo_jax.checkpoints.rules.clip import BLOCK, EMBEDDINGS
from apollo_jax.checkpoints.rules.fields import defaults, take
from apollo_jax.checkpoints.rules.table import Rule, Table, conv, norm, squeeze, weight
from apollo_jax.models.clip import Config as ImageConfig
from apollo_jax.models.languagebind import Config, LanguageBindVideo

MODEL = LanguageBindVideo
# What the published config class assumes; configs older than version 1.5 have no clip_type.
KNOWN = defaults(Config, "kind", "feature_layer") | clip.CLASS_DEFAULTS | dict(clip_type="vl")
FIXED = dict(num_channels=3, tube_size=1, add_time_attn=True)
HEAD_DIM, HUGE = 64, 1280  # only the width of ViT-H has heads of another size: 80


def config(files: dict[str, Any], where: str) -> Config | ImageConfig:
    """Config from config.json.

    The vision half alone says "clip_vision_model", as does every CLIP: without attention over time
    it is one.
    """
    json, place = files["config.json"], f"{where}/config.json"
    half = dict(add_time_attn=False) | clip.vision_half(json)
    if json.get("model_type") != "LanguageBindVideo" and not half["add_time_attn"]:
        return clip.config(files, where)
    if "tube_size" in half:  # came with version 1.5
        half = dict(clip_type="vl_new") | half
    fields = take(half, KNOWN, FIXED, place)
    try:
        return Config(**fields)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def published(c: Config) -> dict[str, Any]:
    """The published JSON file of a fresh tower."""
    vision = dict(
        attention_dropout=0.0,
        initializer_factor=1.0,
        initializer_range=0.02,
        lora_alpha=16,
        lora_dropout=0.1,
        lora_r=0,
        projection_dim=clip.PROJECTION_DIM,
        **FIXED,
        **{name: getattr(c, name) for name in KNOWN},
        model_type="clip_vision_model",
    )
    return {"config.json": clip.both_halves("LanguageBindVideo", vision)}


def table(c: Config, published_config: dict[str, Any]) -> Table:
    """The rules; layers from `feature_layer` on and everything behind them are unused."""
    kernel = (c.patch_size, c.patch_size)
    if c.clip_type == "vl_new":
        kernel = (1, *kernel)  # a tube of one frame
    rules = [
        *weight(f"{EMBEDDINGS}.patch_embedding", "patch_embed", how=conv(*kernel)),
        Rule(f"{EMBEDDINGS}.class_embedding", "cls_token"),
        *clip.around_blocks(),
        Rule(f"{BLOCK}.temporal_embedding", "layers.time_embedding", squeeze(1)),
        *norm(f"{BLOCK}.temporal_layer_norm1", "layers.time_norm", bias=True),
        *clip.attention(f"{BLOCK}.temporal_attn", "layers.time_attention"),
        *clip.block("layers.frame"),
    ]
    unused = clip.unused_groups(c.hidden_size, 1 + c.grid[1] * c.grid[2], published_config)
    # The encoder alone comes without the prefix.
    return Table(tuple(rules), c.num_hidden_layers, unused, prefix="vision_model.")


def recognise(shapes: Mapping[str, tuple[int, ...]], said: dict[str, Any]) -> dict | None:
    """The published JSON file of a pickle that came without, None if the tensors are another's.

    Args:
      said: fields of `vision_config` that the user states.
    """
    names = {name.removeprefix("vision_model."): shape for name, shape in shapes.items()}
    cls, patch, table, time, fc1 = (
        names.get(name, ())
        for name in (
            "embeddings.class_embedding",
            "embeddings.patch_embedding.weight",
            "embeddings.position_embedding.weight",
            "encoder.layers.0.temporal_embedding",
            "encoder.layers.0.mlp.fc1.weight",
        )
    )
    if not (cls and patch and len(table) == 2 and len(time) == 3 and len(fc1) == 2):
        return None
    d, side = table[1], round((table[0] - 1) ** 0.5)
    fields: dict[str, Any] = dict(
        hidden_size=d,
        intermediate_size=fc1[0],
        num_hidden_layers=sum(name.endswith(".temporal_embedding") for name in names),
        num_attention_heads=16 if d == HUGE else max(1, d // HEAD_DIM),
        image_size=side * patch[-1],
        patch_size=patch[-1],
        num_frames=time[1],
        clip_type="vl_new" if len(cls) == 2 else "vl",
    )
    json = published(Config(**fields))["config.json"]
    json["vision_config"] |= said
    return {"config.json": json | clip.heads(shapes)}
