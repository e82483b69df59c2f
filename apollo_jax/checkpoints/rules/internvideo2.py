# SPDX-License-Identifier: Apache-2.0
"""InternVideo2 tower <-> the authors' PretrainInternVideo2, and what they distilled it into."""

import math
from collections.abc import Mapping
from typing import Any

from apollo_jax.checkpoints.rules.dialect import shape_of
from apollo_jax.checkpoints.rules.fields import defaults, take
from apollo_jax.checkpoints.rules.table import (
    Rule,
    Shape,
    Table,
    Unused,
    conv,
    norm,
    squeeze,
    weight,
)
from apollo_jax.models.internvideo2 import Config, InternVideo2

MODEL = InternVideo2
KNOWN = defaults(Config, "kind", "feature_layer", "image_mean", "image_std")
FIXED = dict(
    qkv_bias=False,
    qk_normalization=True,
    sep_pos_embed=False,
    use_fused_mlp=False,  # the fused MLP computes tanh-GELU
)
NORMALIZE = dict(mean=Config.image_mean, std=Config.image_std)
# What the config class assumes about the alignment heads, which Apollo never runs.
HEADS = dict(
    attn_pool_num_heads=16,
    clip_embed_dim=768,
    clip_teacher_embed_dim=3200,
    clip_teacher_final_dim=768,
    clip_return_layer=6,
    sep_image_video_pos_embed=True,
)
# What the authors' code calls the kinds that the config class does not know.
KINDS = dict(clip_student_decoder="Linear_Decoder", num_classes=0)
# width -> heads of the released sizes, which no shape tells
NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1408: 16, 3200: 25}
BLOCK = "blocks.{i}"
PROJECTOR = "clip_projector"


def config(files: dict[str, Any], where: str) -> Config:
    """Config from config.json and preprocessor_config.json."""
    fields = take(files["config.json"], KNOWN, FIXED, f"{where}/config.json")
    preprocessor = files.get("preprocessor_config.json", {})
    place = f"{where}/preprocessor_config.json"
    statistics = take(preprocessor.get("Normalize", {}), NORMALIZE, {}, f"{place}: Normalize")
    resize = dict(interpolation="bilinear", size=fields["img_size"])
    take(preprocessor.get("Resize", {}), {}, resize, f"{place}: Resize")
    return Config(**fields, image_mean=statistics["mean"], image_std=statistics["std"])


def published(c: Config) -> dict[str, Any]:
    """The published JSON files of a fresh tower; a small one gets small alignment heads."""
    heads = HEADS | dict(
        attn_pool_num_heads=c.num_heads,
        clip_embed_dim=min(768, c.d_model),
        clip_teacher_embed_dim=min(3200, 3 * c.d_model),
        clip_teacher_final_dim=min(768, c.d_model),
        clip_return_layer=min(6, c.depth),
    )
    return {
        "config.json": dict(
            architectures=["PretrainInternVideo2"],
            model_type="internvideo2",
            auto_map=dict(
                AutoConfig="configuration_internvideo2.InternVideo2Config",
                AutoModel="modeling_internvideo2.InternVideo2Model",
            ),
            clip_norm_type="l2",
            clip_student_return_interval=1,
            qkv_bias=False,
            use_checkpoint=False,
            checkpoint_num=0,
            use_flash_attn=False,
            use_fused_mlp=False,
            use_fused_rmsnorm=False,
            **{name: getattr(c, name) for name in KNOWN},
            **heads,
        ),
        "preprocessor_config.json": dict(
            CenterCrop=dict(size=[c.img_size, c.img_size]),
            ClipToTensor=dict(channel_nb=3, div_255=True, numpy=False),
            Normalize=dict(mean=list(c.image_mean), std=list(c.image_std)),
            Resize=dict(interpolation="bilinear", size=c.img_size),
            image_processor_type="transforms",
        ),
    }


def table(c: Config, published_config: dict[str, Any]) -> Table:
    """The rules; blocks from `feature_layer` on and all alignment heads are unused."""
    heads = take(published_config, HEADS | KINDS, {}, "InternVideo2 config.json")
    if heads["clip_student_decoder"] not in DECODERS:
        said, known = heads["clip_student_decoder"], ", ".join(DECODERS)
        raise ValueError(f"InternVideo2 config.json: clip_student_decoder {said!r}; known: {known}")
    rules = [
        *weight(
            "patch_embed.proj",
            "patch_embed",
            bias=True,
            how=conv(c.tubelet_size, c.patch_size, c.patch_size),
        ),
        Rule("cls_token", "cls_token", squeeze(2)),
        Rule("pos_embed", "positions", squeeze(1)),
        *norm(f"{BLOCK}.norm1", "layers.norm1"),
        *weight(f"{BLOCK}.attn.qkv", "layers.qkv"),
        *norm(f"{BLOCK}.attn.q_norm", "layers.q_norm"),
        *norm(f"{BLOCK}.attn.k_norm", "layers.k_norm"),
        *weight(f"{BLOCK}.attn.proj", "layers.proj", bias=True),
        # transformers 4 renames gamma to weight on load, so files exist with either
        Rule(f"{BLOCK}.ls1.gamma", "layers.ls1", alias=f"{BLOCK}.ls1.weight"),
        *norm(f"{BLOCK}.norm2", "layers.norm2"),
        *weight(f"{BLOCK}.mlp.fc1", "layers.fc1", bias=True),
        *weight(f"{BLOCK}.mlp.fc2", "layers.fc2", bias=True),
        Rule(f"{BLOCK}.ls2.gamma", "layers.ls2", alias=f"{BLOCK}.ls2.weight"),
    ]
    return Table(tuple(rules), c.depth, unused(c, heads))


def unused(c: Config, heads: dict[str, Any]) -> tuple[Unused, ...]:
    """Everything beside the video path up to `feature_layer`."""
    d, (t, rows, columns) = c.d_model, c.grid
    image, video = (1, 1 + rows * columns, d), (1, 1 + t * rows * columns, d)
    student, classes = heads["clip_embed_dim"], heads["num_classes"]
    projector = projector_shapes(d, heads["attn_pool_num_heads"], student)
    pooled = Unused("nothing is pooled", projector)
    if classes:  # fine-tuning keeps neither the decoders nor their positions
        classifier = {f"fc_norm.{key}": (student,) for key in ("weight", "bias")}
        classifier |= {"head.weight": (classes, student), "head.bias": (classes,)}
        return pooled, Unused("Apollo does not classify", classifier)
    positions = {"clip_pos_embed": video}
    if heads["sep_image_video_pos_embed"]:
        positions |= {"img_pos_embed": image, "clip_img_pos_embed": image}
    teacher, final = heads["clip_teacher_embed_dim"], heads["clip_teacher_final_dim"]
    decode = DECODERS[heads["clip_student_decoder"]]
    decoders: dict[str, Shape] = {}
    for i in range(heads["clip_return_layer"]):
        decoders |= decode(f"clip_decoder.{i}", d, teacher)
    if final:
        decoders |= decode("final_clip_decoder", student, final)
    return (
        Unused("images run as repeated frames, on the video positions", positions),
        pooled,
        Unused("heads of the distillation that trained the tower", decoders),
    )


def linear_decoder(name: str, din: int, dout: int) -> dict[str, Shape]:
    """A linear and a LayerNorm."""
    vectors = {f"{name}.{key}": (dout,) for key in ("head.bias", "norm.weight", "norm.bias")}
    return {f"{name}.head.weight": (dout, din), **vectors}


def mlp_decoder(name: str, din: int, dout: int) -> dict[str, Shape]:
    """Two linears and a LayerNorm, as the distilled towers have."""
    vectors = {f"{name}.{key}": (dout,) for key in ("head.2.bias", "norm.weight", "norm.bias")}
    hidden = {f"{name}.head.0.weight": (din, din), f"{name}.head.0.bias": (din,)}
    return {f"{name}.head.2.weight": (dout, din), **hidden, **vectors}


DECODERS = {"Linear_Decoder": linear_decoder, "MLP_Decoder": mlp_decoder}


def projector_shapes(d: int, num_heads: int, dout: int) -> dict[str, tuple[int, ...]]:
    """The attention pooling over all tokens."""
    inner = d // num_heads * num_heads
    shapes: dict[str, tuple[int, ...]] = {}
    for x in "qkv":
        shapes |= {f"{PROJECTOR}.norm1_{x}.{key}": (d,) for key in ("weight", "bias")}
        shapes |= {f"{PROJECTOR}.cross_attn.{x}.weight": (inner, d)}
        shapes |= {f"{PROJECTOR}.cross_attn.{x}_bias": (inner,)}
    return shapes | {
        f"{PROJECTOR}.cross_attn.proj.weight": (dout, inner),
        f"{PROJECTOR}.cross_attn.proj.bias": (dout,),
    }


# ---- the authors' .bin files, whose names are the published ones


def recognise(shapes: Mapping[str, Shape], said: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON files of a tower saved alone: frames of 224 pixels, unless said.

    ValueError if it is a damaged one, or of a size that was not released and not said.
    """
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    if not any(f"blocks.{i}.attn.q_norm.weight" in shapes for i in blocks):
        return None
    width, _, tubelet, patch, _ = shape_of(shapes, "patch_embed.proj.weight", 5)
    fc1 = next((n for i in blocks if (n := f"blocks.{i}.mlp.fc1.weight") in shapes), "mlp.fc1")
    size = said.get("img_size", 224)
    tokens = shape_of(shapes, "pos_embed", 3)[1] - 1
    fields = dict(
        d_model=width,
        depth=len(blocks),
        mlp_ratio=_ratio(shape_of(shapes, fc1, 2)[0], width),
        img_size=size,
        patch_size=patch,
        num_frames=tokens // (size // patch) ** 2 * tubelet,
        tubelet_size=tubelet,
    )
    if width in NUM_HEADS:
        fields |= dict(num_heads=NUM_HEADS[width])
    elif "num_heads" not in said:
        raise ValueError(f"InternVideo2: no released size is {width} wide; say its num_heads")
    files = published(Config(**take(fields | said, KNOWN, FIXED, "InternVideo2")))
    files["config.json"] |= _heads(shapes) | said
    return files


def _heads(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The published fields of the heads, as shapes tell them; how many pool, none tells."""
    layers = {name.split(".")[1] for name in shapes if name.startswith("clip_decoder.")}
    mlp = any("clip_decoder." in name and ".head.2." in name for name in shapes)
    last = "head.2.bias" if mlp else "head.bias"

    def size(name: str) -> int:
        return shapes.get(name, (0,))[0]

    return dict(
        attn_pool_num_heads=HEADS["attn_pool_num_heads"],
        clip_embed_dim=shape_of(shapes, f"{PROJECTOR}.cross_attn.proj.bias", 1)[0],
        clip_teacher_embed_dim=max((size(f"clip_decoder.{i}.{last}") for i in layers), default=0),
        clip_teacher_final_dim=size(f"final_clip_decoder.{last}"),
        clip_return_layer=len(layers),
        sep_image_video_pos_embed="img_pos_embed" in shapes,
        clip_student_decoder="MLP_Decoder" if mlp else "Linear_Decoder",
        num_classes=size("head.bias"),
    )


def _ratio(hidden: int, width: int) -> float:
    """mlp_ratio such that int(width * mlp_ratio) is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
