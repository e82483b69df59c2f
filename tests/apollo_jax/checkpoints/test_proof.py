# SPDX-License-Identifier: Apache-2.0
"""--verify: what is wrong is named and does not appear; every key and byte is accounted for."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from apollo_jax.checkpoints import activations, convert
from apollo_jax.checkpoints.pretrained import checkpoint_of, save_pretrained
from apollo_jax.checkpoints.proof import report

FIXTURES = Path(__file__).parents[2] / "fixtures"
DINOV2 = FIXTURES / "encoders" / "dinov2-a"
QUERY = "encoder.layer.0.attention.attention.query.weight"


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """What transformers computes is in tests/parity."""
    monkeypatch.setattr(activations, "compare", lambda before, *_, **__: {})


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def flip(folder: Path) -> None:
    """One bit of the last byte of a file."""
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def transpose(folder: Path) -> None:
    """A square tensor, whose shape does not tell."""
    tensors = weights(folder)
    tensors[QUERY] = np.ascontiguousarray(tensors[QUERY].T)
    rewrite(folder, tensors)


def swap(folder: Path) -> None:
    """Two tensors of one shape."""
    tensors = weights(folder)
    key = QUERY.replace("query", "key")
    tensors[QUERY], tensors[key] = tensors[key], tensors[QUERY]
    rewrite(folder, tensors)


def drop(folder: Path) -> None:
    tensors = weights(folder)
    del tensors[QUERY]
    rewrite(folder, tensors)


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (flip, r"dinov2: \S+ \(its bytes differ\)$"),
        (transpose, rf"dinov2: {QUERY} \(its bytes differ\)$"),
        (swap, rf"dinov2: {QUERY}"),
        (drop, rf"missing \(1\):\n *{QUERY}"),
    ],
)
def test_what_was_written_wrongly_is_named_and_does_not_appear(harm, named, monkeypatch, tmp_path):
    write = convert.write_parts

    def wrongly(folder, *args, **kw):
        write(folder, *args, **kw)
        harm(folder)

    monkeypatch.setattr(convert, "write_parts", wrongly)
    with pytest.raises(ValueError, match=named):
        convert.convert(DINOV2, tmp_path / "out", to="hf", verify=True)
    assert not list(tmp_path.iterdir())


def test_what_transformers_finds_wrong_does_not_appear(monkeypatch, tmp_path):
    found = {"dinov2": dict(failed="Dinov2Model of transformers does not load all of it")}
    monkeypatch.setattr(activations, "compare", lambda *_, **__: found)
    with pytest.raises(ValueError, match="dinov2: Dinov2Model of transformers does not load"):
        convert.convert(DINOV2, tmp_path / "out", to="hf", verify=True)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_reported(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((DINOV2 / "config.json").read_bytes())
    tensors = weights(DINOV2)
    tensors[QUERY][0, 0] = np.nan
    rewrite(source, tensors)
    _, found = convert.convert(source, tmp_path / "out", to="hf", verify=True)
    assert found["not_finite"] == [f"dinov2: {QUERY}"]
    assert found["equal"] == found["tensors"]  # the same NaN
    convert.summary(found)
    assert f"not finite: dinov2: {QUERY}" in capsys.readouterr().out.replace("\n", "")


def test_overflow_in_a_smaller_dtype_is_reported(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((DINOV2 / "config.json").read_bytes())
    tensors = weights(DINOV2)
    tensors[QUERY][0, 0] = 1e6
    rewrite(source, tensors)
    with np.errstate(over="ignore"):
        _, found = convert.convert(source, tmp_path / "out", to="hf", verify=True, dtype="float16")
    assert found["not_finite"] == [f"dinov2: {QUERY}"]
    assert found["parts"]["dinov2"]["dtype_changes"] == ["float32 to float16"]


def test_every_key_and_every_byte_is_in_the_report(tmp_path):
    convert.convert(DINOV2, tmp_path / "out", to="hf", verify=True)
    found = json.loads((tmp_path / "out" / convert.REPORT).read_text())
    part = found["parts"]["dinov2"]
    with safe_open(DINOV2 / "model.safetensors", "numpy") as file:
        names = set(file.keys())
        digest = hashlib.sha256(file.get_tensor(QUERY).tobytes()).hexdigest()
    assert {use["tensor"] for use in part["source_keys"]} == names == set(part["tensors"])
    assert all(use.get("to") or use.get("ignored") for use in part["source_keys"])
    assert part["tensors"][QUERY]["sha256"] == digest
    assert part["source"] == str(DINOV2)
    assert not part["made_up"]


def test_a_report_does_not_go_along_to_the_next_conversion(tmp_path):
    convert.convert(DINOV2, tmp_path / "first", to="hf", verify=True)
    convert.convert(tmp_path / "first", tmp_path / "second", to="hf")
    assert (tmp_path / "first" / convert.REPORT).is_file()
    assert not (tmp_path / "second" / convert.REPORT).exists()


def test_parameters_of_our_own_format_are_accounted_for(tmp_path):
    convert.convert(DINOV2, tmp_path / "ours", to="orbax")
    checkpoint, found = convert.convert(tmp_path / "ours", tmp_path / "out", to="hf", verify=True)
    uses = found["parts"]["dinov2"]["source_keys"]
    used = {use["tensor"]: use["to"] for use in uses if "to" in use}
    assert used.keys() == checkpoint.parts[""].ours.stored.keys()
    last = QUERY.replace("0", "1")
    assert used["layers.q.kernel"] == f"{QUERY} ... {last}"
    assert {use["tensor"] for use in uses if "ignored" in use} >= {"layernorm.weight"}
    assert not found["parts"]["dinov2"]["made_up"]


def test_zeros_that_no_source_holds_are_named(model, tmp_path):
    tower = model.vision_tower.towers[0]
    origin, tower.origin = tower.origin, None
    try:
        checkpoint = checkpoint_of(tower)
        save_pretrained(tower, tmp_path / "out")
    finally:
        tower.origin = origin
    part = report(checkpoint, tmp_path / "out", dtype=None)["parts"]["siglip"]
    assert "vision_model.post_layernorm.weight" in part["made_up"]
    assert part["source"] == "fresh"


def test_the_parts_of_an_assembly_name_their_sources(tiny, tmp_path):
    official = tiny / "checkpoint"
    given = {
        "siglip": str(official / "vision_tower/siglip-so400m-patch14-384"),
        "internvideo2": str(official / "vision_tower/internvideo2"),
        "connector": "fresh",
        "llm": str(official / "llm"),
    }
    _, found = convert.convert(None, tmp_path / "out", given=given, verify=True)
    assert {name: part["source"] for name, part in found["parts"].items()} == given
    _, found = convert.convert(
        tmp_path / "out", tmp_path / "other", given={"llm": given["llm"]}, verify=True
    )
    sources = {name: part["source"] for name, part in found["parts"].items()}
    assert sources == dict.fromkeys(given, str(tmp_path / "out")) | {"llm": given["llm"]}
