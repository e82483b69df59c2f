# SPDX-License-Identifier: Apache-2.0
"""From a folder of files from the wild to shards: everything usable stored, the rest named."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from data_pipeline.frame_records import decode_segment
from data_pipeline.frame_shards import FrameShards
from data_pipeline.media_encoding import encode_video
from data_pipeline.media_files import find_media
from data_pipeline.predecode import PredecodeConfig, main, predecode

CONFIG = PredecodeConfig(fps=2.0, size=64, quality=95, subsampling="444", workers=2)
SPEC = CONFIG.spec
BAD = ["empty", "unreadable", "no_moov", "no_video_stream", "corrupt"]


def shown_numbers(videos, shards, media_id, frames=None):
    """The numbers on the stored frames that stand for source `frames` (default: the whole grid)."""
    info = shards.info(media_id)
    if frames is None:
        frames = np.arange(info.stored_frames) * info.fps / info.stored_fps
    canvas = np.zeros((1, len(frames), 64, 64, 3), np.uint8)
    top, left, height, width = shards.read_clips(media_id, np.array([frames]), canvas)
    pictures = canvas[0, :, top : top + height, left : left + width]
    return [videos.number_of(p) for p in pictures]


def test_a_folder_of_everything(videos, tmp_path):
    root, output = tmp_path / "in", tmp_path / "out"
    (root / "deep").mkdir(parents=True)
    videos.write(root / "cfr.mp4", count=61, fps=10)
    videos.write(root / "deep" / "vp9 é.webm", codec="libvpx-vp9", count=20)
    videos.write(root / "one.mp4", count=1, size=(37, 53))
    videos.write(root / "big.mp4", count=12, size=(96, 192))
    videos.write(root / "phone.mp4", count=12)
    videos.rotate(root / "phone.mp4", 90)
    cut = videos.write(root / "cut.mkv")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    for reason in BAD:
        videos.damaged(root / f"{reason}.mp4", reason)
    Image.fromarray(videos.numbered_frame(9, 100, 60)).save(root / "picture.png")
    (root / "broken.jpg").write_text("no picture")
    (root / "notes.txt").write_text("not for us")

    report = predecode(root, output, CONFIG, progress=False)
    assert (report.stored, report.quarantined) == (7, dict.fromkeys(BAD, 1) | {"unreadable": 2})
    lines = (output / "quarantine.jsonl").read_text().splitlines()
    quarantine = [json.loads(line) for line in lines]
    assert {q["id"]: q["reason"] for q in quarantine} == {
        **{f"{reason}.mp4": reason for reason in BAD},
        "broken.jpg": "unreadable",
    }
    shards = FrameShards(output)
    assert shards.verify() == []
    assert sum(shards.info(i).stored_frames for i in shards.ids()) == report.frames

    info = shards.info("cfr.mp4")
    assert (info.kind, info.num_frames, info.fps, info.duration) == ("video", 61, 10.0, 6.1)
    assert (info.stored_frames, info.stored_fps, info.height, info.width) == (13, 2.0, 48, 64)
    assert shown_numbers(videos, shards, "cfr.mp4") == list(range(0, 61, 5))
    assert shown_numbers(videos, shards, "cfr.mp4", [0, 2, 3, 7, 8, 60]) == [0, 0, 5, 5, 10, 60]
    assert shown_numbers(videos, shards, "deep/vp9 é.webm") == [0, 5, 10, 15, 19]
    one = shards.info("one.mp4")
    assert (one.num_frames, one.stored_frames, one.height, one.width) == (1, 1, 36, 52)
    assert (shards.info("big.mp4").height, shards.info("big.mp4").width) == (32, 64)
    assert (shards.info("phone.mp4").height, shards.info("phone.mp4").width) == (64, 48)
    assert 5 < shards.info("cut.mkv").num_frames < 40
    picture = shards.info("picture.png")
    assert (picture.kind, picture.stored_frames, picture.height) == ("image", 1, 64)
    assert shown_numbers(videos, shards, "picture.png", [0, 0]) == [9, 9]


def test_the_grid_shows_the_last_frame_on_screen(videos, tmp_path):
    """A variable frame rate: after 100 ms nothing moves until 1.5 s, then until 4.0 s."""
    pts = [0, 33, 66, 100, 1500, 1501, 1900, 4000, 4033, 4400]
    path = videos.write(tmp_path / "vfr.mkv", count=10, pts=pts)
    medium = encode_video(path, "vfr", SPEC)
    header, _ = decode_segment(medium.records[0])
    assert header["t_us"] == [500_000 * k for k in range(10)]
    shown = [0, 3, 3, 4, 6, 6, 6, 6, 7, 9]
    assert header["pts_us"] == [1000 * pts[k] for k in shown]
    assert (medium.info.num_frames, medium.notes) == (10, {})
    assert medium.info.fps == pytest.approx(9 / 4.4)


def test_damage_is_noted_or_too_much(videos, tmp_path):
    path = videos.write(tmp_path / "cut.mp4", faststart=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert "of 40 frames" in encode_video(path, "cut", SPEC).notes["truncated"]


def test_a_frozen_clock_is_refused(videos, tmp_path):
    path = videos.write(tmp_path / "jump.mkv", count=3, pts=[0, 100, 4_000_000])
    with pytest.raises(ValueError, match=r"jumps from 0 to 4000 s \(bad_timestamps"):
        encode_video(path, "jump", SPEC)


def test_a_jsonl_names_the_media(videos, tmp_path):
    videos.write(tmp_path / "media_a.mp4", count=3)
    Image.fromarray(videos.numbered_frame(1)).save(tmp_path / "b.png")
    records = [
        {"id": 1, "video": "media_a.mp4", "conversations": []},
        {"id": 2, "video": "media_a.mp4", "conversations": []},
        {"id": 3, "images": ["b.png", "gone.png"]},
        {"id": 4, "image": "b.png"},
        {"id": 5, "conversations": []},
    ]
    annotations = tmp_path / "annotations.jsonl"
    annotations.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    assert [(m.id, m.kind) for m in find_media(annotations)] == [
        ("media_a.mp4", "video"), ("b.png", "image"), ("gone.png", "image")
    ]  # fmt: skip
    report = predecode(annotations, tmp_path / "out", CONFIG, progress=False)
    assert (report.stored, report.quarantined) == (2, {"missing": 1})

    annotations.write_text('{"video": "media_a.mp4"}\n{"video": 7}\n')
    with pytest.raises(ValueError, match=r"annotations.jsonl:2"):
        find_media(annotations)


def test_ids_are_relative_to_the_root(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.MP4").write_bytes(b"x")
    assert [m.id for m in find_media(tmp_path / "a")] == ["b/c.MP4"]
    assert [m.id for m in find_media(tmp_path / "a", root=tmp_path)] == ["a/b/c.MP4"]
    assert [m.id for m in find_media(["b/c.MP4"], root=tmp_path / "a")] == ["b/c.MP4"]


def test_an_input_without_media_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_media(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="names no videos or images"):
        find_media(tmp_path)


def test_nothing_usable_is_an_error_that_says_why(videos, tmp_path):
    videos.damaged(tmp_path / "a.mp4", "empty")
    for _ in range(2):  # asking again changes nothing
        with pytest.raises(ValueError, match=r"all media were rejected.*'empty': 1"):
            predecode(tmp_path, tmp_path / "out", CONFIG, progress=False)
        assert "a.mp4" in (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_other_settings_or_input_do_not_touch_the_output(videos, tmp_path, capsys):
    root, output = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    videos.write(root / "a.mp4", count=3)
    arguments = ["--input", str(root), "--output", str(output), "--size", "64", "--workers", "1"]
    main(arguments)
    assert "1 of 1 media stored, 1 frames in 1 shards" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in output.iterdir()}
    main(arguments)  # complete: nothing to do
    with pytest.raises(ValueError, match=r"fps 2.0 there, 4.0 now"):
        main([*arguments, "--fps", "4"])
    videos.write(root / "b.mp4", count=3)
    with pytest.raises(ValueError, match=r"another input .*media 1 there, 2 now"):
        main(arguments)
    assert before == {p: p.stat().st_mtime_ns for p in output.iterdir()}
    with pytest.raises(ValueError, match="not empty"):
        predecode(root, root, CONFIG, progress=False)


def test_a_killed_job_continues_where_it_was(videos, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    for k in range(30):
        videos.write(root / f"{k:02}.mp4", count=10 + k)
    videos.damaged(root / "05.mp4", "empty")
    config = PredecodeConfig(fps=10.0, size=64, workers=1, shard_bytes=20_000)
    predecode(root, tmp_path / "whole", config, progress=False)

    output = tmp_path / "killed"
    command = [sys.executable, "-m", "data_pipeline.predecode", "--input", str(root)]
    command += ["--output", str(output), "--fps", "10", "--size", "64", "--shard-bytes", "20000"]
    job = subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.DEVNULL)
    while not (output / "frames-00001.json").exists() and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    first = (output / "frames-00000.array_record").stat()
    subprocess.run([*command, "--workers", "2"], check=True, capture_output=True)

    assert (output / "frames-00000.array_record").stat().st_mtime_ns == first.st_mtime_ns
    for whole in sorted((tmp_path / "whole").glob("*")):
        assert (output / whole.name).read_bytes() == whole.read_bytes(), whole.name
    assert sorted(os.listdir(output)) == sorted(os.listdir(tmp_path / "whole"))


def test_progress_is_visible_without_a_terminal(videos, tmp_path, capsys):
    videos.write(tmp_path / "a.mp4", count=3)
    predecode([tmp_path / "a.mp4"], tmp_path / "out", CONFIG)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("predecode: 0/1 media")
    assert lines[-1].startswith("predecode: 1/1 media, 3 frames decoded, 0 quarantined")
