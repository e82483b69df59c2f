# SPDX-License-Identifier: Apache-2.0
"""InternVideo2's distilled and fine-tuned files: what their tensors tell, to the last name."""

import json
from pathlib import Path

import pytest
from flax import nnx

from apollo_jax.checkpoints.rules import internvideo2 as rules
from apollo_jax.checkpoints.rules import table as tables
from apollo_jax.models.internvideo2 import Config, InternVideo2

FIXTURES = Path(__file__).parents[3] / "fixtures" / "encoders"
SIZES = {
    "small": Config.distilled_small(),
    "base": Config.distilled_base(),
    "large": Config.distilled_large(),
    "base k400": Config.distilled_base(),
}


def released(name: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the authors' model at its released size."""
    folded = json.loads((FIXTURES / "internvideo2_shapes.json").read_text())[name]
    shapes = {}
    for template, shape in folded.items():
        layers = range(SIZES[name].depth) if "{i}" in template else [0]
        shapes |= {template.format(i=i): tuple(shape) for i in layers}
    return shapes


def expected(config: Config, json: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape by our rules."""
    abstract = nnx.eval_shape(lambda: InternVideo2(config, rngs=nnx.Rngs(0)))
    slots = tables.slots(rules.table(config, json), tables.parameters(abstract))
    return {name: slot.shape for name, slot in slots.items()}


@pytest.mark.parametrize("name", SIZES)
def test_released_towers_to_the_last_name(name):
    shapes = released(name)
    files = rules.recognise(shapes, {})
    assert files is not None
    files = json.loads(json.dumps(files))
    config = rules.config(files, "f")
    assert config == SIZES[name]
    assert expected(config, files["config.json"]) == shapes


def test_a_classifier_is_unused_for_a_reason():
    files = rules.recognise(released("base k400"), {})
    assert files is not None
    assert files["config.json"]["num_classes"] == 400
    groups = rules.table(SIZES["base k400"], files["config.json"]).unused
    reasons = {name: group.reason for group in groups for name in group.shapes}
    assert reasons["head.weight"] == reasons["fc_norm.bias"] == "Apollo does not classify"


def test_the_stage_2_tower_is_recognised_too():
    json = rules.published(Config.stage2_1b())["config.json"]
    assert "clip_student_decoder" not in json  # as published
    shapes = expected(Config.stage2_1b(), json)
    files = rules.recognise(shapes, {})
    assert files is not None
    assert rules.config(files, "f") == Config.stage2_1b()
    assert expected(Config.stage2_1b(), files["config.json"]) == shapes


def test_what_no_shape_tells_must_be_said():
    shapes = expected(
        Config(d_model=48, depth=2, num_heads=3, img_size=28, mlp_ratio=29 / 11),
        rules.published(Config(d_model=48, depth=2, num_heads=3))["config.json"],
    )
    with pytest.raises(ValueError, match="no released size is 48 wide; say its num_heads"):
        rules.recognise(shapes, {})
    files = rules.recognise(shapes, dict(num_heads=3, img_size=28))
    assert files is not None
    config = rules.config(files, "f")
    assert (config.num_heads, config.num_frames, config.mlp_dim) == (3, 4, int(48 * 29 / 11))
    assert rules.recognise({"patch_embed.proj.weight": (4, 3, 1, 2, 2)}, {}) is None


def test_unknown_decoders_are_refused():
    with pytest.raises(ValueError, match="clip_student_decoder 'Conv'; known: Linear_Decoder"):
        rules.table(Config(), dict(clip_student_decoder="Conv"))


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed"])
def test_a_missing_size_is_named(name):
    shapes = released("small")
    del shapes[name]
    with pytest.raises(ValueError, match=f"^{name} is missing"):
        rules.recognise(shapes, {})
