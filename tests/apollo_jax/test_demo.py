# SPDX-License-Identifier: Apache-2.0
"""The demo: its order and resumption, its tokenizer and configs; --quick runs all of it."""

import json
import os
import subprocess
import sys

import pytest

from apollo_jax import demo
from apollo_jax.demo import STAGES, Demo, Stopped, run
from data_pipeline.tokenizer import Tokenizer


@pytest.fixture
def log(monkeypatch):
    """Replaces the steps by a list of what was done; a step in `log.fails` raises."""

    class Log(list):
        fails = ()

    log = Log()

    def steps(self):
        def step(name):
            if name in log.fails:
                raise Stopped
            log.append(name)

        return {name: lambda name=name: step(name) for name in ("one", "two", "three")}

    monkeypatch.setattr(Demo, "steps", steps)
    monkeypatch.setattr(Demo, "report", lambda self, seconds: {"seconds": seconds})
    return log


def test_resume_continues_after_the_last_finished_step(log, tmp_path):
    log.fails = ("two",)
    with pytest.raises(Stopped):
        run(Demo(tmp_path / "d"))
    log.fails = ()
    numbers = run(Demo(tmp_path / "d"), resume=True)
    assert log == ["one", "two", "three"]
    assert list(numbers["seconds"]) == log
    run(Demo(tmp_path / "d"), resume=True)
    assert len(log) == 3


def test_a_used_workdir_is_left_alone(log, tmp_path):
    (tmp_path / "thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="not empty and holds no demo"):
            run(Demo(tmp_path), resume=resume)
    run(Demo(tmp_path / "d"))
    with pytest.raises(FileExistsError, match="--resume"):
        run(Demo(tmp_path / "d"))
    with pytest.raises(ValueError, match="without --quick"):
        run(Demo(tmp_path / "d", quick=True), resume=True)
    assert log == ["one", "two", "three"]


def test_configs_stay_inside_the_workdir(tmp_path):
    job = Demo(tmp_path)
    before = ""
    for stage in STAGES:
        experiment = job.experiment(stage)
        paths = [source.path for source in experiment.data.sources.values()]
        paths += [*experiment.data.frames, experiment.data.tokenizer]
        assert all(path.startswith(str(tmp_path)) for path in paths)
        assert experiment.init_from == before
        before = f"run:demo-{stage}"
    assert job.trained("warmup") == "vision tower, connector, llm"
    assert job.trained("sft") == "connector, llm"
    assert job.mixture("vision") == "100% captions_video"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A quick demo up to its tokenizer."""
    job = Demo(tmp_path_factory.mktemp("demo"), quick=True)
    job.render()
    job.train_tokenizer()
    return job


def test_tokenizer_knows_whole_words(job):
    tokenizer = Tokenizer.from_path(job.workdir / "tokenizer.model")
    assert tokenizer.vocab_size <= job.experiment("warmup").model.llm.vocab_size
    prompt = "Which color comes right before green?\n red\n purple"
    words = "Which| color| comes| right| before| green|?|\n| red|\n| purple"
    assert [tokenizer.decode([i]) for i in tokenizer.encode(prompt)] == words.split("|")
    given = "You are provided the following series of two, 2 second clips from a 0:00:04 [H:MM:SS]"
    assert len(tokenizer.encode(given)) <= 32
    for answer in ("left", "half", "never", "four", "7"):
        assert len(tokenizer.encode(f" {answer}")) == 1


def test_tokenizer_texts_are_the_conversations(job):
    texts = list(demo.training_texts(job.workdir / "world"))
    assert not any("<video>" in text or "<image>" in text for text in texts)
    assert any(text.startswith("Which number") for text in texts)
    assert any("0:00:12 [H:MM:SS]" in text for text in demo.prompt_texts())


def test_quick_demo_leaves_everything_behind(tmp_path):
    command = [sys.executable, "-m", "apollo_jax", "demo", "--quick", "--workdir", str(tmp_path)]
    # One device and a hurried compiler: the steps are few, compiling them is the work.
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert set(numbers["headline"]) == {"video", "image", "text"}
    assert list(numbers["stages"]) == list(STAGES)
    assert numbers["freezing"]
    assert numbers["rate_questions"]
    assert len(numbers["live"]) == 3
    assert (tmp_path / "apollo-mini/llm/model.safetensors").is_file()
    assert (tmp_path / "report.html").stat().st_size > 30_000
