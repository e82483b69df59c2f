# SPDX-License-Identifier: Apache-2.0
"""The official Apollo folder: which part lies where, and its root config files."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from apollo_jax.checkpoints import companions
from apollo_jax.checkpoints.rules import (
    clip,
    connector,
    dinov2,
    internvideo2,
    languagebind,
    qwen2,
    siglip,
    siglip2,
    videomae,
    vjepa,
    vjepa2,
)
from apollo_jax.checkpoints.rules.fields import take
from apollo_jax.models.apollo import Config
from apollo_jax.models.vision_tower import TowerConfig, common_grid

Read = Callable[[Path], companions.Files]
PartConfig = TowerConfig | connector.Config | qwen2.Config
ONE_FEATURE = (vjepa.Config, vjepa2.Config)  # whatever mm_vision_select_layer says

# model_type, or where that is missing the architecture, of one part -> its rules
PARTS: dict[str, Any] = {
    "siglip_vision_model": siglip,
    "SiglipVisionModel": siglip,
    "siglip": siglip,
    "SiglipModel": siglip,
    "siglip2_vision_model": siglip2,
    "Siglip2VisionModel": siglip2,
    "siglip2": siglip2,
    "Siglip2Model": siglip2,
    "internvideo2": internvideo2,
    "PretrainInternVideo2": internvideo2,
    "clip": clip,
    "CLIPModel": clip,
    "LanguageBindImage": clip,
    "LanguageBindVideo": languagebind,
    "clip_vision_model": languagebind,  # or CLIP's: it tells the two apart
    "CLIPVisionModel": languagebind,
    "dinov2": dinov2,
    "Dinov2Model": dinov2,
    "dinov2_with_registers": dinov2,
    "Dinov2WithRegistersModel": dinov2,
    "videomae": videomae,
    "VideoMAEModel": videomae,
    "VideoMAEForPreTraining": videomae,
    "VideoMAEForVideoClassification": videomae,
    "vit": vjepa,
    "vjepa": vjepa,
    "vjepa2": vjepa2,
    "VJEPA2Model": vjepa2,
    "mm_connector": connector,
    "Connector": connector,
    "qwen2": qwen2,
    "Qwen2ForCausalLM": qwen2,
}
TOWER_CONFIGS = tuple({rules.Config for rules in PARTS.values()} - {connector.Config, qwen2.Config})
RULES: dict[type, Any] = {rules.MODEL: rules for rules in PARTS.values()}
RULES_BY_CONFIG: dict[type, Any] = {rules.Config: rules for rules in PARTS.values()}

TOWERS, CONNECTOR, LLM = "vision_tower", "mm_connector", "llm"
KNOWN = dict(clip_duration=2.0, mm_vision_select_layer=-2)
FIXED = dict(interpolate_mode="linear", use_mm_start_end=False)


def config(folder: Path, read: Read = companions.read) -> Config | PartConfig:
    """The config of an Apollo folder, or of a folder with one part.

    read: the files of a folder in it, which may be there or not.
    Raises FileNotFoundError or ValueError naming the file and the field.
    """
    if _kind(read(folder), folder) != "apollo":
        return part_config(folder, read)
    root, towers = (
        companions.parse(read(at), companions.CONFIG, at) for at in (folder, folder / TOWERS)
    )
    fields = take(root, KNOWN, FIXED, f"{folder / companions.CONFIG}")
    layer, names = fields["mm_vision_select_layer"], towers.get("vision_towers")
    if layer >= 0:
        raise ValueError(f"{folder / companions.CONFIG}: mm_vision_select_layer must be negative")
    if not isinstance(names, list) or not names:
        raise ValueError(f"{folder / TOWERS / companions.CONFIG}: vision_towers must list folders")
    check_names(names, str(folder / TOWERS / companions.CONFIG))
    parts = {name: part_config(folder / TOWERS / name, read, *TOWER_CONFIGS) for name in names}
    frames = [getattr(t, "num_frames", 0) for t in parts.values()]
    try:
        return Config(
            towers={n: checked(_at_layer(t, layer), n) for n, t in parts.items()},
            connector=part_config(folder / CONNECTOR, read, connector.Config),
            llm=part_config(folder / LLM, read, qwen2.Config),
            clip_duration=fields["clip_duration"],
            frames_per_clip=max(frames) or Config.frames_per_clip,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def _at_layer(tower: TowerConfig, layer: int) -> TowerConfig:
    if isinstance(tower, ONE_FEATURE):
        return tower
    return dataclasses.replace(tower, feature_layer=layer)


def check_names(names: Iterable[Any], where: str) -> None:
    """ValueError unless each may name a tower: its folder, and no path out of the checkpoint."""
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{where}: {name!r} is no name for a tower; use letters, digits, -._")


def part_config(folder: Path, read: Read = companions.read, *kinds: type) -> Any:
    """The config of a folder with one tower, connector or decoder; of `kinds`, if any are given."""
    files = read(folder)
    rules = PARTS.get(_kind(files, folder))
    if rules is None:
        raise ValueError(f"{folder} holds a whole Apollo where a part of one is expected")
    names = (companions.CONFIG, companions.PREPROCESSOR, companions.VIDEO_PREPROCESSOR)
    said = {n: companions.parse(files, n, folder) for n in names if n in files}
    found = checked(rules.config(said, str(folder)), str(folder))
    if kinds and type(found) not in kinds:
        kind = rules.__name__.rpartition(".")[2]
        raise ValueError(f"{folder} holds a {kind}, which cannot be there")
    return found


def checked(c: Any, where: str) -> Any:
    """The config of a part, whose heads share its width and whose features lie in its layers.

    ValueError if they do not.
    """
    heads = getattr(c, "num_attention_heads", getattr(c, "num_heads", 1))
    if type(c) in TOWER_CONFIGS and (heads < 1 or c.hidden_size % heads):
        raise ValueError(f"{where}: {heads} heads do not divide a width of {c.hidden_size}")
    if getattr(c, "built_layers", 1) < 1:
        depth = c.built_layers - 1 - c.feature_layer
        raise ValueError(
            f"{where}: features at layer {c.feature_layer} of {depth} come before its first layer"
        )
    return c


def _kind(files: companions.Files, folder: Path) -> str:
    config = companions.parse(files, companions.CONFIG, folder)
    said, known = [config.get("model_type"), *(config.get("architectures") or [])], [*PARTS]
    for kind in said:
        if kind in ("apollo", *known):
            return kind
    raise ValueError(
        f"{folder / companions.CONFIG}: model_type {said[0]!r} is not known; known: apollo, "
        f"{', '.join(known)}"
    )


def published(c: Config, parts: dict[str, dict[str, Any]], dtype: str) -> dict[str, Any]:
    """The JSON files of a fresh model that belong to no single part, by path."""
    grid, llm = list(common_grid(c.towers)), parts[LLM]
    layers = {t.feature_layer for t in c.towers.values() if not isinstance(t, ONE_FEATURE)}
    if len(layers) > 1:
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
            mm_vision_select_layer=max(layers, default=KNOWN["mm_vision_select_layer"]),
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
