# SPDX-License-Identifier: Apache-2.0
"""The official Apollo folder: which part lies where, and its root config files."""

from typing import Any

from apollo_jax.checkpoints.rules import connector, internvideo2, qwen2, siglip
from apollo_jax.checkpoints.rules.fields import take
from apollo_jax.models.apollo import Config
from apollo_jax.models.vision_tower import common_grid

# model_type, or where that is missing the architecture, of one part -> its rules
PARTS: dict[str, Any] = {
    "siglip_vision_model": siglip,
    "SiglipVisionModel": siglip,
    "siglip": siglip,
    "SiglipModel": siglip,
    "internvideo2": internvideo2,
    "PretrainInternVideo2": internvideo2,
    "mm_connector": connector,
    "Connector": connector,
    "qwen2": qwen2,
    "Qwen2ForCausalLM": qwen2,
}
RULES: dict[type, Any] = {rules.MODEL: rules for rules in PARTS.values()}
RULES_BY_CONFIG: dict[type, Any] = {rules.Config: rules for rules in PARTS.values()}

TOWERS, CONNECTOR, LLM = "vision_tower", "mm_connector", "llm"
KNOWN = dict(clip_duration=2.0, mm_vision_select_layer=-2)
FIXED = dict(interpolate_mode="linear", use_mm_start_end=False)


def root(published: dict[str, Any], where: str) -> dict[str, Any]:
    """clip_duration and mm_vision_select_layer of the root config.json."""
    fields = take(published, KNOWN, FIXED, f"{where}/config.json")
    if fields["mm_vision_select_layer"] >= 0:
        raise ValueError(f"{where}/config.json: mm_vision_select_layer must count from the end")
    return fields


def tower_folders(published: dict[str, Any], where: str) -> list[str]:
    """The tower folders in channel order, from vision_tower/config.json."""
    names = published.get("vision_towers")
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}/config.json: vision_towers must list the tower folders")
    return names


def published(c: Config, parts: dict[str, dict[str, Any]], dtype: str) -> dict[str, Any]:
    """The JSON files of a fresh model that belong to no single part, by path."""
    grid, llm = list(common_grid(c.towers)), parts[LLM]
    layers = {t.feature_layer for t in c.towers.values()}
    if len(layers) != 1:
        raise ValueError(f"towers take different feature layers {layers}; the format knows one")
    vision = dict(
        auto_map=dict(AutoConfig="configuration_hybrid.HybridTowerConfig"),
        configs={},
        model_type="hybrid_vision_tower",
        num_vision_encoders=len(c.towers),
        token_output_shape=grid,
        vision_towers=list(c.towers),
    )
    seconds = int(c.clip_duration) if c.clip_duration.is_integer() else c.clip_duration
    return {
        f"{TOWERS}/config.json": vision,
        "config.json": dict(
            architectures=["ApolloForCausalLM"],
            attention_dropout=0.0,
            attn_implementation="flash_attention_2",
            clip_duration=seconds,
            drop_path_rate=0.0,
            encode_batch_size=25,
            hidden_act="silu",
            hidden_size=c.llm.hidden_size,
            image_aspect_ratio="square",
            initializer_range=c.llm.initializer_range,
            intermediate_size=c.llm.intermediate_size,
            interpolate_mode="linear",
            llm_cfg=llm,
            mm_connector_cfg=parts[CONNECTOR],
            mm_connector_lr=None,
            mm_hidden_size=None,
            mm_vision_select_feature="patch",
            mm_vision_select_layer=layers.pop(),
            model_dtype=f"torch.{dtype}",
            model_max_length=c.llm.model_max_length,
            model_type="apollo",
            num_video_frames=None,
            use_mm_patch_token=False,
            use_mm_start_end=False,
            vision_resolution=-1,
            vision_tower_cfg=vision,
            vocab_size=c.llm.vocab_size,
        ),
    }
