# SPDX-License-Identifier: Apache-2.0
"""Annotations: every format says the same, and errors name the record and the field."""

import json

import pytest

from data_pipeline.annotations import Media, parse_record
from data_pipeline.conversation import Turn

SAID = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]


def asked(text: str, **fields) -> str:
    return json.dumps({"conversations": [{"from": "human", "value": text}, SAID[1]], **fields})


def test_all_formats_say_the_same():
    conversation = parse_record(asked("<video>\nWhat?", video="a.mp4", id=7), "f:1")
    sharegpt = [{"from": "user", "value": "<video>\nWhat?"}, {"from": "bing", "value": "That."}]
    openai = [
        {"role": "user", "content": "<video>\nWhat?"},
        {"role": "assistant", "content": "That."},
    ]
    turns = [{"role": "user", "text": "<video>\nWhat?"}, {"role": "assistant", "text": "That."}]
    plain = {"question": "What?", "answer": "That."}
    assert conversation.id == "7"
    assert conversation.turns == (Turn("user", "<video>\nWhat?"), Turn("assistant", "That."))
    assert conversation.media == (Media("video", "a.mp4"),)
    for other in (
        {"turns": turns},
        {"conversations": sharegpt},
        {"messages": openai},
        plain,
    ):
        record = parse_record(json.dumps({"id": 7, "video": "a.mp4", **other}), "f:1")
        assert record == conversation


def test_media_follow_the_placeholders():
    text_only = parse_record(asked("What?"), "f:1")
    assert (text_only.id, text_only.media) == ("f:1", ())
    many = parse_record(asked("<image> or <image>?", images=["b.jpg", "a.jpg"]), "f:1")
    assert many.media == (Media("image", "b.jpg"), Media("image", "a.jpg"))
    mixed = parse_record(asked("<image> in <video>?", video="a.mp4", image="a.jpg"), "f:1")
    assert mixed.media == (Media("image", "a.jpg"), Media("video", "a.mp4"))
    as_published = parse_record(asked("<image>\nWhat?", video="a.mp4"), "f:1")
    assert as_published.media == (Media("video", "a.mp4"),)


def test_a_single_frame_control_is_a_field_of_the_record():
    assert parse_record(asked("<video>", video="a", sampling="centre"), "f:1").sampling == "centre"
    assert parse_record(asked("What?"), "f:1").sampling == ""


def test_a_plain_text_is_learnt_whole_and_may_hold_media():
    page = parse_record(json.dumps({"text": "Use the <video> tag."}), "f:1")
    assert (page.turns, page.media) == ((Turn("text", "Use the <video> tag."),), ())
    turn = json.dumps({"turns": [{"role": "text", "text": "Use the <video> tag."}]})
    assert parse_record(turn, "f:1") == page
    document = parse_record(json.dumps({"text": "A cat: <image>.", "image": "a.jpg"}), "f:1")
    assert document.media == (Media("image", "a.jpg"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"f:3: not JSON"),
        ("[]", "expected an object, got list"),
        (asked("<image> What?", id="a"), r"f:3 \(id a\): the text has 1 <image> .* for 0 images"),
        (asked("What?", video="a.mp4"), "0 <video> placeholders for 1 videos"),
        (asked("<video><image>", video="a", images=["b", "c"]), "1 <image> .* for 2 images"),
        (asked("<video>", video=3), "'video' should be a name or a list of names, got 3"),
        (asked("<video>", video="a", sampling="center"), "sampling 'center' is not one of fps"),
        (json.dumps({"conversatoins": SAID}), "did you mean 'conversations'"),
        (json.dumps({"conversations": SAID[:1]}), "assistant says nothing"),
        (
            json.dumps({"turns": [{"role": "bot", "text": "a"}]}),
            r"'role' is 'bot' in turns\[0\]; known: human",
        ),
        (json.dumps({"turns": [{"role": "user"}]}), r"turns\[0\] lacks the text 'text'"),
        (json.dumps({"turns": [{"role": "text", "text": "a"}] * 2}), "does not stand alone"),
        (json.dumps({"text": " "}), "'text' should be a text"),
        (json.dumps({"text": "a", "image": "b"}), "0 <image> placeholders for 1 images"),
        (json.dumps({"question": "a", "answer": ""}), "'answer' is empty"),
        (json.dumps({"turns": "hi"}), "'turns' should be a list"),
    ],
)
def test_faults_name_record_and_field(line, message):
    with pytest.raises(ValueError, match=message):
        parse_record(line, "f:3")
