# SPDX-License-Identifier: Apache-2.0
"""CLIP's and LanguageBind's published folders: fields, names, shapes and the way back."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from apollo_jax.checkpoints.pretrained import from_pretrained, save_pretrained
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.rules import clip as clip_rules
from apollo_jax.checkpoints.rules import languagebind as languagebind_rules
from apollo_jax.checkpoints.rules import table as tables
from apollo_jax.models import clip, languagebind

FIXTURES = Path(__file__).parents[3] / "fixtures" / "encoders"
VIDEO = ("languagebind-video-a", "languagebind-video-v1-a")
NAMES = ("clip-a", "languagebind-image-a", *VIDEO)
TEXT = dict(
    vocab_size=9,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    max_position_embeddings=5,
)
RELEASED = {
    "LanguageBind_Video_V1.5_FT": languagebind.Config.video_v1_5(),
    "LanguageBind_Video_merge": languagebind.Config.video_v1(),
    "LanguageBind_Image": clip.Config.languagebind_image(),
    "clip-vit-large-patch14-336": clip.Config.large_336(),
}
SIZE: dict[str, Any] = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
FRESH = {
    "clip": clip.Config(**SIZE, image_size=16, patch_size=8, resize=20, image_mean=(0.5, 0.4, 0.3)),
    "image": clip.Config(**SIZE, image_size=16, hidden_act="gelu", resample="torch_bicubic"),
    "v1.5": languagebind.Config(**SIZE, image_size=16, num_frames=3),
    "v1": languagebind.Config(**SIZE, hidden_act="quick_gelu", clip_type="vl"),
}


@pytest.fixture
def copy(tmp_path):
    """copy("clip-a", change) -> a copy of the fixture with change(config, tensors) applied."""

    def copy(name, change=lambda config, tensors: None):
        folder = tmp_path / "folder"
        shutil.copytree(FIXTURES / name, folder, ignore=shutil.ignore_patterns("*.npz"))
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        changed = change(config, tensors)
        config, tensors = changed or (config, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return copy


def check_way_back(folder, out):
    """The tower of `folder`, after it was written to `out` as it had been."""
    tower = from_pretrained(folder)
    save_pretrained(tower, out)
    assert {f.name for f in out.iterdir()} == {f.name for f in folder.iterdir()}
    for file in folder.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    return tower


def same(a, b) -> bool:
    a, b = tables.parameters(a), tables.parameters(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def flat(config, tensors):
    """As the encoder alone is kept: no prefix, no heads, no halves in its config."""
    prefix = "vision_model."
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    return config["vision_config"], own


def with_text(config, tensors):
    """With both halves, as they are downloaded."""
    rng = np.random.default_rng(0)
    whole = dict(vision_config=config, projection_dim=20, model_type="clip")
    config = config if "vision_config" in config else whole
    shapes = clip_rules.text_shapes(**TEXT) | {
        "visual_projection.weight": (20, 32),
        "text_projection.weight": (20, 12),
        "logit_scale": (),
    }
    text: dict[str, Any] = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    text["text_model.embeddings.position_ids"] = np.arange(5)[None]
    return config | dict(text_config=TEXT), {n: np.asarray(t) for n, t in text.items()} | tensors


# ---- there and back


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_comes_back_byte_for_byte(name, copy, tmp_path):
    check_way_back(copy(name), tmp_path / "out")


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_encoder_alone_without_prefix(name, copy, tmp_path):
    tower = check_way_back(copy(name, flat), tmp_path / "out")
    whole = from_pretrained(FIXTURES / name)
    assert tower.config == whole.config
    assert same(tower, whole)


@pytest.mark.parametrize("name", NAMES)
def test_the_text_half_travels_along(name, copy, tmp_path):
    tower = check_way_back(copy(name, with_text), tmp_path / "out")
    assert same(tower, from_pretrained(FIXTURES / name))


def test_part_of_a_text_half_is_refused(copy):
    def damage(config, tensors):
        config, tensors = with_text(config, tensors)
        tensors.pop("text_model.final_layer_norm.bias")
        tensors["text_model.extra"] = np.zeros(3)
        return config, tensors

    with pytest.raises(ValueError, match="do not fit the config") as error:
        from_pretrained(copy(VIDEO[0], damage))
    assert "missing (1):\n    text_model.final_layer_norm.bias" in str(error.value)
    assert "unknown (1):\n    text_model.extra" in str(error.value)


def test_indices_stay_integers_in_another_dtype(copy, tmp_path):
    save_pretrained(from_pretrained(copy("clip-a")), tmp_path / "out", dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    ids = tensors.pop("vision_model.embeddings.position_ids")
    np.testing.assert_array_equal(ids, np.arange(17)[None])
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("kind", FRESH)
def test_a_fresh_tower_states_its_config(kind, tmp_path):
    config = FRESH[kind]
    rules = layout.RULES_BY_CONFIG[type(config)]
    files = {n: json.loads(json.dumps(f)) for n, f in rules.published(config).items()}
    assert rules.config(files, "folder") == config
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert layout.config(tmp_path) == config


@pytest.mark.parametrize("kind", ["clip", "v1.5"])
def test_a_fresh_tower_has_no_text_half(kind, build, tmp_path):
    config = FRESH[kind]
    module = layout.RULES_BY_CONFIG[type(config)].MODEL
    tower = build(lambda: module(config, rngs=nnx.Rngs(0)))
    save_pretrained(tower, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert all(name.startswith("vision_model.") for name in tensors)
    assert not tensors["vision_model.encoder.layers.1.mlp.fc1.bias"].any()
    loaded = from_pretrained(tmp_path / "out")
    assert loaded.config == config
    assert same(loaded, tower)


@pytest.mark.parametrize("name", RELEASED)
def test_released_towers_to_the_last_name(name):
    config = RELEASED[name]
    rules = layout.RULES_BY_CONFIG[type(config)]
    leaves = tables.parameters(nnx.eval_shape(lambda: rules.MODEL(config, rngs=nnx.Rngs(0))))
    said = rules.published(config)["config.json"] | dict(projection_dim=768)
    said |= dict(text_config=dict(hidden_size=768)) if "vision_config" in said else {}
    slots = tables.slots(rules.table(config, said), leaves)
    shapes = {name: slot.shape for name, slot in slots.items()}
    folded = json.loads((FIXTURES / "clip_shapes.json").read_text())[name]
    expected = {
        template.format(i=i): tuple(shape)
        for template, shape in folded.items()
        for i in range(24 if "{i}" in template else 1)
    }
    beyond = {name: shapes.pop(name) for name in [*shapes] if name not in expected}
    assert shapes == expected
    heads = {"visual_projection.weight", "text_projection.weight", "logit_scale"}
    buffer = {"vision_model.embeddings.position_ids"}
    assert all(n.startswith("text_model.") or n in heads | buffer for n in beyond)


# ---- fields


def test_published_class_defaults():
    tower = clip_rules.config({"config.json": {}}, "f")
    assert (tower.hidden_size, tower.patch_size, tower.hidden_act) == (768, 32, "quick_gelu")
    said = {"model_type": "LanguageBindVideo", "vision_config": {"add_time_attn": True}}
    tower = languagebind_rules.config({"config.json": said}, "f")
    assert isinstance(tower, languagebind.Config)
    assert (tower.num_frames, tower.clip_type, tower.hidden_act) == (8, "vl", "quick_gelu")


def test_a_vision_config_dict_overrules():
    def change(config, tensors):
        vision, names = config["vision_config"], ("add_time_attn", "clip_type", "num_frames")
        config["vision_config_dict"] = {name: vision.pop(name) for name in names}
        vision |= dict(add_time_attn=False, num_frames=1)
        config["text_config_dict"] = dict(hidden_size=12)
        config["text_config"] = dict(hidden_size=99)
        return config, tensors

    folder = FIXTURES / VIDEO[0]
    config = json.loads((folder / "config.json").read_text())
    expected = languagebind_rules.config({"config.json": config}, "f")
    changed, _ = change(config, {})
    assert languagebind_rules.config({"config.json": changed}, "f") == expected
    assert isinstance(expected, languagebind.Config)
    groups = languagebind_rules.table(expected, changed).unused
    shapes = {name: shape for group in groups for name, shape in group.shapes.items()}
    assert shapes["text_projection.weight"] == (20, 12)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(size=336, crop_size=336),
        dict(size=dict(shortest_edge=336), crop_size=dict(height=336, width=336)),
        dict(size=dict(height=336, width=336)),
        {},
    ],
)
def test_every_spelling_of_a_square(sizes):
    files = {
        "config.json": dict(image_size=[336, 336], patch_size=14),
        "preprocessor_config.json": sizes | dict(image_mean=[0.5, 0.5, 0.5]),
    }
    tower = clip_rules.config(files, "f")
    assert (tower.image_size, tower.resize, tower.image_mean) == (336, 0, (0.5, 0.5, 0.5))
    assert tower.frame_spec.side == 336
    larger = files | {"preprocessor_config.json": dict(size=384, crop_size=336)}
    spec = clip_rules.config(larger, "f").frame_spec
    assert (spec.side, spec.size, spec.resample) == (384, 336, "pil_bicubic")


@pytest.mark.parametrize(
    ("config", "preprocessor", "message"),
    [
        (dict(hidden_act="relu"), {}, "f/config.json: hidden_act is 'relu', supported are quick"),
        (dict(hiden_size=3), {}, r"f/config.json: hiden_size is unknown \(did you mean hidden_s"),
        (dict(image_size=[224, 200]), {}, r"image_size is \[224, 200\], expected a int"),
        (dict(num_channels=1), {}, "num_channels is 1, only 3 is supported"),
        ({}, dict(crop_size=200), "preprocessor_config.json: crop_size is 200, only 224"),
        ({}, dict(size=dict(height=2, width=3)), "size is {.*}, expected a int"),
        ({}, dict(resample=2), "resample is 2, only 3 is supported"),
        ({}, dict(do_center_crop=False), "do_center_crop is False, only True is supported"),
    ],
)
def test_what_does_not_fit_is_named(config, preprocessor, message):
    files = {"config.json": config, "preprocessor_config.json": preprocessor}
    with pytest.raises(ValueError, match=message):
        clip_rules.config(files, "f")


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (dict(clip_type="xl"), "f/config.json: clip_type is 'xl', supported are vl_new, vl"),
        (dict(tube_size=2), "f/config.json: tube_size is 2, only 1 is supported"),
        (dict(add_time_attn=False), "f/config.json: add_time_attn is False, only True"),
        (dict(num_frame=4), r"num_frame is unknown \(did you mean num_frames"),
    ],
)
def test_videos_that_do_not_fit_are_named(vision, message):
    said = dict(model_type="LanguageBindVideo", vision_config=dict(add_time_attn=True) | vision)
    with pytest.raises(ValueError, match=message):
        languagebind_rules.config({"config.json": said}, "f")


def test_version_1_5_is_told_by_its_tube():
    said = dict(model_type="clip_vision_model", add_time_attn=True, tube_size=1)
    tower = languagebind_rules.config({"config.json": said}, "f")
    assert isinstance(tower, languagebind.Config)
    assert tower.clip_type == "vl_new"


# ---- files without a config.json


@pytest.mark.parametrize("change", [with_text, flat, lambda *both: both])
@pytest.mark.parametrize("name", VIDEO)
def test_a_video_file_is_recognised(name, change, copy):
    folder = copy(name, change)
    tensors = load_file(folder / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    expected = layout.config(folder)
    assert isinstance(expected, languagebind.Config)
    files = languagebind_rules.recognise(
        shapes, dict(num_attention_heads=expected.num_attention_heads)
    )
    assert files is not None
    assert languagebind_rules.config(files, "f") == expected
    (folder / "config.json").write_text(json.dumps(files["config.json"]))
    assert same(from_pretrained(folder), from_pretrained(FIXTURES / name))


@pytest.mark.parametrize("name", [name for name in RELEASED if "Video" in name])
def test_the_released_video_files_are_recognised(name):
    folded = json.loads((FIXTURES / "clip_shapes.json").read_text())[name]
    shapes = {n.format(i=i): tuple(s) for n, s in folded.items() for i in range(24)}
    files = languagebind_rules.recognise(shapes, {})
    assert files is not None
    assert languagebind_rules.config(files, "f") == RELEASED[name]
    assert files["config.json"]["projection_dim"] == 768


@pytest.mark.parametrize("name", NAMES[:2])
def test_images_are_not_taken_for_videos(name):
    tensors = load_file(FIXTURES / name / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert languagebind_rules.recognise(shapes, {}) is None
