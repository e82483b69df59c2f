# SPDX-License-Identifier: Apache-2.0
"""CLIP as OpenAI's own class (and OpenCLIP's) names its tensors, for the rules of CLIP."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from apollo_jax.checkpoints.rules.dialect import Dialect, Link, fused, rename
from apollo_jax.checkpoints.rules.table import TRANSPOSE, Shape

HEAD_DIM = 64
FC = "transformer.resblocks.0.mlp.c_fc.weight"
VISION = {
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
}
TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "logit_scale": "logit_scale",
}
BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
IGNORED = dict.fromkeys(
    ("input_resolution", "context_length", "vocab_size"), "a number that the shapes tell"
) | {"attn_mask": "no later word is seen, whatever the file says"}
WORDS = dict.fromkeys(
    ("transformer.*", "ln_final.*", "text_projection", *TEXT), "Apollo has its own words"
)


def dialect(depth: int, text_depth: int | None) -> Dialect:
    """The layout of a model with so many layers; without a text half there is no `text_depth`."""
    links = [
        *(rename(foreign, published) for foreign, published in VISION.items()),
        rename("visual.proj", "visual_projection.weight", TRANSPOSE),
        *_pair("visual.ln_pre", "vision_model.pre_layrnorm"),
        *_pair("visual.ln_post", "vision_model.post_layernorm"),
        *_blocks("visual.", "vision_model", depth),
    ]
    if text_depth is None:
        return Dialect("OpenAI's CLIP", tuple(links), IGNORED | WORDS)
    links += [
        *(rename(foreign, published) for foreign, published in TEXT.items()),
        rename("text_projection", "text_projection.weight", TRANSPOSE),
        *_pair("ln_final", "text_model.final_layer_norm"),
        *_blocks("", "text_model", text_depth),
    ]
    return Dialect("OpenAI's CLIP", tuple(links), IGNORED)


def _blocks(foreign: str, published: str, depth: int) -> Iterator[Link]:
    """The blocks of one half, whose query, key and value are fused."""
    for i in range(depth):
        theirs, ours = f"{foreign}transformer.resblocks.{i}", f"{published}.encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            parts = [f"{ours}.self_attn.{x}_proj.{leaf}" for x in "qkv"]
            yield fused(f"{theirs}.attn.in_proj_{leaf}", parts)
        for a, b in BLOCK.items():
            yield from _pair(f"{theirs}.{a}", f"{ours}.{b}")


def _pair(foreign: str, published: str) -> Iterator[Link]:
    """A weight and its bias."""
    for leaf in ("weight", "bias"):
        yield rename(f"{foreign}.{leaf}", f"{published}.{leaf}")


class Halves(NamedTuple):
    """Published fields of both halves as shapes tell them."""

    vision: dict[str, Any]
    text: dict[str, Any] | None
    projection_dim: int


def halves(shapes: Mapping[str, Shape]) -> Halves | None:
    """What a state dict holds; None if it is not OpenAI's ViT."""
    names = ("visual.conv1.weight", "visual.positional_embedding", f"visual.{FC}", "visual.proj")
    patch, table, fc, projection = (shapes.get(name, ()) for name in names)
    if not (len(patch) == 4 and len(table) == len(fc) == len(projection) == 2):
        return None
    side = round((table[0] - 1) ** 0.5)
    vision = _transformer("visual.", fc, shapes)
    vision |= dict(image_size=side * patch[-1], patch_size=patch[-1])
    words, order, fc = (
        shapes.get(n, ()) for n in ("token_embedding.weight", "positional_embedding", FC)
    )
    if not len(words) == len(order) == len(fc) == 2:
        return Halves(vision, None, projection[1])
    text = _transformer("", fc, shapes) | dict(
        max_position_embeddings=order[0], projection_dim=projection[1], vocab_size=words[0]
    )
    return Halves(vision, text, projection[1])


def _transformer(half: str, fc: Shape, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    blocks = f"{half}transformer.resblocks."
    return dict(
        hidden_size=fc[1],
        intermediate_size=fc[0],
        num_attention_heads=max(1, fc[1] // HEAD_DIM),
        num_hidden_layers=sum(n.startswith(blocks) and n.endswith(".ln_1.weight") for n in shapes),
    )
