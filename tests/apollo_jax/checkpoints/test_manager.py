# SPDX-License-Identifier: Apache-2.0
"""Checkpoints come back bit for bit; damaged and unfinished ones are never chosen."""

import os
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_jax import sharding
from apollo_jax.checkpoints import manager
from apollo_jax.checkpoints.manager import Checkpoints
from apollo_jax.checkpoints.orbax_arrays import OrbaxArrays, write_arrays
from apollo_jax.checkpoints.run import is_run, latest_weights, read_experiment
from apollo_jax.checkpoints.translate import Arrays
from apollo_jax.sharding import MeshConfig
from apollo_jax.training.state import TrainState


def make_state(step: int, **axes: Any) -> TrainState:
    """Random arrays of several dtypes, some of them spread over the mesh."""
    mesh = sharding.make_mesh(MeshConfig(**(axes or dict(data=2, fsdp=4))))
    rng = np.random.default_rng(step)

    def array(shape: tuple[int, ...], dtype, *axes: str | None) -> jax.Array:
        values = jnp.asarray(rng.normal(size=shape), dtype)
        return jax.device_put(values, NamedSharding(mesh, P(*axes)))

    params = {"llm/a/0/kernel": array((64, 96), jnp.float32, "fsdp")}
    frozen = {"connector/b": array((8,), jnp.bfloat16), "connector/c": array((), jnp.float32)}
    mu, nu = ({n: array(p.shape, p.dtype, "fsdp") for n, p in params.items()} for _ in range(2))
    count = jax.device_put(jnp.int32(step), frozen["connector/c"].sharding)
    moments = (optax.EmptyState(), optax.ScaleByAdamState(count, mu, nu))
    return TrainState(count, params, frozen, moments)


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b) -> bool:
    def equal(x: jax.Array, y: jax.Array) -> bool:
        return x.dtype == y.dtype and x.sharding == y.sharding and np.array_equal(x, y)

    return jax.tree.all(jax.tree.map(equal, a, b))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 1, 2 and 3, of which two are kept."""
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {"next_step": step})
    checkpoints.close()
    return folder


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def restore(run: Path, abstract: TrainState | None = None, read_only: bool = False) -> Any:
    checkpoints = Checkpoints(run, keep=2, read_only=read_only)
    try:
        return checkpoints.restore(shapes(make_state(0)) if abstract is None else abstract)
    finally:
        checkpoints.close()


def test_comes_back_bit_for_bit(run):
    step, state, data = restore(run)
    assert (step, data) == (3, {"next_step": 3})
    assert same(state, make_state(3))
    assert sorted(os.listdir(run / "checkpoints")) == ["00000002", "00000003"]


def test_comes_back_on_another_mesh_and_in_another_dtype(run):
    other = make_state(3, data=4, tensor=2)
    _, state, _ = restore(run, shapes(other))
    assert same(state, other)
    wanted = {
        n: jax.ShapeDtypeStruct(w.shape, jnp.bfloat16, sharding=w.sharding)
        for n, w in (other.params | other.frozen).items()
    }
    step, weights = Checkpoints(run, read_only=True).restore_weights(wanted)
    assert step == 3
    assert same(
        weights, {n: w.astype(jnp.bfloat16) for n, w in (other.params | other.frozen).items()}
    )


def test_nothing_saved_yet(tmp_path):
    assert restore(tmp_path) is None
    assert not is_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no finished checkpoint"):
        Checkpoints(tmp_path, read_only=True).restore_weights({})
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        read_experiment(tmp_path)


def truncate(folder: Path) -> None:
    largest = max(folder.glob("ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def flip(folder: Path) -> None:
    """64 bytes in the middle of the arrays, in place: nothing about the file changes but them."""
    largest = max(folder.glob("ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 64)
    content[middle] = bytes(255 - byte for byte in content[middle])
    largest.write_bytes(content)


def lose_chunk(item: Path) -> None:
    """As where the part of one process is not there: without it a chunk would read as zeros."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{item}/"}).result()
    chunks = [key for key in store.list().result() if not key.endswith(b".zarray")]
    store.delete_range(ts.KvStore.KeyRange(chunks[-1], chunks[-1] + b"\0")).result()


def renumber(file: Path) -> None:
    file.write_text(file.read_text().replace('"next_step": 3', '"next_step": 7'))


DAMAGES = {
    "data cut off": lambda folder: truncate(folder / "weights"),
    "moments cut off": lambda folder: truncate(folder / "optimizer"),
    "bytes flipped": lambda folder: flip(folder / "weights"),
    "bytes of moments flipped": lambda folder: flip(folder / "optimizer"),
    "a chunk gone": lambda folder: lose_chunk(folder / "weights"),
    "a chunk of moments gone": lambda folder: lose_chunk(folder / "optimizer"),
    "a digit of the iterator": lambda folder: renumber(folder / "loop" / "metadata"),
    "manifest gone": lambda folder: os.remove(folder / "weights" / "manifest.ocdbt"),
    "part gone": lambda folder: shutil.rmtree(folder / "optimizer"),
    "iterator empty": lambda folder: os.truncate(folder / "loop" / "metadata", 0),
    "all gone": lambda folder: [shutil.rmtree(p) for p in folder.iterdir() if p.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, damage, capsys):
    damage(run / "checkpoints" / "00000003")
    step, state, data = restore(run)
    assert (step, data) == (2, {"next_step": 2})
    assert same(state, make_state(2))
    said = " ".join(capsys.readouterr().err.split())
    assert "checkpoint 3" in said
    assert "going on from step 2" in said
    assert os.listdir(run / "torn") == ["00000003"]
    again = Checkpoints(run, keep=2)
    again.save(3, make_state(3), {"next_step": 3})
    again.close()
    assert restore(run)[0] == 3


@pytest.mark.parametrize("damage", [flip, lose_chunk])
def test_damage_is_no_weights_for_an_export(run, damage):
    damage(run / "checkpoints" / "00000003" / "weights")
    stored = OrbaxArrays(latest_weights(run))
    with pytest.raises(ValueError, match="llm/a/0/kernel is damaged or missing"):
        stored.read("llm/a/0/kernel")


def test_zeros_are_kept_apart_from_what_is_missing(tmp_path):
    item = tmp_path / "item"
    write_arrays(item, Arrays({"zeros": np.zeros((4, 4), np.float32)}))
    assert not OrbaxArrays(item).read("zeros").any()
    lose_chunk(item)
    with pytest.raises(ValueError, match="zeros is damaged or missing"):
        OrbaxArrays(item).read("zeros")


def test_checkpoints_of_before_there_were_checksums_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(manager, "CHECKED", dict(id="zstd", level=1))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, make_state(3), {"next_step": 3})
    checkpoints.close()
    loop = tmp_path / "checkpoints" / "00000003" / "loop" / "metadata"
    loop.write_text('{"step": 3, "data": {"next_step": 3}}')
    step, state, data = restore(tmp_path)
    assert (step, data) == (3, {"next_step": 3})
    assert same(state, make_state(3))


def test_a_reader_changes_nothing(run, capsys):
    truncate(run / "checkpoints" / "00000003" / "weights")
    (run / "checkpoints" / "00000004.orbax-checkpoint-tmp").mkdir()
    before = sorted(run.rglob("*"))
    assert restore(run, read_only=True)[0] == 2
    assert "checkpoint 3" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_an_unfinished_checkpoint_is_not_seen(run):
    folder = run / "checkpoints"
    shutil.copytree(folder / "00000003", folder / "00000004.orbax-checkpoint-tmp")
    assert restore(run)[0] == 3
    deadline = time.monotonic() + 60  # Orbax removes it in the background
    while "00000004.orbax-checkpoint-tmp" in os.listdir(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sorted(os.listdir(folder)) == ["00000002", "00000003"]


def test_all_damaged_is_an_error_that_moves_nothing(run):
    for step in (2, 3):
        truncate(run / "checkpoints" / f"{step:08d}" / "weights")
    with pytest.raises(ValueError, match=r"no checkpoint .* can be read:\n  step 3: .*\n  step 2"):
        restore(run)
    assert sorted(os.listdir(run / "checkpoints")) == ["00000002", "00000003"]


def test_says_what_is_stored(run):
    stored = Checkpoints(run, read_only=True).stored_shapes()
    assert stored == {"llm/a/0/kernel": (64, 96), "connector/b": (8,), "connector/c": ()}


def test_an_export_reads_layer_by_layer(tmp_path, monkeypatch):
    """Orbax alone would write one chunk for each device, to be decoded as a whole."""
    monkeypatch.setattr(manager, "CHUNK_BYTES", 1 << 10)
    state = make_state(1)
    over_embed = NamedSharding(sharding.make_mesh(MeshConfig(data=2, fsdp=4)), P(None, "fsdp"))
    stacked = jax.device_put(jnp.ones((3, 8, 16), jnp.float32), over_embed)
    state = state._replace(params={**state.params, "llm/layers/q/kernel": stacked})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    checkpoints.close()
    stored = OrbaxArrays(latest_weights(tmp_path))
    assert stored.chunks("llm/layers/q/kernel") == (1, 2, 16)
    assert np.prod(stored.chunks("llm/a/0/kernel")) * 4 <= 1 << 10
    for name, array in {**state.params, **state.frozen}.items():
        assert np.array_equal(stored.read(name), array)


def test_a_checkpoint_that_another_process_cannot_read_gives_way_in_all(run, monkeypatch, capsys):
    heard = iter([["", "DataLossError: cut off"], ["", ""]])
    monkeypatch.setattr(manager.agreement, "hear", lambda said: next(heard))
    assert restore(run)[0] == 2
    assert "damaged (DataLossError: cut off); going on from step 2" in " ".join(
        capsys.readouterr().err.split()
    )


# Orbax ends its event loop at the first write that fails; the others answer to nobody.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full_leaves_what_was_saved(run):
    """No file may grow beyond 1 kB: what a write then says stands for a full disk's answer."""
    checkpoints = Checkpoints(run, keep=2)
    before = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    def save() -> None:
        checkpoints.save(4, make_state(4), {"next_step": 4})
        checkpoints.wait()

    try:
        with pytest.raises(OSError, match=r"the checkpoint of step 3 stays saved\. Make room"):
            save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpoints.close()
    assert before == {p: p.read_bytes() for p in before}
    assert restore(run)[0] == 3
