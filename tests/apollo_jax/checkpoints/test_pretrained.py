# SPDX-License-Identifier: Apache-2.0
"""from_pretrained and save_pretrained: bit for bit there and back, and every refusal."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import apollo_jax
from apollo_jax.checkpoints import manager
from apollo_jax.checkpoints.rules.table import parameters
from apollo_jax.config import Experiment, TrainConfig
from apollo_jax.models import apollo, qwen2
from apollo_jax.training.state import TrainState, flatten
from data_pipeline.loader import DataConfig
from data_pipeline.tokenizer import Tokenizer

SIGLIP = "vision_tower/siglip-so400m-patch14-384"
INTERNVIDEO2 = "vision_tower/internvideo2"


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the official fixture's folder, to be changed."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny / "checkpoint", folder)
    return folder


@pytest.fixture
def edit(copy):
    """edit("llm", f) rewrites the tensors there, edit("llm/config.json", f) a JSON file."""

    def edit(name, change):
        path = copy / name
        if path.is_dir():
            tensors = load_file(path / "model.safetensors")
            save_file(change(tensors) or tensors, path / "model.safetensors", {"format": "pt"})
        else:
            content = json.loads(path.read_text())
            path.write_text(json.dumps(change(content) or content))

    return edit


@pytest.fixture
def other(build):
    """An Apollo of another kind: two-layer projector, reversed towers, own names, untied head."""
    debug = apollo.Config.debug(vocab_size=40)
    config = dataclasses.replace(
        debug,
        towers={"video": debug.towers["internvideo2"], "image": debug.towers["siglip"]},
        llm=dataclasses.replace(debug.llm, tie_word_embeddings=False),
        clip_duration=1.5,
    )
    return build(lambda: apollo.Apollo(config, rngs=nnx.Rngs(0)))


class BrokenTokenizer:
    pad_id, eos_id = 1, 2

    def save(self, path):
        raise OSError("disk full")


class SomeTokenizer(BrokenTokenizer):
    def save(self, path):
        path.mkdir(exist_ok=True)
        (path / "tokenizer.json").write_text("{}")


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def same_parameters(a, b):
    a, b = parameters(a), parameters(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# ---- there and back


def test_the_official_folder_comes_back_byte_for_byte(tiny, model, tmp_path):
    apollo_jax.save_pretrained(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tiny / "checkpoint")


def test_another_size_order_and_sharding_comes_back(other, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    apollo_jax.save_pretrained(other, first, max_shard_size="300KB")
    index = json.loads((first / "llm" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert "lm_head.weight" in index["weight_map"]
    connector = (first / "mm_connector" / "model.safetensors.index.json").read_text()
    assert "proj.2.weight" in json.loads(connector)["weight_map"]
    loaded = apollo_jax.from_pretrained(first)
    assert loaded.config == other.config
    assert list(loaded.config.towers) == ["video", "image"]
    assert same_parameters(loaded, other)
    apollo_jax.save_pretrained(loaded, second)
    assert contents(first) == contents(second)


def test_a_fresh_folder_is_complete(other, tiny, tmp_path):
    apollo_jax.save_pretrained(other, tmp_path / "out")
    for name in ("config.json", "vision_tower/config.json", "llm/generation_config.json"):
        official = json.loads((tiny / "checkpoint" / name).read_text()).keys()
        ids = {"bos_token_id", "eos_token_id", "pad_token_id"}  # these come with a tokenizer
        fresh = json.loads((tmp_path / "out" / name).read_text()).keys()
        assert official - ids - {"transformers_version"} <= fresh, name
    for ours, theirs in (("image", SIGLIP), ("video", INTERNVIDEO2)):
        for name in ("config.json", "preprocessor_config.json"):
            official = json.loads((tiny / "checkpoint" / theirs / name).read_text()).keys()
            fresh = json.loads((tmp_path / "out/vision_tower" / ours / name).read_text()).keys()
            assert official - {"transformers_version"} <= fresh, (ours, name)
    unused = load_file(tmp_path / "out/vision_tower/image/model.safetensors")
    assert not unused["vision_model.head.probe"].any()
    assert unused["vision_model.encoder.layers.0.mlp.fc1.bias"].any()
    assert not unused["vision_model.encoder.layers.2.mlp.fc1.bias"].any()


def test_a_fresh_tied_decoder_stores_its_head(build, tmp_path):
    config = apollo.Config.debug(vocab_size=40).llm
    decoder = build(lambda: qwen2.Qwen2(config, rngs=nnx.Rngs(0)))
    apollo_jax.save_pretrained(decoder, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", [SIGLIP, INTERNVIDEO2, "llm", "mm_connector"])
def test_one_part_by_itself(name, tiny, tmp_path):
    part = apollo_jax.from_pretrained(tiny / "checkpoint" / name)
    assert part.config == apollo_jax.config_from_pretrained(tiny / "checkpoint" / name)
    apollo_jax.save_pretrained(part, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tiny / "checkpoint" / name)


def test_either_spelling_of_layer_scale(copy, edit, model, tmp_path):
    def rename(tensors):
        return {n.replace("gamma", "weight"): t for n, t in tensors.items()}

    edit(INTERNVIDEO2, rename)
    loaded = apollo_jax.from_pretrained(copy)
    assert same_parameters(loaded, model)
    apollo_jax.save_pretrained(loaded, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(copy)


def test_a_tied_head_that_is_not_stored_stays_so(copy, edit, model, tmp_path):
    edit("llm", lambda tensors: tensors.pop("lm_head.weight") is None or tensors)
    loaded = apollo_jax.from_pretrained(copy)
    assert same_parameters(loaded, model)
    apollo_jax.save_pretrained(loaded, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(copy)


def test_bfloat16_stays_bfloat16(copy, edit, tmp_path):
    def halve(tensors):
        return {n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()}

    for name in (SIGLIP, INTERNVIDEO2, "mm_connector", "llm"):
        edit(name, halve)
    for param_dtype in (jnp.float32, jnp.bfloat16):
        loaded = apollo_jax.from_pretrained(copy, param_dtype=param_dtype)
        assert {leaf.dtype for leaf in parameters(loaded).values()} == {jnp.dtype(param_dtype)}
        apollo_jax.save_pretrained(loaded, tmp_path / jnp.dtype(param_dtype).name)
        assert contents(tmp_path / jnp.dtype(param_dtype).name) == contents(copy)


def test_another_dtype_is_written_and_stated(model, tmp_path):
    apollo_jax.save_pretrained(model, tmp_path / "out", dtype="bfloat16")
    tensors = load_file(tmp_path / "out/llm/model.safetensors")
    assert {t.dtype.name for t in tensors.values()} == {"bfloat16"}
    root = json.loads((tmp_path / "out/config.json").read_text())
    assert root["model_dtype"] == "torch.bfloat16"
    assert root["llm_cfg"]["torch_dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out/llm/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_unused_tensors_stay_on_the_host(model):
    unused = model.vision_tower.towers[0].origin.unused
    assert "vision_model.head.probe" in unused
    assert all(isinstance(tensor, np.ndarray) for tensor in unused.values())
    graphdef, state = nnx.split(model)
    assert hash(graphdef) == hash(nnx.split(model)[0])
    ours = nnx.state(nnx.eval_shape(lambda: apollo.Apollo(model.config, rngs=nnx.Rngs(0))))
    assert jax.tree.structure(state) == jax.tree.structure(ours)
    assert "architectures" not in repr(model)  # nor are files and tensors printed


def test_parts_take_their_folder_along_into_a_new_model(tiny, other, tmp_path):
    decoder = apollo_jax.from_pretrained(tiny / "checkpoint" / "llm")
    assert decoder.origin.files.keys() >= {"vocab.json", "merges.txt"}
    other.llm = decoder  # (the config is not looked at again)
    apollo_jax.save_pretrained(other, tmp_path / "out")
    assert contents(tmp_path / "out" / "llm") == contents(tiny / "checkpoint" / "llm")


def test_a_training_run_loads_like_a_folder(other, tiny, tmp_path):
    data = DataConfig(
        sources={},
        frames=(),
        tokenizer="",
        batch_size=1,
        length=64,
        clips=1,
        frame_size=other.config.frame_size,
        tokens_per_clip=other.config.connector.num_output_tokens,
        clip_duration=other.config.clip_duration,
    )
    experiment = Experiment("run", other.config, data, TrainConfig(num_steps=1))
    manager.write_run(tmp_path, experiment, Tokenizer.from_path(tiny / "checkpoint"))
    weights = {name: leaf.get_value() for name, leaf in flatten(nnx.state(other)).items()}
    checkpoints = manager.Checkpoints(tmp_path)
    checkpoints.save(1, TrainState(jnp.int32(1), weights, {}, {"count": jnp.int32(1)}), {})
    checkpoints.close()
    assert apollo_jax.config_from_pretrained(tmp_path) == other.config
    assert same_parameters(apollo_jax.from_pretrained(tmp_path), other)


# ---- the folder appears whole or not at all


def test_a_tokenizer_travels_along(other, tmp_path):
    apollo_jax.save_pretrained(other, tmp_path / "out", tokenizer=SomeTokenizer())
    assert (tmp_path / "out/llm/tokenizer.json").read_text() == "{}"
    for name in ("config.json", "generation_config.json"):
        ids = json.loads((tmp_path / "out/llm" / name).read_text())
        assert (ids["pad_token_id"], ids["eos_token_id"]) == (1, 2)


def test_an_existing_folder_is_kept_unless_told(model, other, tmp_path):
    out = tmp_path / "out"
    apollo_jax.save_pretrained(model.connector, out)
    before = contents(out)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        apollo_jax.save_pretrained(other.connector, out)
    with pytest.raises(OSError, match="disk full"):
        apollo_jax.save_pretrained(other, out, tokenizer=BrokenTokenizer(), overwrite=True)
    assert contents(out) == before
    apollo_jax.save_pretrained(other.connector, out, overwrite=True)
    assert contents(out) != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- refusals


def test_all_wrong_tensors_are_named_together(copy, edit):
    def damage(tensors):
        tensors["model.norm.wieght"] = tensors.pop("model.norm.weight")
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((5, 5), np.float32)
        del tensors["model.layers.1.self_attn.q_proj.bias"]

    edit("llm", damage)
    with pytest.raises(ValueError, match="do not fit the config") as error:
        apollo_jax.from_pretrained(copy)
    message = str(error.value)
    assert f"{copy / 'llm'}" in message
    assert "model.norm.wieght (did you mean model.norm.weight?)" in message
    assert "model.layers.1.self_attn.q_proj.bias" in message
    assert "model.layers.0.mlp.up_proj.weight (5, 5), the config gives (96, 48)" in message


@pytest.mark.parametrize("part", [SIGLIP, INTERNVIDEO2, "mm_connector", "llm"])
def test_unused_and_unknown_tensors_are_checked_too(part, copy, edit):
    edit(part, lambda tensors: tensors | {"blocks.99.extra": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"unknown \(1\):\n    blocks.99.extra"):
        apollo_jax.from_pretrained(copy)


def test_a_missing_unused_tensor_is_named(copy, edit):
    edit(SIGLIP, lambda tensors: tensors.pop("vision_model.head.probe") is None or tensors)
    with pytest.raises(ValueError, match=r"missing \(1\):\n    vision_model.head.probe"):
        apollo_jax.from_pretrained(copy)


def test_a_tied_head_that_differs_is_refused(copy, edit):
    edit("llm", lambda tensors: tensors["lm_head.weight"].__setitem__((0, 0), 5.0))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        apollo_jax.from_pretrained(copy)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("llm/config.json", dict(num_hiden_layers=2), "did you mean num_hidden_layers"),
        ("llm/config.json", dict(hidden_act="relu"), "hidden_act is 'relu'"),
        ("llm/config.json", dict(num_hidden_layers=3), "missing"),
        ("mm_connector/config.json", dict(resampler_type="q-former"), "known: perciver, avg"),
        ("mm_connector/config.json", dict(vision_hidden_size=81), "the parts give 80"),
        (f"{INTERNVIDEO2}/config.json", dict(use_fused_mlp=True), "use_fused_mlp is True"),
        (f"{SIGLIP}/preprocessor_config.json", dict(resample=1), "resample is 1"),
        (f"{SIGLIP}/preprocessor_config.json", dict(size=dict(height=9, width=9)), "size is"),
        (f"{SIGLIP}/config.json", dict(model_type="vgg", architectures=None), "'vgg' is not known"),
        ("vision_tower/config.json", dict(vision_towers=["siglip"]), "siglip is not a folder"),
        ("vision_tower/config.json", dict(vision_towers=None), "vision_towers must list"),
        ("config.json", dict(mm_vision_select_layer=None), "mm_vision_select_layer is None"),
        ("config.json", dict(model_type="llava", architectures=[]), "'llava' is not known"),
        ("config.json", dict(interpolate_mode="nearest"), "interpolate_mode is 'nearest'"),
    ],
)
def test_a_wrong_config_is_refused_by_file_and_field(file, change, message, copy, edit):
    def apply(content):
        if "num_hiden_layers" in change:
            del content["num_hidden_layers"]
        content |= change
        return content

    edit(file, apply)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        apollo_jax.from_pretrained(copy)
    assert str(copy) in str(error.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "has no config.json .* .it holds nothing"), ("nowhere", "nowhere does not exist")],
)
def test_a_wrong_path_is_refused(path, message, tmp_path):
    with pytest.raises(FileNotFoundError, match=message):
        apollo_jax.from_pretrained(tmp_path / path)


def test_a_config_that_is_not_json_is_named(copy):
    (copy / "llm" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"llm/config\.json is not JSON"):
        apollo_jax.from_pretrained(copy)


def test_a_truncated_file_is_named(copy):
    file = copy / "mm_connector" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"mm_connector/model\.safetensors is truncated"):
        apollo_jax.from_pretrained(copy)


def test_the_public_names_are_lazy():
    with pytest.raises(AttributeError, match="no attribute 'from_pretraned'"):
        _ = apollo_jax.from_pretraned
    assert {"from_pretrained", "save_pretrained"} <= set(dir(apollo_jax))
