# SPDX-License-Identifier: Apache-2.0
"""CLIP vision tower <-> transformers' CLIPVisionModel, or the vision half of a CLIPModel.

LanguageBind-Image is a CLIPModel that says of itself how it is trained, not how it is resampled.
"""

from collections.abc import Mapping
from typing import Any

from apollo_jax.checkpoints.rules import openai_clip
from apollo_jax.checkpoints.rules.dialect import Dialect
from apollo_jax.checkpoints.rules.fields import defaults, take
from apollo_jax.checkpoints.rules.table import Rule, Table, Unused, conv, norm, weight
from apollo_jax.models.clip import CLIP, Config

MODEL = CLIP
# What CLIPVisionConfig assumes where config.json is silent (its base/32 size at 224).
CLASS_DEFAULTS = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
)
PREPROCESSING = ("image_mean", "image_std", "resample", "resize")
KNOWN = defaults(Config, "kind", "feature_layer", *PREPROCESSING) | CLASS_DEFAULTS
FIXED = dict(num_channels=3, add_time_attn=False)
STATISTICS = dict(image_mean=Config.image_mean, image_std=Config.image_std)
PREPROCESSOR_FIXED = dict(
    do_center_crop=True,
    do_normalize=True,
    do_rescale=True,
    do_resize=True,
    resample=3,  # bicubic
    rescale_factor=1 / 255,
)
PROJECTION_DIM = 512
PROJECTED = "CLIPVisionModelWithProjection"
# What CLIPTextConfig assumes; the text half only has to survive the round trip.
TEXT = dict(
    vocab_size=49_408,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    max_position_embeddings=77,
)

EMBEDDINGS = "vision_model.embeddings"
BLOCK = "vision_model.encoder.layers.{i}"


def config(files: dict[str, Any], where: str) -> Config:
    """Config from config.json (of the tower or of both halves) and preprocessor_config.json."""
    json, place = files["config.json"], f"{where}/config.json"
    half = vision_half(json)
    fields = take(half, KNOWN, FIXED, place)
    size = fields["image_size"]
    preprocessor = files.get("preprocessor_config.json", {})
    sizes = {k: side(preprocessor[k]) for k in ("size", "crop_size") if k in preprocessor}
    seen = take(
        preprocessor | sizes,
        STATISTICS | dict(size=size),
        PREPROCESSOR_FIXED | dict(crop_size=size),
        f"{where}/preprocessor_config.json",
    )
    resize = seen.pop("size")
    # Only LanguageBind's own config class knows add_time_attn; its processor resizes floats.
    languagebind = json.get("model_type") == "LanguageBindImage" or "add_time_attn" in half
    fields |= seen | dict(
        resize=0 if resize == size else resize,
        resample="torch_bicubic" if languagebind else "pil_bicubic",
    )
    try:
        return Config(**fields)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def vision_half(json: dict[str, Any]) -> dict[str, Any]:
    """The vision fields of a config.json, with `image_size` a number."""
    fields = half_of(json, "vision")
    return fields | {k: side(fields[k]) for k in ("image_size",) if k in fields}


def half_of(json: dict[str, Any], half: str) -> dict[str, Any]:
    """The fields of one half; those of `*_config_dict` overrule those of `*_config`."""
    if not is_whole(json):
        return json
    return (json.get(f"{half}_config") or {}) | (json.get(f"{half}_config_dict") or {})


def is_whole(json: dict[str, Any]) -> bool:
    """Whether a config.json speaks of both halves."""
    return "vision_config" in json or "vision_config_dict" in json


def side(size: Any) -> Any:
    """224 of 224, [224, 224] and the ways in which a processor says it; others stay as they are."""
    if isinstance(size, dict) and len(set(size.values())) == 1:
        return next(iter(size.values()))
    if isinstance(size, list) and len(set(size)) == 1:
        return size[0]
    return size


def published(c: Config) -> dict[str, Any]:
    """The published JSON files of a fresh tower."""
    vision = dict(
        attention_dropout=0.0,
        initializer_factor=1.0,
        initializer_range=0.02,
        num_channels=3,
        projection_dim=PROJECTION_DIM,
        **{name: getattr(c, name) for name in KNOWN},
        model_type="clip_vision_model",
    )
    json = dict(architectures=["CLIPVisionModel"], **vision)
    if c.resample == "torch_bicubic":
        training = dict(add_time_attn=False, lora_alpha=16, lora_dropout=0.1, lora_r=0)
        json = both_halves("LanguageBindImage", vision | training | dict(num_frames=1))
    resize = c.resize or c.image_size
    return {
        "config.json": json,
        "preprocessor_config.json": dict(
            crop_size=dict(height=c.image_size, width=c.image_size),
            do_convert_rgb=True,
            image_mean=list(c.image_mean),
            image_processor_type="CLIPImageProcessor",
            image_std=list(c.image_std),
            size=dict(shortest_edge=resize),
            **PREPROCESSOR_FIXED,
        ),
    }


def both_halves(model_type: str, vision: dict[str, Any]) -> dict[str, Any]:
    """LanguageBind's config.json around its vision half."""
    return dict(
        architectures=["CLIPModel"],
        initializer_factor=1.0,
        logit_scale_init_value=2.6592,
        model_type=model_type,
        projection_dim=PROJECTION_DIM,
        text_config={},
        vision_config=vision | dict(num_mel_bins=0, target_length=0),
    )


def table(c: Config, published_config: dict[str, Any]) -> Table:
    """The rules; layers from `feature_layer` on and everything behind them are unused."""
    rules = [
        *weight(f"{EMBEDDINGS}.patch_embedding", "patch_embed", how=conv(*2 * (c.patch_size,))),
        Rule(f"{EMBEDDINGS}.class_embedding", "cls_token"),
        *around_blocks(),
        *block("layers"),
    ]
    unused = unused_groups(c.hidden_size, 1 + c.grid[1] * c.grid[2], published_config)
    # transformers 5 saves a tower alone without the prefix, and loads it with or without.
    return Table(tuple(rules), c.num_hidden_layers, unused, prefix="vision_model.")


def around_blocks() -> list[Rule]:
    """Positions and the norm (sic) before the blocks."""
    return [
        Rule(f"{EMBEDDINGS}.position_embedding.weight", "positions"),
        *norm("vision_model.pre_layrnorm", "pre_norm", bias=True),
    ]


def block(path: str) -> list[Rule]:
    """The blocks, stacked at `path`."""
    return [
        *norm(f"{BLOCK}.layer_norm1", f"{path}.norm1", bias=True),
        *attention(f"{BLOCK}.self_attn", f"{path}.attention"),
        *norm(f"{BLOCK}.layer_norm2", f"{path}.norm2", bias=True),
        *weight(f"{BLOCK}.mlp.fc1", f"{path}.fc1", bias=True),
        *weight(f"{BLOCK}.mlp.fc2", f"{path}.fc2", bias=True),
    ]


def attention(name: str, path: str) -> list[Rule]:
    """The four linears of an attention."""
    parts = ("q", "k", "v", "out")
    return [r for x in parts for r in weight(f"{name}.{x}_proj", f"{path}.{x}", bias=True)]


def unused_groups(d: int, tokens: int, published_config: dict[str, Any]) -> tuple[Unused, ...]:
    """All that files hold beside the tower up to its feature layer.

    Args:
      d: width of the tower.
      tokens: entries of its position table.
    """
    projection_dim = published_config.get("projection_dim", PROJECTION_DIM)
    last_norm = {f"vision_model.post_layernorm.{name}": (d,) for name in ("weight", "bias")}
    groups = [
        Unused("features are taken before the last norm", last_norm),
        counting(f"{EMBEDDINGS}.position_ids", tokens),
        Unused(
            "Apollo keeps all patches, nothing is pooled and compared",
            {"visual_projection.weight": (projection_dim, d)},
            optional=True,
        ),
    ]
    if is_whole(published_config):
        place = "CLIP config.json: text_config"
        text = take(half_of(published_config, "text"), TEXT, {}, place)
        comparison = {"text_projection.weight": (projection_dim, text["hidden_size"])}
        comparison |= {"logit_scale": ()}
        reason, length = "Apollo has its own words", text["max_position_embeddings"]
        groups += [
            Unused(reason, comparison, optional=True),
            Unused(reason, text_shapes(**text), optional=True),
            counting("text_model.embeddings.position_ids", length),
        ]
    return tuple(groups)


def counting(name: str, length: int) -> Unused:
    """A buffer that old versions of transformers stored."""
    return Unused("0, 1, 2, ... as indices", {name: (1, length)}, optional=True)


def text_shapes(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    max_position_embeddings: int,
) -> dict[str, tuple[int, ...]]:
    """The text half."""
    d, m = hidden_size, intermediate_size
    linears = {f"self_attn.{x}_proj": (d, d) for x in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (m, d), "mlp.fc2": (d, m)}
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (vocab_size, d),
        "text_model.embeddings.position_embedding.weight": (max_position_embeddings, d),
    }
    blocks = [f"text_model.encoder.layers.{i}" for i in range(num_hidden_layers)]
    norms = [f"{block}.layer_norm{i}" for block in blocks for i in (1, 2)]
    for name in [*norms, "text_model.final_layer_norm"]:
        shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    for block in blocks:
        for name, shape in linears.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    return shapes


def heads(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of a config.json that speak of the tensors beside a tower."""
    out: dict[str, Any] = {}
    if "visual_projection.weight" in shapes:
        out["projection_dim"] = shapes["visual_projection.weight"][0]
    if "text_projection.weight" in shapes:
        out["text_config"] = dict(hidden_size=shapes["text_projection.weight"][1])
    words, table = (
        shapes.get(f"text_model.embeddings.{name}_embedding.weight")
        for name in ("token", "position")
    )
    fc1 = shapes.get("text_model.encoder.layers.0.mlp.fc1.weight")
    if words and table and fc1:
        text = [name for name in shapes if name.startswith("text_model.encoder.layers.")]
        out["text_config"] = dict(
            vocab_size=words[0],
            hidden_size=words[1],
            intermediate_size=fc1[0],
            num_hidden_layers=len({name.split(".")[3] for name in text}),
            max_position_embeddings=table[0],
        )
    return out


# ---- state dicts of OpenAI's own class


def dialects(c: Config, published_config: dict[str, Any]) -> tuple[Dialect, ...]:
    """Of OpenAI's names, with the text half if the config has one."""
    if not is_whole(published_config):
        return (openai_clip.dialect(c.num_hidden_layers, None),)
    text = take(half_of(published_config, "text"), TEXT, {}, "CLIP config.json: text_config")
    return (openai_clip.dialect(c.num_hidden_layers, text["num_hidden_layers"]),)


def recognise(shapes: Mapping[str, tuple[int, ...]], said: dict[str, Any]) -> dict | None:
    """The published JSON files of such a state dict, None if the tensors are another's.

    Args:
      said: fields of `vision_config` that the user states, like OpenCLIP's hidden_act "gelu".
    """
    found = openai_clip.halves(shapes)
    if found is None:
        return None
    known = {name: value for name, value in said.items() if name in KNOWN}
    files = published(Config(**take(found.vision | known, KNOWN, {}, "OpenAI's CLIP")))
    vision = files["config.json"] | said | dict(projection_dim=found.projection_dim)
    if found.text is None:
        return files | {"config.json": vision | dict(architectures=[PROJECTED])}
    del vision["architectures"]
    act, kind = vision["hidden_act"], "clip_text_model"
    json = dict(
        architectures=["CLIPModel"],
        initializer_factor=1.0,
        logit_scale_init_value=2.6592,
        model_type="clip",
        projection_dim=found.projection_dim,
        text_config=found.text | dict(hidden_act=act, model_type=kind),
        vision_config=vision,
    )
    return files | {"config.json": json}
