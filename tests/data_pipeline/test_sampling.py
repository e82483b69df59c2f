# SPDX-License-Identifier: Apache-2.0
"""Apollo's sampling rule against 750 recorded cases, and the decisions where it breaks."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.sampling import (
    ClipSampling,
    calculate_sample_indices,
    clip_sampling_ratio,
    sample_clips,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "apollo-tiny-a"
CASES = json.loads((FIXTURE / "sampling_cases.json").read_text())
INPUTS = ("clip_duration", "frames_per_clip", "total_frames", "fps", "duration", "ratio")


def well_formed(case):
    return all(len(c) == case["frames_per_clip"] and min(c) >= 0 for c in case["clips"])


def our_clips(case):
    sampling = ClipSampling(
        clip_duration=case["clip_duration"], frames_per_clip=case["frames_per_clip"]
    )
    return sample_clips(
        sampling,
        fps=case["fps"],
        num_frames=case["total_frames"],
        duration=case["duration"],
        ratio=case["ratio"],
    )


def test_the_published_rule_is_reproduced_exactly():
    assert len(CASES) == 750
    for case in CASES:
        indices, stamps = calculate_sample_indices(*[case[k] for k in INPUTS])
        assert indices.tolist() == [i for clip in case["clips"] for i in clip], case
        assert [list(s) for s in stamps] == case["timestamps"], case


def test_sample_clips_is_the_published_rule_where_that_is_well_formed():
    broken = [case for case in CASES if not well_formed(case)]
    assert len(broken) == 78  # 62 with frame -1, 16 with 20 frames in a clip of 16
    for case in CASES:
        clips = our_clips(case)
        if well_formed(case):
            assert clips.frame_indices.tolist() == case["clips"]
            assert clips.timestamps.tolist() == case["timestamps"]
        else:
            assert clips.frame_indices.shape == (len(case["clips"]), case["frames_per_clip"])
            assert clips.frame_indices.min() >= 0
            assert clips.frame_indices.max() < case["total_frames"]


def test_a_slow_video_is_covered_from_end_to_end():
    """0.3 fps, 30 frames in 100 s: the published rule answers frame -1 fifty times."""
    clips = sample_clips(ClipSampling(max_clips=10), fps=0.3, num_frames=30, duration=100.0)
    assert clips.frame_indices[:, 0].tolist() == [0, 3, 6, 9, 12, 16, 19, 22, 25, 29]
    assert (clips.frame_indices == clips.frame_indices[:, :1]).all()


def test_a_misaligned_clip_holds_the_frames_on_screen():
    """16 frames in 5 s of a 1 fps video: every source frame stays for about 3.2 of them."""
    sampling = ClipSampling(clip_duration=5, frames_per_clip=16)
    clips = sample_clips(sampling, fps=1.0, num_frames=5, duration=5.0)
    expected = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert clips.frame_indices.tolist() == [expected]


def test_uniform_takes_the_middle_of_equal_parts():
    sampling = ClipSampling(mode="uniform", uniform_frames=8)
    clips = sample_clips(sampling, fps=10.0, num_frames=80, duration=8.0)
    assert clips.frame_indices.tolist() == [[5, 15, 25, 35], [45, 55, 65, 75]]
    assert clips.timestamps.tolist() == [[0.5, 3.5], [4.5, 7.5]]


def test_centre_repeats_the_middle_frame():
    clips = sample_clips(ClipSampling(mode="centre"), fps=10.0, num_frames=37, duration=3.7)
    assert clips.frame_indices.tolist() == [[18, 18, 18, 18]]
    assert clips.timestamps.tolist() == [[1.8, 1.8]]


@given(
    fps=st.floats(0.01, 240),
    num_frames=st.integers(1, 100_000),
    clip_duration=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    frames_per_clip=st.integers(1, 32),
    max_clips=st.integers(1, 50),
    mode=st.sampled_from(["fps", "uniform", "centre"]),
)
def test_clips_are_always_valid(fps, num_frames, clip_duration, frames_per_clip, max_clips, mode):
    sampling = ClipSampling(mode, clip_duration, frames_per_clip, max_clips, 4 * frames_per_clip)
    clips = sample_clips(sampling, fps=fps, num_frames=num_frames, duration=num_frames / fps)
    count = len(clips.frame_indices)
    assert 1 <= count <= sampling.max_clips
    assert clips.frame_indices.shape == (count, frames_per_clip)
    assert clips.timestamps.shape == (count, 2)
    assert clips.frame_indices.min() >= 0
    assert clips.frame_indices.max() < num_frames
    assert (np.diff(clips.frame_indices, axis=1) >= 0).all()


def test_the_clip_ratio_of_the_fixture():
    z = np.load(FIXTURE / "fixture.npz")
    setting = float(z["clip_sampling_ratio_setting"])
    ratio = clip_sampling_ratio(float(z["duration"]), 512, setting, 8, 2)
    assert ratio == float(z["clip_sampling_ratio_effective"])
    assert clip_sampling_ratio(10_000.0, 512, 0.65, 8, 2.0) == pytest.approx(0.00832)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"mode": "unifrom"},
        {"clip_duration": 0.0},
        {"mode": "uniform", "uniform_frames": 6},
    ],
)
def test_a_wrong_setting_is_named(kwargs):
    with pytest.raises(ValueError, match=str(next(iter(kwargs.values())))):
        ClipSampling(**kwargs)


def test_a_video_without_frames_is_an_error():
    with pytest.raises(ValueError, match="0 frames"):
        sample_clips(ClipSampling(), fps=30.0, num_frames=0, duration=0.0)
