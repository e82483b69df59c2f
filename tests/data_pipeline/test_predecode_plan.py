# SPDX-License-Identifier: Apache-2.0
"""A plan is made once and holds for everyone; tasks that know only the folder complete a set."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_pipeline.frame_shard_writer import ShardFile
from data_pipeline.frame_shards import FrameShards
from data_pipeline.media_files import Medium, find_media
from data_pipeline.predecode import main, merge, predecode, task_of
from data_pipeline.predecode_plan import Plan, PredecodeConfig, begin_plan, cut
from data_pipeline.predecode_shards import make_shards

CONFIG = PredecodeConfig(fps=2.0, size=64, workers=1, shards=3)


def media_of(sizes):
    return [Medium(f"{k}.mp4", "video", f"/{k}.mp4", size) for k, size in enumerate(sizes)]


def sizes_of(groups):
    return [[medium.size for medium in group] for group in groups]


@pytest.fixture
def folder(videos, tmp_path):
    (tmp_path / "in").mkdir()
    for k in range(7):
        videos.write(tmp_path / "in" / f"{k}.mp4", count=10 + k)
    videos.damaged(tmp_path / "in" / "bad.mp4", "empty")
    return tmp_path / "in"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_groups_of_so_many_bytes():
    assert sizes_of(cut(media_of([5, 5, 5, 20, 1, 9, 2]), 0, 10)) == [
        [5, 5],
        [5],
        [20],
        [1, 9],
        [2],
    ]
    assert len(cut(media_of([0] * 5000), 0, 10)) == 2  # no more than 4096 in one
    unknown = cut(media_of([-1] * 4), 0, 32 << 20)
    assert sizes_of(unknown) == [[-1, -1], [-1, -1]]


@pytest.mark.parametrize("shards", range(1, 10))
def test_groups_of_equal_size(shards):
    media = media_of([3, 1, 4, 1, 5, 9, 2, 6, 5])
    groups = cut(media, shards, 1)
    assert len(groups) == shards
    assert all(groups)
    assert [medium for group in groups for medium in group] == media
    assert max(sum(m.size for m in g) for g in groups) <= 36 / shards + 9


def test_equal_groups_are_nearly_equal():
    groups = cut(media_of([10] * 1000), 7, 1)
    assert {len(group) for group in groups} <= {142, 143}
    with pytest.raises(ValueError, match="2 media cannot fill 3 shards"):
        cut(media_of([1, 1]), 3, 1)


def test_a_plan_is_read_back(folder, tmp_path):
    media = find_media(folder)
    plan = begin_plan(tmp_path / "out", CONFIG, media)
    assert len(plan) == 3
    assert [medium for k in range(3) for medium in plan.media(k)] == media
    again = begin_plan(tmp_path / "out", CONFIG, media)
    assert again.digest == plan.digest
    assert plan.unfinished() == [0, 1, 2]
    with pytest.raises(ValueError, match="shards 3 there, 4 now"):
        begin_plan(tmp_path / "out", PredecodeConfig(fps=2.0, size=64, shards=4), media)
    with pytest.raises(ValueError, match=r"media 8 there, 7 now; the input has other media\)"):
        begin_plan(tmp_path / "out", CONFIG, media[1:])


def test_those_who_plan_at_once_agree_or_fail(tmp_path):
    """Half of them see one file more: one of the two plans wins, for everyone."""
    output, barrier, plans, errors = tmp_path / "out", threading.Barrier(8), [], []

    def begin(count):
        barrier.wait()
        try:
            plans.append(begin_plan(output, CONFIG, media_of([1] * count)).digest)
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=begin, args=(10 + k % 2,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(plans), len(errors)) == (4, 4)
    assert set(plans) == {Plan(output).digest}
    assert all("another input" in error for error in errors)
    assert os.listdir(output) == ["plan.jsonl"]


def test_a_folder_without_hard_links(folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("hard links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    plan = begin_plan(tmp_path / "out", CONFIG, find_media(folder))
    assert Plan(tmp_path / "out").digest == plan.digest


def test_a_shard_of_another_plan_is_an_error(folder, tmp_path):
    output = tmp_path / "out"
    make_shards(begin_plan(output, CONFIG, find_media(folder)), [1], CONFIG)
    (output / "plan.jsonl").unlink()
    (folder / "0.mp4").unlink()
    with pytest.raises(ValueError, match="not empty"):
        begin_plan(output, CONFIG, find_media(folder))
    begin_plan(tmp_path / "other", CONFIG, find_media(folder))
    (tmp_path / "other" / "plan.jsonl").rename(output / "plan.jsonl")
    with pytest.raises(ValueError, match=r"frames-00001.json belongs to another plan"):
        make_shards(Plan(output), [1], CONFIG)


def test_any_tasks_in_any_order_give_the_same_folder(folder, tmp_path):
    predecode(folder, tmp_path / "alone", CONFIG, progress=False)
    for number in (2, 0, 1):
        report = predecode(folder, tmp_path / "tasks", CONFIG, progress=False, task=(number, 4))
        left = {2: 2, 0: 1, 1: 0}[number]
        assert report.unfinished == left
        assert (tmp_path / "tasks" / "manifest.json").exists() == (left == 0)
    assert predecode(folder, tmp_path / "tasks", CONFIG, progress=False, task=(3, 4)).stored == 7
    assert contents(tmp_path / "tasks") == contents(tmp_path / "alone")
    assert FrameShards(tmp_path / "tasks").verify() == []


def test_the_same_shard_made_twice_at_once(folder, tmp_path):
    """As engines do with stragglers."""
    plan = begin_plan(tmp_path / "out", CONFIG, find_media(folder))
    threads = [threading.Thread(target=make_shards, args=(plan, [1], CONFIG)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {"plan.jsonl", "frames-00001.json", "frames-00001.array_record"}
    assert set(os.listdir(tmp_path / "out")) == names
    predecode(None, tmp_path / "out", CONFIG, progress=False)
    assert FrameShards(tmp_path / "out").verify() == []


def test_tasks_that_complete_the_set_at_once(folder, tmp_path):
    """Each clears what killed processes left, and what the others are just writing."""
    predecode(folder, tmp_path / "out", CONFIG, progress=False)
    before = contents(tmp_path / "out")
    plan = Plan(tmp_path / "out")

    def merge_often(_: int) -> None:
        for _ in range(50):
            merge(plan, CONFIG)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(merge_often, range(4))) == [None] * 4
    assert contents(tmp_path / "out") == before


def test_a_straggler_whose_file_is_cleared_before_it_commits(folder, tmp_path, monkeypatch):
    output, commit, late = tmp_path / "out", ShardFile.commit, []
    plan = begin_plan(output, CONFIG, find_media(folder))

    def commit_late(shard, **facts):
        if not late:
            late.append(shard)
            predecode(None, output, CONFIG, progress=False)  # by another, from begin to end
            late.append(contents(output))
        return commit(shard, **facts)

    monkeypatch.setattr(ShardFile, "commit", commit_late)
    make_shards(plan, [1], CONFIG)
    assert "manifest.json" in late[1]
    assert contents(output) == late[1]


@pytest.mark.parametrize("complete", [True, False])
def test_a_shard_that_was_cut_off_is_made_again(folder, tmp_path, complete):
    output = tmp_path / "out"
    predecode(folder, output, CONFIG, progress=False)
    before = contents(output)
    if not complete:
        (output / "manifest.json").unlink()
    (output / "frames-00002.array_record").write_bytes(b"half")
    predecode(None, output, CONFIG, progress=False)
    assert contents(output) == before


def test_tasks_as_processes_that_start_at_once(folder, tmp_path):
    """With the variables of a scheduler; the folder does not exist before."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "apollo_jax", "predecode", "--input", str(folder)]
    command += ["--output", str(output), "--size", "64", "--workers", "1", "--shards", "3"]
    environments = [
        os.environ | {"SLURM_ARRAY_TASK_ID": str(5 + 2 * k), "SLURM_ARRAY_TASK_COUNT": "2"}
        | {"SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_STEP": "2"}
        for k in range(2)
    ]  # fmt: skip
    jobs = [
        subprocess.Popen([*command, "--task", "auto"], env=env, stdout=subprocess.PIPE, text=True)
        for env in environments
    ]
    said = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert any("7 of 8 media stored" in text for text in said)
    predecode(folder, tmp_path / "alone", CONFIG, progress=False)
    assert contents(output) == contents(tmp_path / "alone")


def test_a_task_is_named_by_hand_or_by_the_scheduler(monkeypatch):
    assert task_of("3/8") == (3, 8)
    for wrong in ("8/8", "3", "a/b", "-1/8", "0/0"):
        with pytest.raises(ValueError, match="is not I/N"):
            task_of(wrong)
    for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="JOB_COMPLETION_INDEX with JOB_COMPLETIONS"):
        task_of("auto")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    monkeypatch.setenv("JOB_COMPLETIONS", "5")
    assert task_of("auto") == (2, 5)


def test_planning_alone_then_without_the_input(folder, tmp_path, capsys):
    output = str(tmp_path / "out")
    settings = ["--size", "64", "--shards", "3", "--fps", "4"]
    main(["--input", str(folder), "--output", output, *settings, "--plan-only"])
    assert "8 media in 3 shards" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another size"):
        main(["--output", output, "--size", "32"])
    main(["--output", output, "--workers", "1"])
    assert "7 of 8 media stored" in capsys.readouterr().out
    assert FrameShards(output).spec.fps == 4.0
    with pytest.raises(FileNotFoundError, match="holds no plan yet"):
        main(["--output", str(tmp_path / "nothing")])


def test_the_manifest_says_what_was_made_of_what(folder, tmp_path):
    predecode(folder, tmp_path / "out", CONFIG, progress=False)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["job"]["max_hours"] == 8.0
    assert (manifest["media"], manifest["videos"], manifest["rejected"]) == (7, 7, {"empty": 1})
    assert manifest["source_bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    assert {"av", "libavcodec", "simplejpeg", "pillow"} <= manifest["made_with"].keys()
    assert all(len(versions) == 1 for versions in manifest["made_with"].values())
    rows = json.loads((tmp_path / "out" / "frames-00000.json").read_text())["media"]
    assert all(len(row["source_sha256"]) == 64 for row in rows)
