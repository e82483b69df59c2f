# SPDX-License-Identifier: Apache-2.0
"""DINOv2 <-> transformers' Dinov2Model or Dinov2WithRegistersModel, and the authors' .pth files."""

from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from apollo_jax.checkpoints.rules.dialect import Dialect, fused, rename
from apollo_jax.checkpoints.rules.fields import take
from apollo_jax.checkpoints.rules.table import Rule, Table, Unused, conv, norm, squeeze, weight
from apollo_jax.models.dinov2 import Config, DINOv2

MODEL = DINOv2
# What Dinov2Config assumes where config.json is silent (its base size).
KNOWN = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    mlp_ratio=4,
    use_swiglu_ffn=False,
    image_size=224,
    patch_size=14,
    layer_norm_eps=1e-6,
    layerscale_value=1.0,
    interpolation="scale_offset",  # our own field: elsewhere the code alone decides
)
# Where Dinov2WithRegistersConfig differs.
REGISTERS = dict(patch_size=16, num_register_tokens=4, interpolation="antialias")
FIXED = dict(hidden_act="gelu", num_channels=3, qkv_bias=True)
INTERPOLATIONS = get_args(get_type_hints(Config)["interpolation"])
PREPROCESSOR = dict(
    image_mean=Config.image_mean,
    image_std=Config.image_std,
    size=Config.resize,
    crop_size=Config.image_size,
)
PREPROCESSOR_FIXED = dict(
    do_center_crop=True,
    do_normalize=True,
    do_rescale=True,
    do_resize=True,
    resample=3,  # PIL bicubic
    rescale_factor=1 / 255,
)
HEAD_DIM = 64  # of every released size

EMBEDDINGS = "embeddings"
BLOCK = "encoder.layer.{i}"
# use_swiglu_ffn -> the MLP's linears: the authors' name -> the published one
MLP = {False: dict(fc1="fc1", fc2="fc2"), True: dict(w12="weights_in", w3="weights_out")}


def config(files: dict[str, Any], where: str) -> Config:
    """Config from config.json and preprocessor_config.json."""
    json, place = files["config.json"], f"{where}/config.json"
    known = KNOWN | REGISTERS if with_registers(json) else KNOWN
    fields = take(squares(json, "image_size"), known, FIXED, place)
    if fields["interpolation"] not in INTERPOLATIONS:
        names = ", ".join(INTERPOLATIONS)
        raise ValueError(f"{place}: interpolation is {fields['interpolation']!r}; known: {names}")
    place = f"{where}/preprocessor_config.json"
    preprocessor = squares(files.get("preprocessor_config.json", {}), "size", "crop_size")
    seen = take(preprocessor, PREPROCESSOR, PREPROCESSOR_FIXED, place)
    if seen["crop_size"] > seen["size"]:
        raise ValueError(f"{place}: crop_size {seen['crop_size']} exceeds size {seen['size']}")
    return Config(
        table_size=fields.pop("image_size"),
        **fields,
        image_size=seen["crop_size"],
        resize=seen["size"],
        image_mean=seen["image_mean"],
        image_std=seen["image_std"],
    )


def with_registers(json: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the class with registers."""
    kinds = [json.get("model_type"), *(json.get("architectures") or [])]
    return "dinov2_with_registers" in kinds or "Dinov2WithRegistersModel" in kinds


def squares(json: dict[str, Any], *names: str) -> dict[str, Any]:
    """`json` with 224 for [224, 224], {"shortest_edge": 224} and {"height": 224, "width": 224}."""

    def side(value: Any) -> Any:
        sides = list(value.values()) if isinstance(value, dict) else value
        return sides[0] if isinstance(sides, list) and len(set(sides)) == 1 else value

    return json | {name: side(json[name]) for name in names if name in json}


def published(c: Config) -> dict[str, Any]:
    """The published JSON files of a fresh tower."""
    fields = {name: getattr(c, name) for name in KNOWN} | dict(image_size=c.table_size)
    kind = dict(architectures=["Dinov2Model"], model_type="dinov2")
    if c.num_register_tokens:
        fields |= dict(num_register_tokens=c.num_register_tokens)
        kind = dict(architectures=["Dinov2WithRegistersModel"], model_type="dinov2_with_registers")
    return {
        "config.json": dict(
            attention_probs_dropout_prob=0.0,
            drop_path_rate=0.0,
            hidden_dropout_prob=0.0,
            initializer_range=0.02,
            **FIXED,
            **fields,
            **kind,
        ),
        "preprocessor_config.json": dict(
            crop_size=dict(height=c.image_size, width=c.image_size),
            do_convert_rgb=True,
            image_mean=list(c.image_mean),
            image_processor_type="BitImageProcessor",
            image_std=list(c.image_std),
            size=dict(shortest_edge=c.resize),
            **PREPROCESSOR_FIXED,
        ),
    }


def table(c: Config, published_config: dict[str, Any]) -> Table:
    """The rules; layers from `feature_layer` on and the last norm are unused."""
    d = c.hidden_size
    last_norm = {"layernorm.weight": (d,), "layernorm.bias": (d,)}
    unused = [Unused("features are taken before the last norm", last_norm)]
    if published_config.get("use_mask_token", True):
        mask = {f"{EMBEDDINGS}.mask_token": (1, d)}
        unused.append(Unused("patches are masked in pretraining only", mask))
    patch_embed, patch = f"{EMBEDDINGS}.patch_embeddings.projection", (c.patch_size, c.patch_size)
    rules = [
        Rule(f"{EMBEDDINGS}.cls_token", "cls_token", squeeze(2)),
        Rule(f"{EMBEDDINGS}.position_embeddings", "positions", squeeze(1)),
        *weight(patch_embed, "patch_embed", bias=True, how=conv(*patch)),
        *block(*MLP[c.use_swiglu_ffn].values()),
    ]
    if c.num_register_tokens:
        rules.append(Rule(f"{EMBEDDINGS}.register_tokens", "registers", squeeze(1)))
    return Table(tuple(rules), c.num_hidden_layers, tuple(unused))


def block(fc1: str, fc2: str) -> list[Rule]:
    """A layer, whose MLP calls its linears `fc1` and `fc2`."""
    return [
        *norm(f"{BLOCK}.norm1", "layers.norm1", bias=True),
        *weight(f"{BLOCK}.attention.attention.query", "layers.q", bias=True),
        *weight(f"{BLOCK}.attention.attention.key", "layers.k", bias=True),
        *weight(f"{BLOCK}.attention.attention.value", "layers.v", bias=True),
        *weight(f"{BLOCK}.attention.output.dense", "layers.out", bias=True),
        Rule(f"{BLOCK}.layer_scale1.lambda1", "layers.ls1"),
        *norm(f"{BLOCK}.norm2", "layers.norm2", bias=True),
        *weight(f"{BLOCK}.mlp.{fc1}", "layers.fc1", bias=True),
        *weight(f"{BLOCK}.mlp.{fc2}", "layers.fc2", bias=True),
        Rule(f"{BLOCK}.layer_scale2.lambda1", "layers.ls2"),
    ]


# ---- the authors' own layout


def dialects(c: Config, published_config: dict[str, Any]) -> tuple[Dialect, ...]:
    """The .pth files of the DINOv2 repository: fused qkv, other names, the same tensors."""
    links = [
        rename("cls_token", f"{EMBEDDINGS}.cls_token"),
        rename("pos_embed", f"{EMBEDDINGS}.position_embeddings"),
    ]
    if published_config.get("use_mask_token", True):
        links.append(rename("mask_token", f"{EMBEDDINGS}.mask_token"))
    if c.num_register_tokens:
        links.append(rename("register_tokens", f"{EMBEDDINGS}.register_tokens"))
    linears = {"patch_embed.proj": f"{EMBEDDINGS}.patch_embeddings.projection", "norm": "layernorm"}
    for i in range(c.num_hidden_layers):
        a, b = f"blocks.{i}", BLOCK.format(i=i)
        for x, y in MLP[c.use_swiglu_ffn].items():
            linears[f"{a}.mlp.{x}"] = f"{b}.mlp.{y}"
        linears[f"{a}.attn.proj"] = f"{b}.attention.output.dense"
        for j in (1, 2):
            linears[f"{a}.norm{j}"] = f"{b}.norm{j}"
            links.append(rename(f"{a}.ls{j}.gamma", f"{b}.layer_scale{j}.lambda1"))
        for leaf in ("weight", "bias"):
            parts = [f"{b}.attention.attention.{x}.{leaf}" for x in ("query", "key", "value")]
            links.append(fused(f"{a}.attn.qkv.{leaf}", parts))
    for a, b in linears.items():
        links += [rename(f"{a}.{leaf}", f"{b}.{leaf}") for leaf in ("weight", "bias")]
    return (Dialect("dinov2", tuple(links)),)


def recognise(shapes: Mapping[str, tuple[int, ...]], said: dict[str, Any]) -> dict | None:
    """The published JSON files of an authors' .pth file, None if the tensors are another's.

    Args:
      said: fields of config.json that the user states.
    """
    swiglu = "blocks.0.mlp.w12.weight" in shapes
    fc2 = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
    ranks = {"mask_token": 2, "pos_embed": 3, "patch_embed.proj.weight": 4, fc2: 2}
    ranks |= {"blocks.0.ls1.gamma": 1, "blocks.0.attn.qkv.bias": 1}
    if any(len(shapes.get(name, ())) != rank for name, rank in ranks.items()):
        return None
    d, _, _, patch = shapes["patch_embed.proj.weight"]
    registers = shapes.get("register_tokens", (1, 0, d))[1]
    side = round((shapes["pos_embed"][1] - 1) ** 0.5)
    fields: dict[str, Any] = dict(
        hidden_size=d,
        num_hidden_layers=sum(name.endswith(".ls1.gamma") for name in shapes),
        num_attention_heads=max(1, d // HEAD_DIM),
        mlp_ratio=round(shapes[fc2][1] / d * (1.5 if swiglu else 1)),
        use_swiglu_ffn=swiglu,
        num_register_tokens=registers,
        table_size=side * patch,
        patch_size=patch,
        interpolation="antialias" if registers else "scale_offset",
    )
    files = published(Config(**fields))
    return files | {"config.json": files["config.json"] | said}
