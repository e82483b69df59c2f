# SPDX-License-Identifier: Apache-2.0
"""The whole pipeline over small real shards: content, determinism, resuming, bad data."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batch import Batch, empty_batch
from data_pipeline.conversation import MediaClips, Turn, render
from data_pipeline.frame_records import MediaInfo, ShardSpec, encode_segments
from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.frame_shards import FrameShards
from data_pipeline.loader import DataConfig, Loader, SourceConfig
from data_pipeline.sampling import ClipSampling, sample_clips
from data_pipeline.tokenizer import Tokenizer

LLM = Path(__file__).parents[1] / "fixtures" / "apollo-tiny-a" / "checkpoint" / "llm"
Q, F, S, L, C = 4, 4, 16, 256, 8
SPEC = ShardSpec(fps=2.0, size=S)


def write_shards(folder: Path) -> Path:
    """24 videos v0.. of 1 to 12 s at 10 fps, 16x10, and 8 images i0.., 10x16; shades tell all."""
    writer = FrameShardWriter(folder, SPEC)
    for v in range(24):
        frames = 2 * (1 + v % 12)
        jpegs = [SPEC.encode(np.full((10, 16, 3), 40 + 3 * k + v, np.uint8)) for k in range(frames)]
        info = MediaInfo(f"v{v}", "video", 5 * frames, 10.0, frames / 2, frames, 2.0, 10, 16)
        times = [k / 2 for k in range(frames)]
        writer.add(info, encode_segments(info.id, jpegs, times, (10, 16), SPEC))
    for i in range(8):
        info = MediaInfo(f"i{i}", "image", 1, 1.0, 0.0, 1, 1.0, 16, 10)
        jpeg = SPEC.encode(np.full((16, 10, 3), 200 + i, np.uint8))
        writer.add(info, encode_segments(info.id, [jpeg], [0.0], (16, 10), SPEC))
    writer.close()
    return folder


def record(name: str, text: str, answer: str = "Yes.", **fields) -> dict:
    said = [{"from": "human", "value": text}, {"from": "gpt", "value": f"{answer}"}]
    return {"id": name, "conversations": said, **fields}


def write_records(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


VIDEOS = [record(f"video{v}", "<video>\nDark?", f"No {v}.", video=f"v{v}") for v in range(24)]
TEXTS = [record(f"text{t}", f"Is {t} odd?", "Yes." * (1 + t)) for t in range(9)]
IMAGES = [
    record("images0", "<image> or <image>?", images=["i0", "i1"]),
    record("images1", "<image> in <video>?", image="i2", video="v0"),
    record("images2", "<image>\nBright?", image="i3"),
    record("centre", "<video>\nDark?", video="v11", sampling="centre"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_shards(root / "shards")
    return root


def data(root: Path, sources: dict[str, list[dict]] | None = None, **changes) -> DataConfig:
    sources = sources or {"video": VIDEOS, "image": IMAGES, "text": TEXTS}
    config = DataConfig(
        sources={n: SourceConfig(write_records(root / n, r)) for n, r in sources.items()},
        frames=(str(root / "shards"),),
        tokenizer=str(LLM),
        batch_size=8,
        length=L,
        clips=C,
        frame_size=S,
        tokens_per_clip=Q,
    )
    return dataclasses.replace(config, **changes)


def load(config: DataConfig, steps: int, **place) -> list:
    with contextlib.closing(Loader(config, num_steps=steps, **place)) as loader:
        return list(loader)


def assert_same(batches: list, expected: list) -> None:
    assert len(batches) == len(expected)
    for (batch, _), (other, _) in zip(batches, expected, strict=True):
        for name, a, b in zip(Batch._fields, batch, other, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def answers(batches: list, tokenizer: Tokenizer) -> list[str]:
    """What the assistant says, sample by sample."""
    said = []
    for batch, _ in batches:
        for row in range(len(batch.tokens)):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                learnt = (batch.segment_ids[row] == segment) & (batch.loss_weights[row] > 0)
                said.append(tokenizer.decode(batch.targets[row][learnt]))
    return said


def test_the_tree_is_the_same_for_every_mix_of_modalities(root):
    shape = [(a.shape, a.dtype) for a in empty_batch(8, L, C, F, S)]
    for sources in ({"t": TEXTS}, {"i": IMAGES[2:3]}, {"v": VIDEOS}, None):
        for batch, stats in load(data(root, sources), 2):
            assert [(a.shape, a.dtype) for a in batch] == shape
            assert stats.bad == ()
            assert stats.clips == batch.clip_mask.sum() == (batch.clip_segment_ids > 0).sum()
            assert stats.frames == stats.clips * F
            assert stats.tokens == (batch.segment_ids > 0).sum()
            assert (stats.clips == 0) == (sources == {"t": TEXTS})
            assert stats.fill_tokens == stats.tokens / (8 * L)


def test_every_segment_is_the_record_rendered_as_at_inference(root):
    tokenizer, shards = Tokenizer.from_path(LLM), FrameShards(root / "shards")
    by_answer = {r["conversations"][1]["value"]: r for r in VIDEOS}
    seen = 0
    for batch, _ in load(data(root, {"v": VIDEOS}), 3):
        for row in range(8):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                at = batch.segment_ids[row] == segment
                slots = np.flatnonzero(batch.clip_segment_ids[row] == segment)
                answer = tokenizer.decode(batch.targets[row][at & (batch.loss_weights[row] > 0)])
                info = shards.info(by_answer[answer]["video"])
                clips = sample_clips(
                    ClipSampling(), fps=10.0, num_frames=info.num_frames, duration=info.duration
                )
                turns = [Turn("user", "<video>\nDark?"), Turn("assistant", answer)]
                media = [MediaClips("video", clips.timestamps, info.duration)]
                expected = render(turns, media, tokenizer, Q)
                np.testing.assert_array_equal(batch.tokens[row][at], expected.tokens)
                np.testing.assert_array_equal(batch.positions[row][at], np.arange(at.sum()))
                # Visual tokens point at this segment's own clips, in order.
                visual = batch.visual_index[row][at]
                owned = (slots[:, None] * Q + np.arange(Q)).ravel()
                np.testing.assert_array_equal(visual[visual >= 0], owned)
                assert (visual >= 0).tolist() == (expected.visual_index >= 0).tolist()
                # A frame's shade is 40 + 3 * (its half-second) + the video's number.
                canvas = batch.frames[row, slots]
                assert (batch.frame_geometry[row, slots] == [3, 0, 10, 16]).all()
                assert not canvas[:, :, :3].any()
                shade = 40 + 3 * np.round(clips.frame_indices / 5) + int(info.id[1:])
                np.testing.assert_allclose(canvas[:, :, 8, 8, 0], shade, atol=3)
                seen += 1
    assert seen > 24


def test_images_are_one_clip_each_and_centre_is_one_frame(root):
    batch = load(data(root, {"i": IMAGES}), 1)[0][0]
    tokenizer = Tokenizer.from_path(LLM)
    upright = (batch.frame_geometry == [0, 3, 16, 10]).all(-1) & batch.clip_mask
    images = batch.frames[upright]
    assert (images == images[:, :1]).all()
    assert set(images[:, 0, 8, 8, 0].tolist()) == {200, 201, 202, 203}
    centre = load(data(root, {"c": IMAGES[3:]}), 1)[0][0]
    assert (centre.clip_mask.sum(1) == (centre.segment_ids.max(1))).all()
    first = centre.frames[0, 0]
    assert (first == first[0]).all()
    text = tokenizer.decode(centre.tokens[0][centre.segment_ids[0] == 1], skip_special=False)
    assert "series of one, 2 second clips from a 0:00:12 " in text
    assert "6.0-6.0 seconds" in text


def test_every_position_knows_its_source_and_modality(root):
    """A sample is of what is most in it: a video, an image, or text alone."""
    sources = {"mixed": [IMAGES[0], IMAGES[1], TEXTS[0]], "v": VIDEOS[:6]}
    seen = set()
    for batch, _ in load(data(root, sources), 3):
        assert not batch.groups[batch.segment_ids == 0].any()
        for row in range(8):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                (group,) = set(batch.groups[row][batch.segment_ids[row] == segment].tolist())
                clips = (batch.clip_segment_ids[row] == segment).sum()
                seen.add((group, clips > 0, clips == 2))
    mixed = {(0, False, False), (1, True, True), (2, True, True)}  # text, two images, image+video
    assert mixed <= seen
    assert {group for group, *_ in seen} == {0, 1, 2, 5}


def test_processes_share_the_rows_of_one(root):
    config = data(root)
    whole = load(config, 4)
    for count in (2, 8):
        parts = [load(config, 4, process_index=p, process_count=count) for p in range(count)]
        joined = [
            (Batch(*map(np.concatenate, zip(*(part[s][0] for part in parts), strict=True))), None)
            for s in range(4)
        ]
        assert_same(joined, whole)
        assert sum(part[0][1].samples for part in parts) == whole[0][1].samples


def test_threads_and_prefetch_do_not_matter(root):
    whole = load(data(root), 4)
    assert_same(load(data(root, threads=5, prefetch=1), 4), whole)
    assert_same(load(data(root, prefetch=0), 4), whole)
    assert not np.array_equal(load(data(root, seed=1), 1)[0][0].tokens, whole[0][0].tokens)


def test_planes_show_the_same_pictures(root):
    config = data(root, layout="yuv420")
    for (batch, stats), (rgb, same) in zip(load(config, 3), load(data(root), 3), strict=True):
        assert batch.frames.shape == (8, C, F, S * S * 3 // 2)
        assert stats == same
        np.testing.assert_array_equal(batch.tokens, rgb.tokens)
        np.testing.assert_array_equal(batch.frame_geometry, rgb.frame_geometry)
        luma = batch.frames[..., : S * S].reshape(8, C, F, S, S)
        np.testing.assert_allclose(luma.astype(int), rgb.frames[..., 0], atol=2)  # all is grey
        assert not batch.frames[~batch.clip_mask].any()
    with pytest.raises(ValueError, match="layout 'bgr' is not one of rgb, yuv420"):
        Loader(data(root, layout="bgr"), num_steps=1)


def test_an_epoch_has_every_record_exactly_once(root):
    texts = [record(f"t{t}", "?", f"This is {t}.") for t in range(100)]
    config = data(root, {"t": texts}, batch_size=1)
    tokenizer, said, loader = Tokenizer.from_path(LLM), [], Loader(config, num_steps=100)
    while len(said) < 100:
        said += answers([next(loader)], tokenizer)
    loader.close()
    assert sorted(said) == sorted(f"This is {t}." for t in range(100))
    assert said != [f"This is {t}." for t in range(100)]


@pytest.mark.parametrize("stop", [0, 1, 5, 11, 12])
def test_resumed_is_uninterrupted(root, stop):
    config = data(root)
    whole = load(config, 12)
    first = Loader(config, num_steps=12)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    assert state["next_step"] == stop
    again = Loader(config, num_steps=12)
    again.set_state(state)
    assert_same(list(again), whole[stop:])
    again.set_state(state)  # back again, and on other processes
    assert_same(list(again), whole[stop:])
    again.close()
    last = Loader(config, num_steps=12, process_index=7, process_count=8)
    last.set_state(state)
    assert_same(list(last), [(Batch(*(a[7:] for a in batch)), None) for batch, _ in whole[stop:]])
    last.close()


def test_a_state_of_other_data_is_refused_by_name(root):
    loader = Loader(data(root), num_steps=3)
    state = loader.get_state()
    loader.close()
    other = Loader(data(root, {"video": VIDEOS[:5], "text": TEXTS}, seed=3), num_steps=3)
    with pytest.raises(ValueError, match="seed: 0 then, 3 now") as error:
        other.set_state(state)
    assert "sources.video.content" in str(error.value)
    assert "sources.image.weight: 1.0 then, None now" in str(error.value)
    other.close()
    moved = Loader(data(root, threads=7, prefetch=1), num_steps=9)
    moved.set_state(state)
    moved.close()


def test_long_videos_lose_clips_spread_over_the_whole(root):
    config = data(root, {"v": VIDEOS[11:12]}, clips=3)
    batch, stats = load(config, 1)[0]
    assert stats.clips == 24
    clips = sample_clips(ClipSampling(max_clips=3), fps=10.0, num_frames=120, duration=12.0)
    tokenizer = Tokenizer.from_path(LLM)
    text = tokenizer.decode(batch.tokens[0][batch.segment_ids[0] == 1])
    assert "of three, 2 second clips from a 0:00:12 " in text
    for start, end in clips.timestamps.round(1):
        assert f"\n{start}-{end} seconds: " in text
    full = (load(data(root, {"v": VIDEOS[11:12]}), 1)[0][0].segment_ids[0] == 1).sum()
    tight, stats = load(data(root, {"v": VIDEOS[11:12]}, length=int(full) - 1), 1)[0]
    assert stats.bad == ()
    assert (tight.clip_segment_ids[0] == 1).sum() == 5


def test_a_text_too_long_for_a_row_is_masked_and_named(root):
    records = [*TEXTS, record("endless", "?", "word " * L)]
    batches = load(data(root, {"t": records}, max_bad_share=0.5), 3)
    bad = [entry for _, stats in batches for entry in stats.bad]
    assert {name for name, _ in bad} == {"endless"}
    assert f"a row holds {L}" in bad[0][1]
    epochs = (sum(stats.samples for _, stats in batches) + len(bad)) // len(records)
    assert epochs <= len(bad) <= epochs + 1


def damage(root: Path, copy: Path, ids: set[str]) -> Path:
    """A copy of the shards in which the first JPEG of each of `ids` is overwritten."""
    copy.mkdir()
    for file in (root / "shards").iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".array_record":
            for name in ids:
                at = content.index(b"\xa2id" + bytes([0xA0 + len(name)]) + name.encode())
                jpeg = content.index(b"\xff\xd8\xff", at)
                content[jpeg : jpeg + 40] = bytes(40)
        (copy / file.name).write_bytes(content)
    return copy


def test_damaged_records_are_masked_counted_and_named(root, tmp_path):
    shards = str(damage(root, tmp_path / "shards", {"v3", "i2"}))
    config = data(root, frames=(shards,), max_bad_share=0.5)
    whole, batches = load(data(root), 6), load(config, 6)
    bad = {name: reason for _, stats in batches for name, reason in stats.bad}
    assert set(bad) == {"video3", "images1"}  # images1 needs v0 too, which is fine
    assert "v3" in bad["video3"]
    assert "frames-00000.array_record" in bad["video3"]
    for (batch, stats), (_, before) in zip(batches, whole, strict=True):
        assert stats.samples + len(stats.bad) == before.samples
        assert not batch.frames[~batch.clip_mask].any()
        assert not batch.frame_geometry[~batch.clip_mask].any()
        assert (batch.loss_weights[batch.segment_ids == 0] == 0).all()
        assert batch.visual_index.max() < Q * C
        for row in range(8):
            held = set(batch.clip_segment_ids[row][batch.clip_mask[row]].tolist())
            assert held <= set(batch.segment_ids[row].tolist())


def test_too_many_bad_records_stop_with_their_names(root, tmp_path):
    shards = str(damage(root, tmp_path / "shards", {f"v{v}" for v in range(0, 24, 2)}))
    with pytest.raises(ValueError, match=r"max_bad_share=0\.1; the latest:\n  video\d+: .*v\d+"):
        load(data(root, {"v": VIDEOS}, frames=(shards,), max_bad_share=0.1), 50)
    one = str(damage(root, tmp_path / "one", {"v5"}))
    loaded = load(data(root, {"v": VIDEOS}, frames=(one,), max_bad_share=0.05), 20)
    assert sum(len(stats.bad) for _, stats in loaded) > 3


def test_media_missing_from_the_shards_are_told_when_opened(root):
    records = [*VIDEOS, record("lost", "<video>", video="V1")]
    with pytest.raises(ValueError, match="1 of 25 records need media") as error:
        Loader(data(root, {"v": records}), num_steps=1)
    assert "lost: 'V1'" in str(error.value)
    stats = [s for _, s in load(data(root, {"v": records}, max_bad_share=0.1), 9)]
    assert {entry for s in stats for entry in s.bad} == {
        ("lost", "video 'V1' is not in the frame shards")
    }


def test_other_mistakes_of_the_config(root):
    with pytest.raises(ValueError, match="batch_size=8 rows do not divide over 3 processes"):
        Loader(data(root), num_steps=1, process_count=3)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Loader(data(root, frames=(str(root / "nowhere"),)), num_steps=1)
    with pytest.raises(ValueError, match="names no sources"):
        Loader(dataclasses.replace(data(root), sources={}), num_steps=1)
    with pytest.raises(ValueError, match="mode 'fsp' is not one of"):
        Loader(data(root, sampling_mode="fsp"), num_steps=1)
    named_wrong = [record("a", "<image>", image="v0")]
    with pytest.raises(ValueError, match="'v0' is named as image, but the shards hold a video"):
        load(data(root, {"i": named_wrong}), 9)
