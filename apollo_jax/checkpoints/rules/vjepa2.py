# SPDX-License-Identifier: Apache-2.0
"""V-JEPA 2 encoder <-> transformers' VJEPA2Model."""

from typing import Any

from apollo_jax.checkpoints.rules.fields import defaults, take
from apollo_jax.checkpoints.rules.table import Shape, Table, Unused, conv, norm, weight
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
