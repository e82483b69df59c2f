# SPDX-License-Identifier: Apache-2.0
"""V-JEPA encoder <-> the authors' VisionTransformer, as Apollo's vision tower names its tensors."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from apollo_jax.checkpoints.rules.dialect import Dialect, rename
from apollo_jax.checkpoints.rules.fields import defaults, take
from apollo_jax.checkpoints.rules.table import Rule, Shape, Table, conv, norm, squeeze, weight
from apollo_jax.models.vjepa import VJEPA, Config

MODEL = VJEPA
KNOWN = defaults(Config, "kind")
FIXED = dict(in_chans=3, qkv_bias=True, qk_scale=None, out_layers=None)
NAMES = {  # model_name -> what it stands for where config.json is silent
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4.0),
    "vit_huge": dict(embed_dim=1280, depth=32, num_heads=16, mlp_ratio=4.0),
    "vit_giant": dict(embed_dim=1408, depth=40, num_heads=16, mlp_ratio=48 / 11),
    # its constructor misspells the ratio of 64/13 that it means
    "vit_gigantic": dict(embed_dim=1664, depth=48, num_heads=16, mlp_ratio=4.0),
}
TOKENS = (1568, 4608)  # of the released ones: 16 frames of 224 or 384 pixels
BLOCK = "blocks.{i}"
PREDICTOR = {
    f"{begin}{name}": "nothing is predicted"
    for begin in ("", "module.backbone.")
    for name in ("predictor_*", "mask_tokens.*")
}
PUBLISHED, APOLLO = "module.backbone.", "vision_tower."  # what names begin with elsewhere


def config(files: dict[str, Any], where: str) -> Config:
    """Config from config.json, whose model_type `vit` it shares with transformers' ViT."""
    json, place = files["config.json"], f"{where}/config.json"
    if "crop_size" not in json:
        raise ValueError(
            f"{place}: a vit is a V-JEPA only with a crop_size; plain ViTs are unknown"
        )
    known = KNOWN | NAMES.get(json.get("model_name"), {})
    return Config(**take(json, known, FIXED, place))


def published(c: Config) -> dict[str, Any]:
    """The published JSON file of a fresh encoder."""
    fields = {name: getattr(c, name) for name in KNOWN}
    named = (name for name, sizes in NAMES.items() if sizes.items() <= fields.items())
    return {
        "config.json": dict(
            architectures=["vjepa"],
            checkpoint_key="target_encoder",
            **FIXED,
            **fields,
            model_name=next(named, "vit"),
            model_type="vit",
        )
    }


def table(c: Config, published_config: dict[str, Any]) -> Table:
    """The rules; the encoder uses every tensor."""
    del published_config
    rules = [
        *weight(
            "patch_embed.proj",
            "patch_embed",
            bias=True,
            how=conv(c.tubelet_size, c.patch_size, c.patch_size),
        ),
        Rule("pos_embed", "positions", squeeze(1)),
        *norm(f"{BLOCK}.norm1", "layers.norm1", bias=True),
        *weight(f"{BLOCK}.attn.qkv", "layers.qkv", bias=True),
        *weight(f"{BLOCK}.attn.proj", "layers.proj", bias=True),
        *norm(f"{BLOCK}.norm2", "layers.norm2", bias=True),
        *weight(f"{BLOCK}.mlp.fc1", "layers.fc1", bias=True),
        *weight(f"{BLOCK}.mlp.fc2", "layers.fc2", bias=True),
        *norm("norm", "norm", bias=True),
    ]
    rules = [rule._replace(alias=PUBLISHED + rule.name) for rule in rules]
    return Table(tuple(rules), c.depth)


# ---- the authors' files


def dialects(c: Config, published_config: dict[str, Any]) -> tuple[Dialect, ...]:
    """Of the authors' .pth.tar files (one of the encoders in them) and of a whole Apollo's."""
    names = [*_names(table(c, published_config))]
    links = {at: tuple(rename(at + name, name) for name in names) for at in (PUBLISHED, APOLLO)}
    return (
        Dialect("V-JEPA", links[PUBLISHED], PREDICTOR, prefix=PUBLISHED),
        Dialect("Apollo's V-JEPA", links[APOLLO], prefix=APOLLO),
    )


def _names(table: Table) -> Iterator[str]:
    for rule in table.rules:
        layers = range(table.depth) if "{i}" in rule.name else (0,)
        yield from (rule.name.format(i=i) for i in layers)


def recognise(shapes: Mapping[str, Shape], said: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON file of an authors' file: 16 frames wherever that leaves a square, unless said."""
    stem = next((s for s in (PUBLISHED, APOLLO, "") if f"{s}pos_embed" in shapes), "")
    patches = shapes.get(f"{stem}patch_embed.proj.weight", ())
    biased = f"{stem}blocks.0.attn.qkv.bias" in shapes  # InternVideo2's is not
    if len(patches) != 5 or not biased or f"{stem}pos_embed" not in shapes:
        return None
    if said.get("model_type") == "vjepa2":  # an older file of its, with a table it has no use for
        return None
    tokens, told = (
        shapes[f"{stem}pos_embed"][1],
        said.keys() & {"num_frames", "num_heads", "model_type"},
    )
    if stem == PUBLISHED and tokens not in TOKENS and not told:
        raise ValueError(
            f"a table of {tokens} positions is of no released V-JEPA; say what the file is with "
            """--config '{"model_type": "vit"}' (V-JEPA) or '{"model_type": "vjepa2"}'"""
        )
    width, _, tubelet, patch, _ = patches
    depth = sum(n.startswith(f"{stem}blocks.") and n.endswith("norm1.weight") for n in shapes)
    times, side = _grid(tokens, tubelet, patch, said)
    fields = dict(
        embed_dim=width,
        depth=depth,
        num_heads=16 if width >= 1024 else max(1, width // 64),
        mlp_ratio=ratio(shapes[f"{stem}blocks.0.mlp.fc1.weight"][0], width),
        crop_size=side * patch,
        patch_size=patch,
        num_frames=times * tubelet,
        tubelet_size=tubelet,
    )
    known = {k: v for k, v in said.items() if k in KNOWN}
    files = published(Config(**take(fields | known, KNOWN, {}, "the file")))
    files["config.json"] |= said
    return files


def _grid(tokens: int, tubelet: int, patch: int, said: dict[str, Any]) -> tuple[int, int]:
    """Time steps and patches along a side."""
    if "crop_size" in said:
        times = [tokens // (said["crop_size"] // patch) ** 2]
    elif "num_frames" in said:
        times = [said["num_frames"] // tubelet]
    else:
        times = [16 // tubelet, *range(1, tokens + 1)]
    sides = {t: math.isqrt(tokens // max(1, t)) for t in times}
    return next(((t, s) for t, s in sides.items() if t * s * s == tokens), (1, 1))


def ratio(hidden: int, width: int) -> float:
    """mlp_ratio such that int(width * mlp_ratio) is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
