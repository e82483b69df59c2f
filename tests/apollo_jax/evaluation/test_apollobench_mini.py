# SPDX-License-Identifier: Apache-2.0
"""The world's files: readable, consistent with each other, the same for any number of workers."""

import collections
import json

import av
import numpy as np
from PIL import Image

from apollo_jax.evaluation import scenes
from apollo_jax.evaluation.apollobench_mini import write_video, write_world


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_conversations_name_existing_media(world):
    for path in sorted((world / "train").glob("*.jsonl")):
        records = _lines(path)
        assert len({record["id"] for record in records}) == len(records)
        for record in records:
            media = [record.get("video"), record.get("image"), *record.get("images", [])]
            media = [name for name in media if name]
            assert all((world / name).is_file() for name in media)
            text = "".join(turn["value"] for turn in record["conversations"])
            assert text.count("<video>") + text.count("<image>") == len(media)
            senders = [turn["from"] for turn in record["conversations"]]
            assert senders == ["human", "gpt"] * (len(senders) // 2)


def test_control_records(world):
    records = _lines(world / "train/qa_video.jsonl")
    kinds = collections.Counter(record["id"].rsplit("_")[-1] for record in records)
    assert set(kinds) == {"qa", "text", "centre"}
    for record in records:
        assert (record.get("sampling") == "centre") == record["id"].endswith("_centre")
        assert ("video" in record) != record["id"].endswith("_text")
        # a second question about one video could be answered from the first answer
        assert len(record["conversations"]) == 2


def test_an_answer_is_one_of_the_options(world):
    for record in _lines(world / "train/qa_video.jsonl") + _lines(world / "train/text.jsonl"):
        said = [turn["value"] for turn in record["conversations"]]
        for question, answer in zip(said[::2], said[1::2], strict=True):
            if "Describe" not in question:
                assert answer in question.splitlines()[-4:]


def test_benchmark_is_balanced(world):
    questions = _lines(world / "test.jsonl")
    for family in scenes.FAMILIES:
        answers = collections.Counter(q["answer"] for q in questions if q["family"] == family)
        assert set(answers) == {0, 1, 2, 3}
        assert len(set(answers.values())) == 1


def test_files_can_be_decoded(world):
    for question in _lines(world / "test.jsonl"):
        with av.open(str(world / question["video"])) as container:
            stream = container.streams.video[0]
            assert (stream.average_rate, stream.width, stream.height) == (8, 64, 64)
            assert stream.frames % 8 == 0
    with Image.open(world / "images/00000.png") as image:
        assert image.size == (64, 64)


def test_workers_do_not_change_the_world(world, tmp_path):
    write_world(tmp_path, train_scenes=48, test_scenes_per_family=4, seed=3, workers=2)
    files = [path.relative_to(world) for path in sorted(world.rglob("*")) if path.is_file()]
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for name in files:
        assert (world / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_video_keeps_frames_and_colours(tmp_path):
    frames = scenes.make_scene("ocr", np.random.default_rng(0)).frames
    write_video(tmp_path / "x.mp4", frames)
    with av.open(str(tmp_path / "x.mp4")) as container:
        back = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 6
