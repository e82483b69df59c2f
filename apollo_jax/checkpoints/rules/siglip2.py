# SPDX-License-Identifier: Apache-2.0
"""SigLIP 2 NaFlex tower <-> transformers' Siglip2VisionModel, or that half of a Siglip2Model."""

from collections.abc import Mapping
from typing import Any

from apollo_jax.checkpoints.rules import big_vision, siglip
from apollo_jax.checkpoints.rules.dialect import Dialect
from apollo_jax.checkpoints.rules.fields import defaults, take
from apollo_jax.checkpoints.rules.table import Shape, Table, weight
from apollo_jax.models.siglip2 import Config, SigLIP2

MODEL = SigLIP2
OTHERS = ("kind", "feature_layer", "image_mean", "image_std", "max_num_patches")
# What Siglip2VisionConfig assumes where config.json is silent (its base/16 size).
KNOWN = defaults(Config, *OTHERS) | dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
)
FIXED = dict(hidden_act="gelu_pytorch_tanh", num_channels=3)
PREPROCESSOR = dict(image_mean=Config.image_mean, image_std=Config.image_std, max_num_patches=256)
PREPROCESSOR_FIXED = dict(resample=2, rescale_factor=1 / 255)  # PIL bilinear, to [0, 1]


def config(files: dict[str, Any], where: str) -> Config:
    """Config from config.json (of the tower or of both) and preprocessor_config.json."""
    json, place = files["config.json"], f"{where}/config.json"
    fields = take(json.get("vision_config", json), KNOWN, FIXED, place)
    seen = take(
        files.get("preprocessor_config.json", {}),
        PREPROCESSOR,
        PREPROCESSOR_FIXED | dict(patch_size=fields["patch_size"]),
        f"{where}/preprocessor_config.json",
    )
    try:
        return Config(**fields, **seen)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def published(c: Config) -> dict[str, Any]:
    """The published JSON files of a fresh tower."""
    return {
        "config.json": dict(
            architectures=["Siglip2VisionModel"],
            attention_dropout=0.0,
            **FIXED,
            **{name: getattr(c, name) for name in KNOWN},
            model_type="siglip2_vision_model",
        ),
        "preprocessor_config.json": dict(
            do_convert_rgb=None,
            do_normalize=True,
            do_rescale=True,
            do_resize=True,
            image_mean=list(c.image_mean),
            image_processor_type="Siglip2ImageProcessor",
            image_std=list(c.image_std),
            max_num_patches=c.max_num_patches,
            patch_size=c.patch_size,
            **PREPROCESSOR_FIXED,
        ),
    }


def table(c: Config, published_config: dict[str, Any]) -> Table:
    """SigLIP's rules, but for patches that are flattened and not convolved."""
    stem = weight(f"{siglip.EMBEDDINGS}.patch_embedding", "patch_embed", bias=True)
    unused = siglip.unused_groups(c.hidden_size, c.intermediate_size, published_config)
    rules = (*stem, siglip.POSITIONS, *siglip.BLOCKS)
    return Table(rules, c.num_hidden_layers, unused, prefix="vision_model.")


def dialects(c: Config, published_config: dict[str, Any]) -> tuple[Dialect, ...]:
    """Of big_vision's .npz files."""
    return siglip.big_vision_dialects(c, published_config, big_vision.NAFLEX_STEM)


def recognise(shapes: Mapping[str, Shape], said: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON files of a big_vision .npz."""
    found = big_vision.halves(shapes)
    if found is None or not found.naflex:
        return None
    fields = found.vision | dict(num_patches=found.positions) | said
    c = Config(**take(fields, KNOWN, {}, "big_vision"))
    return big_vision.described(published(c), found, "siglip2", said)
