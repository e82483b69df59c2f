# SPDX-License-Identifier: Apache-2.0
"""Samples: which clips a record gets when a row is too short for all of them."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipeline.annotations import Media, Record
from data_pipeline.conversation import Turn
from data_pipeline.samples import TOO_LONG, TOO_MANY, SampleMaker, Unusable
from data_pipeline.sampling import ClipSampling, sample_clips
from data_pipeline.tokenizer import Tokenizer

LLM = Path(__file__).parents[1] / "fixtures" / "apollo-tiny-a" / "checkpoint" / "llm"
TOKENIZER = Tokenizer.from_path(LLM)


class Shards(dict):
    """Facts about media, without frames: {id: (kind, seconds)} at 30 fps."""

    def info(self, media_id: str) -> SimpleNamespace:
        kind, seconds = self[media_id]
        return SimpleNamespace(kind=kind, fps=30.0, num_frames=30 * seconds, duration=seconds)


SHARDS: Any = Shards(hour=("video", 3600), minute=("video", 60), a=("image", 0), b=("image", 0))


def make(media: list[str], length=10**6, clips=10**4, sampling="", **how):
    kinds = [SHARDS[name][0] for name in media]
    text = "".join(f"<{kind}>\n" for kind in kinds) + "What?"
    named = tuple(Media(kind, name) for kind, name in zip(kinds, media, strict=True))
    record = Record("r", (Turn("user", text), Turn("assistant", "That.")), named, sampling)
    maker = SampleMaker([SHARDS], TOKENIZER, ClipSampling(**how), 8, length, clips)
    return maker.make(record)


def frames(sample) -> list[np.ndarray]:
    return [indices for _, _, indices in sample.media]


def test_clips_are_those_of_the_sampler():
    expected = sample_clips(ClipSampling(), fps=30.0, num_frames=1800, duration=60)
    sample = make(["minute"])
    np.testing.assert_array_equal(frames(sample)[0], expected.frame_indices)
    assert (sample.text.visual_index >= 0).sum() == 8 * sample.clips == 8 * 30
    assert make(["minute"], max_clips=7).clips == 7
    assert make(["minute"], mode="uniform", uniform_frames=32).clips == 8
    assert (frames(make(["minute"], sampling="centre"))[0] == 900).all()


@pytest.mark.parametrize("media", [["hour"], ["hour", "a"], ["hour", "minute"]])
@pytest.mark.parametrize("length", [300, 777, 2048])
def test_a_short_row_gets_as_many_spread_clips_as_fit(media, length):
    sample = make(media, length=length)
    assert len(sample.text.tokens) <= length
    most = max(len(part) for part in frames(sample))
    whole = sample_clips(ClipSampling(max_clips=most), fps=30.0, num_frames=108000, duration=3600)
    np.testing.assert_array_equal(frames(sample)[0], whole.frame_indices)
    one_more = make(media, max_clips=most + 1)
    assert len(one_more.text.tokens) > length
    assert sample.trimmed
    assert not one_more.trimmed


def test_a_plain_text_loses_its_end():
    record = Record("r", (Turn("text", "word " * 50),), ())
    maker = SampleMaker([], TOKENIZER, ClipSampling(), 8, 10**6, 9)
    whole, cut = maker.make(record), dataclasses.replace(maker, length=20).make(record)
    assert (whole.trimmed, cut.trimmed) == (False, True)
    np.testing.assert_array_equal(cut.text.tokens, whole.text.tokens[:20])
    assert len(cut.text.loss_weights) == len(cut.text.visual_index) == 20


def test_videos_share_the_clip_slots_that_images_leave():
    sample = make(["hour", "a", "minute", "b"], clips=13)
    assert [len(part) for part in frames(sample)] == [5, 1, 5, 1]
    assert frames(sample)[1].tolist() == [[0, 0, 0, 0]]
    assert sample.seconds == 3660
    assert sample.trimmed
    assert not make(["minute"]).trimmed
    assert not make(["minute"], max_clips=7, clips=7).trimmed  # what was asked for
    assert make(["minute"], max_clips=8, clips=7).trimmed


def test_what_a_longer_row_would_hold():
    turns = (Turn("user", "<video>\n<image>\nWhat?"), Turn("assistant", "That."))
    record = Record("r", turns, (Media("video", "minute"), Media("image", "a")))
    maker = SampleMaker([SHARDS], TOKENIZER, ClipSampling(), 8, 10**6, 9)
    assert maker.wanted_clips(record) == 31
    assert maker.make(record).clips == 9
    assert maker.wanted_clips(dataclasses.replace(record, sampling="centre")) == 2
    found = maker.info("minute", record)
    assert found is not None
    assert found.duration == 60
    assert maker.info("none") is None


def test_media_inside_a_record_come_before_those_of_the_shards():
    inside: Any = Shards(minute=("video", 2))
    turns = (Turn("user", "<video> <video>"), Turn("assistant", "That."))
    media = (Media("video", "minute"), Media("video", "hour"))
    maker = SampleMaker([SHARDS], TOKENIZER, ClipSampling(max_clips=9), 8, 10**6, 99)
    sample = maker.make(Record("r", turns, media, store=inside))
    assert [store is inside for store, _, _ in sample.media] == [True, False]
    assert [len(part) for part in frames(sample)] == [1, 9]


def test_what_cannot_fit_says_why():
    with pytest.raises(Unusable, match="3 media need more than the 2 clip slots") as error:
        make(["a", "b", "minute"], clips=2)
    assert error.value.outcome == TOO_MANY
    with pytest.raises(Unusable, match=r"needs \d+ tokens even .*a row holds 50") as error:
        make(["hour"], length=50)
    assert error.value.outcome == TOO_LONG
    with pytest.raises(ValueError, match=r"needs \d+ tokens"):
        make(["a"], length=30)
