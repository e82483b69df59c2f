# SPDX-License-Identifier: Apache-2.0
"""Outputs that are URLs: the same files, complete or not there; fsspec's own storages stand in."""

import subprocess
import sys

import fsspec
import pytest

from data_pipeline.frame_shards import FrameShards
from data_pipeline.media_files import find_media
from data_pipeline.predecode import predecode
from data_pipeline.predecode_plan import PredecodeConfig, begin_plan, open_plan
from data_pipeline.predecode_shards import make_shards

CONFIG = PredecodeConfig(size=64, workers=1, shards=3)


@pytest.fixture
def folder(videos, tmp_path):
    (tmp_path / "in").mkdir()
    for k in range(5):
        videos.write(tmp_path / "in" / f"{k}.mp4", count=10 + k)
    videos.damaged(tmp_path / "in" / "bad.mp4", "empty")
    return tmp_path / "in"


@pytest.fixture
def alone(folder, tmp_path):
    predecode(folder, tmp_path / "alone", CONFIG, progress=False)
    return {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}


def test_a_storage_gets_the_same_files(folder, alone, tmp_path):
    url = "memory://bucket/frames"
    storage = fsspec.filesystem("memory")
    first = predecode(folder, url, CONFIG, progress=False, task=(1, 3))
    assert (first.unfinished, first.shards) == (2, 1)
    assert sorted(storage.ls(url, detail=False)) == [
        f"/bucket/frames/{name}"
        for name in ("frames-00001.array_record", "frames-00001.json", "plan.jsonl")
    ]
    report = predecode(None, url, CONFIG, progress=False)
    assert (report.stored, str(report.output)) == (5, url)
    assert f"see {url}/quarantine.jsonl" in report.text()
    assert {name: storage.cat(f"{url}/{name}") for name in alone} == alone
    assert len(storage.ls(url)) == len(alone)
    assert predecode(folder, url, CONFIG, progress=False).stored == 5  # nothing left to do


def test_what_was_killed_while_sending_is_made_again(folder, alone):
    url = "memory://bucket/killed"
    storage = fsspec.filesystem("memory")
    plan = begin_plan(url, CONFIG, find_media(folder))
    make_shards(plan, [0, 1, 2], CONFIG)
    storage.rm(f"{url}/frames-00000.json")  # the sidecar comes last
    storage.pipe(f"{url}/frames-00001.array_record", b"half")
    predecode(None, url, CONFIG, progress=False)
    assert {name: storage.cat(f"{url}/{name}") for name in alone} == alone


def test_one_plan_for_all_and_nothing_else(folder):
    plan = begin_plan("memory://bucket/one", CONFIG, find_media(folder))
    assert open_plan("memory://bucket/one").digest == plan.digest
    with pytest.raises(ValueError, match="shards 3 there, 2 now"):
        begin_plan("memory://bucket/one", PredecodeConfig(size=64, shards=2), find_media(folder))
    fsspec.filesystem("memory").pipe("memory://bucket/other/file", b"x")
    with pytest.raises(ValueError, match="not empty"):
        begin_plan("memory://bucket/other", CONFIG, find_media(folder))
    with pytest.raises(FileNotFoundError, match="holds no plan yet"):
        open_plan("memory://bucket/nothing")


def test_all_rejected_is_told_there_too(folder):
    url = "memory://bucket/rejected"
    with pytest.raises(ValueError, match="all media were rejected"):
        predecode([folder / "bad.mp4"], url, PredecodeConfig(size=64, workers=1), progress=False)
    assert b"bad.mp4" in fsspec.filesystem("memory").cat(f"{url}/quarantine.jsonl")


def test_the_command_with_a_url(folder, alone, tmp_path):
    url = f"file://{tmp_path}/there"
    command = [sys.executable, "-m", "apollo_jax", "predecode", "--input", str(folder)]
    command += ["--output", url, "--size", "64", "--shards", "3", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{url}: 5 of 6 media stored" in done.stdout
    assert {p.name: p.read_bytes() for p in (tmp_path / "there").iterdir()} == alone
    assert FrameShards(tmp_path / "there").verify() == []
