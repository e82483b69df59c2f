# SPDX-License-Identifier: Apache-2.0
"""Folders and authors' files of VideoMAE and both V-JEPAs: names, shapes and the way back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from apollo_jax.checkpoints.pretrained import from_pretrained, save_pretrained
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.rules import table as tables
from apollo_jax.checkpoints.rules import videomae, vjepa, vjepa2
from apollo_jax.models import apollo, connectors

FIXTURES = Path(__file__).parents[3] / "fixtures" / "encoders"
RULES: dict[str, Any] = {"videomae-a": videomae, "vjepa-a": vjepa, "vjepa2-a": vjepa2}
PRETRAINING = dict(  # as in the released config.json
    architectures=["VideoMAEForPreTraining"],
    use_mean_pooling=False,
    decoder_hidden_size=512,
    decoder_intermediate_size=2048,
    decoder_num_attention_heads=8,
    decoder_num_hidden_layers=12,
)
RELEASED: dict[str, tuple[Any, Any, dict]] = {
    "videomae-large": (videomae, videomae.Config.large(), PRETRAINING),
    "vjepa vitl16": (vjepa, vjepa.Config.vitl16(), {}),
    "vjepa vith16": (vjepa, vjepa.Config.vith16(), {}),
    "vjepa vith16-384": (vjepa, vjepa.Config.vith16_384(), {}),
}


def shapes(rules: Any, config: Any, published: dict | None = None) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of a tower, nothing allocated."""
    leaves = tables.parameters(nnx.eval_shape(lambda: rules.MODEL(config, rngs=nnx.Rngs(0))))
    said = rules.published(config)["config.json"] | (published or {})
    return {n: s.shape for n, s in tables.slots(rules.table(config, said), leaves).items()}


def released(name: str) -> dict[str, tuple[int, ...]]:
    """Released name -> shape, from the list with layers folded to {i}."""
    _, config, published = RELEASED[name]
    out = {}
    for template, shape in json.loads((FIXTURES / "video_shapes.json").read_text())[name].items():
        depth = published.get("decoder_num_hidden_layers") if "decoder" in template else 0
        layers = range(depth or config.built_layers + (name == "videomae-large"))
        out |= {template.format(i=i): tuple(shape) for i in (layers if "{i}" in template else [0])}
    return out


def config_json(name: str) -> dict:
    return json.loads((FIXTURES / name / "config.json").read_text())


@pytest.mark.parametrize("name", RELEASED)
def test_released_towers_to_the_last_name(name):
    rules, config, published = RELEASED[name]
    ours = shapes(rules, config, published)
    if rules is vjepa:
        ours = {f"module.backbone.{n}": shape for n, shape in ours.items()}
    assert ours == released(name)


def test_released_vjepa2_in_size():
    """300M, 600M and 1B in the paper; heads as in the released configs."""
    sizes = (vjepa2.Config.vitl_256(), vjepa2.Config.vith_256(), vjepa2.Config.vitg_384())
    for config, millions in zip(sizes, (300, 600, 1000), strict=True):
        names = shapes(vjepa2, config)
        total = sum(np.prod(s) for n, s in names.items() if n.startswith("encoder."))
        assert round(total / 1e8) * 100 == millions
        assert config.hidden_size % config.num_attention_heads == 0


@pytest.mark.parametrize("name", RULES)
def test_a_folder_survives_to_the_last_bit(name, tmp_path):
    save_pretrained(from_pretrained(FIXTURES / name), tmp_path / "out")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (FIXTURES / name / file).read_bytes()


FRESH: list[tuple[Any, Any]] = [
    (videomae, videomae.Config.base()),
    (videomae, videomae.Config(image_size=32, num_frames=4, qkv_bias=False)),
    (vjepa, vjepa.Config.vitl16()),
    (vjepa, vjepa.Config(embed_dim=32, num_heads=2, uniform_power=False)),
    (vjepa2, vjepa2.Config.vitg_256()),
    (vjepa2, vjepa2.Config(crop_size=32, image_mean=(0.1, 0.2, 0.3))),
]


@pytest.mark.parametrize(("rules", "config"), FRESH)
def test_a_fresh_tower_states_its_config(rules, config):
    files = {n: json.loads(json.dumps(f)) for n, f in rules.published(config).items()}
    assert rules.config(files, "folder") == config
    assert rules.config({"config.json": files["config.json"]}, "folder").grid == config.grid
    assert layout.PARTS[files["config.json"]["model_type"]] is rules


def test_published_class_defaults():
    assert videomae.config({"config.json": {}}, "f") == videomae.Config.base()
    assert videomae.config({"config.json": dict(qv_bias=False)}, "f").qkv_bias is False
    assert vjepa2.config({"config.json": {}}, "f") == vjepa2.Config.vitl_256()
    # Apollo's own file: a ViT's leftovers, and a name that stands for the sizes.
    released = dict(model_type="vit", hidden_size=768, image_size=224, num_attention_heads=12)
    released |= dict(crop_size=384, num_frames=16, model_name="vit_huge", uniform_power=True)
    assert vjepa.config({"config.json": released}, "f") == vjepa.Config.vith16_384()
    large = vjepa.config({"config.json": released | dict(model_name="vit_large")}, "f")
    assert (large.embed_dim, large.depth, large.crop_size) == (1024, 24, 384)
    giant = vjepa.config({"config.json": released | dict(model_name="vit_giant")}, "f")
    assert (giant.num_heads, giant.mlp_dim) == (16, 6144)


@pytest.mark.parametrize(
    ("rules", "files", "message"),
    [
        (videomae, dict(config=dict(hidden_act="relu")), "f/config.json: hidden_act is 'relu'"),
        (videomae, dict(config=dict(tublet_size=2)), r"did you mean tubelet_size"),
        (videomae, dict(config=dict(image_size=[224, 224])), "image_size is .224, 224., expected"),
        (vjepa, dict(config=dict(hidden_size=768)), "f/config.json: a vit is a V-JEPA only with"),
        (vjepa, dict(config=dict(crop_size=24, out_layers=[1])), r"out_layers is \[1\], only None"),
        (vjepa2, dict(config=dict(in_chans=4)), "in_chans is 4, only 3"),
        (
            vjepa2,
            dict(video_preprocessor_config=dict(resample=3)),
            "f/video_preprocessor_config.json: resample is 3, only 2",
        ),
        (vjepa2, dict(video_preprocessor_config=dict(crop_size=dict(height=9))), "crop_size is"),
    ],
)
def test_what_does_not_fit_is_named(rules, files, message):
    with pytest.raises(ValueError, match=message):
        rules.config({"config.json": {}} | {f"{n}.json": f for n, f in files.items()}, "f")


def test_heads_of_videomae_are_known():
    config = videomae.Config(num_hidden_layers=2)
    alone = shapes(videomae, config)
    assert not any(name.startswith(("videomae.", "decoder.")) for name in alone)
    normed = shapes(videomae, config, dict(use_mean_pooling=False))
    assert normed.keys() - alone.keys() == {"layernorm.weight", "layernorm.bias"}
    said = dict(architectures=["VideoMAEForVideoClassification"], id2label={"0": "a", "1": "b"})
    tuned = shapes(videomae, config, said | dict(id2label={str(i): "" for i in range(7)}))
    assert tuned["classifier.weight"] == (7, 1024)
    assert tuned["fc_norm.bias"] == (1024,)
    assert {n.removeprefix("videomae.") for n in tuned} > alone.keys()
    assert "fc_norm.bias" not in shapes(videomae, config, said | dict(use_mean_pooling=False))


# ---- a whole Apollo


@pytest.mark.parametrize(("beside", "layer"), [([], -2), (["siglip"], -3)])
def test_towers_with_one_feature_stand_beside_any_layer(beside, layer):
    siglip = replace(apollo.Config.debug().towers["siglip"], feature_layer=-3)
    towers = {"vjepa": vjepa.Config()} | dict.fromkeys(beside, siglip)
    connector = connectors.Config(
        vision_hidden_size=sum(t.hidden_size for t in towers.values()),
        token_input_shape=(8, 24, 24),
        text_hidden_size=2048,
    )
    config = apollo.Config(towers=towers, connector=connector, frames_per_clip=16)
    root = layout.published(config, {layout.LLM: {}, layout.CONNECTOR: {}}, "float32")
    assert root["config.json"]["mm_vision_select_layer"] == layer


def test_an_apollo_of_vjepas_survives(build, tmp_path):
    tower = from_pretrained(FIXTURES / "vjepa-a")
    debug = apollo.Config.debug(vocab_size=40)
    connector = replace(debug.connector, vision_hidden_size=36, token_input_shape=(2, 3, 3))
    config = replace(debug, towers={"vjepa": tower.config}, connector=connector)
    model = build(lambda: apollo.Apollo(config, rngs=nnx.Rngs(0)))
    model.vision_tower.towers = nnx.List([tower])
    save_pretrained(model, tmp_path / "out")
    back = from_pretrained(tmp_path / "out")
    assert back.config == config
    np.testing.assert_array_equal(back.vision_tower.towers[0].positions, tower.positions)


# ---- the authors' files


def foreign_file(dialect, published: dict) -> dict[str, np.ndarray]:
    """Published tensors as a dialect has them."""
    return {
        link.foreign[0]: np.concatenate([published[name] for name in link.published])
        for link in dialect.links
    }


def there_and_back(dialect, published: dict) -> dict[str, np.ndarray]:
    """The file, once every tensor has come back from it equal."""
    file = foreign_file(dialect, published)
    assert len(file) == len(dialect.links)
    back = {}
    for link in dialect.links:
        parts = np.split(file[link.foreign[0]], len(link.published))
        back |= dict(zip(link.published, parts, strict=True))
    assert back.keys() == published.keys()
    for name, tensor in published.items():
        np.testing.assert_array_equal(back[name], tensor)
    return file


def test_videomae_in_the_authors_layout():
    published = load_file(FIXTURES / "videomae-a" / "model.safetensors")
    said = config_json("videomae-a")
    config = videomae.config({"config.json": said}, "f")
    (dialect,) = videomae.dialects(config, said)
    file = there_and_back(dialect, published)
    attention = "videomae.encoder.layer.2.attention.attention"
    qkv = [published[f"{attention}.{x}.weight"] for x in ("query", "key", "value")]
    np.testing.assert_array_equal(file["encoder.blocks.2.attn.qkv.weight"], np.concatenate(qkv))
    expected = {"encoder.patch_embed.proj.weight", "encoder.blocks.0.attn.q_bias", "mask_token"}
    expected |= {"encoder.blocks.1.mlp.fc2.bias", "encoder.norm.weight", "decoder.head.bias"}
    expected |= {"decoder.blocks.0.attn.qkv.weight", "decoder.blocks.0.norm2.weight"}
    assert expected | {"encoder_to_decoder.weight", "decoder.norm.bias"} <= file.keys()

    found = {name: tensor.shape for name, tensor in file.items()}
    heads = dict(num_attention_heads=4, decoder_num_attention_heads=2)
    files = videomae.recognise(found, heads | dict(image_size=24, num_frames=4))
    assert files is not None
    assert videomae.config(files, "f") == config
    for key in ("architectures", "use_mean_pooling", "decoder_intermediate_size"):
        assert files["config.json"][key] == said[key]
    assert files["config.json"]["decoder_num_hidden_layers"] == 1
    assert files["preprocessor_config.json"]["size"] == dict(shortest_edge=24)
    assert videomae.dialects(config, files["config.json"]) == (dialect,)


def test_a_released_and_a_tuned_videomae_are_recognised():
    _, config, published = RELEASED["videomae-large"]
    (dialect,) = videomae.dialects(config, published)
    names = released("videomae-large")
    found = {}
    for link in dialect.links:
        rows, *rest = names[link.published[0]]
        found[link.foreign[0]] = (rows * len(link.published), *rest)
    files = videomae.recognise(found, {})
    assert files is not None
    assert videomae.config(files, "f") == config
    assert published.items() <= files["config.json"].items()

    tuned = {n.removeprefix("encoder."): s for n, s in found.items() if n.startswith("encoder.")}
    del tuned["norm.weight"], tuned["norm.bias"]
    tuned |= {"fc_norm.weight": (1024,), "fc_norm.bias": (1024,), "head.weight": (400, 1024)}
    files = videomae.recognise(tuned, {})
    assert files is not None
    (dialect,) = videomae.dialects(config, files["config.json"])
    names = {n.removeprefix(dialect.prefix) for link in dialect.links for n in link.foreign}
    assert tuned.keys() - names == {"fc_norm.weight", "fc_norm.bias", "head.weight"}
    assert not names - tuned.keys()


def test_vjepa_in_both_other_layouts():
    prefixed = load_file(FIXTURES / "vjepa-a" / "model.safetensors")
    published = {n.removeprefix("module.backbone."): t for n, t in prefixed.items()}
    said = config_json("vjepa-a")
    config = vjepa.config({"config.json": said}, "f")
    authors, apollos = (there_and_back(d, published) for d in vjepa.dialects(config, said))
    assert authors.keys() == prefixed.keys()
    assert apollos.keys() == {f"vision_tower.{name}" for name in published}
    for file in (authors, apollos, published):
        found = {name: tensor.shape for name, tensor in file.items()}
        files = vjepa.recognise(found, dict(num_heads=3))
        assert files is not None
        assert vjepa.config(files, "f") == config


@pytest.mark.parametrize("name", [n for n in RELEASED if n.startswith("vjepa")])
def test_released_vjepas_are_recognised(name):
    files = vjepa.recognise(released(name), {})
    assert files is not None
    assert vjepa.config(files, "f") == RELEASED[name][1]
    assert files["config.json"]["model_name"] in ("vit_large", "vit_huge")


def test_what_a_vjepa_file_cannot_say_can_be_stated():
    giant = replace(vjepa.Config(), embed_dim=1408, depth=1, mlp_ratio=48 / 11, crop_size=224)
    found = shapes(vjepa, giant)
    files = vjepa.recognise(found, {})
    assert files is not None
    assert vjepa.config(files, "f") == giant
    # 1568 tokens are also 32 steps of 7 x 7
    for said in (dict(num_frames=64), dict(crop_size=112)):
        files = vjepa.recognise(found, said)
        assert files is not None
        assert vjepa.config(files, "f") == replace(giant, num_frames=64, crop_size=112)


def test_a_ratio_that_would_round_down():
    assert int(22 * (30 / 22)) == 29
    config = vjepa.Config(embed_dim=22, depth=1, num_heads=1, mlp_ratio=30.5 / 22)
    files = vjepa.recognise(shapes(vjepa, config), {})
    assert files is not None
    assert vjepa.config(files, "f").mlp_dim == 30


def test_other_models_are_not_taken_for_these():
    names = released("vjepa vitl16")
    assert videomae.recognise(names, {}) is None
    assert vjepa.recognise({n: s for n, s in names.items() if "qkv.bias" not in n}, {}) is None
    assert vjepa.recognise({n: s for n, s in names.items() if "pos_embed" not in n}, {}) is None
    flat = {n: s[:3] + s[3:4] if len(s) == 5 else s for n, s in names.items()}  # of images
    assert vjepa.recognise(flat, {}) is None
    assert videomae.recognise({}, {}) is None
