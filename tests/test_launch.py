# SPDX-License-Identifier: Apache-2.0
"""The scripts in launch/ start commands that exist, with flags that exist."""

import argparse
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from data_pipeline import predecode
from data_pipeline.frame_shards import FrameShards

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"


@pytest.fixture
def folder(tmp_path):
    """Three pictures."""
    (tmp_path / "in").mkdir()
    for k in range(3):
        Image.new("RGB", (64, 48), (k, 0, 0)).save(tmp_path / "in" / f"{k}.png")
    return tmp_path / "in"


def start(script, *arguments, tmp_path, command="", **variables):
    """Runs a shell script with an apollo-jax of our own on the PATH; returns its output."""
    command = command or f'exec {shlex.quote(sys.executable)} -m apollo_jax "$@"'
    stub = tmp_path / "bin" / "apollo-jax"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(f"#!/bin/bash\n{command}\n")
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}", **variables}
    line = [LAUNCH / script, *map(str, arguments)]
    done = subprocess.run(
        line, env=environment, cwd=LAUNCH.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound_shell(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def test_predecode_as_a_slurm_array(folder, tmp_path):
    output = tmp_path / "out"
    for task in (1, 0):
        variables = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2"}
        arguments = (folder, output, "--shards", "2", "--size", "64")
        start(
            "predecode_slurm.sh",
            *arguments,
            tmp_path=tmp_path,
            SLURM_CPUS_PER_TASK="1",
            **variables,
        )
        assert (output / "manifest.json").exists() == (task == 0)
    assert len(FrameShards(output)) == 3


def test_predecode_as_an_indexed_job(folder, tmp_path, monkeypatch):
    job = yaml.safe_load((LAUNCH / "predecode_gke_job.yaml").read_text())["spec"]
    assert job["completionMode"] == "Indexed"
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["apollo-jax", "predecode"]
    variables = {v["name"]: v["value"] for v in container["env"]}
    assert variables["JOB_COMPLETIONS"] == str(job["completions"])
    (mount,), (volume,) = container["volumeMounts"], job["template"]["spec"]["volumes"]
    assert (mount["mountPath"], mount["name"]) == (variables["TMPDIR"], volume["name"])
    monkeypatch.setenv("JOB_COMPLETIONS", variables["JOB_COMPLETIONS"])
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    places = {"gs://BUCKET/videos": str(folder), "gs://BUCKET/frames": str(tmp_path / "out")}
    arguments = [a.partition("=") for a in container["args"]]
    predecode.main([f"{flag}={places.get(value, value)}" for flag, _, value in arguments])
    assert len(FrameShards(tmp_path / "out")) == 3  # one shard: the others have nothing to do


def test_predecode_on_dataflow(tmp_path):
    variables = {"PROJECT": "some-project", "REGION": "us-central1", "IMAGE": "image:1"}
    words = ("gs://bucket/videos", "gs://bucket/frames", "--fps", "4")
    said = start(
        "predecode_dataflow.sh",
        *words,
        tmp_path=tmp_path,
        command='printf "%s\\n" "$@"',
        **variables,
    )
    command, *arguments = said.splitlines()
    own, options = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parsed = predecode.parser().parse_args(own)
    assert (command, parsed.runner, parsed.fps) == ("predecode", "dataflow", 4.0)
    beam = pytest.importorskip("apache_beam.options.pipeline_options")
    assert beam.PipelineOptions(options).get_all_options()["project"] == "some-project"
    groups = beam.PipelineOptions.__subclasses__()
    known = {flag for group in groups for flag in flags_of(group)}
    assert {option.partition("=")[0] for option in options} <= known


def flags_of(group):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    group._add_argparse_args(parser)
    return {flag for action in parser._actions for flag in action.option_strings}
