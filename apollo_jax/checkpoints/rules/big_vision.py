# SPDX-License-Identifier: Apache-2.0
"""SigLIP and SigLIP 2 as big_vision's .npz files hold them, for the rules of both.

A name is a path in {params: {img, txt, t, b}}. Blocks are numbered (`encoderblock_0`, SigLIP) or
stacked along a leading axis (`encoderblock`, SigLIP 2). A training run's files hold its optimizer
too, and older ones keep the parameters in it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from apollo_jax.checkpoints.rules.dialect import (
    Dialect,
    Link,
    divided,
    rename,
    shape_of,
    stacked,
)
from apollo_jax.checkpoints.rules.table import SAME, TRANSPOSE, Shape, Transform, squeeze

SIGLIP2_VOCABULARY = 256_000
# Where the parameters begin -> what a name is called for it, and what else such files hold.
ROOTS = {
    "params/": ("big_vision", {"opt/*": "the optimizer", "chrono/*": "the trainer's clock"}),
    "opt/target/": ("big_vision-run", {"opt/state/*": "the optimizer", "extra/*": "the trainer's"}),
    "": ("big_vision-bare", {}),
}
TEXT = ("txt/*", "t", "b")  # the text half, temperature and bias of the loss
ATTENTION = "MultiHeadDotProductAttention_0"
EMBEDDINGS = "vision_model.embeddings"
HEAD = "vision_model.head"

Leaf = tuple[str, str, Transform]  # big_vision's name, the published one, and how


# ---- shapes: D stream, H heads, h head dim, p patch side, S side of a position table


def split(heads: int) -> Transform:
    """Query, key, value: kernel [D, H, h] <-> weight [H*h, D]."""
    return Transform(
        lambda x: x.reshape(x.shape[0], -1).T, lambda y: y.T.reshape(y.shape[1], heads, -1)
    )


def merged(heads: int) -> Transform:
    """Output projection: kernel [H, h, D] <-> weight [D, H*h]."""
    return Transform(
        lambda x: x.reshape(-1, x.shape[-1]).T, lambda y: y.T.reshape(heads, -1, y.shape[0])
    )


def flat(heads: int) -> Transform:
    """Bias [H, h] <-> [H*h]."""
    return Transform(lambda x: x.reshape(-1), lambda y: y.reshape(heads, -1))


# [p, p, 3, D] <-> [D, 3, p, p]
CONV = Transform(lambda x: x.transpose(3, 2, 0, 1), lambda y: y.transpose(2, 3, 1, 0))
# [S, S, D] <-> [S*S, D]
GRID = Transform(
    lambda x: x.reshape(-1, x.shape[-1]),
    lambda y: y.reshape(math.isqrt(y.shape[0]), math.isqrt(y.shape[0]), -1),
)


# ---- links


BIAS = ("embedding/bias", f"{EMBEDDINGS}.patch_embedding.bias", SAME)
CONV_STEM: tuple[Leaf, ...] = (  # patches and positions of a fixed resolution
    ("embedding/kernel", f"{EMBEDDINGS}.patch_embedding.weight", CONV),
    BIAS,
    ("pos_embedding", f"{EMBEDDINGS}.position_embedding.weight", squeeze(1)),
)
NAFLEX_STEM: tuple[Leaf, ...] = (  # of NaFlex
    ("embedding/kernel", f"{EMBEDDINGS}.patch_embedding.weight", TRANSPOSE),
    BIAS,
    ("pos_embedding", f"{EMBEDDINGS}.position_embedding.weight", GRID),
)


def norm(theirs: str, ours: str) -> Iterator[Leaf]:
    """A LayerNorm."""
    yield f"{theirs}/scale", f"{ours}.weight", SAME
    yield f"{theirs}/bias", f"{ours}.bias", SAME


def dense(theirs: str, ours: str) -> Iterator[Leaf]:
    """A linear."""
    yield f"{theirs}/kernel", f"{ours}.weight", TRANSPOSE
    yield f"{theirs}/bias", f"{ours}.bias", SAME


def block(heads: int) -> Iterator[Leaf]:
    """A transformer block, of either half."""
    yield from norm("LayerNorm_0", "layer_norm1")
    for theirs in ("query", "key", "value"):
        ours = f"self_attn.{theirs[0]}_proj"
        yield f"{ATTENTION}/{theirs}/kernel", f"{ours}.weight", split(heads)
        yield f"{ATTENTION}/{theirs}/bias", f"{ours}.bias", flat(heads)
    yield f"{ATTENTION}/out/kernel", "self_attn.out_proj.weight", merged(heads)
    yield f"{ATTENTION}/out/bias", "self_attn.out_proj.bias", SAME
    yield from norm("LayerNorm_1", "layer_norm2")
    yield from dense("MlpBlock_0/Dense_0", "mlp.fc1")
    yield from dense("MlpBlock_0/Dense_1", "mlp.fc2")


def blocks(theirs: str, ours: str, depth: int, heads: int, scan: bool) -> Iterator[Link]:
    """All blocks of one half."""
    for leaf, name, how in block(heads):
        names = [f"{ours}.layers.{i}.{name}" for i in range(depth)]
        if scan:
            yield stacked(f"{theirs}/encoderblock/{leaf}", names, how)
        else:
            for i, published in enumerate(names):
                yield rename(f"{theirs}/encoderblock_{i}/{leaf}", published, how)


def pooling(theirs: str, heads: int) -> Iterator[Link]:
    """The attention-pooling head; its published query, key and value are fused."""
    attention = f"{theirs}/{ATTENTION}"
    for leaf, name, how in (
        ("kernel", "in_proj_weight", split(heads)),
        ("bias", "in_proj_bias", flat(heads)),
    ):
        parts = (f"{attention}/{x}/{leaf}" for x in ("query", "key", "value"))
        yield divided(parts, f"{HEAD}.attention.{name}", how)
    for leaf in (
        ("probe", f"{HEAD}.probe", SAME),
        (f"{ATTENTION}/out/kernel", f"{HEAD}.attention.out_proj.weight", merged(heads)),
        (f"{ATTENTION}/out/bias", f"{HEAD}.attention.out_proj.bias", SAME),
        *norm("LayerNorm_0", f"{HEAD}.layernorm"),
        *dense("MlpBlock_0/Dense_0", f"{HEAD}.mlp.fc1"),
        *dense("MlpBlock_0/Dense_1", f"{HEAD}.mlp.fc2"),
    ):
        yield below(theirs, leaf)


def below(theirs: str, leaf: Leaf) -> Link:
    """The link of a leaf below a path."""
    name, published, how = leaf
    return rename(f"{theirs}/{name}", published, how)


def text_links(root: str, text: dict[str, Any], scan: bool) -> Iterator[Link]:
    """The text half, and the temperature (its logarithm, as published) and bias of the loss."""
    at, depth, heads = f"{root}txt", text["num_hidden_layers"], text["num_attention_heads"]
    for leaf in (
        ("Embed_0/embedding", "text_model.embeddings.token_embedding.weight", SAME),
        ("pos_embedding", "text_model.embeddings.position_embedding.weight", squeeze(1)),
        *norm("Encoder_0/encoder_norm", "text_model.final_layer_norm"),
        *dense("head", "text_model.head"),
    ):
        yield below(at, leaf)
    yield from blocks(f"{at}/Encoder_0", "text_model.encoder", depth, heads, scan)
    yield rename(f"{root}t", "logit_scale")
    yield rename(f"{root}b", "logit_bias")


def dialects(
    stem: Iterable[Leaf],
    *,
    depth: int,
    heads: int,
    pooled: bool,
    text: dict[str, Any] | None,
) -> tuple[Dialect, ...]:
    """Every layout of one model, numbered blocks first.

    Args:
      stem: patches and positions.
      depth, heads: of the vision half.
      pooled: whether it has the attention-pooling head.
      text: published fields of the text half, if the model has one.
    """

    def layout(root: str, scan: bool) -> Dialect:
        name, ignored = ROOTS[root]
        at, ours = f"{root}img", "vision_model"
        links = [below(at, leaf) for leaf in stem]
        links += blocks(f"{at}/Transformer", f"{ours}.encoder", depth, heads, scan)
        last = norm("Transformer/encoder_norm", f"{ours}.post_layernorm")
        links += [below(at, leaf) for leaf in last]
        links += pooling(f"{at}/MAPHead_0", heads) if pooled else ()
        if text is None:
            ignored = ignored | {f"{root}{x}": "Apollo has its own words" for x in TEXT}
        else:
            links += text_links(root, text, scan)
        prefix = f"{at}/" if text is None else root
        return Dialect(name + "-scan" * scan, tuple(links), ignored, prefix=prefix)

    return tuple(layout(root, scan) for root in ROOTS for scan in (False, True))


# ---- files without a config.json


class Halves(NamedTuple):
    """Published fields of both halves as shapes tell them.

    positions: entries of the image position table.
    naflex: whether patches are flattened and the table is a grid.
    """

    vision: dict[str, Any]
    text: dict[str, Any] | None
    positions: int
    naflex: bool


def halves(shapes: Mapping[str, Shape]) -> Halves | None:
    """What an .npz holds; None if it is no SigLIP. ValueError if it is a damaged one."""
    root = next((r for r in (*(f"{r}img/" for r in ROOTS), "") if _is_tower(r, shapes)), None)
    if root is None:
        return None
    naflex = len(shapes.get(f"{root}embedding/kernel", ())) == 2
    kernel = shape_of(shapes, f"{root}embedding/kernel", 2 if naflex else 4)
    table = shape_of(shapes, f"{root}pos_embedding", 3)  # [1, N, D] or [S, S, D]
    vision = _encoder(f"{root}Transformer/", shapes) | dict(
        patch_size=math.isqrt(kernel[0] // 3) if naflex else kernel[0],
        vision_use_head=any(name.startswith(f"{root}MAPHead_0/") for name in shapes),
    )
    txt = root.removesuffix("img/") + "txt/"
    text = _text(txt, shapes) if any(name.startswith(txt) for name in shapes) else None
    return Halves(vision, text, table[0] * table[1], naflex)


def _is_tower(root: str, shapes: Mapping[str, Shape]) -> bool:
    stem = f"{root}embedding/kernel" in shapes or f"{root}pos_embedding" in shapes
    return stem and any(name.startswith(f"{root}Transformer/encoderblock") for name in shapes)


def _text(root: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    return _encoder(f"{root}Encoder_0/", shapes) | dict(
        vocab_size=shape_of(shapes, f"{root}Embed_0/embedding", 2)[0],
        max_position_embeddings=shape_of(shapes, f"{root}pos_embedding", 3)[1],
        projection_size=shape_of(shapes, f"{root}head/kernel", 2)[1],
    )


def _encoder(root: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    below = (name.removeprefix(root) for name in shapes if name.startswith(f"{root}encoderblock"))
    names = sorted({name.partition("/")[0] for name in below})
    scan = names == ["encoderblock"]

    def leaf(name: str, rank: int) -> Shape:
        """Of whichever block has it."""
        there = [n for n in names if f"{root}{n}/{name}" in shapes]
        at = (*there, *names, "encoderblock_0")[0]
        return shape_of(shapes, f"{root}{at}/{name}", rank + scan)

    *layers, width, heads, _ = leaf(f"{ATTENTION}/query/kernel", 3)
    return dict(
        hidden_size=width,
        intermediate_size=leaf("MlpBlock_0/Dense_0/bias", 1)[-1],
        num_hidden_layers=layers[0] if scan else len(names),
        num_attention_heads=heads,
    )


def described(
    files: dict[str, Any], found: Halves, kind: str, said: dict[str, Any]
) -> dict[str, Any]:
    """The JSON files of a fresh tower, completed by what a file holds and what is said of it.

    kind: model_type of both halves together.
    """
    preprocessor = files["preprocessor_config.json"]
    mine = {name: value for name, value in said.items() if name in preprocessor}
    rest = {name: value for name, value in said.items() if name not in preprocessor}
    config = files["config.json"] | rest
    if not found.vision["vision_use_head"]:
        config["vision_use_head"] = False
    if found.text is not None:
        config.pop("architectures")
        config = dict(
            architectures=[f"{kind.capitalize()}Model"],
            initializer_factor=1.0,
            model_type=kind,
            text_config=found.text | dict(model_type=f"{kind}_text_model"),
            vision_config=config,
        )
    return {"config.json": config, "preprocessor_config.json": preprocessor | mine}
