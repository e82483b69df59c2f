# SPDX-License-Identifier: Apache-2.0
import dataclasses

import av
import numpy as np
import pytest
from PIL import Image

from apollo_jax.checkpoints import manager
from apollo_jax.checkpoints.pretrained import config_from_pretrained
from apollo_jax.config import Experiment, TrainConfig
from apollo_jax.inference.processor import Processor
from apollo_jax.models import apollo
from data_pipeline.loader import DataConfig
from data_pipeline.sampling import ClipSampling

SIGLIP, INTERNVIDEO2 = "siglip-so400m-patch14-384", "internvideo2"


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 20, 28, 3), np.uint8)


def assert_official(example, official):
    """Pixels bit for bit, whatever the axis order of the official code."""
    siglip = official["pixel_values_siglip"].transpose(0, 1, 3, 4, 2)
    internvideo2 = official["pixel_values_internvideo2"].transpose(0, 2, 3, 4, 1)
    np.testing.assert_array_equal(example.pixels[SIGLIP], siglip)
    np.testing.assert_array_equal(example.pixels[INTERNVIDEO2], internvideo2)


@pytest.mark.parametrize("source", ["frames", "file"])
def test_a_video_is_what_the_official_code_makes_of_it(processor, official, video, source):
    fps = float(official["fps"])
    given = {"video": video} if source == "file" else {"frames": official["video"], "fps": fps}
    example = processor(prompt=str(official["question"]), **given)
    assert example.prompt == str(official["prompt"])
    ids = np.where(example.visual_index >= 0, -200, example.tokens)
    np.testing.assert_array_equal(ids, official["prompt_ids"])
    np.testing.assert_array_equal(example.visual_index[example.visual_index >= 0], np.arange(16))
    np.testing.assert_array_equal(example.clip_indices, official["clip_indices"])
    np.testing.assert_array_equal(example.timestamps, official["timestamps"])
    assert_official(example, official)


def test_an_image_is_one_clip_that_shows_it_four_times(processor, image, tmp_path):
    Image.fromarray(image["image"]).save(tmp_path / "image.png")
    example = processor(image=tmp_path / "image.png", prompt="What is it?")
    assert_official(example, image)
    assert "<|image_token|>" * 8 + "\nWhat is it?<|im_end|>" in example.prompt
    assert (example.visual_index >= 0).sum() == 8
    np.testing.assert_array_equal(example.clip_indices, np.zeros((1, 4)))


def test_without_a_medium_there_are_no_clips(processor):
    example = processor(prompt="Hello?")
    assert example.pixels == {}
    assert example.clip_indices.shape == (0, 4)
    assert example.timestamps.shape == (0, 2)
    assert (example.visual_index == -1).all()
    assert example.prompt.endswith("user\nHello?<|im_end|>\n<|im_start|>assistant\n")


def test_the_medium_stands_where_the_prompt_says(processor, noise):
    example = processor(frames=noise, fps=8.0, prompt="Watch this: <video> What was it?")
    before, _, after = example.prompt.partition("You are provided")
    assert before.endswith("user\nWatch this:\n\n")
    assert after.endswith("\n\nWhat was it?<|im_end|>\n<|im_start|>assistant\n")


def test_clips_of_a_long_video_take_their_share_of_the_context(processor):
    big = dataclasses.replace(processor, tokens_per_clip=128, max_length=4096)
    sampled = big.sample(fps=4.0, num_frames=800, duration=200.0)  # 100 clips
    assert len(sampled.timestamps) == np.ceil(4096 * 0.65 / 128)
    assert sampled.timestamps[-1, 1] > 190
    half = dataclasses.replace(big, visual_share=0.325)
    assert len(half.sample(fps=4.0, num_frames=800, duration=200.0).timestamps) == 11


def test_where_times_take_more_room_than_clips_there_are_fewer(processor):
    frames = np.zeros((800, 4, 4, 3), np.uint8)  # 8 tokens and some 17 of text per clip
    example = processor(frames=frames, fps=4.0, prompt="What?")
    assert 0.8 * 512 < len(example.tokens) < 512
    assert example.timestamps[-1, 1] > 180


def test_the_sampling_can_be_replaced(processor, noise):
    uniform = dataclasses.replace(processor, sampling=ClipSampling("uniform", uniform_frames=8))
    indices = uniform(frames=noise, fps=8.0, prompt="?").clip_indices
    np.testing.assert_array_equal(indices, [[1, 4, 7, 10], [13, 16, 19, 22]])
    centre = dataclasses.replace(processor, sampling=ClipSampling("centre"))
    np.testing.assert_array_equal(
        centre(frames=noise, fps=8.0, prompt="?").clip_indices, [[12, 12, 12, 12]]
    )


@pytest.mark.parametrize("mode", ["missing", "empty", "text", "audio"])
def test_a_file_that_is_no_video_is_named(processor, tmp_path, mode):
    path = tmp_path / "clip.mp4"
    if mode == "empty":
        path.touch()
    if mode == "text":
        path.write_text("not a video\n" * 200)
    if mode == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", 16_000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            sound.sample_rate = 16_000
            container.mux([*stream.encode(sound), *stream.encode()])
    with pytest.raises(ValueError, match=r"clip\.mp4.*(no such|0 bytes|not a video|no video)"):
        processor(video=path, prompt="What?")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "<image> What?"}, "speaks of <image> but neither video nor image was given"),
        ({"prompt": "<image> What?", "frames": 1}, "speaks of <image> but video was given"),
        ({"prompt": "<video> or <video>?", "frames": 1}, "speaks of <video>, <video> but video"),
        ({"prompt": "What?", "frames": 1, "video": "a.mp4"}, "one of .* not video and frames"),
        ({"prompt": "What?", "frames": 1, "fps": None}, "frames need their fps"),
        ({"prompt": "word " * 600}, r"the prompt has \d+ tokens \(0 of them visual\).*at most 512"),
    ],
)
def test_what_does_not_fit_together_is_said(processor, noise, given, message):
    given = {"fps": 8.0, **given}
    if "frames" in given:
        given["frames"] = noise
    with pytest.raises(ValueError, match=message):
        processor(**given)


def test_a_run_is_asked_as_it_was_trained(checkpoint, processor, tmp_path):
    model = config_from_pretrained(checkpoint)
    assert isinstance(model, apollo.Config)
    data = DataConfig(
        sources={},
        frames=(),
        tokenizer="",
        batch_size=2,
        length=256,
        clips=6,
        frame_size=30,
        tokens_per_clip=8,
        max_clips=3,
    )
    experiment = Experiment("run", model, data, TrainConfig(num_steps=1))
    manager.write_run(tmp_path, experiment, processor.tokenizer)
    (tmp_path / "checkpoints").mkdir()
    of_run = Processor.from_pretrained(tmp_path)
    assert of_run.sampling == ClipSampling(max_clips=3)
    assert of_run.tokenizer.encode("What?") == processor.tokenizer.encode("What?")
    assert (of_run.towers, of_run.tokens_per_clip) == (processor.towers, 8)


def test_a_folder_must_hold_a_whole_model(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="llm holds qwen2, not a whole Apollo"):
        Processor.from_pretrained(checkpoint / "llm")
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        Processor.from_pretrained(tmp_path / "nothing-here")
