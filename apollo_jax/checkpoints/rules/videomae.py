# SPDX-License-Identifier: Apache-2.0
"""VideoMAE <-> transformers' VideoMAEModel, alone or below the heads it is published with."""

from collections.abc import Iterator, Mapping
from typing import Any

from apollo_jax.checkpoints.rules.dialect import Dialect, Link, fused, rename
from apollo_jax.checkpoints.rules.fields import defaults, take
from apollo_jax.checkpoints.rules.table import Rule, Shape, Table, Unused, conv, norm, weight
from apollo_jax.models.videomae import IMAGE_MEAN, IMAGE_STD, Config, VideoMAE

MODEL = VideoMAE
# What VideoMAEConfig assumes where config.json is silent (its base size).
BASE = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
KNOWN = defaults(Config, "kind", "feature_layer") | BASE
FIXED = dict(hidden_act="gelu", num_channels=3)
DECODER = dict(
    decoder_hidden_size=384,
    decoder_intermediate_size=1536,
    decoder_num_attention_heads=6,
    decoder_num_hidden_layers=4,
)
PRETRAINING, CLASSIFIER = "VideoMAEForPreTraining", "VideoMAEForVideoClassification"
LAYER, ATTENTION = "encoder.layer.{i}", "encoder.layer.{i}.attention.attention"
DECODER_LAYER = "decoder.decoder_layers.{i}"

# Of one layer: the authors' name -> transformers'.
VECTORS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
LINEARS = {
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
QKV = ("query", "key", "value")


def config(files: dict[str, Any], where: str) -> Config:
    """Config from config.json; Apollo's statistics do not follow preprocessor_config.json."""
    return Config(**take(_fields(files["config.json"]), KNOWN, FIXED, f"{where}/config.json"))


def _fields(published_config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes qkv_bias as qv_bias."""
    return {{"qv_bias": "qkv_bias"}.get(k, k): v for k, v in published_config.items()}


def published(c: Config) -> dict[str, Any]:
    """The published JSON files of a fresh encoder, which has neither decoder nor last norm."""
    return {
        "config.json": dict(
            architectures=["VideoMAEModel"],
            attention_probs_dropout_prob=0.0,
            hidden_dropout_prob=0.0,
            **FIXED,
            **{name: getattr(c, name) for name in KNOWN},
            model_type="videomae",
            use_mean_pooling=True,
        ),
        "preprocessor_config.json": dict(
            crop_size=dict(height=c.image_size, width=c.image_size),
            do_center_crop=True,
            do_normalize=True,
            do_rescale=True,
            do_resize=True,
            image_mean=list(IMAGE_MEAN),
            image_processor_type="VideoMAEImageProcessor",
            image_std=list(IMAGE_STD),
            resample=2,
            rescale_factor=1 / 255,
            size=dict(shortest_edge=c.image_size),
        ),
    }


def table(c: Config, published_config: dict[str, Any]) -> Table:
    """The rules; layers from `feature_layer` on, the last norm and all heads are unused."""
    stem, unused = _stem(published_config), []
    if not published_config.get("use_mean_pooling", True):
        reason = "features are taken before the last norm"
        unused.append(Unused(reason, _pair(f"{stem}layernorm", c.hidden_size)))
    if PRETRAINING in _architectures(published_config):
        unused.append(Unused("the encoder alone sees", decoder_shapes(c, published_config)))
    if CLASSIFIER in _architectures(published_config):
        unused.append(Unused("nothing is classified", classifier_shapes(c, published_config)))
    patches = conv(c.tubelet_size, c.patch_size, c.patch_size)
    rules = [
        *weight("embeddings.patch_embeddings.projection", "patch_embed", bias=True, how=patches),
        *norm(f"{LAYER}.layernorm_before", "layers.norm1", bias=True),
        *weight(f"{ATTENTION}.query", "layers.q"),
        *weight(f"{ATTENTION}.key", "layers.k"),
        *weight(f"{ATTENTION}.value", "layers.v"),
        *weight(f"{LAYER}.attention.output.dense", "layers.out", bias=True),
        *norm(f"{LAYER}.layernorm_after", "layers.norm2", bias=True),
        *weight(f"{LAYER}.intermediate.dense", "layers.fc1", bias=True),
        *weight(f"{LAYER}.output.dense", "layers.fc2", bias=True),
    ]
    if c.qkv_bias:
        rules += [Rule(f"{ATTENTION}.{x}_bias", f"layers.{x}.bias") for x in "qv"]
    rules = [rule._replace(name=stem + rule.name) for rule in rules]
    return Table(tuple(rules), c.num_hidden_layers, tuple(unused))


def _architectures(published_config: dict[str, Any]) -> list[str]:
    return published_config.get("architectures") or []


def _stem(published_config: dict[str, Any]) -> str:
    """What the encoder's names begin with below a head."""
    headed = {PRETRAINING, CLASSIFIER} & set(_architectures(published_config))
    return "videomae." if headed else ""


def decoder_shapes(c: Config, published_config: dict[str, Any]) -> dict[str, Shape]:
    """The decoder that rebuilds the pixels."""
    fields = take(published_config, DECODER, {}, "VideoMAE config.json")
    d, m = fields["decoder_hidden_size"], fields["decoder_intermediate_size"]
    pixels = 3 * c.tubelet_size * c.patch_size**2
    shapes: dict[str, Shape] = {
        "mask_token": (1, 1, d),
        "encoder_to_decoder.weight": (d, c.hidden_size),
        **_pair("decoder.head", pixels, d),
        **_pair("decoder.norm", d),
    }
    for i in range(fields["decoder_num_hidden_layers"]):
        layer = DECODER_LAYER.format(i=i)
        shapes |= {f"{layer}.attention.attention.{x}.weight": (d, d) for x in QKV}
        shapes |= {f"{layer}.attention.attention.{x}_bias": (d,) for x in "qv" if c.qkv_bias}
        shapes |= _pair(f"{layer}.attention.output.dense", d, d)
        shapes |= _pair(f"{layer}.intermediate.dense", m, d) | _pair(f"{layer}.output.dense", d, m)
        for name in VECTORS.values():
            shapes |= _pair(f"{layer}.{name}", d)
    return shapes


def classifier_shapes(c: Config, published_config: dict[str, Any]) -> dict[str, Shape]:
    """The head of a fine-tuned model; transformers assumes two classes."""
    classes = len(published_config.get("id2label") or (0, 1))
    shapes = _pair("classifier", classes, c.hidden_size)
    if published_config.get("use_mean_pooling", True):
        shapes |= _pair("fc_norm", c.hidden_size)
    return shapes


def _pair(name: str, *shape: int) -> dict[str, Shape]:
    """A weight and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


# ---- the authors' files


def dialects(c: Config, published_config: dict[str, Any]) -> tuple[Dialect, ...]:
    """Of the authors' .pth files; those of fine-tuned models leave out the prefix."""
    stem = _stem(published_config)
    links = list(
        _renamed("encoder.patch_embed.proj", f"{stem}embeddings.patch_embeddings.projection")
    )
    if not published_config.get("use_mean_pooling", True):
        links += _renamed("encoder.norm", f"{stem}layernorm")
    for i in range(c.num_hidden_layers):
        links += _layer_links(f"encoder.blocks.{i}", stem + LAYER.format(i=i), c.qkv_bias)
    if PRETRAINING in _architectures(published_config):
        fields = take(published_config, DECODER, {}, "VideoMAE config.json")
        links += [rename(name, name) for name in ("mask_token", "encoder_to_decoder.weight")]
        links += [
            *_renamed("decoder.norm", "decoder.norm"),
            *_renamed("decoder.head", "decoder.head"),
        ]
        for i in range(fields["decoder_num_hidden_layers"]):
            links += _layer_links(f"decoder.blocks.{i}", DECODER_LAYER.format(i=i), c.qkv_bias)
    head = "the head of a fine-tuned model"
    ignored = {"head.*": head, "fc_norm.*": head}
    return (Dialect("VideoMAE", tuple(links), ignored, prefix="encoder."),)


def _layer_links(foreign: str, published: str, bias: bool) -> Iterator[Link]:
    attention = f"{published}.attention.attention"
    yield fused(f"{foreign}.attn.qkv.weight", [f"{attention}.{x}.weight" for x in QKV])
    if bias:
        yield from (rename(f"{foreign}.attn.{x}_bias", f"{attention}.{x}_bias") for x in "qv")
    for theirs, ours in (VECTORS | LINEARS).items():
        yield from _renamed(f"{foreign}.{theirs}", f"{published}.{ours}")


def _renamed(foreign: str, published: str) -> Iterator[Link]:
    for name in ("weight", "bias"):
        yield rename(f"{foreign}.{name}", f"{published}.{name}")


def recognise(shapes: Mapping[str, Shape], said: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON files of an authors' file: 16 frames of 224 pixels unless said otherwise."""
    stem = "encoder." if "encoder.patch_embed.proj.weight" in shapes else ""
    patches = shapes.get(f"{stem}patch_embed.proj.weight", ())
    if len(patches) != 5 or f"{stem}blocks.0.attn.q_bias" not in shapes:
        return None
    fields = dict(
        _sizes(shapes, f"{stem}blocks", ""), tubelet_size=patches[2], patch_size=patches[3]
    )
    known = {k: v for k, v in said.items() if k in KNOWN}
    files = published(config({"config.json": fields | known}, "the file"))
    head = dict(use_mean_pooling=f"{stem}norm.weight" not in shapes)
    if "decoder.head.weight" in shapes:
        head |= dict(architectures=[PRETRAINING], **_sizes(shapes, "decoder.blocks", "decoder_"))
    files["config.json"] |= head | said
    return files


def _sizes(shapes: Mapping[str, Shape], blocks: str, prefix: str) -> dict[str, int]:
    """The fields of a transformer; heads are 64 wide, those of the huge model 80."""
    m, d = shapes[f"{blocks}.0.mlp.fc1.weight"]
    depth = sum(name.startswith(blocks) and name.endswith("norm1.weight") for name in shapes)
    sizes = dict(
        hidden_size=d,
        intermediate_size=m,
        num_attention_heads=max(1, d // (80 if d in (640, 1280) else 64)),
        num_hidden_layers=depth,
    )
    return {prefix + name: size for name, size in sizes.items()}
