# SPDX-License-Identifier: Apache-2.0
"""Shards made by Apache Beam are those made without it; needs the extra `beam`."""

import importlib.util
import subprocess
import sys

import pytest

from data_pipeline.media_files import find_media
from data_pipeline.predecode import main, predecode
from data_pipeline.predecode_beam import make_one
from data_pipeline.predecode_plan import PredecodeConfig, begin_plan

CONFIG = PredecodeConfig(size=64, workers=2, shards=5)
HAS_BEAM = importlib.util.find_spec("apache_beam") is not None


@pytest.fixture
def folder(videos, tmp_path):
    (tmp_path / "in").mkdir()
    for k in range(9):
        videos.write(tmp_path / "in" / f"{k}.mp4", count=10 + k)
    videos.damaged(tmp_path / "in" / "bad.mp4", "corrupt")
    return tmp_path / "in"


@pytest.mark.skipif(not HAS_BEAM, reason="Apache Beam is not installed")
def test_the_direct_runner_with_several_processes(folder, tmp_path):
    """As a user would, on a folder where one shard is made already."""
    predecode(folder, tmp_path / "alone", CONFIG, progress=False)
    predecode(folder, tmp_path / "beam", CONFIG, progress=False, task=(3, 5))
    first = (tmp_path / "beam" / "frames-00003.json").stat().st_mtime_ns
    command = [sys.executable, "-m", "apollo_jax", "predecode", "--input", str(folder)]
    command += ["--output", str(tmp_path / "beam"), "--size", "64", "--shards", "5"]
    command += ["--workers", "2", "--runner", "direct", "--", "--job_name=test"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "9 of 10 media stored" in done.stdout
    assert (tmp_path / "beam" / "frames-00003.json").stat().st_mtime_ns == first
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "beam" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.skipif(HAS_BEAM, reason="Apache Beam is installed")
def test_without_beam_the_extra_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"pip install 'apollo-jax\[beam\]'"):
        predecode(folder, tmp_path / "out", CONFIG, progress=False, runner="dataflow")


def test_one_shard_on_a_worker(folder, tmp_path):
    output = tmp_path / "out"
    plan = begin_plan(output, CONFIG, find_media(folder))
    for _ in range(2):  # engines try again
        assert make_one(4, str(output), plan.digest, CONFIG) == 4
    assert plan.unfinished() == [0, 1, 2, 3]
    with pytest.raises(FileNotFoundError, match=r"no .*plan.jsonl: .* all workers share"):
        make_one(4, str(tmp_path / "not mounted"), plan.digest, CONFIG)
    with pytest.raises(ValueError, match="another plan"):
        make_one(4, str(output), "0" * 64, CONFIG)


def test_options_without_a_runner_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no --runner"):
        main(["--input", str(tmp_path), "--output", str(tmp_path / "out"), "--", "--project=p"])
