# SPDX-License-Identifier: Apache-2.0
"""DINOv2's published folders and the authors' files: fields, names, shapes and the way back."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from apollo_jax.checkpoints.pretrained import from_pretrained, save_pretrained
from apollo_jax.checkpoints.rules import dinov2 as rules
from apollo_jax.checkpoints.rules import table as tables
from apollo_jax.models.dinov2 import Config, DINOv2

FIXTURES = Path(__file__).parents[3] / "fixtures" / "encoders"
NAMES = ("dinov2-a", "dinov2reg-a")
RELEASED = {"dinov2-large": Config.large(), "dinov2-giant": Config.giant()}
SMALL = Config(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, table_size=35, patch_size=7
)
KINDS = {
    "mlp": replace(SMALL, mlp_ratio=3),
    "swiglu": replace(SMALL, use_swiglu_ffn=True),
    "registers": replace(SMALL, num_register_tokens=3, interpolation="antialias"),
}


def published_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a fresh tower, nothing allocated."""
    leaves = tables.parameters(nnx.eval_shape(lambda: DINOv2(config, rngs=nnx.Rngs(0))))
    table = rules.table(config, rules.published(config)["config.json"])
    return {name: slot.shape for name, slot in tables.slots(table, leaves).items()}


@pytest.mark.parametrize("name", RELEASED)
def test_released_towers_to_the_last_name(name):
    folded = json.loads((FIXTURES / "dinov2_shapes.json").read_text())[name]
    depth, expected = RELEASED[name].num_hidden_layers, {}
    for template, shape in folded.items():
        layers = range(depth) if "{i}" in template else [0]
        expected |= {template.format(i=i): tuple(shape) for i in layers}
    assert published_shapes(RELEASED[name]) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_survives_to_the_last_bit(name, tmp_path):
    folder = FIXTURES / name
    save_pretrained(from_pretrained(folder), tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key].view(np.uint8), tensor.view(np.uint8))
    for file in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_tower_states_its_config(kind):
    config = KINDS[kind]
    files = {n: json.loads(json.dumps(f)) for n, f in rules.published(config).items()}
    assert rules.config(files, "folder") == config


def test_published_class_defaults_and_every_spelling_of_a_square():
    assert rules.config({"config.json": {}}, "f").num_hidden_layers == 12
    registers = rules.config({"config.json": dict(model_type="dinov2_with_registers")}, "f")
    assert (registers.num_register_tokens, registers.interpolation) == (4, "antialias")
    for size, crop in ((256, 224), (dict(shortest_edge=256), dict(height=224, width=224))):
        files = {
            "config.json": dict(image_size=[518, 518]),
            "preprocessor_config.json": dict(size=size, crop_size=crop),
        }
        config = rules.config(files, "f")
        assert (config.table_size, config.image_size, config.resize) == (518, 224, 256)


@pytest.mark.parametrize(
    ("config", "preprocessor", "message"),
    [
        (dict(interpolation="nearest"), {}, r"interpolation is 'nearest'; known: scale_offset, si"),
        (dict(qkv_bias=False), {}, r"f/config.json: qkv_bias is False, only True"),
        (dict(use_swiglu_fnn=True), {}, r"use_swiglu_fnn is unknown \(did you mean use_swiglu_ffn"),
        ({}, dict(crop_size=300), r"f/preprocessor_config.json: crop_size 300 exceeds size 256"),
        ({}, dict(crop_size=dict(height=3, width=4)), r"crop_size is {.*}, expected a int"),
        ({}, dict(do_center_crop=False), r"do_center_crop is False, only True is supported"),
    ],
)
def test_what_does_not_fit_is_named(config, preprocessor, message):
    files = {"config.json": config, "preprocessor_config.json": preprocessor}
    with pytest.raises(ValueError, match=message):
        rules.config(files, "f")


# ---- the authors' own layout


def authors_file(config: Config, published: dict) -> dict[str, np.ndarray]:
    """The tensors of a published folder as the authors' .pth file has them."""
    (dialect,) = rules.dialects(config, rules.published(config)["config.json"])
    return {
        link.foreign[0]: np.concatenate([published[name] for name in link.published])
        for link in dialect.links
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_one_place_in_the_authors_layout(kind):
    config, rng = KINDS[kind], np.random.default_rng(0)
    published = {name: rng.random(shape) for name, shape in published_shapes(config).items()}
    (dialect,) = rules.dialects(config, rules.published(config)["config.json"])
    linked = [name for link in dialect.links for name in link.published]
    assert sorted(linked) == sorted(published)
    file = authors_file(config, published)
    assert len(file) == len(dialect.links)
    back = {}
    for link in dialect.links:
        parts = np.split(file[link.foreign[0]], len(link.published))
        back |= dict(zip(link.published, parts, strict=True))
    for name, tensor in published.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_names_of_the_authors_files():
    published = load_file(FIXTURES / "dinov2reg-a" / "model.safetensors")
    folder = json.loads((FIXTURES / "dinov2reg-a" / "config.json").read_text())
    file = authors_file(rules.config({"config.json": folder}, "f"), published)
    block = "encoder.layer.2.attention.attention"
    qkv = np.concatenate([published[f"{block}.{x}.weight"] for x in ("query", "key", "value")])
    np.testing.assert_array_equal(file["blocks.2.attn.qkv.weight"], qkv)
    assert file["register_tokens"].shape == (1, 4, 32)
    expected = {"cls_token", "pos_embed", "mask_token", "register_tokens", "norm.weight"}
    expected |= {"patch_embed.proj.bias", "blocks.0.attn.proj.weight", "blocks.0.mlp.fc2.bias"}
    assert expected | {"blocks.0.ls1.gamma", "blocks.0.norm2.bias"} <= file.keys()
    swiglu = KINDS["swiglu"]
    tensors = {name: np.zeros(shape) for name, shape in published_shapes(swiglu).items()}
    file = authors_file(swiglu, tensors)
    assert file["blocks.1.mlp.w12.weight"].shape == (176, 32)
    assert file["blocks.1.mlp.w3.weight"].shape == (32, 88)


@pytest.mark.parametrize("kind", [*KINDS, *RELEASED])
def test_an_authors_file_is_recognised(kind):
    config = (KINDS | RELEASED)[kind]
    (dialect,) = rules.dialects(config, rules.published(config)["config.json"])
    shapes = published_shapes(config)
    found = {}
    for link in dialect.links:
        first, *rest = (shapes[name] for name in link.published)
        found[link.foreign[0]] = (first[0] * (1 + len(rest)), *first[1:])
    said = {} if kind in RELEASED else dict(num_attention_heads=4)
    files = rules.recognise(found, said)
    assert files is not None
    assert rules.config(files, "f") == config
    for name in ("mask_token", "blocks.0.ls1.gamma"):
        assert rules.recognise({n: s for n, s in found.items() if n != name}, said) is None
