# SPDX-License-Identifier: Apache-2.0
"""V-JEPA 2 encoder <-> transformers' VJEPA2Model."""

from collections.abc import Iterator, Mapping
from typing import Any

from apollo_jax.checkpoints.rules.dialect import Dialect, Link, fused, rename
from apollo_jax.checkpoints.rules.fields import defaults, take
from apollo_jax.checkpoints.rules.table import Shape, Table, Unused, conv, norm, weight
from apollo_jax.checkpoints.rules.vjepa import ratio
from apollo_jax.models.vjepa2 import VJEPA2, Config

MODEL = VJEPA2
KNOWN = defaults(Config, "kind", "image_mean", "image_std")
FIXED = dict(hidden_act="gelu", in_chans=3)
PROCESSOR = dict(image_mean=Config.image_mean, image_std=Config.image_std)
# What VJEPA2Config assumes about the predictor.
PREDICTOR = dict(
    pred_hidden_size=384,
    pred_mlp_ratio=4.0,
    pred_num_attention_heads=12,
    pred_num_hidden_layers=12,
    pred_num_mask_tokens=10,
)
LAYER = "encoder.layer.{i}"
AUTHORS = "module.backbone."  # what the names of the authors' files begin with
TABLES = ("pos_embed", "predictor_pos_embed")
WIDTHS = {1024: 16, 1280: 16, 1408: 22}  # of the released sizes: heads
AC = ("action_encoder.*", "state_encoder.*", "extrinsics_encoder.*", "predictor_*", "mask_tokens.*")


def config(files: dict[str, Any], where: str) -> Config:
    """Config from config.json and video_preprocessor_config.json."""
    fields = take(files["config.json"], KNOWN, FIXED, f"{where}/config.json")
    name = "video_preprocessor_config.json"
    size = dict(height=fields["crop_size"], width=fields["crop_size"])
    fixed = dict(crop_size=size, resample=2, rescale_factor=1 / 255)  # PIL bilinear, to [0, 1]
    return Config(**fields, **take(files.get(name, {}), PROCESSOR, fixed, f"{where}/{name}"))


def published(c: Config) -> dict[str, Any]:
    """The published JSON files of a fresh encoder; a small one gets a small predictor."""
    predictor = PREDICTOR | dict(pred_zero_init_mask_tokens=True)
    if c.hidden_size < PREDICTOR["pred_hidden_size"]:
        predictor |= dict(
            pred_hidden_size=c.hidden_size,
            pred_num_attention_heads=c.num_attention_heads,
            pred_num_hidden_layers=1,
        )
    return {
        "config.json": dict(
            architectures=["VJEPA2Model"],
            attention_probs_dropout_prob=0.0,
            drop_path_rate=0.0,
            **FIXED,
            **{name: getattr(c, name) for name in KNOWN},
            **predictor,
            model_type="vjepa2",
        ),
        "video_preprocessor_config.json": dict(
            crop_size=dict(height=c.crop_size, width=c.crop_size),
            do_center_crop=True,
            do_normalize=True,
            do_rescale=True,
            do_resize=True,
            image_mean=list(c.image_mean),
            image_std=list(c.image_std),
            resample=2,
            rescale_factor=1 / 255,
            size=dict(shortest_edge=c.frame_spec.side),
            video_processor_type="VJEPA2VideoProcessor",
        ),
    }


def table(c: Config, published_config: dict[str, Any]) -> Table:
    """The rules; the predictor is unused."""
    rules = [
        *weight(
            "encoder.embeddings.patch_embeddings.proj",
            "patch_embed",
            bias=True,
            how=conv(c.tubelet_size, c.patch_size, c.patch_size),
        ),
        *norm(f"{LAYER}.norm1", "layers.norm1", bias=True),
        *weight(f"{LAYER}.attention.query", "layers.q", bias=c.qkv_bias),
        *weight(f"{LAYER}.attention.key", "layers.k", bias=c.qkv_bias),
        *weight(f"{LAYER}.attention.value", "layers.v", bias=c.qkv_bias),
        *weight(f"{LAYER}.attention.proj", "layers.out", bias=True),
        *norm(f"{LAYER}.norm2", "layers.norm2", bias=True),
        *weight(f"{LAYER}.mlp.fc1", "layers.fc1", bias=True),
        *weight(f"{LAYER}.mlp.fc2", "layers.fc2", bias=True),
        *norm("encoder.layernorm", "norm", bias=True),
    ]
    shapes = predictor_shapes(c, published_config)
    return Table(tuple(rules), c.num_hidden_layers, (Unused("nothing is predicted", shapes),))


def predictor_shapes(c: Config, published_config: dict[str, Any]) -> dict[str, Shape]:
    """The predictor of what is masked, which trained the encoder."""
    fields = take(published_config, PREDICTOR, {}, "V-JEPA 2 config.json")
    d = fields["pred_hidden_size"]
    m = int(d * fields["pred_mlp_ratio"])
    shapes: dict[str, Shape] = {
        "predictor.embeddings.mask_tokens": (fields["pred_num_mask_tokens"], 1, 1, d),
        **_pair("predictor.embeddings.predictor_embeddings", d, c.hidden_size),
        **_pair("predictor.layernorm", d),
        **_pair("predictor.proj", c.hidden_size, d),
    }
    for i in range(fields["pred_num_hidden_layers"]):
        layer = f"predictor.layer.{i}"
        shapes |= _pair(f"{layer}.norm1", d) | _pair(f"{layer}.norm2", d)
        for x in ("query", "key", "value"):
            shapes |= _pair(f"{layer}.attention.{x}", d, d, bias=c.qkv_bias)
        shapes |= _pair(f"{layer}.attention.proj", d, d)
        shapes |= _pair(f"{layer}.mlp.fc1", m, d) | _pair(f"{layer}.mlp.fc2", d, m)
    return shapes


def _pair(name: str, *shape: int, bias: bool = True) -> dict[str, Shape]:
    """A weight and its bias."""
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


# ---- the authors' files


def dialects(c: Config, published_config: dict[str, Any]) -> tuple[Dialect, ...]:
    """Of the authors' .pt files: one of the encoders in them, with the predictor or without."""
    fields = take(published_config, PREDICTOR, {}, "V-JEPA 2 config.json")
    encoder = [
        *_renamed("patch_embed.proj", "encoder.embeddings.patch_embeddings.proj"),
        *_renamed("norm", "encoder.layernorm"),
        *_layers("blocks", "encoder.layer", c.num_hidden_layers, c.qkv_bias),
    ]
    depth = fields["pred_num_hidden_layers"]
    masks = [f"{AUTHORS}mask_tokens.{i}" for i in range(fields["pred_num_mask_tokens"])]
    predictor = [
        Link(tuple(masks), ("predictor.embeddings.mask_tokens",), stacked=True),
        *_renamed("predictor_embed", "predictor.embeddings.predictor_embeddings"),
        *_renamed("predictor_norm", "predictor.layernorm"),
        *_renamed("predictor_proj", "predictor.proj"),
        *_layers("predictor_blocks", "predictor.layer", depth, c.qkv_bias),
    ]
    why = "positions are rotations; the table in the file is not used"
    ignored = {f"{at}{name}": why for at in ("", AUTHORS) for name in TABLES}
    other = {f"{at}{name}": "another predictor" for at in ("", AUTHORS) for name in AC}
    absent = {n: "the file has no such predictor" for link in predictor for n in link.published}
    return (
        Dialect("V-JEPA 2", (*encoder, *predictor), ignored, prefix=AUTHORS),
        Dialect("V-JEPA 2's encoder", tuple(encoder), ignored | other, absent, prefix=AUTHORS),
    )


def _layers(foreign: str, published: str, depth: int, bias: bool) -> Iterator[Link]:
    """Blocks of the encoder or the predictor."""
    for i in range(depth):
        theirs, ours = f"{foreign}.{i}", f"{published}.{i}"
        for leaf in ("weight", "bias") if bias else ("weight",):
            parts = [f"{ours}.attention.{x}.{leaf}" for x in ("query", "key", "value")]
            yield fused(f"{AUTHORS}{theirs}.attn.qkv.{leaf}", parts)
        yield from _renamed(f"{theirs}.attn.proj", f"{ours}.attention.proj")
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            yield from _renamed(f"{theirs}.{name}", f"{ours}.{name}")


def _renamed(foreign: str, published: str) -> Iterator[Link]:
    for leaf in ("weight", "bias"):
        yield rename(f"{AUTHORS}{foreign}.{leaf}", f"{published}.{leaf}")


def recognise(shapes: Mapping[str, Shape], said: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON files of an authors' file: 64 frames of 256 pixels, unless said."""
    own = {name.removeprefix(AUTHORS): shape for name, shape in shapes.items()}
    patches, hidden = own.get("patch_embed.proj.weight", ()), own.get("blocks.0.mlp.fc1.weight", ())
    told = said.get("model_type") == "vjepa2" or "pos_embed" not in own
    if len(patches) != 5 or not hidden or "blocks.0.attn.qkv.bias" not in own or not told:
        return None
    width, _, tubelet, patch, _ = patches
    fields = dict(
        hidden_size=width,
        num_hidden_layers=_depth(own, "blocks"),
        num_attention_heads=WIDTHS.get(width, max(1, width // 64)),
        mlp_ratio=ratio(hidden[0], width),
        patch_size=patch,
        tubelet_size=tubelet,
    )
    known = {k: v for k, v in said.items() if k in KNOWN}
    files = published(config({"config.json": fields | known}, "the file"))
    files["config.json"] |= _predictor(own) | said
    return files


def _predictor(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The fields of a predictor, if it is there and of V-JEPA 2."""
    hidden, masks = shapes.get("predictor_blocks.0.mlp.fc1.weight", ()), "mask_tokens."
    if not hidden or not any(name.startswith(masks) for name in shapes):
        return {}
    m, d = hidden
    return dict(
        pred_hidden_size=d,
        pred_mlp_ratio=ratio(m, d),
        pred_num_attention_heads=max(1, d // 32),
        pred_num_hidden_layers=_depth(shapes, "predictor_blocks"),
        pred_num_mask_tokens=sum(name.startswith(masks) for name in shapes),
    )


def _depth(shapes: Mapping[str, Shape], blocks: str) -> int:
    return sum(n.startswith(f"{blocks}.") and n.endswith("norm1.weight") for n in shapes)
