# SPDX-License-Identifier: Apache-2.0
"""Benchmarks in the shapes people publish them, and errors that name the record."""

import json

import pytest

from apollo_jax.evaluation import benchmark

GOOD = {"id": "q1", "question": "What?", "options": ["x", "y"], "answer": 1}


def _write(folder, *records, name="test.jsonl"):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _load(folder, *records):
    return benchmark.load("multiple_choice", _write(folder, *records)).questions


@pytest.mark.parametrize(
    "fields",
    [
        {"options": ["x", "y", "z"], "answer": 1},
        {"options": ["A. x", "B. y", "C. z"], "answer": "B"},
        {"options": ["(A) x", "(B) y", "(C) z"], "answer": "B. y"},
        {"candidates": ["x", "y", "z"], "answer": "y"},
        {"a0": "x", "a1": "y", "a2": "z", "answer_id": 1},
        {"option0": "x", "option1": "y", "option2": "z", "option3": "N/A", "correct_choice": 1},
    ],
)
def test_field_names(tmp_path, fields):
    (question,) = _load(tmp_path, {"question": "What?", **fields})
    assert question.options == ("x", "y", "z")
    assert question.answer == 1


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_question_may_hold_other_line_separators(tmp_path, separator):
    asked = f"What?{separator}And why?"
    line = json.dumps(GOOD | {"question": asked}, ensure_ascii=False)
    (tmp_path / "test.jsonl").write_text(f"{line}\n")
    (question,) = benchmark.load("multiple_choice", tmp_path).questions
    assert question.question == asked


def test_media_are_relative_to_the_file(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/1.mp4").touch()
    (question,) = _load(tmp_path, {**GOOD, "video_path": "v/1.mp4", "type": "order"})
    assert question.video == str(tmp_path / "v/1.mp4")
    assert question.category == "order"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**GOOD, "answer": 2}, r"line 1 \(id q1\): answer 2 is neither"),
        ({**GOOD, "answer": "C"}, r"line 1 \(id q1\): answer 'C'"),
        ({**GOOD, "options": ["x"]}, r"q1\): needs a list of 2"),
        ({**GOOD, "question": ""}, r"q1\): has no 'question'"),
        ({**GOOD, "start": 3.0}, r"q1\): 'start'"),
    ],
)
def test_bad_records_are_named(tmp_path, record, message):
    with pytest.raises(ValueError, match=message):
        _load(tmp_path, record)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"first .*1\.mp4"):
        _load(tmp_path, {**GOOD, "video": "1.mp4"})
    with pytest.raises(ValueError, match="'q1' occurs twice"):
        _load(tmp_path, GOOD, GOOD)
    with pytest.raises(ValueError, match=r"'apollobnch' is unknown.*apollobench_mini"):
        benchmark.load("apollobnch", tmp_path)
    with pytest.raises(FileNotFoundError, match="--data"):
        benchmark.load("apollobench", tmp_path / "nowhere")
    (tmp_path / "test.jsonl").write_text('{"id": 1,\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        benchmark.load("apollobench", tmp_path)
