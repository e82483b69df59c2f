# SPDX-License-Identifier: Apache-2.0
"""A little world of shards and conversations, and the experiment that trains on it."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from apollo_jax import config
from apollo_jax.checkpoints import run
from apollo_jax.checkpoints.orbax_arrays import OrbaxArrays
from apollo_jax.training.train import train
from data_pipeline.batch import Batch, empty_batch
from data_pipeline.frame_records import MediaInfo, ShardSpec, encode_segments
from data_pipeline.frame_shard_writer import FrameShardWriter
from data_pipeline.tokenizer import train_sentencepiece

TINY = Path(__file__).parent / "tiny.py"
SMALL = Path(__file__).parent / "small.py"
SPEC = ShardSpec(fps=2.0, size=32)
ROOT = Path(__file__).parents[3]
# Half of a process's start would be the import of torch, which a run has no use for.
MAIN = """
import sys; sys.modules['torch'] = None
{first}
from apollo_jax.__main__ import main; main()
"""
MISHAP = """
import os, time
from apollo_jax.training import train
place, calls = train.place, []
def mishap(*args):
    calls.append(1)
    if len(calls) == {nth}:
        os.kill(os.getpid(), {number})
        time.sleep(3)
    return place(*args)
train.place = mishap
"""


def _write_shards(folder: Path) -> None:
    """Videos v0..v5 of 2 s, each of one grey level."""
    writer = FrameShardWriter(folder, SPEC)
    for v in range(6):
        jpegs = [SPEC.encode(np.full((24, 32, 3), 40 * v, np.uint8))] * 4
        info = MediaInfo(f"v{v}", "video", 20, 10.0, 2.0, 4, 2.0, 24, 32)
        writer.add(info, encode_segments(info.id, jpegs, [0.0, 0.5, 1.0, 1.5], (24, 32), SPEC))
    writer.close()


def _record(name: str, question: str, answer: str, **media: str) -> dict:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": said, **media}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with frame shards, train.jsonl, eval.jsonl and a tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    _write_shards(folder / "shards")
    ask = "<video>\nHow bright?"
    records = [_record(f"v{v}", ask, f"Level {v}.", video=f"v{v}") for v in range(6)]
    records += [_record(f"t{t}", f"What is {t} and {t}?", f"It is {2 * t}.") for t in range(12)]
    for name, part in (("train", records[1:]), ("eval", records[:1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    texts = [turn["value"] for r in records for turn in r["conversations"]]
    train_sentencepiece(texts, folder / "tokenizer.model", 400)
    return folder


@pytest.fixture(scope="session")
def experiment(world: Path):
    """experiment({"train.num_steps": "3"}): the tiny experiment with fields overridden."""

    def make(overrides: dict[str, str] | None = None) -> config.Experiment:
        return config.load(f"{TINY}:{world}", overrides)

    return make


@pytest.fixture(scope="session")
def command(world: Path):
    """command(workdir, rates, "--config.a=b", ...): arguments of `apollo-jax train`.

    Two steps of the small model, on texts and videos, with the rates from the first step on.
    """

    def command(workdir: Path, rates: config.LearningRates, *more: str) -> list[str]:
        fields = {
            "data.sources.all.path": world / "train.jsonl",
            "data.frames": world / "shards",
            "data.clips": 1,
            "data.length": 192,
            "train.num_steps": 2,
            "train.checkpoint_every": 1,
            "optimizer.warmup_ratio": 0,
        } | {f"optimizer.learning_rates.{c}": rate for c, rate in asdict(rates).items()}
        given = [f"--config.{name}={value}" for name, value in fields.items()]
        return ["--config", f"{SMALL}:{world}", "--workdir", str(workdir), *given, *more]

    return command


@pytest.fixture(scope="session")
def stored_weights():
    """stored_weights(folder): the latest weights of a run by name, as they are stored."""

    def stored_weights(folder: Path) -> dict[str, np.ndarray]:
        stored = OrbaxArrays(run.latest_weights(folder))
        return {name: stored.read(name) for name in stored.stored}

    return stored_weights


@pytest.fixture(scope="session")
def stored_moments():
    """stored_moments(folder, step): the arrays that the optimizer kept by name, by their keys."""

    def stored_moments(folder: Path, step: int) -> dict[str, np.ndarray]:
        path = folder / run.CHECKPOINTS / f"{step:08d}" / run.OPTIMIZER
        stored = OrbaxArrays(path, lambda key: "/" in key)
        return {key: stored.read(key) for key in stored.stored}

    return stored_moments


@pytest.fixture(scope="session")
def check_moments(stored_moments):
    """check_moments(folder, names): moments, norm and clip of step 1 are of these weights alone.

    Adam's first moment is then (1 - b1) times the clipped gradient.
    """

    def check_moments(folder: Path, names: set[str]) -> None:
        mu = {k: a for k, a in stored_moments(folder, 1).items() if ".mu." in k}
        assert {key.partition(".mu.")[2] for key in mu} == names
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        first = next(line for line in lines if line["step"] == 1)
        components = {name.partition("/")[0] for name in names}
        norms = {k.partition("/")[2]: v for k, v in first.items() if k.startswith("grad_norm/")}
        assert norms.keys() == components
        whole = np.sqrt(sum(norm**2 for norm in norms.values()))
        assert first["grad_norm"] == pytest.approx(whole, rel=1e-5)
        clipped = np.sqrt(sum(float(np.sum(np.square(m))) for m in mu.values()))
        assert clipped == pytest.approx(0.1 * min(1.0, whole), rel=1e-4)

    return check_moments


@pytest.fixture(scope="session")
def random_batch():
    """random_batch(seed=0, clips=1): 8 rows of 32 tokens for the debug model, in no file.

    Every row: a clip (or none) at positions 2 to 9, targets on the second half.
    """

    def random_batch(seed: int = 0, clips: int = 1) -> Batch:
        rng = np.random.default_rng(seed)
        rows, length, visual = 8, 32, 8
        b = empty_batch(rows, length, clips, 4, 32)
        b.tokens[:], b.targets[:] = rng.integers(0, 512, (2, rows, length))
        b.loss_weights[:, length // 2 :] = 1.0
        b.positions[:], b.segment_ids[:] = np.arange(length), 1
        if clips:
            b.visual_index[:, 2 : 2 + visual] = np.arange(visual)
            b.frames[:] = rng.integers(0, 255, b.frames.shape)
            b.frame_geometry[:], b.clip_mask[:], b.clip_segment_ids[:] = [0, 0, 32, 32], True, 1
        return b

    return random_batch


@pytest.fixture(scope="session")
def texts(world, tmp_path_factory) -> Path:
    """A folder with the world's texts and tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "text.jsonl").write_text("".join(li for li in lines if '"video"' not in li))
    shutil.copy(world / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="session")
def small_run(texts, tmp_path_factory) -> Path:
    """The folder of a run of `small.py` that nothing befell; checkpoints of steps 2, 4, 6, 8."""
    workdir = tmp_path_factory.mktemp("small")
    assert train(config.load(f"{SMALL}:{texts}"), workdir)
    return workdir


@pytest.fixture(scope="session")
def as_after():
    """as_after(workdir, step, to): a copy of a run as it was after the checkpoint of `step`."""

    def as_after(workdir: Path, step: int, to: Path) -> Path:
        copy = shutil.copytree(workdir, to)
        for folder in (copy / run.CHECKPOINTS).iterdir():
            if int(folder.name) > step:
                shutil.rmtree(folder)
        return copy

    return as_after


@pytest.fixture
def begun(small_run, as_after, tmp_path) -> Path:
    """A copy of that run as it was after step 2."""
    return as_after(small_run, 2, tmp_path / "run")


class Company:
    """Processes of one run that are started together, each on CPU devices of its own.

    Args:
      config: FILE[:ARG] of the run.
      flags: of all of them; `own` are those of each.
      alone: only the first of them is started.
      first: lines of Python that a process runs before the command, by its number.
    """

    def __init__(
        self,
        config: str,
        workdir: Path,
        count: int,
        *flags: str,
        command: str = "train",
        devices: int = 1,
        own: Sequence[Sequence[str]] = (),
        roots: Sequence[Path] = (),
        alone: bool = False,
        first: Mapping[int, str] | None = None,
        xla_flags: str = "",
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.all: list[subprocess.Popen] = []
        flags_of_all = f"{os.environ['XLA_FLAGS']} {xla_flags}"
        for i in range(1 if alone else count):
            root = roots[i] if roots else ROOT
            main = MAIN.format(first=(first or {}).get(i, ""))
            said = [sys.executable, "-c", main, command, "--config", config]
            said += ["--workdir", str(workdir), *flags, *(own[i] if own else ())]
            if count > 1:
                said += ["--distributed", f"localhost:{port},{count},{i}"]
            environ = {
                "XLA_FLAGS": f"{flags_of_all} --xla_force_host_platform_device_count={devices}",
                "PYTHONPATH": str(root),
            }
            one = subprocess.Popen(
                said,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=root,
                env=os.environ | environ,
            )
            self.all.append(one)

    def end(self) -> tuple[list[int], list[str]]:
        """Exit statuses, and what each said with its lines joined."""
        said = [" ".join(process.communicate(timeout=300)[0].split()) for process in self.all]
        return [process.returncode for process in self.all], said


@pytest.fixture(scope="session")
def company() -> type[Company]:
    return Company


@pytest.fixture(scope="session")
def mishap():
    """mishap(signal, nth): what one of a company may run first.

    It then sends itself the signal before it places its nth batch, while the others use theirs.
    """

    def mishap(number: int, nth: int) -> str:
        return MISHAP.format(number=int(number), nth=nth)

    return mishap
