# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to a folder of shards: a repaired one is sound and holds all that was good."""

import errno
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_pipeline import frame_shard_writer, shard_repair
from data_pipeline.frame_records import MediaInfo, ShardSpec, encode_segments
from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.frame_shards import FrameShards
from data_pipeline.predecode import PredecodeConfig, predecode
from data_pipeline.shard_repair import repair
from data_pipeline.shards import verify

CONFIG = PredecodeConfig(fps=2.0, size=128, workers=1, shards=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory, videos):
    root, output = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out") / "shards"
    for k in range(9):
        videos.write(root / f"{k}.mp4", count=60 + 30 * k, size=(96, 128))
    videos.damaged(root / "0 bad.mp4", "empty")
    predecode(root, output, CONFIG, progress=False)
    return output


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "shards")


def held(path):
    """Everything that readers get, by id."""
    shards, media = FrameShards(path), {}
    for media_id in shards.ids():
        frames = [bytes(jpeg) for _, jpegs in shards.segments(media_id) for jpeg in jpegs]
        media[media_id] = (shards.info(media_id), frames)
    return media


def state(path):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.iterdir()}


def sidecar(folder, number):
    return json.loads((folder / f"frames-{number:05d}.json").read_text())


def change(path, at, length=1):
    data = bytearray(path.read_bytes())
    data[at : at + length] = bytes(byte ^ 1 for byte in data[at : at + length])
    path.write_bytes(data)


def test_a_sound_folder_is_left_alone(folder):
    before = state(folder)
    done = repair(folder, workers=1)
    assert (done.lines, done.remaining) == ([], [])
    assert state(folder) == before


def test_one_damaged_medium_is_dropped(folder, made):
    path = folder / "frames-00001.array_record"
    victim = sidecar(folder, 1)["media"][1]["id"]
    change(path, path.read_bytes().index(b"id\xa5" + victim.encode()) + 3000)
    before = state(folder)
    dry = repair(folder, workers=1, dry_run=True)
    assert state(folder) == before
    done = repair(folder, workers=1)
    assert (dry.lines, dry.remaining) == (done.lines, [])
    assert [line for line in done.lines if "dropped" in line] == [
        line for line in done.lines if f"{victim!r} dropped: segment 0 is lost" in line
    ]
    assert verify(folder, decode=True, workers=1) == []
    expected = held(made)
    del expected[victim]
    assert held(folder) == expected
    untouched = [name for name in before if name.startswith(("frames-00000", "frames-00002"))]
    assert len(untouched) == 4
    assert {n: state(folder)[n] for n in untouched} == {n: before[n] for n in untouched}
    manifest = FrameShards(folder).manifest
    assert manifest["rejected"] == {"empty": 1, "damaged": 1}
    assert manifest["job"] == FrameShards(made).manifest["job"]
    assert victim in (folder / "quarantine.jsonl").read_text()


def test_random_damage_costs_no_good_medium(folder, made):
    """What was not hit is kept, whatever part of a file was hit."""
    whole, rng = held(made), np.random.default_rng(0)
    for _ in range(25):
        shutil.rmtree(folder)
        shutil.copytree(made, folder)
        number = int(rng.integers(3))
        path = folder / f"frames-{number:05d}.array_record"
        size, media = path.stat().st_size, sidecar(folder, number)["media"]
        at = int(rng.integers(size))
        if rng.random() < 0.5:
            change(path, at)
            most = 1  # one byte is of one medium at most
        else:
            path.write_bytes(path.read_bytes()[:at])
            starts = [path.read_bytes().find(b"id\xa5" + m["id"].encode()) for m in media]
            # All that came before the last one begun is whole.
            most = len(media) - max(0, sum(start >= 0 for start in starts) - 1)
        done = repair(folder, workers=1)
        assert done.remaining == []
        assert verify(folder, workers=1) == []
        kept = held(folder)
        assert kept == {name: whole[name] for name in kept}
        assert len(whole) - len(kept) <= most


def test_lost_files_come_back_from_the_others(folder, made):
    for name in ("index.npz", "manifest.json"):
        (folder / name).unlink()
        assert verify(folder, workers=1)
        assert repair(folder, workers=1).remaining == []
        assert (folder / name).read_bytes() == (made / name).read_bytes()
    (folder / "manifest.json").write_text("{}")
    (folder / "frames-00000.array_record.1.tmp").write_bytes(b"x")
    assert repair(folder, workers=1).remaining == []
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in made.iterdir()
    }
    (folder / "frames-00001.json").write_text("{")  # all but the sources' checksums comes back
    (folder / "frames-00000.json").unlink()
    assert repair(folder, workers=1).remaining == []
    assert verify(folder, workers=1) == []
    assert held(folder) == held(made)
    assert sidecar(folder, 0)["rejected"] == sidecar(made, 0)["rejected"]


def test_a_sidecar_that_says_something_else_is_not_believed(folder, made):
    path = folder / "frames-00000.json"
    for old, new in (('"fps": 10.0', '"fps": 50.0'), ('"sha256": "', '"sha256": "0')):
        text = path.read_text()
        path.write_text(text.replace(old, new, 1))
        assert path.read_text() != text
        before = (folder / "frames-00000.array_record").stat().st_mtime_ns
        assert verify(folder, workers=1)
        done = repair(folder, workers=1)
        assert done.lines[0] == "frames-00000.json: written again from index.npz"
        assert done.remaining == []
        assert (folder / "frames-00000.array_record").stat().st_mtime_ns == before
        assert held(folder) == held(made)
        assert sidecar(folder, 0) == sidecar(made, 0)


def test_a_plan_that_is_not_the_jobs_is_told_and_not_used(folder, made):
    path = folder / "plan.jsonl"
    path.write_text(path.read_text().replace("8.mp4", "9.mp4"))
    (folder / "index.npz").unlink()
    done = repair(folder, workers=1)
    assert [str(problem) for problem in done.remaining] == [
        "plan.jsonl: is not the one that manifest.json names; predecode cannot continue it"
    ]
    for name in ("index.npz", "manifest.json"):
        assert (folder / name).read_bytes() == (made / name).read_bytes()


def test_what_nobody_knows_is_left_to_predecode(folder, made):
    (folder / "index.npz").unlink()
    (folder / "frames-00001.json").unlink()
    done = repair(folder, workers=1)
    assert any("frames-00001.json" in str(problem) for problem in done.remaining)
    predecode(None, folder, CONFIG, progress=False)
    assert held(folder) == held(made)
    assert verify(folder, workers=1) == []


def test_redo_gives_a_shard_back_to_predecode(folder, made):
    path = folder / "frames-00002.array_record"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert repair(folder, workers=1).remaining == []
    assert len(FrameShards(folder)) < 9  # dropped at first, the sources are found again later
    assert repair(folder, redo=True, workers=1, dry_run=True).lines
    assert (folder / "frames-00002.json").exists()
    assert repair(folder, redo=True, workers=1).lines == [
        "frames-00002.json: removed; rerunning predecode makes its shard again"
    ]
    predecode(None, folder, CONFIG, progress=False)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in made.iterdir()
    }


def test_an_interrupted_repair_can_be_done_again(folder, made, tmp_path, monkeypatch):
    first = folder / "frames-00000.array_record"
    change(first, first.read_bytes().index(b"id\xa5") + 3000)
    (folder / "frames-00001.array_record").unlink()
    shutil.copytree(folder, tmp_path / "straight")
    repair(tmp_path / "straight", workers=1)
    expected, writes = held(tmp_path / "straight"), 0
    while True:
        again = shutil.copytree(folder, tmp_path / f"after {writes}")
        left, real = [writes], frame_shard_writer.write_atomic

        def write(path, data, left=left, real=real):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            real(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(frame_shard_writer, "write_atomic", write)
            try:
                repair(again, workers=1)
                break
            except KeyboardInterrupt:
                writes += 1
        assert repair(again, workers=1).remaining == []
        assert held(again) == expected
        assert verify(again, workers=1) == []
    assert writes >= 4


def test_a_failing_disk_is_no_reason_to_drop(folder, monkeypatch):
    (folder / "frames-00000.json").write_text("{")
    path = folder / "frames-00001.array_record"
    change(path, path.read_bytes().index(b"id\xa5") + 3000)
    before = state(folder)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shard_repair, "_records", fail)
    done = repair(folder, workers=1)
    assert "cannot be read now: [Errno 5] Input/output error" in str(done.remaining[0])
    assert state(folder)[path.name] == before[path.name]
    assert state(folder)["manifest.json"] == before["manifest.json"]


def test_shards_without_a_plan(tmp_path):
    spec = ShardSpec(size=16)
    writer = FrameShardWriter(tmp_path, spec, shard_bytes=1)
    for k in range(3):
        jpegs = [spec.encode(np.full((16, 16, 3), 40 * k, np.uint8))] * 3
        info = MediaInfo(f"{k}", "video", 45, 30.0, 1.5, 3, 2.0, 16, 16)
        writer.add(info, encode_segments(f"{k}", jpegs, [0.0, 0.5, 1.0], (16, 16), spec))
    writer.reject("x", "empty", "0 bytes")
    writer.close()
    (tmp_path / "frames-00001.array_record").unlink()
    with pytest.raises(ValueError, match=r"no plan.jsonl"):
        repair(tmp_path, redo=True, workers=1)
    assert repair(tmp_path, workers=1).remaining == []
    assert FrameShards(tmp_path).ids() == ["0", "2"]
    assert FrameShards(tmp_path).manifest["rejected"] == {"damaged": 1, "empty": 1}
    assert verify(tmp_path, workers=1) == []
    for number in (0, 2):
        (tmp_path / f"frames-{number:05d}.array_record").write_bytes(b"")
    with pytest.raises(ValueError, match="all media were rejected"):
        repair(tmp_path, workers=1)


def test_as_a_user(folder):
    def run(*arguments):
        command = [sys.executable, "-m", "apollo_jax", "shards", "repair", str(folder)]
        return subprocess.run([*command, *arguments], capture_output=True, text=True)

    (folder / "frames-00001.array_record").unlink()
    (folder / "frames-00009.array_record").write_bytes(b"of another set")
    done = run("--dry-run")
    assert "nothing was changed" in done.stderr
    assert done.stdout.count(" dropped: ") == 2
    assert not (folder / "frames-00001.json").read_text().count("damaged")
    done = run()
    assert done.returncode == 1
    assert "frames-00001.array_record: removed, nothing in it is good" in done.stdout
    assert "not repaired: frames-00009.array_record: belongs to no shard" in done.stdout
    (folder / "frames-00009.array_record").unlink()
    done = run()
    assert (done.returncode, done.stdout) == (0, "")
    assert "sound" in done.stderr
