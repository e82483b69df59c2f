# SPDX-License-Identifier: Apache-2.0
"""big_vision's .npz layouts: every array linked once, the published tensors and the way back."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from apollo_jax.checkpoints.rules import siglip, siglip2
from apollo_jax.checkpoints.rules.big_vision import SIGLIP2_VOCABULARY

FIXTURE = Path(__file__).parents[3] / "fixtures" / "encoders" / "bigvision-siglip-a"
LAYOUTS = {"loop": "big_vision", "scan": "big_vision-scan"}
SAID = dict(image_size=30)  # 7 does not divide it


def arrays(layout: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURE / f"{layout}.npz") as z:
        return dict(z)


def shapes(tensors: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def links(rules, files: dict, name: str):
    config = rules.config(json.loads(json.dumps(files)), "f")
    found = {d.name: d for d in rules.dialects(config, files["config.json"])}
    return found[name].links


def translate(links, tensors: dict[str, np.ndarray], *, out: bool) -> dict[str, np.ndarray]:
    """One side of the links from the other."""
    made = {}
    for link in links:
        below, above = (link.published, link.foreign) if out else (link.foreign, link.published)
        make = link.transform.outward if out else link.transform.inward
        pieces = [tensors.pop(name) for name in below]
        if len(above) == 1:
            whole = [make(piece) for piece in pieces]
            made[above[0]] = np.stack(whole) if link.stacked else np.concatenate(whole)
        else:
            parts = pieces[0] if link.stacked else np.split(pieces[0], len(above))
            made |= {name: make(part) for name, part in zip(above, parts, strict=True)}
    assert not tensors  # all of them are linked
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout):
    theirs = arrays(layout)
    files = siglip.recognise(shapes(theirs), SAID)
    assert files is not None
    model = links(siglip, files, LAYOUTS[layout])
    ours = translate(model, dict(theirs), out=False)
    for name, tensor in load_file(FIXTURE / "model.safetensors").items():
        np.testing.assert_array_equal(ours[name], tensor)
    table = siglip.table(siglip.config(files, "f"), files["config.json"])
    text = next(g for g in table.unused if "text_model.head.weight" in g.shapes).shapes
    assert {n: a.shape for n, a in ours.items() if not n.startswith("vision_model")} == text
    back = translate(model, ours, out=True)
    assert back.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_tell_the_model(layout):
    files = siglip.recognise(shapes(arrays(layout)), SAID)
    assert files is not None
    published = json.loads((FIXTURE / "config.json").read_text())
    found = files["config.json"]["vision_config"]
    assert {name: found[name] for name in published} == published
    text = dict(
        hidden_size=24,
        intermediate_size=16,
        max_position_embeddings=5,
        model_type="siglip_text_model",
        num_attention_heads=2,
        num_hidden_layers=1,
        projection_size=24,
        vocab_size=11,
    )
    assert files["config.json"]["text_config"] == text
    assert files["preprocessor_config.json"]["size"] == dict(height=30, width=30)
    assert siglip2.recognise(shapes(arrays(layout)), {}) is None


def strip(prefix: str, tensors: dict) -> dict:
    return {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)}


@pytest.mark.parametrize(
    ("stored", "dialect"),
    [
        ("params/img/", "big_vision"),
        ("opt/target/img/", "big_vision-run"),
        ("img/", "big_vision-bare"),
        ("", "big_vision"),  # file.npz:img
    ],
)
def test_a_tower_alone(stored, dialect):
    theirs = {stored + n: a for n, a in strip("params/img/", arrays("loop")).items()}
    files = siglip.recognise(shapes(theirs), SAID)
    assert files is not None
    assert files["config.json"]["model_type"] == "siglip_vision_model"
    config = siglip.config(files, "f")
    found = {d.name: d for d in siglip.dialects(config, files["config.json"])}[dialect]
    full = {found.prefix + n.removeprefix(found.prefix): a for n, a in theirs.items()}
    ours = translate(found.links, full, out=False)
    published = load_file(FIXTURE / "model.safetensors")
    assert ours.keys() == published.keys()
    for name, tensor in published.items():
        np.testing.assert_array_equal(ours[name], tensor)


def test_image_sizes_that_leave_a_remainder_are_known():
    tower = shapes(strip("params/img/", arrays("loop")))

    def image_size(patch: int, side: int, **said) -> int:
        files = siglip.recognise(
            tower
            | {
                "embedding/kernel": (patch, patch, 3, 32),
                "pos_embedding": (1, side * side, 32),
            },
            said,
        )
        assert files is not None
        return files["config.json"]["image_size"]

    assert image_size(14, 27) == 384
    assert image_size(14, 16) == image_size(16, 14) == 224
    assert image_size(14, 27, image_size=378) == 378


def test_what_a_vocabulary_and_a_missing_head_tell():
    both = shapes(arrays("scan"))
    both["params/txt/Embed_0/embedding"] = (SIGLIP2_VOCABULARY, 24)
    headless = {n: s for n, s in both.items() if "MAPHead" not in n}
    files = siglip.recognise(headless, {})
    assert files is not None
    assert files["preprocessor_config.json"]["resample"] == 2
    assert siglip.config(files, "f").resample == "pil_bilinear"
    vision = files["config.json"]["vision_config"]
    assert vision["vision_use_head"] is False
    names = {f for link in links(siglip, files, "big_vision-scan") for f in link.foreign}
    assert names == headless.keys()
    files = siglip.recognise(both, dict(resample=3, layer_norm_eps=1e-5))
    assert files is not None
    assert files["preprocessor_config.json"]["resample"] == 3
    assert files["config.json"]["vision_config"]["layer_norm_eps"] == 1e-5


def test_naflex_there_and_back():
    rng = np.random.default_rng(0)
    theirs = arrays("scan") | {
        "params/img/embedding/kernel": rng.random((5 * 5 * 3, 32), np.float32),
        "params/img/pos_embedding": rng.random((3, 3, 32), np.float32),
    }
    assert siglip.recognise(shapes(theirs), {}) is None
    files = siglip2.recognise(shapes(theirs), dict(max_num_patches=20))
    assert files is not None
    config = siglip2.config(files, "f")
    assert (config.patch_size, config.num_patches, config.grid[1]) == (5, 9, 4)
    assert files["config.json"]["model_type"] == "siglip2"
    model = links(siglip2, files, "big_vision-scan")
    ours = translate(model, dict(theirs), out=False)
    at = "vision_model.embeddings"
    kernel, table = theirs["params/img/embedding/kernel"], theirs["params/img/pos_embedding"]
    np.testing.assert_array_equal(ours[f"{at}.patch_embedding.weight"], kernel.T)
    np.testing.assert_array_equal(ours[f"{at}.position_embedding.weight"][4], table[1, 1])
    back = translate(model, ours, out=True)
    assert back.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(back[name], array)


def test_other_files_are_none():
    assert siglip.recognise({"patch_embed.proj.weight": (32, 3, 7, 7)}, {}) is None
    assert siglip2.recognise({"params/img/embedding/kernel": (75, 32)}, {}) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_left_to_the_strict_check_or_refused_by_name(layout):
    whole = shapes(arrays(layout))

    def refusal(damaged) -> str:
        try:
            siglip.recognise(damaged, SAID)
        except ValueError as error:
            return str(error)
        return ""

    for victim in whole:
        dropped = refusal({name: shape for name, shape in whole.items() if name != victim})
        assert not dropped or dropped.startswith(f"{victim} is missing")
        misshaped = refusal(whole | {victim: (2, *whole[victim])})
        assert not misshaped or misshaped.startswith(f"{victim} is (2, ")
    assert refusal({n: s for n, s in whole.items() if "Encoder_0" not in n}).startswith(
        "params/txt"
    )
