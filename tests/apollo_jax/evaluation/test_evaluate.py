# SPDX-License-Identifier: Apache-2.0
"""Evaluation end to end with an untrained model: what is asked, resumed, scored and refused."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from apollo_jax.evaluation import answering, benchmark
from apollo_jax.evaluation.answering import Answerer, Reply, read_ahead, waves
from apollo_jax.evaluation.evaluate import evaluate, make_runs, read_responses
from apollo_jax.evaluation.multiple_choice import PromptFormat


@pytest.fixture(scope="module")
def bench(world):
    return benchmark.load("apollobench_mini", world)


@pytest.fixture
def answers(monkeypatch):
    """Answers without a model: always the first option; records what was asked."""
    asked = []

    def first(self, wave):
        asked.extend(seen for seen in wave)
        return [Reply(0, seen.question.options[0]) for seen in wave]

    monkeypatch.setattr(Answerer, "__call__", first)
    return asked


def test_every_run_asks_every_question(model, processor, bench, answers, tmp_path):
    results = evaluate(model, processor, bench, tmp_path, samplings=("fps", "uniform:8"))
    assert list(results["runs"]) == ["video-fps", "video-uniform8", "image", "text"]
    assert results == json.loads((tmp_path / "results.json").read_text())
    number = len(bench.questions)
    assert len(answers) == 4 * number
    for name, run in results["runs"].items():
        assert run["overall"]["questions"] == number
        assert run["overall"]["accuracy"] == 0.25  # the answers are spread evenly
        rows = read_responses(tmp_path, name)
        assert [row["video"] for row in rows] == [q.video for q in bench.questions]
    clips = [0 if seen.media is None else len(seen.media.frame_indices) for seen in answers]
    assert set(clips[number : 2 * number]) == {2}
    assert set(clips[2 * number : 3 * number]) == {1}
    assert set(clips[3 * number :]) == {0}
    assert len({id(seen.media) for seen in answers[:number]}) == len(
        {q.video for q in bench.questions}
    )


def test_resume_asks_only_what_is_left(model, processor, bench, answers, tmp_path):
    def run(**options):
        del answers[:]
        return evaluate(model, processor, bench, tmp_path, modalities=["text"], **options)

    whole = run()["runs"]["text"]
    path = tmp_path / "responses-text.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:10]) + lines[10][:25])  # killed while writing
    resumed = run()["runs"]["text"]
    assert len(answers) == len(lines) - 10
    assert {k: v for k, v in resumed.items() if k != "seconds"} == {
        k: v for k, v in whole.items() if k != "seconds"
    }
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)
    with pytest.raises(ValueError, match=r"other weights, prompts or settings.*--overwrite"):
        run(scoring="cloze")
    run(scoring="cloze", overwrite=True)
    assert len(answers) == len(lines)


def test_broken_video_is_a_row(model, processor, bench, answers, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video" * 200)
    first, *others = bench.questions[:4]
    bench = dataclasses.replace(
        bench, questions=[dataclasses.replace(first, video=str(broken)), *others]
    )
    evaluate(model, processor, bench, tmp_path, modalities=["video"])
    rows = {row["id"]: row for row in read_responses(tmp_path, "video-fps")}
    bad = rows.pop(first.id)
    assert bad["status"] == "decode_error"
    assert "broken.mp4" in bad["error"]
    assert not bad["correct"]
    assert all(row["status"] == "ok" for row in rows.values())


@pytest.mark.parametrize("scoring", ["generate", "letter", "cloze"])
def test_scoring_is_the_same_in_any_company(model, processor, bench, scoring, monkeypatch):
    """A question's answer does not depend on the other rows of its batch."""
    monkeypatch.setattr(answering, "ROWS", 4)
    answerer = Answerer(model, processor, PromptFormat(), scoring, max_new_tokens=4)
    seen = list(read_ahead(processor, bench.questions[:6]))
    together = answerer(seen)
    assert len(together) == 6
    assert together[4:] == answerer(seen[4:])
    if scoring != "generate":
        assert all(reply.choice is not None for reply in together)


def test_cloze_takes_the_likeliest_option(model, processor, bench, monkeypatch):
    """With a likelihood of our own making: only the option's tokens count, per token."""
    question = dataclasses.replace(
        bench.questions[0], options=("two seconds", "one", "never"), answer=1
    )
    ids = {processor.tokenizer.encode(option)[-1]: option for option in question.options}

    def likelihood(model, tokens, visual_tokens, visual_index, lengths, *, starts):
        options = [ids[row[length - 1]] for row, length in zip(tokens, lengths, strict=True)]
        mean = np.array([{"two seconds": -1.0, "one": -0.9, "never": -2.0}[o] for o in options])
        return mean * (lengths - starts)

    monkeypatch.setattr(answering.decoding, "log_likelihood", likelihood)
    answerer = Answerer(model, processor, PromptFormat(), "cloze")
    assert answerer([answering.Seen(question, None)]) == [Reply(1, "one")]


def test_waves_keep_a_video_together(processor, bench):
    seen = list(read_ahead(processor, bench.questions))
    groups = list(waves(seen))
    assert [one for group in groups for one in group] == seen
    assert len(groups) > 1
    for before, after in itertools.pairwise(groups):
        assert before[-1].media is not after[0].media


def test_unknown_names_are_refused(processor):
    with pytest.raises(ValueError, match=r"'audio' is unknown; known: video, image, text"):
        make_runs(["audio"], ["fps"], processor.sampling)  # pyright: ignore[reportArgumentType]
    for name in ("unifrom:8", "uniform", "fps:2"):
        with pytest.raises(ValueError, match=rf"{name!r} is neither"):
            make_runs(["video"], [name], processor.sampling)
