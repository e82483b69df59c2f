# SPDX-License-Identifier: Apache-2.0
"""SigLIP vision tower <-> transformers' SiglipVisionModel, or the vision half of a SiglipModel.

SigLIP 2 at a fixed resolution is published as a SigLIP with another vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from apollo_jax.checkpoints.rules import big_vision, clip
from apollo_jax.checkpoints.rules.dialect import Dialect
from apollo_jax.checkpoints.rules.fields import defaults, take
from apollo_jax.checkpoints.rules.table import Rule, Shape, Table, Unused, conv, norm, weight
from apollo_jax.models import siglip2
from apollo_jax.models.siglip import Config, SigLIP

MODEL = SigLIP
# What SiglipVisionConfig assumes where config.json is silent (its base/16 size at 224).
KNOWN = defaults(Config, "kind", "feature_layer", "image_mean", "image_std", "resample") | dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=16,
)
FIXED = dict(hidden_act="gelu_pytorch_tanh", num_channels=3)
PREPROCESSOR = dict(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5), resample=3)
PREPROCESSOR_FIXED = dict(rescale_factor=1 / 255)  # to [0, 1]
RESAMPLE = {3: "pil_bicubic", 2: "pil_bilinear"}  # PIL's numbers

# What SiglipTextConfig assumes; the text half only has to survive the round trip.
TEXT = dict(
    vocab_size=32_000,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=64,
)
IMAGE_SIZES = {(14, 27): 384}  # (patch, patches along a side) of releases that leave a remainder

EMBEDDINGS = "vision_model.embeddings"
BLOCK = "vision_model.encoder.layers.{i}"
HEAD = "vision_model.head"
POSITIONS = Rule(f"{EMBEDDINGS}.position_embedding.weight", "positions")
BLOCKS = (
    *norm(f"{BLOCK}.layer_norm1", "layers.norm1", bias=True),
    *weight(f"{BLOCK}.self_attn.q_proj", "layers.q", bias=True),
    *weight(f"{BLOCK}.self_attn.k_proj", "layers.k", bias=True),
    *weight(f"{BLOCK}.self_attn.v_proj", "layers.v", bias=True),
    *weight(f"{BLOCK}.self_attn.out_proj", "layers.out", bias=True),
    *norm(f"{BLOCK}.layer_norm2", "layers.norm2", bias=True),
    *weight(f"{BLOCK}.mlp.fc1", "layers.fc1", bias=True),
    *weight(f"{BLOCK}.mlp.fc2", "layers.fc2", bias=True),
)


def config(files: dict[str, Any], where: str) -> Config:
    """Config from config.json (of the tower or of both) and preprocessor_config.json."""
    json = files["config.json"]
    fields = take(json.get("vision_config", json), KNOWN, FIXED, f"{where}/config.json")
    size = dict(height=fields["image_size"], width=fields["image_size"])
    preprocessor = files.get("preprocessor_config.json", {})
    place = f"{where}/preprocessor_config.json"
    seen = take(preprocessor, PREPROCESSOR, PREPROCESSOR_FIXED | dict(size=size), place)
    number = seen.pop("resample")
    if number not in RESAMPLE:
        known = ", ".join(f"{n} ({name})" for n, name in RESAMPLE.items())
        raise ValueError(f"{place}: resample is {number!r}, only {known} are supported")
    return Config(**fields, **seen, resample=RESAMPLE[number])


def published(c: Config) -> dict[str, Any]:
    """The published JSON files of a fresh tower."""
    size = dict(height=c.image_size, width=c.image_size)
    return {
        "config.json": dict(
            architectures=["SiglipVisionModel"],
            attention_dropout=0.0,
            **FIXED,
            **{name: getattr(c, name) for name in KNOWN},
            model_type="siglip_vision_model",
        ),
        "preprocessor_config.json": dict(
            do_convert_rgb=None,
            do_normalize=True,
            do_rescale=True,
            do_resize=True,
            image_mean=list(c.image_mean),
            image_processor_type="SiglipImageProcessor",
            image_std=list(c.image_std),
            resample=next(number for number, name in RESAMPLE.items() if name == c.resample),
            size=size,
            **PREPROCESSOR_FIXED,
        ),
    }


def table(c: Config, published_config: dict[str, Any]) -> Table:
    """The rules; layers from `feature_layer` on and the pooling head are unused."""
    stem = weight(
        f"{EMBEDDINGS}.patch_embedding",
        "patch_embed",
        bias=True,
        how=conv(c.patch_size, c.patch_size),
    )
    unused = unused_groups(c.hidden_size, c.intermediate_size, published_config)
    # transformers 5 saves a tower alone without the prefix, and loads it with or without.
    return Table((*stem, POSITIONS, *BLOCKS), c.num_hidden_layers, unused, prefix="vision_model.")


def unused_groups(d: int, m: int, published_config: dict[str, Any]) -> tuple[Unused, ...]:
    """All that files hold beside the patches, positions and blocks of a tower."""
    last_norm = {f"vision_model.post_layernorm.{name}": (d,) for name in ("weight", "bias")}
    unused = [Unused("features are taken before the last norm", last_norm)]
    if is_pooled(published_config):
        unused.append(Unused("Apollo keeps all patches, nothing is pooled", head_shapes(d, m)))
    if "text_config" in published_config:
        shapes = text_shapes(**text_fields(published_config["text_config"]))
        unused.append(Unused("Apollo has its own words", shapes))
    return tuple(unused)


def text_fields(text_config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the text half; it projects to the width of the tower, mostly its own."""
    said = {name: value for name, value in text_config.items() if value is not None}
    width = said.get("hidden_size", TEXT["hidden_size"])
    return take(said, TEXT | dict(projection_size=width), {}, "SigLIP config.json: text_config")


def head_shapes(d: int, m: int) -> dict[str, tuple[int, ...]]:
    """The attention-pooling head."""
    return {
        f"{HEAD}.probe": (1, 1, d),
        f"{HEAD}.attention.in_proj_weight": (3 * d, d),
        f"{HEAD}.attention.in_proj_bias": (3 * d,),
        f"{HEAD}.attention.out_proj.weight": (d, d),
        f"{HEAD}.attention.out_proj.bias": (d,),
        f"{HEAD}.layernorm.weight": (d,),
        f"{HEAD}.layernorm.bias": (d,),
        f"{HEAD}.mlp.fc1.weight": (m, d),
        f"{HEAD}.mlp.fc1.bias": (m,),
        f"{HEAD}.mlp.fc2.weight": (d, m),
        f"{HEAD}.mlp.fc2.bias": (d,),
    }


def text_shapes(
    *, hidden_size: int, num_attention_heads: int, projection_size: int, **fields: int
) -> dict[str, tuple[int, ...]]:
    """The text half, which is CLIP's with a head, and the two scalars of the contrastive loss."""
    del num_attention_heads  # no shape tells
    return {
        "logit_scale": (1,),
        "logit_bias": (1,),
        **clip.text_shapes(hidden_size=hidden_size, **fields),
        "text_model.head.weight": (projection_size, hidden_size),
        "text_model.head.bias": (projection_size,),
    }


# ---- big_vision's files


def dialects(c: Config, published_config: dict[str, Any]) -> tuple[Dialect, ...]:
    """Of big_vision's .npz files."""
    return big_vision_dialects(c, published_config, big_vision.CONV_STEM)


def recognise(shapes: Mapping[str, Shape], said: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON files of a big_vision .npz; its vocabulary tells SigLIP 2."""
    found = big_vision.halves(shapes)
    if found is None or found.naflex:
        return None
    patch, side = found.vision["patch_size"], math.isqrt(found.positions)
    fields = found.vision | dict(image_size=IMAGE_SIZES.get((patch, side), side * patch)) | said
    c = Config(**take(fields, KNOWN, {}, "big_vision"))
    if found.text is not None and found.text["vocab_size"] == big_vision.SIGLIP2_VOCABULARY:
        c = replace(c, resample="pil_bilinear")
    return big_vision.described(published(c), found, "siglip", said)


def big_vision_dialects(
    c: Config | siglip2.Config, published_config: dict[str, Any], stem: tuple[big_vision.Leaf, ...]
) -> tuple[Dialect, ...]:
    """Of SigLIP and of SigLIP 2, which differ in the `stem`."""
    text = published_config.get("text_config")
    return big_vision.dialects(
        stem,
        depth=c.num_hidden_layers,
        heads=c.num_attention_heads,
        pooled=is_pooled(published_config),
        text=None if text is None else text_fields(text),
    )


def is_pooled(published_config: dict[str, Any]) -> bool:
    """Whether the tower has its attention-pooling head."""
    return published_config.get("vision_config", published_config).get("vision_use_head", True)
