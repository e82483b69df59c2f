# SPDX-License-Identifier: Apache-2.0
"""Prompts, ids, labels and visual positions: the official ones, and the decisions beyond them."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.conversation import MediaClips, Turn, ask, media_text, prompt_text, render
from data_pipeline.tokenizer import Tokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "apollo-tiny-a"
Q = 8  # visual tokens per clip in the fixture


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_path(FIXTURE / "checkpoint" / "llm")


@pytest.fixture(scope="module")
def official():
    return np.load(FIXTURE / "fixture.npz")


@pytest.fixture(scope="module")
def video(official):
    return MediaClips("video", official["timestamps"], float(official["duration"]), 2.0)


def image():
    return MediaClips("image", np.zeros((1, 2)))


def test_prompt_is_the_official_text(official, video):
    turns = [ask(str(official["question"]), [video])]
    assert prompt_text(turns, [video], Q) == str(official["prompt"])
    assert media_text(video, Q) == str(official["replace_string"])


def test_ids_and_labels_are_the_official_ones(official, video, tokenizer):
    turns = [ask(str(official["question"]), [video])]
    asked = render(turns, [video], tokenizer, Q)
    np.testing.assert_array_equal(
        np.where(asked.visual_index >= 0, -200, asked.tokens), official["prompt_ids"]
    )
    assert not asked.loss_weights.any()

    answered = [*turns, Turn("assistant", str(official["answer"]))]
    sample = render(answered, [video], tokenizer, Q)
    visual = sample.visual_index >= 0
    np.testing.assert_array_equal(np.where(visual, -200, sample.tokens), official["input_ids"][0])
    np.testing.assert_array_equal(
        np.where(sample.loss_weights > 0, sample.tokens, -100), official["labels"][0]
    )
    np.testing.assert_array_equal(sample.visual_index[visual], np.arange(2 * Q))
    assert (sample.tokens.dtype, sample.loss_weights.dtype) == (np.int32, np.float32)


def test_training_tokens_begin_with_the_prompt_they_are_asked_with(video, tokenizer):
    turns = [ask("What?", [video]), Turn("assistant", " \n odd start"), Turn("user", "And?")]
    prompt = render(turns[:1], [video], tokenizer, Q).tokens
    whole = render(turns, [video], tokenizer, Q)
    np.testing.assert_array_equal(whole.tokens[: len(prompt)], prompt)
    spoken = tokenizer.decode(whole.tokens[whole.loss_weights > 0], skip_special=False)
    assert spoken == " \n odd start<|im_end|>"


@pytest.mark.parametrize(
    "text", ["<video>What?", "<video>\nWhat?", " <video>\n\n What?", "<video>  What?"]
)
def test_a_video_is_a_paragraph_of_its_own(text, video):
    expected = f"user\n{media_text(video, Q)}\n\nWhat?<|im_end|>"
    assert expected in prompt_text([Turn("user", text)], [video], Q)


def test_images_stand_where_they_are_mentioned():
    turns = [Turn("user", "Is <image> like\n<image>?"), Turn("assistant", "No <image>.")]
    tokens = "<|image_token|>" * 3
    text = prompt_text(turns, [image(), image()], 3)
    assert f"user\nIs {tokens} like\n{tokens}?<|im_end|>" in text
    assert text.endswith("assistant\nNo <image>.<|im_end|>")


def test_media_may_come_in_any_turn_and_are_counted_through(video, tokenizer):
    turns = [ask("One?", [image()]), Turn("assistant", "1"), ask("Two?", [video])]
    sample = render(turns, [image(), video], tokenizer, Q)
    np.testing.assert_array_equal(
        sample.visual_index[sample.visual_index >= 0], np.arange(Q + 2 * Q)
    )


def test_a_clip_duration_prints_as_in_the_official_config(official):
    for duration, text in ((2, "one, 2 second"), (2.0, "one, 2 second"), (2.5, "one, 2.5 second")):
        clip = MediaClips("video", np.array([[0, 61.26]]), 3661, duration)
        assert f"{text} clips from a 1:01:01 [H:MM:SS]" in media_text(clip, Q)
        assert "\n0.0-61.3 seconds: <" in media_text(clip, Q)


def test_an_own_system_text_takes_the_same_place():
    text = prompt_text([Turn("system", "Be brief."), Turn("user", "Hi")], [], Q)
    assert text == (
        "<|im_start|>system\n\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_plain_text_is_learnt_to_its_end_and_its_media_are_not(video, tokenizer):
    document = [Turn("text", "Use <video>, said <image>.")]
    sample = render(document, [], tokenizer, Q)
    assert tokenizer.decode(sample.tokens, skip_special=False) == (
        "Use <video>, said <image>.<|endoftext|>"
    )
    assert sample.loss_weights.all()
    sample = render(document, [video, image()], tokenizer, Q)
    learnt = tokenizer.decode(sample.tokens[sample.loss_weights > 0], skip_special=False)
    assert learnt == "Use , said .<|endoftext|>"
    text = prompt_text(document, [video, image()], Q)
    assert text.startswith(f"Use {media_text(video, Q)}, said <|image_token|>")
    with pytest.raises(ValueError, match="2 <video>/<image> placeholders for 1 media"):
        render(document, [video], tokenizer, Q)


def test_mismatches_are_errors(video, tokenizer):
    with pytest.raises(ValueError, match="0 <video>/<image> placeholders for 1 media"):
        prompt_text([Turn("user", "What?")], [video], Q)
    with pytest.raises(ValueError, match="placeholder more than the sample has media"):
        prompt_text([Turn("user", "<image> What?")], [], Q)
    with pytest.raises(ValueError, match="unknown role 'human'"):
        prompt_text([Turn("human", "What?")], [], Q)
    with pytest.raises(ValueError, match="1 of the reserved tokens"):
        render([Turn("user", "What is <|video_token|>?")], [], tokenizer, Q)
