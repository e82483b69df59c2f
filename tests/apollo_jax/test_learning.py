# SPDX-License-Identifier: Apache-2.0
"""A tiny Apollo learns, from random weights, to say what a picture shows; as a user trains it."""

import json
import os
import subprocess
import sys

import pytest

from apollo_jax.demo import Demo
from apollo_jax.evaluation.apollobench_mini import write_world

STEPS, HELD_OUT = 240, 64


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The demo's folder before its first stage, with captions that are held out.

    Held out twice: with their own pictures, and each with the picture of another caption.
    """
    job = Demo(tmp_path_factory.mktemp("learning"))
    write_world(job.workdir / "world", train_scenes=900, test_scenes_per_family=1, workers=2)
    job.train_tokenizer()
    job.predecode()
    captions = job.workdir / "world/train/captions_image.jsonl"
    records = [json.loads(line) for line in captions.read_text().splitlines()]
    learnt, seen = records[:-HELD_OUT], records[-HELD_OUT:]
    pictures = [r["image"] for r in seen]
    swapped = [r | {"image": p} for r, p in zip(seen, pictures[1:] + pictures[:1], strict=True)]
    for name, part in {"captions_image": learnt, "seen": seen, "swapped": swapped}.items():
        text = "".join(json.dumps(record) + "\n" for record in part)
        captions.with_name(f"{name}.jsonl").write_text(text)
    return job.workdir


def test_captions_follow_from_the_pictures(world):
    """A picture's own caption becomes far likelier than another's, in words that occur alike."""
    config = """
import dataclasses
from pathlib import Path
from apollo_jax.config import EvalConfig, load, to_config
from data_pipeline.loader import SourceConfig

def get_config():
    experiment = load("{root}/configs/demo.py:images")
    held_out = {{name: SourceConfig(f"world/train/{{name}}.jsonl") for name in ("seen", "swapped")}}
    return to_config(dataclasses.replace(
        experiment, evaluation=EvalConfig(held_out, every={steps}, batches=8)))
"""
    (world / "learning.py").write_text(config.format(root=os.getcwd(), steps=STEPS))
    command = [sys.executable, "-m", "apollo_jax", "train", "--config", "learning.py", "--workdir"]
    flags = [f"--config.train.num_steps={STEPS}"]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, "run", *flags], cwd=world, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (world / "run/metrics.jsonl").read_text().splitlines()]
    (held_out,) = (line for line in lines if "eval/loss" in line)
    own, other = (held_out[f"eval/loss/dataset/{name}"] for name in ("seen", "swapped"))
    assert own < 0.3 * other
