# SPDX-License-Identifier: Apache-2.0
"""Rule tables: the released sizes, the way there and back, and every kind of damage."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.rules import internvideo2, qwen2, siglip
from apollo_jax.checkpoints.rules import table as tables
from apollo_jax.checkpoints.rules.fields import take
from apollo_jax.checkpoints.rules.table import Rule, Table, Unused
from apollo_jax.checkpoints.translate import Arrays, Renamed, to_ours, to_published
from apollo_jax.models import apollo

SHAPES = Path(__file__).parents[2] / "fixtures" / "param_shapes.json.gz"
SIZES = {
    "1.5B": apollo.Config.apollo_1p5b(),
    "3B": apollo.Config.apollo_3b(),
    "7B": apollo.Config.apollo_7b(),
}


def published_shapes(config) -> dict:
    """Name -> shape of a fresh part at its published size, nothing allocated."""
    rules = layout.RULES_BY_CONFIG[type(config)]
    leaves = tables.parameters(nnx.eval_shape(lambda: rules.MODEL(config, rngs=nnx.Rngs(0))))
    table = rules.table(config, rules.published(config)["config.json"])
    shapes = {name: list(slot.shape) for name, slot in tables.slots(table, leaves).items()}
    return shapes | {copy: shapes[of] for copy, of in table.copies.items()}


@pytest.mark.parametrize("size", SIZES)
def test_released_decoders_and_connectors_to_the_last_name(size):
    expected = json.loads(gzip.decompress(SHAPES.read_bytes()))
    config = SIZES[size]
    assert published_shapes(config.llm) == expected[f"llm {size}"]
    connector = expected[f"mm_connector (released config, 128 latents) {size}"]
    assert published_shapes(config.connector) == connector


@pytest.mark.parametrize("tower", SIZES["3B"].towers)
def test_released_towers_to_the_last_name(tower):
    expected = json.loads(gzip.decompress(SHAPES.read_bytes()))
    assert published_shapes(SIZES["3B"].towers[tower]) == expected[f"vision_tower/{tower}"]


@pytest.mark.parametrize("part", ["llm", "connector", *apollo.Config.debug().towers])
def test_a_fresh_part_states_its_config(part):
    debug = apollo.Config.debug()
    config = {"llm": debug.llm, "connector": debug.connector, **debug.towers}[part]
    rules = layout.RULES_BY_CONFIG[type(config)]
    files = {n: json.loads(json.dumps(f)) for n, f in rules.published(config).items()}
    assert rules.config(files, "folder") == config


# ---- random tables

SHAPE = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)


@st.composite
def random_tables(draw):
    """A table with parameters that fit it: stacked or not, every transform, unused tensors."""
    depth, rules, leaves = draw(st.integers(1, 4)), [], {}
    built = draw(st.integers(1, depth))
    for i in range(draw(st.integers(1, 5))):
        transform, shape = draw(
            st.sampled_from(
                [
                    (tables.SAME, draw(SHAPE)),
                    (tables.TRANSPOSE, (2, 3)),
                    (tables.squeeze(2), draw(SHAPE)),
                    (tables.conv(2, 3), (6 * 2, 5)),
                    (tables.conv(1, 2, 2), (4 * 3, 2)),
                ]
            )
        )
        stacked, alias = draw(st.booleans()), draw(st.booleans())
        name = f"block.{{i}}.part{i}.weight" if stacked else f"part{i}.weight"
        rules.append(Rule(name, f"p{i}", transform, name.replace("weight", "gamma") * alias))
        leaves[f"p{i}"] = np.random.default_rng(i).random((built, *shape) if stacked else shape)
    unused = Unused("no reason", {f"unused{i}": (i,) for i in range(draw(st.integers(0, 2)))})
    copies = {"copy": rules[0].name} if "{i}" not in rules[0].name and draw(st.booleans()) else {}
    return Table(tuple(rules), depth, (unused,), copies), leaves


def publish(table, leaves):
    slots = tables.slots(table, leaves)
    published = to_published(Arrays(leaves), slots)
    return slots, {
        name: published.read(name) if slot.path else np.zeros(slot.shape)
        for name, slot in slots.items()
    }


@settings(max_examples=60, deadline=None)
@given(random_tables(), st.data())
def test_a_random_tree_survives_and_damage_does_not(drawn, data):
    table, leaves = drawn
    slots, tensors = publish(table, leaves)
    for name, slot in slots.items():
        assert tensors[name].shape == slot.shape
        if slot.alias and data.draw(st.booleans()):
            tensors[slot.alias] = tensors.pop(name)
    tensors |= {copy: tensors[of] for copy, of in table.copies.items() if of in tensors}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    names = tables.spellings(table, slots, shapes, "folder")
    back = to_ours(Renamed(Arrays(tensors), names), slots)
    assert back.stored.keys() == leaves.keys()
    for path, leaf in leaves.items():
        assert back.stored[path].shape == leaf.shape
        np.testing.assert_array_equal(back.read(path), leaf)

    victim = data.draw(
        st.sampled_from([name for name in names.values() if name not in table.copies])
    )
    damage = data.draw(st.sampled_from(["dropped", "renamed", "mis-shaped", "doubled"]))
    if damage == "mis-shaped":
        shapes[victim] = (*shapes[victim], 2)
    elif damage == "doubled":
        shapes[f"{victim}.again"] = shapes[victim]
    else:
        shape = shapes.pop(victim)
        shapes |= {f"{victim}_": shape} if damage == "renamed" else {}
    with pytest.raises(ValueError, match="folder: the tensors do not fit") as error:
        tables.spellings(table, slots, shapes, "folder")
    assert victim.replace("gamma", "weight") in str(error.value).replace("gamma", "weight")


def test_all_damage_is_reported_at_once():
    table = Table((Rule("norm.weight", "norm"), Rule("head.weight", "head"), Rule("x", "x")))
    leaves = {name: np.zeros(3) for name in ("norm", "head", "x")}
    found = {"norm.wieght": (3,), "head.weight": (4,), "x": (3,)}
    with pytest.raises(ValueError, match="do not fit") as error:
        tables.spellings(table, tables.slots(table, leaves), found, "folder")
    message = str(error.value)
    assert "unknown (1):\n    norm.wieght (did you mean norm.weight?)" in message
    assert "missing (1):\n    norm.weight" in message
    assert "mis-shaped (1):\n    head.weight (4,), the config gives (3,)" in message


def test_long_lists_are_cut():
    table = Table((Rule("layers.{i}.weight", "w"),), depth=100)
    slots = tables.slots(table, {"w": np.zeros((100, 1))})
    with pytest.raises(ValueError, match=r"missing \(100\)(.|\n)*\.\.\. and 70 more"):
        tables.spellings(table, slots, {}, "folder")


def test_both_spellings_at_once_are_refused():
    table = Table((Rule("ls.gamma", "ls", alias="ls.weight"),))
    slots = tables.slots(table, {"ls": np.zeros(3)})
    with pytest.raises(ValueError, match=r"unknown \(1\):\n    ls.weight"):
        tables.spellings(table, slots, {"ls.gamma": (3,), "ls.weight": (3,)}, "folder")


def test_layers_that_are_not_built_are_unused():
    config = dataclasses.replace(apollo.Config.debug().towers["siglip"], feature_layer=-3)
    rules = layout.RULES_BY_CONFIG[type(config)]
    leaves = tables.parameters(nnx.eval_shape(lambda: rules.MODEL(config, rngs=nnx.Rngs(0))))
    slots = tables.slots(rules.table(config, {}), leaves)
    paths = [slots[f"vision_model.encoder.layers.{i}.mlp.fc1.bias"].path for i in range(3)]
    assert paths == ["layers.fc1.bias", "", ""]


# ---- fields of config.json

KNOWN = dict(hidden_size=4, rate=0.5, tied=False, grid=(1, 2))


def test_absent_fields_take_the_published_default_and_others_are_ignored():
    assert take(dict(hidden_size=8, rate=1, future=3), KNOWN, {}, "f") == dict(
        hidden_size=8, rate=1.0, tied=False, grid=(1, 2)
    )


@pytest.mark.parametrize(
    ("published", "message"),
    [
        (dict(hiden_size=8), "hiden_size is unknown .did you mean hidden_size"),
        (dict(hidden_size="8"), "hidden_size is '8', expected a int"),
        (dict(hidden_size=True), "hidden_size is True, expected a int"),
        (dict(tied=1), "tied is 1, expected a bool"),
        (dict(grid=[1, 2, 3]), r"grid is \[1, 2, 3\], expected a tuple"),
        (dict(hidden_act="relu"), "hidden_act is 'relu', only 'silu' is supported"),
        (dict(hidden_size=None, tied=None), "hidden_size is None.*; tied is None"),
    ],
)
def test_wrong_fields_are_refused_by_name(published, message):
    with pytest.raises(ValueError, match=f"folder/config.json: {message}"):
        take(published, KNOWN, dict(hidden_act="silu"), "folder/config.json")


def test_published_class_defaults():
    assert siglip.config({"config.json": {}}, "f").hidden_size == 768
    assert qwen2.config({"config.json": {}}, "f").num_hidden_layers == 32
    tower = internvideo2.config({"config.json": {}}, "f")
    assert (tower.depth, tower.mlp_dim, tower.init_values) == (40, 6144, 1e-5)


# As in the released folders, with the generic leftovers that say something else.
RELEASED_INTERNVIDEO2 = dict(
    model_type="internvideo2",
    d_model=1408,
    num_heads=16,
    img_size=224,
    patch_size=14,
    num_frames=4,
    tubelet_size=1,
    attn_pool_num_heads=16,
    clip_embed_dim=768,
    clip_teacher_embed_dim=3200,
    clip_teacher_final_dim=768,
    clip_return_layer=6,
    clip_student_return_interval=1,
    clip_norm_type="l2",
    sep_image_video_pos_embed=True,
    qkv_bias=False,
    use_checkpoint=True,
    checkpoint_num=40,
    use_flash_attn=False,
    use_fused_mlp=False,
    use_fused_rmsnorm=False,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    image_size=224,
    layer_norm_eps=1e-12,
    initializer_range=0.02,
)


def test_released_internvideo2_config_and_its_leftovers():
    tower = internvideo2.config({"config.json": RELEASED_INTERNVIDEO2}, "f")
    assert tower == internvideo2.Config.stage2_1b()


def test_rope_theta_of_newer_configs():
    rope = dict(rope_theta=5e5, rope_type="default")
    assert qwen2.config({"config.json": dict(rope_parameters=rope)}, "f").rope_theta == 5e5
    with pytest.raises(ValueError, match="rope_type is 'yarn'"):
        qwen2.config({"config.json": dict(rope_parameters=rope | dict(rope_type="yarn"))}, "f")
