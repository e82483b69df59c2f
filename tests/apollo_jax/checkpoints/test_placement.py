# SPDX-License-Identifier: Apache-2.0
"""Two real processes of two devices load a checkpoint: each reads the slices that it holds.

The processes run this file; what they hold is compared with one process that loads everything.
"""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from apollo_jax import sharding
from apollo_jax.checkpoints import convert
from apollo_jax.checkpoints.orbax_arrays import OrbaxArrays
from apollo_jax.checkpoints.pretrained import from_pretrained, save_pretrained
from apollo_jax.checkpoints.sources import RawFiles
from apollo_jax.config import Experiment, TrainConfig
from apollo_jax.models import apollo
from apollo_jax.sharding import MeshConfig
from apollo_jax.training.state import abstract_model, flatten
from apollo_jax.training.weights import initial_weights
from data_pipeline.loader import DataConfig, SourceConfig

ROOT = Path(__file__).parents[3]
MESH = MeshConfig(data=1, fsdp=2, tensor=2)  # fsdp lies across the processes
# Small tensors of the towers, of which a slice of ours is no slice of the file's: read whole.
WHOLE = ("patch_embed/kernel", "patch_embedding.weight", "patch_embed.proj.weight", "cls_token")
WHOLE += ("vision_tower/towers/1/positions", "pos_embed")
WAYS = ("from_pretrained", "init_from, published", "init_from, orbax")


@pytest.fixture(scope="module")
def found(build, tmp_path_factory) -> list[dict]:
    """What each process wrote about each way."""
    folder = tmp_path_factory.mktemp("placed")
    debug = apollo.Config.debug()
    # a head of its own: that a stored copy is one, the first process sees by reading both
    config = replace(debug, llm=replace(debug.llm, tie_word_embeddings=False))
    model = build(lambda: apollo.Apollo(config, rngs=nnx.Rngs(0)))
    save_pretrained(model, folder / "published")
    convert.convert(folder / "published", folder / "orbax", to="orbax")
    np.savez(folder / "one.npz", **values(from_pretrained(folder / "published")))
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    xla = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    flags = {"XLA_FLAGS": xla, "PYTHONPATH": str(ROOT)}
    jobs = [
        subprocess.Popen(
            [sys.executable, __file__, address, str(index), str(folder)],
            env=os.environ | flags,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [job.communicate(timeout=300)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(said)
    return [json.loads((folder / f"{index}.json").read_text()) for index in range(2)]


@pytest.mark.parametrize("way", WAYS)
def test_each_process_reads_what_it_holds(found, way):
    for process in found:
        about = process[way]
        assert about["wrong"] == []
        assert about["read"] == about["held"]  # a slice that both devices hold is read once
        assert about["held"] < 0.6 * about["whole"]


def test_saving_names_the_way(found):
    for process in found:
        assert "several processes" in process["refused"]
        assert "apollo-jax convert" in process["refused"]


# ---- in each of the two processes


def values(model: apollo.Apollo) -> dict:
    return {name: leaf[...] for name, leaf in flatten(nnx.state(model)).items()}


def load(way: str, folder: Path) -> dict[str, jax.Array]:
    mesh = sharding.make_mesh(MESH)
    if way == "from_pretrained":
        return values(from_pretrained(folder / "published", mesh=mesh))
    start = folder / way.removeprefix("init_from, ")
    experiment = experiment_from(start)
    _, shapes = abstract_model(experiment.model, experiment.train, ("llm",), mesh)
    return initial_weights(experiment, shapes)[0]


def experiment_from(start: Path) -> Experiment:
    config = convert.read_config(start)
    assert isinstance(config, apollo.Config)
    data = DataConfig(
        sources={"all": SourceConfig("train.jsonl")},
        frames=(),
        tokenizer="",
        batch_size=1,
        length=64,
        clips=1,
        frame_size=config.frame_size,
        tokens_per_clip=config.connector.num_output_tokens,
    )
    train = TrainConfig(num_steps=1, frozen_dtype="float32")
    return Experiment("tiny", config, data, train, init_from=str(start))


def account(arrays: dict[str, jax.Array], one: Path) -> dict:
    """Which are wrong, the bytes of the slices here, each counted once, and of everything."""
    wrong, held, whole = [], 0, 0
    with np.load(one) as expected:
        assert set(expected) == set(arrays)
        for name, array in arrays.items():
            slices = {str(s.index): s for s in array.addressable_shards}
            if not name.endswith(WHOLE):
                held += sum(s.data.nbytes for s in slices.values())
            whole += array.nbytes
            if not all(np.array_equal(s.data, expected[name][s.index]) for s in slices.values()):
                wrong.append(name)
    return dict(wrong=wrong, held=held, whole=whole)


def count_reading() -> Counter[str]:
    """The bytes of every tensor that are read from files from now on."""
    counts = Counter()
    for source in (RawFiles, OrbaxArrays):

        def counting(self, name, index=(), read=source.read):
            array = read(self, name, index)
            counts[name] += array.nbytes
            return array

        source.read = counting
    return counts


def refusal(folder: Path) -> str:
    model = from_pretrained(folder / "published", mesh=sharding.make_mesh(MESH))
    try:
        save_pretrained(model, folder / "saved")
    except ValueError as error:
        assert not list(folder.glob("saved*"))
        return str(error)
    return ""


def process(address: str, index: str, folder: Path) -> None:
    jax.distributed.initialize(address, 2, int(index))
    counts, about = count_reading(), {}
    for way in WAYS:
        counts.clear()
        arrays = load(way, folder)
        read = sum(count for name, count in counts.items() if not name.endswith(WHOLE))
        about[way] = dict(read=read, **account(arrays, folder / "one.npz"))
    about["refused"] = refusal(folder)
    (folder / f"{index}.json").write_text(json.dumps(about))


if __name__ == "__main__":
    process(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
