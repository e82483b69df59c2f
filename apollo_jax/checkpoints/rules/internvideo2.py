# SPDX-License-Identifier: Apache-2.0
"""InternVideo2 stage-2 tower <-> the authors' PretrainInternVideo2."""

from typing import Any

from apollo_jax.checkpoints.rules.fields import defaults, take
from apollo_jax.checkpoints.rules.table import Rule, Table, Unused, conv, norm, squeeze, weight
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
    heads = take(published_config, HEADS, {}, "InternVideo2 config.json")
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
    positions = {"clip_pos_embed": video}
    if heads["sep_image_video_pos_embed"]:
        positions |= {"img_pos_embed": image, "clip_img_pos_embed": image}
    student, teacher = heads["clip_embed_dim"], heads["clip_teacher_embed_dim"]
    final = heads["clip_teacher_final_dim"]
    decoders: dict[str, tuple[int, ...]] = {}
    for i in range(heads["clip_return_layer"]):
        decoders |= decoder_shapes(f"clip_decoder.{i}", d, teacher)
    if final:
        decoders |= decoder_shapes("final_clip_decoder", student, final)
    return (
        Unused("images run as repeated frames, on the video positions", positions),
        Unused("nothing is pooled", projector_shapes(d, heads["attn_pool_num_heads"], student)),
        Unused("heads of the distillation that trained the tower", decoders),
    )


def decoder_shapes(name: str, din: int, dout: int) -> dict[str, tuple[int, ...]]:
    """A linear and a LayerNorm."""
    vectors = {f"{name}.{key}": (dout,) for key in ("head.bias", "norm.weight", "norm.bias")}
    return {f"{name}.head.weight": (dout, din), **vectors}


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
