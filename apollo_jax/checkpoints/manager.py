# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its config, its tokenizer and its checkpoints (Orbax).

    workdir/config.json            the whole Experiment
    workdir/tokenizer/             the tokenizer it was trained with
    workdir/checkpoints/00000120/  after step 120: weights | optimizer | loop (step, data iterator)

The weights are one flat dict whatever the stage trained, so that the next stage may split them
differently. A checkpoint gets its name when all of it is written; one that cannot be read back is
reported, moved to workdir/torn/ and the one before it taken. Every chunk of an array is stored with
a checksum, which every reader checks: bytes that changed where they lie are damage too.
"""

import contextlib
import dataclasses
import gc
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils
from rich.console import Console

from apollo_jax.checkpoints.orbax_arrays import CHECKED
from apollo_jax.checkpoints.run import CHECKPOINTS, CONFIG, TOKENIZER
from apollo_jax.config import Experiment
from apollo_jax.training import agreement
from apollo_jax.training.state import Arrays, Shapes, TrainState
from data_pipeline.tokenizer import Tokenizer

TORN = "torn"
CHUNK_BYTES = 16 << 20

# Orbax has no option for it: its own codec, zstd, notices no flipped bits (and is slower).
_spec_of_orbax = tensorstore_utils.build_array_write_spec


def _with_checksums(*args: Any, **kwargs: Any) -> tensorstore_utils.ArrayWriteSpec:
    """How Orbax is to write an array, but each chunk with a checksum."""
    spec = _spec_of_orbax(*args, **kwargs)
    metadata = spec.json.get("base", spec.json)["metadata"]
    if "compressor" in metadata:  # zarr 2, what we write
        metadata["compressor"] = CHECKED
    else:  # zarr 3, of the local tier
        metadata["codecs"][0]["configuration"]["codecs"].append({"name": "crc32c"})
    return spec


tensorstore_utils.build_array_write_spec = _with_checksums

# Replicas share the writing of an array only where it is worth a compiled slice.
_ARRAYS = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 20))
)


def write_run(workdir: Path, experiment: Experiment, tokenizer: Tokenizer) -> None:
    """Put down what makes the folder readable on its own, config.json last and all at once."""
    if jax.process_index() != 0:
        return
    tokenizer.save(workdir / TOKENIZER)
    temporary = workdir / f"{CONFIG}.tmp"
    temporary.write_text(json.dumps(dataclasses.asdict(experiment), indent=2) + "\n")
    os.replace(temporary, workdir / CONFIG)


class Checkpoints:
    """The checkpoints of one run; saving goes on in the background."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 1, read_only: bool = False):
        self.workdir = Path(workdir).absolute()
        self.console = Console(stderr=True, quiet=jax.process_index() != 0)
        self.read_only, self.failed = read_only, False
        self.torn: dict[int, str] = {}  # steps that `restore` found damaged, and how
        self.options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            step_format_fixed_length=8,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        handlers = {
            "weights": ocp.PyTreeCheckpointHandler(type_handler_registry=_ARRAYS),
            "optimizer": ocp.PyTreeCheckpointHandler(type_handler_registry=_ARRAYS),
            "loop": ocp.JsonCheckpointHandler(),
        }
        folder = self.workdir / CHECKPOINTS
        return ocp.CheckpointManager(folder, options=self.options, item_handlers=handlers)

    def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Save the state after `step` steps, and the data iterator's; returns once copied.

        Raises OSError if that, or the save before, could not be written; what was saved stays.
        """
        items = ocp.args.Composite(
            weights=_by_layer({**state.params, **state.frozen}),
            optimizer=ocp.args.PyTreeSave(state.opt_state),
            loop=ocp.args.JsonSave({"step": step, "data": data, "crc": _crc(step, data)}),
        )
        with self._explained():
            self.manager.save(step, args=items, force=True)

    def check(self) -> None:
        """OSError as `save` if the save that goes on in the background has failed."""
        with self._explained():
            self.manager.check_for_errors()

    def wait(self) -> None:
        """Until what was given to `save` is written; OSError as there."""
        with self._explained():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failed = True
            left = shutil.disk_usage(self.workdir).free
            whole = self.latest()
            stays = f"the checkpoint of step {whole} stays" if whole else "no checkpoint was"
            raise OSError(
                f"{self.workdir}: a checkpoint could not be written ({left / 1e9:,.1f} GB are free "
                f"there); {stays} saved. Make room, then run the same command to go on.\n"
                f"{_first_line(error)}"
            ) from error

    def latest(self) -> int:
        """The last step that there is a finished checkpoint of; 0 without any."""
        return max(self._whole(), default=0)

    def _whole(self) -> list[int]:
        """Steps of the checkpoints that have their name: they were written to the end."""
        folder = self.workdir / CHECKPOINTS
        return [int(p.name) for p in folder.iterdir() if p.name.isdigit()]

    def restore(self, abstract: TrainState) -> tuple[int, TrainState, dict[str, Any]] | None:
        """(step, state, data iterator's state) of the latest whole checkpoint; None without any."""
        items = ocp.args.Composite(
            weights=_like({**abstract.params, **abstract.frozen}),
            optimizer=_like(abstract.opt_state),
            loop=ocp.args.JsonRestore(),
        )
        found = self._latest_whole(items)
        if found is None:
            return None
        step, weights = found.loop["step"], found.weights
        params, frozen = (
            {n: weights[n] for n in part} for part in (abstract.params, abstract.frozen)
        )
        count = jax.device_put(np.int32(step), abstract.step.sharding)
        return step, TrainState(count, params, frozen, found.optimizer), found.loop["data"]

    def restore_weights(self, shapes: Shapes) -> tuple[int, Arrays]:
        """(step, weights) of the latest whole checkpoint, in the dtypes and places of `shapes`.

        Raises FileNotFoundError if there is none.
        """
        items = ocp.args.Composite(weights=_like(shapes), loop=ocp.args.JsonRestore())
        found = self._latest_whole(items)
        if found is None:
            raise self._none()
        return found.loop["step"], found.weights

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight in the latest checkpoint that can say.

        Raises FileNotFoundError if there is none.
        """
        for step in sorted(self.manager.all_steps(), reverse=True):
            with contextlib.suppress(Exception):  # whatever a damaged file makes of its reader
                tree = self.manager.item_metadata(step).weights.tree
                return {name: tuple(leaf.shape) for name, leaf in tree.items()}
        raise self._none()

    def _none(self) -> FileNotFoundError:
        return FileNotFoundError(f"{self.workdir / CHECKPOINTS} holds no finished checkpoint")

    def _latest_whole(self, items: ocp.args.Composite) -> Any:
        """The items of the newest checkpoint that can be read; the torn ones before it go aside."""
        torn = self.torn = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            found, problem = self._try(step, items)
            # A process alone may have read the part that is damaged.
            problem = next(filter(None, agreement.hear(problem)), "")
            if not problem:
                self.set_aside(step)
                return found
            torn[step] = problem
        if torn:
            reasons = "\n".join(f"  step {step}: {problem}" for step, problem in torn.items())
            raise ValueError(f"no checkpoint in {self.workdir} can be read:\n{reasons}")
        return None

    def _try(self, step: int, items: ocp.args.Composite) -> tuple[Any, str]:
        """(items, "") or (None, what is wrong), whatever a damaged file makes of its reader."""
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:  # a read that fails leaves coroutines behind, each of which would be reported
            found: Any = self.manager.restore(step, args=items)
            loop = found.loop
            if loop.get("crc", _crc(step, loop["data"])) == _crc(loop["step"], loop["data"]):
                return found, ""
            problem = "the data iterator's state is not what was saved"
        except Exception as error:
            problem = f"{type(error).__name__}: {_first_line(error)[:160]}"
        finally:
            gc.collect()
            sys.unraisablehook = hook
        return None, problem

    def set_aside(self, used: int) -> None:
        """Say what was found damaged, and move it to torn/: the run goes on from step `used`."""
        torn, self.torn = self.torn, {}
        for step, problem in torn.items():
            self.console.print(
                f"[yellow]checkpoint {step} of {self.workdir} is damaged ({problem}); "
                f"going on from step {used}"
            )
        if torn and not self.read_only:
            self.manager.close()
            if jax.process_index() == 0:
                for step in torn:
                    _move(self.workdir / CHECKPOINTS / f"{step:08d}", self.workdir / TORN)
            self.manager = self._open()

    def any_torn(self) -> bool:
        """Whether damaged checkpoints were put aside."""
        folder = self.workdir / TORN
        return folder.is_dir() and any(folder.iterdir())

    def close(self) -> None:
        """Wait for the last save to be complete; OSError as `save` if it could not be written."""
        if self.failed:  # and has been told
            return
        self.wait()
        self.manager.close()


def _by_layer(weights: Arrays) -> ocp.args.PyTreeSave:
    """Save stacked layers in chunks of one layer, others in small ones: an export reads by layer.

    By itself Orbax makes one chunk of what a device holds, which is decoded as a whole.
    """

    def how(array: jax.Array) -> ocp.SaveArgs:
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) * (array.ndim > 2))

    return ocp.args.PyTreeSave(weights, save_args=jax.tree.map(how, weights))


def _like(abstract: Any) -> ocp.args.PyTreeRestore:
    """Restore into the structure, dtypes and shardings of a tree of ShapeDtypeStructs."""
    how = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(item=abstract, restore_args=how)


def _crc(step: int, data: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps([step, data]).encode())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _move(folder: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    shutil.rmtree(target / folder.name, ignore_errors=True)
    os.rename(folder, target / folder.name)
