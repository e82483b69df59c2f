# SPDX-License-Identifier: Apache-2.0
"""The local tier: what a run saves on its machines' own disks, between its checkpoints.

    FOLDER/sft-1f0c9a3e/data=4,..-8/120/   what one machine keeps of the state after step 120

It is Orbax's emergency manager without its own permanent half, which manager.py is. Every replica
along the mesh axis `data` but the first saves what its devices hold, and nothing crosses a network.
When the run goes on, a replica that has the step whole reads it and sends it to the others: it has
to lie with processes of the same number on the same mesh. A checkpoint of the run's folder that is
newer goes before it. Chunks have checksums as there.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint._src.multihost import multihost, multislice
from orbax.checkpoint.experimental.emergency import checkpoint_manager as emergency

from apollo_jax import meshes
from apollo_jax.config import TrainConfig
from apollo_jax.training import processes
from apollo_jax.training.meeting import gather, meet
from apollo_jax.training.state import TrainState

# Orbax warns at every save that replicas have no primary host, which is as it should be.
logging.getLogger("absl").addFilter(lambda record: "primary_host=None" not in str(record.msg))

_REPLICAS = 0  # of the mesh axes `data`, the first
_LOOP_BYTES = 1 << 20  # that the iterator's state may have; it is stored with the arrays


class LocalTier:
    """The local checkpoints of one run; saving goes on in the background. See `open_tier`."""

    def __init__(self, folder: Path, mesh: Mesh, abstract: TrainState):
        self.folder, self.abstract = folder, abstract
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        nothing = folder / "nothing"  # where Orbax would save for good
        nothing.mkdir(parents=True, exist_ok=True)
        if not flags.FLAGS.is_parsed():  # Orbax has settings of its own there
            flags.FLAGS.mark_as_parsed()
        multihost.initialize_distributed_to_device_ids()
        loop = jax.ShapeDtypeStruct((_LOOP_BYTES,), np.uint8, sharding=self.everywhere)
        options = emergency.CheckpointManagerOptions(
            local=emergency.LocalCheckpointOptions(should_save_fn=lambda step, last: True),
            persistent=emergency.PersistentCheckpointOptions(
                should_save_fn=lambda step, last: False
            ),
            replica_axis_index=_REPLICAS,
        )
        meet()  # what comes next is exchanged
        with jax.set_mesh(None):  # Orbax takes what it makes for this process's own
            self.manager = emergency.CheckpointManager(
                folder, nothing, mesh, {"state": abstract, "loop": loop}, options=options
            )

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Save the state after `step` steps, and the data iterator's; returns once copied.

        Raises OSError if that, or the save before, could not be written.
        """
        said = np.zeros(_LOOP_BYTES, np.uint8)
        text = np.frombuffer(json.dumps({"step": step, "data": data}).encode(), np.uint8)
        assert len(text) < _LOOP_BYTES, f"{len(text)} bytes of the data iterator's state"
        said[: len(text)] = text
        loop = jax.make_array_from_callback(said.shape, self.everywhere, lambda index: said[index])
        items = ocp.args.Composite(state=ocp.args.PyTreeSave({"state": state, "loop": loop}))
        with self._explained(), jax.set_mesh(None):
            self.manager.save(step, args=items)

    def check(self) -> None:
        """OSError as `save` if the save that goes on in the background has failed."""
        with self._explained():
            self.manager.check_for_errors()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            left = shutil.disk_usage(self.folder).free
            raise OSError(
                f"{self.folder}: a local checkpoint could not be written ({left / 1e9:,.1f} GB are "
                "free there). Make room, or leave config.train.local_checkpoints out; then run the "
                f"same command to go on.\n{error}"
            ) from error

    def latest(self) -> int:
        """The last step that a replica has whole; 0 without any. The same in all processes."""
        return self.manager.latest_step() or 0

    def restore(self) -> tuple[int, TrainState, dict[str, Any]]:
        """(step, state, data iterator's state) after `latest` steps.

        Raises processes.Again if this process cannot read what it has of it; that is then put
        aside, so that whoever starts next goes on from something older.
        """
        step = self.latest()
        try:
            with jax.set_mesh(None):
                found: Any = self.manager.restore(step)
        except Exception as error:
            if processes.is_loss(error):
                raise
            damaged = self.folder / str(step)
            aside = damaged.with_suffix(".torn")
            with contextlib.suppress(OSError):  # this process may have had no part of it
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(damaged, aside)
            raise processes.Again(
                f"the local checkpoint {damaged} could not be read and is {aside.name} now: {error}"
            ) from error
        loop = np.asarray(found.state["loop"]).astype(np.uint8)  # a sum over replicas widened it
        told = json.loads(loop.tobytes().rstrip(b"\0"))
        assert told["step"] == step, f"{self.folder}: step {told['step']} where {step} should be"
        state = jax.tree.map(
            lambda held, shape: jax.device_put(held.astype(shape.dtype), shape.sharding),
            TrainState(*found.state["state"]),
            self.abstract,
        )
        return step, state, told["data"]

    def close(self) -> None:
        """Wait for the last save to be complete."""
        self.manager.close()

    def forget(self) -> None:
        """Delete what this machine holds: the run has all its steps behind it."""
        self.close()
        shutil.rmtree(self.folder.parent, ignore_errors=True)


def open_tier(
    train: TrainConfig, workdir: Path, mesh: Mesh, abstract: TrainState, begun: bool
) -> LocalTier | None:
    """The local tier of the run in `workdir`, empty if that has not begun; None if not asked for.

    Raises ValueError if no replica of the mesh would save, a process belongs to several, or two
    processes share a folder.
    """
    if not train.local_checkpoints:
        return None
    several = multislice.process_spans_multiple_replicas(mesh, replica_axis_index=_REPLICAS)
    if mesh.shape["data"] < 2 or several:
        why = "its processes each belong to several" if several else "it has but one"
        raise ValueError(
            f"config.train.local_checkpoints={train.local_checkpoints}: replicas of the mesh along "
            f"`data` save there, and of {meshes.text(mesh.shape)} {why}; take a mesh with data=2 "
            "or more, each replica on processes of its own, or leave it out"
        )
    name = f"{workdir.name}-{zlib.crc32(str(workdir.absolute()).encode()):08x}"
    of_run = Path(train.local_checkpoints).absolute() / name
    folder = of_run / f"{meshes.text(mesh.shape).replace(' ', ',')}-{jax.process_count()}"
    for other in of_run.iterdir() if of_run.exists() else ():  # what it went by before
        if other != folder or not begun:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_shared(folder)
    return LocalTier(folder, mesh, abstract)


def _refuse_shared(folder: Path) -> None:
    """ValueError, in all processes, if two of them would save to the same folder of a machine."""
    held = folder.stat()
    place = f"{socket.gethostname()} {held.st_dev} {held.st_ino}"
    mine = np.frombuffer(hashlib.sha256(place.encode()).digest()[:8], np.uint32)
    places = [row.tobytes() for row in gather(mine)]
    same = [i for i, place in enumerate(places) if places.count(place) > 1]
    if same:
        raise ValueError(
            f"config.train.local_checkpoints: processes {', '.join(map(str, same[:8]))} have the "
            f"same folder {folder.parents[1]}; give each process of a machine a path of its own"
        )
