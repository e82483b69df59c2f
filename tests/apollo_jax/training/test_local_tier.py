# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on the machines' own disks, by real processes that are killed and lose them."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from apollo_jax import sharding
from apollo_jax.checkpoints import local_tier
from apollo_jax.config import MeshConfig, TrainConfig
from apollo_jax.training.processes import AGAIN
from apollo_jax.training.state import TrainState

SMALL = Path(__file__).parent / "small.py"
NAMES = ("loss", "accuracy", "grad_norm", "target_tokens")
FLAGS = (
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
    "--config.train.local_every=1",
    "--config.train.checkpoint_every=4",
    "--config.train.heartbeat_seconds=10",
)


@pytest.fixture
def start(texts, company, tmp_path):
    """start(first={}): exit statuses and words of two replicas, each with a disk of its own."""

    def start(disks=(0, 1), **more) -> tuple[list[int], list[str]]:
        own = [(f"--config.train.local_checkpoints={tmp_path}/{i}",) for i in disks]
        config, run = f"{SMALL}:{texts}", tmp_path / "run"
        return company(config, run, 2, *FLAGS, own=own, devices=2, **more).end()

    return start


def lines(workdir: Path) -> list[tuple]:
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], *(line[name] for name in NAMES)) for line in found]


def test_goes_on_from_the_last_step_as_long_as_it_can_be_read(start, tmp_path, mishap, small_run):
    """Killed in step 7; what is left is of step 6 or 5, and of 4 for good."""
    statuses, said = start(first={0: mishap(signal.SIGKILL, nth=7)})
    assert statuses[0] == -signal.SIGKILL, said
    assert statuses[1] in (AGAIN, -signal.SIGABRT), said
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000004"]
    (folder,) = (tmp_path / "1").glob("run-*/data=2,fsdp=2-2")
    step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    assert step in (5, 6)
    for name in ("run", "1"):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}-before")
    statuses, said = start()
    assert statuses == [0, 0], said
    assert f"after step {step} (from {tmp_path}/0/run-" in said[0]
    np.testing.assert_allclose(lines(tmp_path / "run"), lines(small_run), rtol=1e-5)
    assert not any(p for i in range(2) for p in (tmp_path / str(i)).iterdir())

    for name in ("run", "1"):
        shutil.rmtree(tmp_path / name)
        shutil.move(tmp_path / f"{name}-before", tmp_path / name)
    for file in (folder / str(step) / "state").glob("**/d/*"):
        held = file.read_bytes()
        middle = len(held) // 2
        file.write_bytes(held[:middle] + bytes([held[middle] ^ 1]) + held[middle + 1 :])
    statuses, said = start()
    assert statuses == [AGAIN, AGAIN], said
    assert f"could not be read and is {step}.torn now" in said[1]
    statuses, said = start()
    assert statuses == [0, 0], said
    assert "after step 4" in said[0] or f"after step {step - 1} (from" in said[0]
    np.testing.assert_allclose(lines(tmp_path / "run"), lines(small_run), rtol=1e-5)


def test_two_processes_do_not_share_a_folder(start, tmp_path):
    statuses, said = start(disks=(0, 0))
    assert statuses == [2, 2], said
    for text in said:
        assert f"processes 0, 1 have the same folder {tmp_path}/0; give each" in text


@pytest.mark.parametrize(("data", "why"), [(1, "it has but one"), (8, "belong to several")])
def test_meshes_whose_replicas_cannot_save_are_refused(data, why, tmp_path):
    train = TrainConfig(1, local_checkpoints=str(tmp_path))
    mesh, state = (
        sharding.make_mesh(MeshConfig(data=data, fsdp=8 // data)),
        TrainState(0, {}, {}, ()),
    )
    with pytest.raises(ValueError, match=rf"`data` .* {why}; take a mesh with data=2"):
        local_tier.open_tier(train, tmp_path / "run", mesh, state, False)
    assert not any(tmp_path.iterdir())
