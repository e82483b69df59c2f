# SPDX-License-Identifier: Apache-2.0
"""TFDS datasets, made by real builders without TensorFlow, as sources of the loader's mixture."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_pipeline.conversation import Turn
from data_pipeline.frame_records import MediaInfo, ShardSpec, encode_segments
from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.loader import DataConfig, Loader
from data_pipeline.sources import SourceConfig, open_source
from data_pipeline.tfds_video_conversations import build
from data_pipeline.tokenizer import Tokenizer

LLM = Path(__file__).parents[1] / "fixtures" / "apollo-tiny-a" / "checkpoint" / "llm"
SPEC = ShardSpec(fps=2.0, size=16)
text = tfds.features.Text


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((24, 32, 3), shade, np.uint8)).save(file, "png")
    return file.getvalue()


class Dataset(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What the datasets below have in common."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None
    FEATURES: dict[str, Any]

    def example(self, number: int) -> dict[str, Any]:
        raise NotImplementedError

    def _info(self):
        features = tfds.features.FeaturesDict(self.FEATURES)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(8), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, self.example(number)


class Animals(Dataset, skip_registration=True):
    """A classification set, with pictures of one shade each."""

    FEATURES = {  # noqa: RUF012
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
        "captions": tfds.features.Sequence({"text": text(), "score": np.float32}),
        "size": {"width": np.int64},
    }

    def example(self, number):
        said = [{"text": f"Number {number}.", "score": 0.5}, {"text": "Two.", "score": 1}]
        return {
            "image": png(20 * number),
            "label": number % 2,
            "captions": said,
            "size": {"width": 32},
        }


class Pairs(Dataset, skip_registration=True):
    """Conversations about two pictures each."""

    FEATURES = {  # noqa: RUF012
        "id": text(),
        "pictures": tfds.features.Sequence(tfds.features.Image()),
        "thumbnail": tfds.features.Image(),
        "conversations": tfds.features.Sequence({"from": text(), "value": text()}),
    }

    def example(self, number):
        said = [("human", "<image> or <image>?"), ("gpt", f"The first of {number}.")]
        return {
            "id": f"pair{number}",
            "pictures": [png(100), png(200)],
            "thumbnail": png(0),
            "conversations": [{"from": who, "value": what} for who, what in said],
        }


class Stories(Dataset, skip_registration=True):
    """Plain texts."""

    FEATURES = {"title": text(), "text": text()}  # noqa: RUF012
    ENDING = "."

    def example(self, number):
        return {"title": "A story", "text": f"Once upon a time {number}{self.ENDING}"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tfds")
    for cls in (Animals, Pairs, Stories):
        cls(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root


def source(root: Path, path: str, **fields: Any) -> Any:
    return open_source(SourceConfig(path, data_dir=str(root), **fields))


def test_templates_make_conversations_of_fields(root):
    ask = {"question": "Which animal is this?", "answer": "A {label}."}
    animals = source(root, "tfds:animals@train", **ask)
    records = [animals[i] for i in range(8)]
    assert {r.turns[1].text for r in records} == {"A cat.", "A dog."}
    assert {r.turns[0] for r in records} == {Turn("user", "<image>\nWhich animal is this?")}
    assert [r.id for r in records] == [f"animals/1.0.0@train[{i}]" for i in range(8)]
    assert records[3].media[0].kind == "image"
    assert records[3].media[0].id in records[3].store
    nested = {"question": "Left of <image> {size[width]}?", "answer": "{captions[0][text]}"}
    record = source(root, "tfds:animals:1.0.0@test", **nested)[1]
    assert record.turns[0].text == "Left of <image> 32?"
    assert record.turns[1].text.startswith("Number ")
    assert "tensorflow" not in sys.modules


def test_datasets_of_conversations_need_no_template(root):
    pairs = source(root, "tfds:pairs@train", image="pictures")
    record = pairs[0]
    assert record.id.startswith("pair")
    assert record.turns[0].text == "<image> or <image>?"
    canvas = np.zeros((1, 4, 16, 16, 3), np.uint8)
    for medium, shade in zip(record.media, (100, 200), strict=True):
        assert record.store.read_clips(medium.id, np.zeros((1, 4)), canvas).tolist() == [
            2,
            0,
            12,
            16,
        ]
        assert (np.abs(canvas[:, :, 8, 8].astype(int) - shade) < 3).all()


def test_plain_texts_are_learnt_whole(root):
    stories = source(root, "tfds:stories@test")
    assert {stories[i].turns for i in range(2)} == {
        (Turn("text", f"Once upon a time {n}."),) for n in range(2)
    }


def test_the_fingerprint_changes_with_the_records(root, tmp_path):
    class Changed(Stories, skip_registration=True):
        name, ENDING = "stories", "!"

    Changed(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    then, now = (source(folder, "tfds:stories@train") for folder in (root, tmp_path))
    assert now[0].turns[0].text.endswith("!")
    assert now.fingerprint != then.fingerprint


def test_the_fingerprint_is_the_same_when_built_again(root, tmp_path):
    """In another process: there protocol buffers put their fields in another order."""
    build = f"import {__name__.rpartition('.')[2]} as t; t.Pairs(data_dir={str(tmp_path)!r}, "
    build += "file_format='array_record').download_and_prepare()"
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", build], env=place, check=True, capture_output=True)
    folders = (root, tmp_path)
    then, now = (source(folder, "tfds:pairs@train", image="pictures") for folder in folders)
    assert now.fingerprint == then.fingerprint


def test_splits_may_be_cut_and_a_folder_named(root):
    path = f"tfds:{root}/pairs/1.0.0@train[25%:]+test"
    assert len(open_source(SourceConfig(path, image="pictures"))) == 8


def test_the_fingerprint_tells_datasets_splits_and_templates_apart(root):
    ask = {"question": "?", "answer": "{label}"}
    paths = ("tfds:animals@train", "tfds:animals@test", "tfds:animals@train[:4]")
    prints = [source(root, path, **ask).fingerprint for path in paths]
    prints.append(source(root, paths[0], question="?", answer="It is {label}").fingerprint)
    assert len(set(prints)) == 4
    assert source(root, paths[0], **ask).fingerprint == prints[0]


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("tfds:animals", {}, "names no split; write tfds:animals@train"),
        ("tfds:animls@train", {}, r"no such dataset in .*, which has animals/1\.0\.0, pairs/1"),
        ("tfds:gone/animals/1.0.0@train", {}, r"no dataset in the folder gone/animals/1\.0\.0 "),
        ("tfds:animals@valid", {"answer": "a"}, r"Unknown split 'valid'.*'train', 'test'"),
        ("tfds:animals@train", {}, r"no 'conversations'.*among its fields.*question= and answer="),
        ("tfds:animals@train", {"answer": "{lable}"}, r"'{lable}' asks for .*fields are .*label"),
        ("tfds:animals@train", {"image": "img"}, "no pictures in a field 'img'; .* in image"),
        ("tfds:pairs@train", {}, "pictures in pictures, thumbnail; choose one by image="),
        ("tfds:pairs@train", {"image": "thumbnail"}, "2 <image> placeholders for 1 images"),
    ],
)
def test_mistakes_name_what_there_is(root, path, fields, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        source(root, path, **fields)


def test_other_file_formats_are_told(root, tmp_path):
    folder = tmp_path / "animals" / "1.0.0"
    folder.mkdir(parents=True)
    for name in ("features.json", "dataset_info.json", "label.labels.txt"):
        content = (root / "animals" / "1.0.0" / name).read_text()
        (folder / name).write_text(content.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"tfrecord.* no random access; .*array_record"):
        source(tmp_path, "tfds:animals@train")


def write_videos(folder: Path) -> None:
    """Videos v0 .. v3 of 3 s and shades, with questions about them and a plain text."""
    writer = FrameShardWriter(folder / "frames", SPEC)
    for v in range(4):
        jpegs = [SPEC.encode(np.full((10, 16, 3), 50 * v + 5 * k, np.uint8)) for k in range(6)]
        info = MediaInfo(f"v{v}", "video", 30, 10.0, 3.0, 6, 2.0, 10, 16)
        times = [k / 2 for k in range(6)]
        writer.add(info, encode_segments(info.id, jpegs, times, (10, 16), SPEC))
    writer.close()
    asked = [
        {"id": f"q{v}", "video": f"v{v}", "question": "Dark?", "answer": f"V{v}."} for v in range(4)
    ]
    lines = [*asked[:3], {"id": "t", "text": "Once upon a time."}]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    (folder / "validation.json").write_text(json.dumps(asked[3:]))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """The folder of `write_videos`, built with and without frames below `out`."""
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder)
    for frames in (False, True):
        build(folder, folder / "out", frames=frames)
    return folder


def test_our_dataset_has_the_conversations_and_frames(videos):
    jsonl = open_source(SourceConfig(str(videos / "train.jsonl")))
    expected = {r.id: r for r in (jsonl[i] for i in range(len(jsonl)))}
    for config in ("names", "frames"):
        ours = source(videos / "out", f"tfds:video_conversations/{config}@train")
        found = [ours[i] for i in range(len(ours))]
        assert {r.id for r in found} == set(expected)
        for record in found:
            same = expected[record.id]
            assert (record.turns, record.media) == (same.turns, same.media)
            assert (record.store is None) == (config == "names" or record.id == "t")
    plain: Any = tfds.data_source(
        "video_conversations/frames", split="validation", data_dir=str(videos / "out")
    )
    assert plain[0]["turns"]["text"][1] == b"V3."
    assert [frame.shape for frame in plain[0]["frames"]] == [(10, 16, 3)] * 6
    assert "tensorflow" not in sys.modules


def test_all_kinds_of_sources_enter_one_mixture(root, videos):
    """Every sample of TFDS and JSONL sources, with its pictures, whatever the order."""
    ours = SourceConfig("tfds:video_conversations/frames@train", data_dir=str(videos / "out"))
    named = SourceConfig("tfds:video_conversations/names@train", data_dir=str(videos / "out"))
    config = DataConfig(
        sources={
            "animals": SourceConfig("tfds:animals@train", 1, str(root), "", "?", "A {label}."),
            "inside": ours,
            "named": named,
            "jsonl": SourceConfig(str(videos / "train.jsonl")),
        },
        frames=(str(videos / "frames"),),
        tokenizer=str(LLM),
        batch_size=4,
        length=192,
        clips=6,
        frame_size=16,
        tokens_per_clip=4,
        threads=3,
    )
    tokenizer, shades = Tokenizer.from_path(LLM), {}
    loader = Loader(config, num_steps=12)
    for batch, stats in loader:
        assert stats.bad == ()
        for row in range(4):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                at = (batch.segment_ids[row] == segment) & (batch.loss_weights[row] > 0)
                said = tokenizer.decode(batch.targets[row][at])
                slots = batch.clip_segment_ids[row] == segment
                seen = batch.frames[row, slots][:, :, 8, 8, 0]
                shades.setdefault(said, set()).add(tuple(seen.ravel().tolist()))
    loader.close()
    # What is learnt begins with a text's second token.
    assert set(shades) == {"A cat.", "A dog.", "V0.", "V1.", "V2.", "nce upon a time."}
    assert len(shades["A cat."]) == 4  # shades 0, 40, 80, 120
    for v in range(3):  # the same frames from a record, and by name from TFDS and JSONL
        (frames,) = shades[f"V{v}."]
        assert abs(frames[0] - 50 * v) < 9


def test_the_builder_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match="none is no folder with SPLIT"):
        build(tmp_path / "none", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"is no folder with SPLIT\.jsonl"):
        build(tmp_path, tmp_path / "out")
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError, match="frames is no complete set of frame shards"):
        build(tmp_path, tmp_path / "out")
