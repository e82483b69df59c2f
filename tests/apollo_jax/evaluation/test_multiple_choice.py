# SPDX-License-Identifier: Apache-2.0
"""Reading the choice out of a reply; scores with honest intervals."""

import numpy as np
import pytest

from apollo_jax.evaluation.multiple_choice import (
    PromptFormat,
    Question,
    parse_choice,
    question_text,
    score,
    summarise,
)

OPTIONS = ("red", "blue", "green", "Vitamin C")


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("B", 1),
        ("b", 1),
        ("(b)", 1),
        ("B.", 1),
        ("blue (B)", 1),
        ("(B) blue", 1),
        ("B. blue, not A", 1),  # the start before everything else
        ("It shows C and then D, so B", 1),  # then the end
        ("The answer is C because (A) is wrong here", 2),
        ("Not (A) but (B) here", 1),  # the last of one form
        ("I exclude (A). Maybe C) fits best there", 0),  # parentheses before the rest
        ("Best option: (C", 2),
        ("<think>A A A</think> D", 3),
        ("blue", 1),
        ("Blue.", 1),
        ("Vitamin C", 3),  # the text of an option, not the letter at its end
        ("Because of the light", None),
        ("E", None),  # not an option
        ("", None),
        ("a red thing", None),
    ],
)
def test_parse_choice(reply, choice):
    assert parse_choice(reply, OPTIONS) == choice


def test_question_text():
    question = Question("What?", ("x", "y"), 0, "c")
    assert question_text(question) == "What?\n(A) x\n(B) y"
    prompt = PromptFormat("{letter}. {text}", "Choose.")
    assert question_text(question, prompt) == "What?\nA. x\nB. y\nChoose."


def test_wilson_interval():
    # 8 of 10: the textbook interval 0.490 to 0.943.
    result = score([True] * 8 + [False] * 2, [str(i) for i in range(10)])
    np.testing.assert_allclose((result.low, result.high), (0.490, 0.943), atol=2e-3)


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(0)
    per_video = rng.random(50) < 0.6
    correct, videos = per_video.repeat(4).tolist(), np.arange(50).repeat(4).astype(str).tolist()
    clustered = score(correct, videos)
    alone = score(correct, [str(i) for i in range(200)])
    once = score(per_video.tolist(), [str(i) for i in range(50)])
    assert clustered.high - clustered.low > 1.8 * (alone.high - alone.low)
    # Four copies of an answer tell as much as one.
    np.testing.assert_allclose((clustered.low, clustered.high), (once.low, once.high))


def test_all_right_is_not_certain():
    result = score([True] * 20, [str(i // 2) for i in range(20)])
    assert result.accuracy == 1
    assert result.high == pytest.approx(1)
    assert 0.6 < result.low < 0.8


def _row(**fields):
    base = dict(
        id="q", video="v", category="a", family="f", temporal=True, options=["x", "y"],
        correct=True, parse_ok=True, status="ok",
    )  # fmt: skip
    return base | fields


def test_summary():
    rows = [
        _row(video="1"),
        _row(video="2", correct=False, parse_ok=False),
        _row(video="3", category="b", temporal=False, family="g"),
        _row(video="4", category="b", family="g", status="decode_error", correct=False),
    ]
    result = summarise(rows)
    assert result["overall"]["accuracy"] == 0.5
    assert result["temporal"]["questions"] == 3
    assert result["macro"] == 0.5
    assert result["categories"]["b"]["questions"] == 2
    assert (result["chance"], result["parse_rate"], result["errors"]) == (0.5, 0.75, 1)
