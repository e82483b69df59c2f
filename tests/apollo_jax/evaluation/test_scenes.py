# SPDX-License-Identifier: Apache-2.0
"""The scenes show what they claim, and a centre frame never gives the answer away."""

import numpy as np
import pytest

from apollo_jax.evaluation import pictures, scenes


def _many(family, number=60):
    return [scenes.make_scene(family, np.random.default_rng(i)) for i in range(number)]


@pytest.mark.parametrize("family", scenes.FAMILIES)
def test_scene_form(family):
    for scene in _many(family):
        count, *shape = scene.frames.shape
        assert scene.frames.dtype == np.uint8
        assert shape == [64, 64, 3]
        assert 3 <= count / scenes.FPS <= 12
        for question in scene.questions:
            assert len(set(question.options)) == 4
            assert question.temporal == (family != "static")


@pytest.mark.parametrize("family", scenes.FAMILIES)
def test_same_seed_same_scene(family):
    first, second = (scenes.make_scene(family, np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first.frames, second.frames)
    assert first[1:] == second[1:]


def test_caption_agrees_with_answers():
    for family, words in {"ocr": (1, 5), "color": (1, 5), "ego": (1, 3)}.items():
        for scene in _many(family):
            said = {scene.caption.split()[i] for i in words}
            assert said == {q.options[q.answer] for q in scene.questions}


def test_centre_shows_the_middle_or_rest():
    for scene in _many("color"):
        middle = scene.caption.split()[3]
        assert tuple(scene.frames[len(scene.frames) // 2, 0, 0]) == pictures.COLORS[middle]
        for question in scene.questions:
            assert middle not in question.options
    rest = pictures.draw_door(0, 0, 0)[..., 0] == 150
    for scene in _many("ego"):
        door = scene.frames[len(scene.frames) // 2, ..., 0] == 150
        np.testing.assert_array_equal(door, rest)


@pytest.mark.parametrize(("family", "expected"), [("dur", 1.0), ("count", 0.0), ("blink", 0.5)])
def test_centre_light_is_independent_of_the_answer(family, expected):
    by_answer = {}
    for scene in _many(family, 200):
        question = scene.questions[0]
        middle = len(scene.frames) // 2
        for frame in scene.frames[[middle - 1, middle]]:
            lit = frame[32, 32].max() > 200
            by_answer.setdefault(question.options[question.answer], []).append(lit)
    assert len(by_answer) == 4
    for lit in by_answer.values():
        assert abs(np.mean(lit) - expected) <= (0.25 if family == "blink" else 0)


def _runs(scene):
    """Lengths of the lit runs, in frames."""
    lit = scene.frames[:, 32, 32].max(-1) > 200
    edges = np.flatnonzero(np.diff(np.concatenate([[0], lit, [0]])))
    return edges[1::2] - edges[::2]


def test_lights_keep_time():
    for scene in _many("dur"):
        question = scene.questions[0]
        seconds = scenes.LENGTHS[question.options[question.answer]]
        assert _runs(scene).tolist() == [seconds * scenes.FPS]
    for scene in _many("count"):
        question = scene.questions[0]
        assert len(_runs(scene)) == scenes.NUMBERS.index(question.options[question.answer]) + 1
    for scene in _many("blink"):
        question = scene.questions[0]
        period = scenes.PERIODS[question.options[question.answer]]
        runs = _runs(scene)
        assert max(runs, default=0) <= (period * scenes.FPS // 2 or len(scene.frames))
        changes = np.abs(np.diff(scene.frames[:, 32, 32, 0].astype(int))).astype(bool).sum()
        assert bool(changes) == bool(period)


def test_unknown_family_lists_the_known():
    with pytest.raises(ValueError, match=r"speeed.*ocr"):
        scenes.make_scene("speeed", np.random.default_rng(0))


def test_stills_have_captions():
    captions = {pictures.draw_still(np.random.default_rng(i))[1].split()[0] for i in range(100)}
    assert {"number", "screen", "door", "light", "lamp", "star"} < captions
