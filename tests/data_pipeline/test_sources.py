# SPDX-License-Identifier: Apache-2.0
"""Annotation files: what is understood, random access, and errors that name the record."""

import json

import pytest

from data_pipeline.conversation import Turn
from data_pipeline.sources import JsonlSource, Media, parse_record

SAID = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]


def asked(text: str, **fields) -> str:
    return json.dumps({"conversations": [{"from": "human", "value": text}, SAID[1]], **fields})


def write(path, *lines: str):
    path.write_text("\n".join(lines))
    return path


def test_llava_turns_and_question_answer_say_the_same():
    conversation = parse_record(asked("<video>\nWhat?", video="a.mp4", id=7), "f:1")
    turns = [{"role": "user", "text": "<video>\nWhat?"}, {"role": "assistant", "text": "That."}]
    plain = {"question": "What?", "answer": "That."}
    assert conversation.id == "7"
    assert conversation.turns == (Turn("user", "<video>\nWhat?"), Turn("assistant", "That."))
    assert conversation.media == (Media("video", "a.mp4"),)
    for other in ({"turns": turns}, plain):
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
        (json.dumps({"turns": [{"role": "bot", "text": "a"}]}), "'role' is 'bot'.*known: human"),
        (json.dumps({"turns": [{"role": "user"}]}), "lacks the text 'text'"),
        (json.dumps({"turns": "hi"}), "'turns' should be a list"),
    ],
)
def test_faults_name_record_and_field(line, message):
    with pytest.raises(ValueError, match=message):
        parse_record(line, "f:3")


def test_a_file_is_read_by_record(tmp_path):
    lines = ["", asked("é?", id="one"), "  ", asked("two?"), asked("three?", id="three"), ""]
    source = JsonlSource(write(tmp_path / "a.jsonl", *lines))
    assert len(source) == 3
    assert [source[i].id for i in (2, 0, 1)] == ["three", "one", "a.jsonl:4"]
    assert source[0].turns[0].text == "é?"
    same = JsonlSource(write(tmp_path / "b.jsonl", *lines))
    other = JsonlSource(write(tmp_path / "c.jsonl", *lines[:3]))
    assert source.fingerprint == same.fingerprint != other.fingerprint


def test_all_faults_of_a_file_are_told_at_once(tmp_path):
    path = write(tmp_path / "a.jsonl", *[asked("<video>", id=i) for i in range(7)])
    with pytest.raises(ValueError, match=r"7 faulty records in .*a\.jsonl:") as error:
        JsonlSource(path)
    assert "a.jsonl:5 (id 4)" in str(error.value)
    assert str(error.value).endswith("and 2 more")


def test_missing_media_are_listed_not_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", asked("<video>", video="a"), asked("<video>", video="b"))
    assert JsonlSource(path).missing == []
    assert JsonlSource(path, known={"b"}).missing == [("a.jsonl:1", "a")]


def test_a_file_changed_while_in_use_is_told(tmp_path):
    path = write(tmp_path / "a.jsonl", asked("one?"), asked("two?"))
    source = JsonlSource(path)
    write(path, asked("one?"))
    assert source[0].turns[0].text == "one?"
    with pytest.raises(RuntimeError, match=r"a\.jsonl was changed while it was in use: a\.jsonl:2"):
        source[1]


def test_no_file_and_no_records(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        JsonlSource(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no records"):
        JsonlSource(write(tmp_path / "empty.jsonl", "", " "))
