# SPDX-License-Identifier: Apache-2.0
"""Annotation files: random access to their records, and errors that name the place."""

import json

import pytest

from data_pipeline.sources import JsonlSource

SAID = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]


def asked(text: str, **fields) -> str:
    return json.dumps({"conversations": [{"from": "human", "value": text}, SAID[1]], **fields})


def write(path, *lines: str):
    path.write_text("\n".join(lines))
    return path


def test_a_file_is_read_by_record(tmp_path):
    lines = ["", asked("é?", id="one"), "  ", asked("two?"), asked("three?", id="three"), ""]
    source = JsonlSource(write(tmp_path / "a.jsonl", *lines))
    assert len(source) == 3
    assert [source[i].id for i in (2, 0, 1)] == ["three", "one", "a.jsonl:4"]
    assert source[0].turns[0].text == "é?"
    same = JsonlSource(write(tmp_path / "b.jsonl", *lines))
    other = JsonlSource(write(tmp_path / "c.jsonl", *lines[:3]))
    assert source.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_a_json_array_is_read_by_record(tmp_path, space):
    records = [asked("é?", id="one"), asked("<image> [{€", image="b"), asked("three?")]
    text = space + "[" + space + f"{space},{space}".join(records).replace("\\u00e9", "é") + "]"
    source = JsonlSource(write(tmp_path / "a.json", text + space), known=())
    assert [source[i].id for i in (2, 0, 1)] == ["a.json[2]", "one", "a.json[1]"]
    assert [source[i].turns[0].text for i in range(3)] == ["é?", "<image> [{€", "three?"]
    assert source.missing == [("a.json[1]", "b")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"a\.json: a \.json file is one array of records"),
        ("[", r"a\.json: Expecting value"),
        ("[{}", r"a\.json: ',' or '\]' is missing after record 0"),
        ("[]", "has no records"),
        ("[{}]", r"a\.json\[0\]: no 'conversations'"),
        ("[\xff]", r"a\.json: 'utf-8' codec can't decode"),
    ],
)
def test_what_is_no_array_of_records_is_told(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        JsonlSource(path)


def test_all_faults_of_a_file_are_told_at_once(tmp_path):
    path = write(tmp_path / "a.jsonl", *[asked("<video>", id=i) for i in range(7)])
    with pytest.raises(ValueError, match=r"a\.jsonl, of 7, more than max_bad_share=0\.0") as error:
        JsonlSource(path)
    assert "a.jsonl:5 (id 4)" in str(error.value)
    assert str(error.value).endswith("and 2 more")


def test_a_few_faulty_records_are_told_when_they_are_read(tmp_path):
    path = write(tmp_path / "a.jsonl", asked("one?"), asked("<video>", id="bad"), asked("three?"))
    with pytest.raises(ValueError, match="1 faulty records in"):
        JsonlSource(path, max_bad_share=0.3)
    source = JsonlSource(path, max_bad_share=0.4)
    source.write_index(tmp_path)
    for same in (source, JsonlSource(path, index=tmp_path, max_bad_share=0.4)):
        assert [same[i].turns[0].text for i in (0, 2)] == ["one?", "three?"]
        with pytest.raises(ValueError, match=r"^a\.jsonl:2 \(id bad\): the text has 1 <video>"):
            same[1]
    with pytest.raises(ValueError, match=r"1 faulty records in .*\n  a\.jsonl:2 \(id bad\)"):
        JsonlSource(path, index=tmp_path)


def test_missing_media_are_listed_not_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", asked("<video>", video="a"), asked("<video>", video="b"))
    assert JsonlSource(path).missing == []
    assert JsonlSource(path, known={"b"}).missing == [("a.jsonl:1", "a")]


def test_a_file_changed_while_in_use_is_told(tmp_path):
    path = write(tmp_path / "a.jsonl", asked("one?"), asked("two?"))
    source = JsonlSource(path)
    write(path, asked("one?"))
    assert source[0].turns[0].text == "one?"
    with pytest.raises(ValueError, match=r"a\.jsonl was changed while it was in use: a\.jsonl:2"):
        source[1]


def test_no_file_and_no_records(tmp_path):
    with pytest.raises(ValueError, match="does not say where one text ends"):
        JsonlSource(write(tmp_path / "a.txt", "Once upon a time"))
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        JsonlSource(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no records"):
        JsonlSource(write(tmp_path / "empty.jsonl", "", " "))
