# SPDX-License-Identifier: Apache-2.0
"""What docs/survive.md says, by real processes that are killed, told to stop, or do not fit.

One run of one process is the measure; all others continue copies of it.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from apollo_jax import sharding
from apollo_jax.config import load
from apollo_jax.training.processes import AGAIN
from apollo_jax.training.rows import place
from apollo_jax.training.state import create
from apollo_jax.training.step import build
from apollo_jax.training.train import train
from data_pipeline.loader import Loader
from data_pipeline.tokenizer import Tokenizer

SMALL = Path(__file__).parent / "small.py"
ROOT = Path(__file__).parents[3]
# Half of a process's start would be the import of torch, which a run has no use for.
MAIN = "import sys; sys.modules['torch'] = None; from apollo_jax.__main__ import main; main()"
# Before its part of a step something happens to this process, while the others are in the step.
MISHAP = """
import os, sys, time; sys.modules['torch'] = None
from apollo_jax.training import train
place, calls = train.place, []
def mishap(*args):
    calls.append(1)
    if len(calls) == {nth}:
        os.kill(os.getpid(), {signal})
        time.sleep(3)
    return place(*args)
train.place = mishap
from apollo_jax.__main__ import main; main()
"""
TOLERANCE = 1e-5  # relative, of losses on another number of processes or devices


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory) -> Path:
    """The folder of a run of one process that nothing befell; checkpoints of steps 2, 4, 6, 8."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train(load(f"{SMALL}:{texts}"), workdir)
    return workdir


@pytest.fixture
def begun(whole, tmp_path) -> Path:
    """A copy of it as it was after step 2."""
    copy = shutil.copytree(whole, tmp_path / "run")
    for step in (4, 6, 8):
        shutil.rmtree(copy / "checkpoints" / f"{step:08d}")
    return copy


def losses(workdir: Path) -> dict[int, tuple[float, float]]:
    """Loss and number of targets by step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["loss"], line["target_tokens"]) for line in lines}


class Company:
    """Processes that are started together."""

    def __init__(
        self,
        texts: Path,
        workdir: Path,
        count: int,
        *flags: str,
        devices: int = 1,
        own: Sequence[Sequence[str]] = (),
        roots: Sequence[Path] = (),
        alone: bool = False,
        mains: dict[int, str] | None = None,
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.workdir, self.all = workdir, []
        for i in range(1 if alone else count):
            root = roots[i] if roots else ROOT
            main = (mains or {}).get(i, MAIN)
            command = [sys.executable, "-c", main, "train", "--config", f"{SMALL}:{texts}"]
            command += ["--workdir", str(workdir), *flags, *(own[i] if own else ())]
            if count > 1:
                command += ["--distributed", f"localhost:{port},{count},{i}"]
            environ = {
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "PYTHONPATH": str(root),
            }
            self.all.append(
                subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    cwd=root,
                    env=os.environ | environ,
                )
            )

    def end(self) -> tuple[list[int], list[str]]:
        """Exit statuses, and what each said with its lines joined."""
        said = [" ".join(process.communicate(timeout=300)[0].split()) for process in self.all]
        return [process.returncode for process in self.all], said


def test_killed_told_to_stop_and_continued_by_fewer(texts, whole, begun):
    """4 processes, one killed; 2, one told to stop; 1 to the end: as if nothing had been."""
    mishap = MISHAP.format(nth=3, signal="9")
    company = Company(texts, begun, 4, devices=2, mains={2: mishap})
    company.all[2].wait(timeout=300)
    killed = time.monotonic()
    statuses, said = company.end()
    assert statuses == [AGAIN, AGAIN, -signal.SIGKILL, AGAIN], said
    assert time.monotonic() - killed < load(f"{SMALL}:{texts}").train.heartbeat_seconds
    for i in (0, 1, 3):
        assert f"process {i} lost the others of the run and stops" in said[i]
        assert "Start all of them again with the same command" in said[i]
    mishap = MISHAP.format(nth=2, signal="15")
    statuses, said = Company(texts, begun, 2, mains={1: mishap}).end()
    assert statuses == [0, 0], said
    assert "continuing" in said[0]
    assert "stopped on a signal, saved; the same command continues" in said[0]
    assert "goodput: " in said[0]
    one = Company(texts, begun, 1, devices=4)
    statuses, said = one.end()
    assert statuses == [0], said
    assert "trained, 8 of 8 steps" in said[0]
    found, expected = losses(begun), losses(whole)
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=TOLERANCE)


def test_other_code_and_another_config_are_refused_by_name(texts, begun, tmp_path):
    other = tmp_path / "other"
    for package in ("apollo_jax", "data_pipeline"):
        shutil.copytree(ROOT / package, other / package)
    with open(other / "apollo_jax" / "sharding.py", "a") as file:
        file.write("# changed\n")
    before = sorted(begun.rglob("*"))
    own = [[], ["--config.optimizer.b1=0.5"], []]
    company = Company(texts, begun, 3, own=own, roots=[ROOT, ROOT, other])
    statuses, said = company.end()
    assert statuses == [2, 2, 2], said
    for text in said:
        assert "the processes of this run are not the same" in text
        assert "config.optimizer.b1 is 0.5, process 0 has 0.9" in text
        assert f"process 1 ({socket.gethostname()}): config" in text
        assert f"process 2 ({socket.gethostname()}): apollo-jax code is" in text
    assert sorted(begun.rglob("*")) == before


def test_a_process_that_is_alone_gives_up(texts, begun):
    company = Company(texts, begun, 2, "--config.train.join_seconds=4", alone=True)
    statuses, said = company.end()
    assert statuses == [AGAIN], said
    assert "process 0 of 2 at localhost:" in said[0]
    assert "waited 4 s and not all processes of the run have come" in said[0]


def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(texts, whole, begun):
    """No file may grow beyond 100 kB: what a write then says stands for a full disk's answer."""

    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5)); " + MAIN
    before = {p: p.read_bytes() for p in (begun / "checkpoints").rglob("*") if p.is_file()}
    statuses, said = Company(texts, begun, 1, mains={0: limited}).end()
    assert statuses == [2], said
    assert "a checkpoint could not be written" in said[0], said
    assert "the checkpoint of step 2 stays saved. Make room" in said[0]
    for path, content in before.items():
        assert path.read_bytes() == content
    statuses, said = Company(texts, begun, 1).end()
    assert statuses == [0], said
    np.testing.assert_allclose(
        list(losses(begun).values()), list(losses(whole).values()), rtol=TOLERANCE
    )


def weights_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint: weights and moments, without the optimizer's own counts."""
    folder = workdir / "checkpoints" / f"{step:08d}"
    arrays = {}
    for part in ("weights", "optimizer"):
        with warnings.catch_warnings():  # that the devices may be others now
            warnings.simplefilter("ignore")
            restored = ocp.PyTreeCheckpointer().restore(folder / part)
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
            arrays[part + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


@pytest.fixture
def poison(monkeypatch):
    """poison(start, step): the batch of `step` has weights that are no numbers."""

    def poison(start: int, *steps: int) -> None:
        now = iter(range(start + 1, 1000))

        def placed(rows, mesh):
            factor = np.float32(np.nan if next(now) in steps else 1)
            return place(rows._replace(loss_weights=rows.loss_weights * factor), mesh)

        monkeypatch.setattr("apollo_jax.training.train.place", placed)

    return poison


def bad_steps(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "bad_steps.jsonl").read_text().splitlines()]


def test_stop_then_skip_leaves_the_step_out_bit_for_bit(texts, whole, begun, poison, capsys):
    poison(2, 5)
    with pytest.raises(ValueError, match=r"the loss of step 5 is nan; its records: t\d+, t\d+"):
        train(load(f"{SMALL}:{texts}"), begun)
    assert sorted(os.listdir(begun / "checkpoints")) == ["00000002", "00000004"]
    (said,) = bad_steps(begun)
    poison(4, 5)
    every = {"train.checkpoint_every": "1", "train.keep": "9"}
    skipping = {"train.on_nonfinite": "skip", **every}
    assert train(load(f"{SMALL}:{texts}", skipping), begun)
    out = " ".join(capsys.readouterr().out.split())
    assert "the loss of step 5 is nan; its records: t" in out
    assert "its update is left out" in out
    assert "; 1 bad steps" in out
    assert bad_steps(begun) == [said]
    found, expected = losses(begun), losses(whole)
    assert found[5][0] is None
    assert [found[step] for step in (1, 2, 3, 4)] == [expected[step] for step in (1, 2, 3, 4)]
    before, after, later = (weights_of(begun, step) for step in (4, 5, 6))
    assert len(before) > 20
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert not all(np.array_equal(before[name], later[name]) for name in before)


def test_the_records_that_are_named_are_those_of_the_batch(texts):
    data = load(f"{SMALL}:{texts}").data
    tokenizer, loader = Tokenizer.from_path(data.tokenizer), Loader(data, num_steps=20)
    with contextlib.closing(loader):
        for step in range(12):
            batch, _ = next(loader)
            asked = loader.records(step)
            text = [tokenizer.decode(row[row > 0].tolist()) for row in batch.tokens]
            told = zip(asked, text, strict=True)
            assert all(f"What is {name[1:]} and {name[1:]}?" in row for name, row in told)
        assert loader.records(step - 1) != asked
        assert loader.records(0) == []


def test_rewind_goes_on_from_the_last_checkpoint_with_later_batches(texts, whole, begun, poison):
    poison(2, 5)
    assert train(load(f"{SMALL}:{texts}", {"train.on_nonfinite": "rewind"}), begun)
    (said,) = bad_steps(begun)
    assert said["step"] == 5
    back, after, later = (weights_of(begun, step) for step in (4, 6, 8))
    assert all(np.array_equal(back[name], after[name]) for name in back)
    assert not all(np.array_equal(back[name], later[name]) for name in back)
    found, expected = losses(begun), losses(whole)
    assert found[5][0] is None
    assert [found[step] for step in (3, 4)] == [expected[step] for step in (3, 4)]
    assert found[7][0] != expected[7][0]  # the same batch, seen by the parameters of step 4
    assert found[7][1] == expected[7][1]
    poison(0, 1)
    fresh = begun.with_name("fresh")
    one = {"train.on_nonfinite": "rewind", "train.num_steps": "2"}
    assert train(load(f"{SMALL}:{texts}", one), fresh)  # it begins with a checkpoint
    zero, end = (weights_of(fresh, step) for step in (0, 2))
    assert all(np.array_equal(zero[name], end[name]) for name in zero)


def test_the_jitted_step_obeys_the_limits(texts):
    """Above them nothing moves but the counter, and what the step reports."""
    experiment = load(f"{SMALL}:{texts}", {"train.on_nonfinite": "skip"})
    mesh = sharding.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        program = build(experiment, mesh)
        shapes = {**program.abstract.params, **program.abstract.frozen}
        weights = {
            n: jax.device_put(np.full(s.shape, 0.01, s.dtype), s.sharding)
            for n, s in shapes.items()
        }
        with contextlib.closing(Loader(experiment.data, num_steps=1)) as loader:
            rows, _ = next(loader)
        for limits, moves in (((0.0, np.inf), False), ((np.inf, 0.0), False), ((1e9, 1e9), True)):
            state = create(weights, program.abstract, program.tx)
            before = jax.tree.map(np.asarray, (state.params, state.opt_state))
            weights = jax.tree.map(lambda x: x.copy(), weights)  # the step takes the old ones
            batch = place(rows, mesh)
            after, metrics = program.train_step(state, batch, np.asarray(limits, np.float32))
            assert int(after.step) == 1
            assert float(metrics["grad_norm"]) > 0
            now = jax.tree.map(np.asarray, (after.params, after.opt_state))
            assert jax.tree.all(jax.tree.map(np.array_equal, before, now)) != moves
