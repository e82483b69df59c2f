# SPDX-License-Identifier: Apache-2.0
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

import apollo_jax
from apollo_jax.inference import generate as command
from apollo_jax.inference.generate import answer, generate

QUESTION = "What is moving in the video?"


def test_the_answer_is_that_of_the_official_code(model, processor, official, video):
    wanted = processor.tokenizer.decode(official["greedy_new_tokens"][0]).strip()
    assert generate(model, processor, video=video, prompt=QUESTION, max_new_tokens=8) == wanted
    example = processor(frames=official["video"], fps=10.0, prompt=QUESTION)
    assert answer(model, processor, example, max_new_tokens=8) == wanted


def test_images_and_text_alone_are_answered_too(model, processor, image, tmp_path):
    Image.fromarray(image["image"]).save(tmp_path / "image.png")
    shown = generate(
        model, processor, image=tmp_path / "image.png", prompt="What?", max_new_tokens=8
    )
    told = generate(model, processor, prompt="What?", max_new_tokens=8)
    assert shown != told


def test_the_package_offers_it():
    assert apollo_jax.generate is generate


@pytest.fixture
def loaded(model, monkeypatch):
    """The command finds the model loaded and compiled already."""
    monkeypatch.setattr(command, "load_model", lambda _: model)


def test_command_prints_the_text(checkpoint, model, processor, video, capsys, loaded):
    arguments = ["--checkpoint", str(checkpoint), "--video", str(video), "--prompt", QUESTION]
    command.main([*arguments, "--max-new-tokens", "8"])
    wanted = generate(model, processor, video=video, prompt=QUESTION, max_new_tokens=8)
    assert capsys.readouterr().out == wanted + "\n"

    drawn = ["--max-new-tokens", "8", "--temperature", "1", "--top-p", "0.9", "--seed", "3"]
    command.main([*arguments, *drawn])
    kw = dict[str, Any](temperature=1.0, top_p=0.9, seed=3, max_new_tokens=8)
    other = generate(model, processor, video=video, prompt=QUESTION, **kw)
    assert capsys.readouterr().out == other + "\n"
    assert other != wanted


def test_command_prints_json(checkpoint, official, video, capsys):
    arguments = ["--checkpoint", str(checkpoint), "--video", str(video), "--prompt", QUESTION]
    command.main([*arguments, "--max-new-tokens", "8", "--json"])
    record = json.loads(capsys.readouterr().out)
    assert record["prompt"] == str(official["prompt"])
    np.testing.assert_array_equal(record["clip_indices"], official["clip_indices"])
    np.testing.assert_array_equal(record["timestamps"], official["timestamps"])
    assert record["text"]
    assert record["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--video", "nowhere.mp4", "--prompt", "?"], r"nowhere\.mp4: there is no such file"),
        (["--image", "nowhere.png", "--prompt", "?"], r"nowhere\.png: there is no such file"),
        (["--prompt", "word " * 600], "model reads at most 512"),
        (["--prompt", "?", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "?", "--checkpoint", "no-folder"], "no-folder"),
    ],
)
def test_what_is_wrong_is_said(checkpoint, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command.main(["--checkpoint", str(checkpoint), *arguments])
