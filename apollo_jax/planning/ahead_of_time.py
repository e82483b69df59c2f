# SPDX-License-Identifier: Apache-2.0
"""Compiles an experiment's real train step for a TPU topology, on a machine without one."""

import multiprocessing
import os
import re
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from apollo_jax import sharding
from apollo_jax.config import Experiment
from apollo_jax.planning import hlo, layout_only
from apollo_jax.planning.buffers import GAPS, Buffer, at_peak
from apollo_jax.planning.hlo_module import Module
from apollo_jax.planning.rates import Rates
from apollo_jax.planning.topology import Topology, use_compiler_only
from apollo_jax.training import accumulate
from apollo_jax.training.state import HOST, TrainState
from apollo_jax.training.step import build
from data_pipeline.batch import Batch, empty_batch

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_LARGE = re.compile(r"\(([\d.]+)([KMGT])?\) exceeds available \w+ \(([\d.]+)([KMGT])\)")
_LARGEST = 12  # buffers that are named
_CRASH = "async-update"  # in the message of a fault that libtpu is known to have
# Asked for once more where the compiler stumbles over its own asynchronous exchanges.
PLAINER = {"xla_tpu_enable_async_collective_fusion": "false"}


@dataclass(frozen=True)
class Memory:
    """Bytes per device. `temporaries` holds activations, gradients and the compiler's copies."""

    params: int  # that train
    frozen: int
    moments: int  # of the optimizer
    batch: int
    temporaries: int
    code: int
    peak: int  # the compiler's own; the sum where it gives none
    accumulated: int = 0  # sums of gradients, of steps from several microbatches

    @property
    def resident(self) -> int:
        return self.params + self.frozen + self.moments + self.accumulated


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step."""

    fits: bool
    memory: Memory
    totals: hlo.Totals | None  # None if it did not fit
    buffers: list[Buffer] = field(default_factory=list)  # temporaries at the peak
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the process until then, its imports and tracing included
    note: str = ""  # what was asked of the compiler beyond the usual

    @property
    def largest(self) -> list[tuple[int, str]]:
        """(bytes, shape, place in the model, purpose) of the largest temporaries at the peak."""
        return [(b.bytes, b.text) for b in self.buffers[:_LARGEST]]

    @property
    def temporaries(self) -> dict[str, int]:
        """Bytes at the peak by purpose, the largest first; what is left are padding and gaps."""
        kinds: dict[str, int] = {}
        for buffer in self.buffers:
            kinds[buffer.kind] = kinds.get(buffer.kind, 0) + buffer.bytes
        kinds = dict(sorted(kinds.items(), key=lambda item: -item[1]))
        return kinds and kinds | {GAPS: max(0, self.memory.temporaries - sum(kinds.values()))}


def abstract_batch(experiment: Experiment, mesh: Any) -> Batch:
    """The global batch as shapes on the mesh."""
    data = experiment.data
    frames = data.frames_per_clip, data.frame_size, data.layout
    row = empty_batch(1, data.length, data.clips, *frames)
    shapes = [(data.batch_size, *x.shape[1:]) for x in row]

    def shape(x: np.ndarray, shape: tuple[int, ...], place: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=place)

    return Batch(*map(shape, row, shapes, sharding.batch_shardings(shapes, mesh)))


def compile_step(experiment: Experiment, topology: Topology, code: bool = True) -> Compiled:
    """Compiles the train step for the topology; a step that does not fit is an answer, no error.

    Of a step from several microbatches both programs: that of the last and that of the others.
    Memory and buffers are those of the program that needs more, the rest is of the whole step.

    Without `code` it takes a tenth of the time and `memory.code` is 0, see layout_only.
    Raises ValueError for a mesh or batch that does not divide, and for a fault of the compiler.
    """
    others = experiment.train.ramp.most - 1
    if not others:
        return _program(experiment, topology, code)
    step = (_program if code else _apart)(experiment, topology, code)
    add = _program(experiment, topology, code, add=True)
    larger = max(step, add, key=lambda c: (not c.fits, c.memory.peak))
    totals = None
    if step.totals and add.totals:
        totals = hlo.together([(step.totals, 1), (add.totals, others)])
    return replace(
        larger,
        fits=step.fits and add.fits,
        memory=replace(larger.memory, code=step.memory.code + add.memory.code),
        totals=totals,
        seconds=step.seconds + add.seconds,
        cpu_seconds=add.cpu_seconds if code else step.cpu_seconds + add.cpu_seconds,
        note=step.note or add.note,
    )


def _program(experiment: Experiment, topology: Topology, code: bool, add: bool = False) -> Compiled:
    """The program of an update, or the one that adds a microbatch to those before it."""
    mesh = sharding.make_mesh(experiment.mesh, topology.devices())
    program = build(experiment, mesh)  # before the mesh is set: it computes a few constants
    batch = abstract_batch(experiment, mesh)
    several = experiment.train.ramp.most > 1
    gradients = several and accumulate.shapes_of(program.abstract).grads
    held = _held(program.abstract, batch, gradients)
    with jax.set_mesh(mesh):
        lowered = program.lower_add(batch) if add else program.lower(batch, several)
        return _compiled(lowered, held, mesh, topology, code)


def _apart(experiment: Experiment, topology: Topology, code: bool) -> Compiled:
    """`_program` in a process of its own: what layout_only leaves behind there ends with it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_program, args=(sender, experiment, topology, code))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError as error:
        process.join()
        raise ValueError(_fault(f"exit code {process.exitcode}", tried=False)) from error
    finally:
        process.kill()
    if isinstance(found, ValueError):
        raise found
    return found


def _send_program(sender: Any, experiment: Experiment, topology: Topology, code: bool) -> None:
    use_compiler_only()
    try:
        sender.send(_program(experiment, topology, code))
    except ValueError as error:
        sender.send(error)
    os._exit(0)  # not waiting for the compiler


def _compiled(
    lowered: Any, held: dict[str, int], mesh: Any, topology: Topology, code: bool
) -> Compiled:
    """One program, beside which the bytes of `held` lie in memory by kind."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        compiled, too_large, note = _compile(lowered, folder, code)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time()
        module = Module(optimised(folder))
        totals = compiled and hlo.totals(module, dict(mesh.shape), _rates(mesh, topology))
        return Compiled(
            fits=compiled is not None,
            memory=_memory(held, compiled, too_large),
            totals=totals,
            buffers=at_peak(folder, module),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            note=note,
        )


def _compile(lowered: Any, folder: str, code: bool = True) -> tuple[Any, int, str]:
    """(the program or None, bytes that it needs where they exceed the memory, flags it took).

    The compiler's reports are left in the folder. Where it fails of itself in a way that is known,
    it is asked once more for a plainer program. ValueError where that does not help.
    """
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    for plainer in ({}, PLAINER):
        try:
            if not code:
                return layout_only.lay_out(lowered, folder, dump | plainer), 0, _flags(plainer)
            return lowered.compile(compiler_options=dump | plainer), 0, _flags(plainer)
        except jax.errors.JaxRuntimeError as error:
            if too_large := _TOO_LARGE.search(str(error)):
                return None, round(_size(too_large[1], too_large[2])), _flags(plainer)
            if plainer or _CRASH not in str(error):
                raise ValueError(_fault(str(error), tried=bool(plainer))) from error
        for file in Path(folder).glob("*.txt"):
            file.unlink()
    raise AssertionError


def _fault(message: str, tried: bool) -> str:
    """What to tell someone whose config the compiler itself fails on."""
    first = message.strip().splitlines()[0][:200]
    flags = f"{_flags(PLAINER)} {'was tried' if tried else 'is worth a try'}"
    return (
        f"the TPU compiler (libtpu) failed on this program: {first}; that is a fault of the "
        "compiler, not of the config. What gets around such faults: another mesh, batch_size or "
        "remat for this step, another version of libtpu, or XLA flags in the environment as "
        f"LIBTPU_INIT_ARGS ({flags})"
    )


def _flags(options: dict[str, str]) -> str:
    return " ".join(f"--{name}={value}" for name, value in options.items())


def _rates(mesh: Any, topology: Topology) -> Rates:
    """Of one device of the topology, its slice's places in the order of the mesh."""
    chip = topology.chip
    first = mesh.devices.reshape(-1)[: mesh.size // topology.slices]
    return Rates(
        flops=chip.flops / chip.devices,
        hbm=chip.hbm_bandwidth / chip.devices,
        ici=chip.ici_bandwidth / chip.devices,
        dcn=chip.dcn_bandwidth / chip.devices,
        places=tuple(tuple(d.coords[: chip.dimensions]) for d in first),
        shape=topology.shape,
        wraps=chip.wraps,
    )


def _held(state: TrainState, batch: Batch, accumulated: Any) -> dict[str, int]:
    """Bytes per device of what lies there before a program runs, by the names in Memory."""
    return {
        "params": _local(state.params),
        "frozen": _local(state.frozen),
        "moments": _local(state.opt_state),
        "accumulated": _local(accumulated) if accumulated else 0,
        "batch": _local(batch),
    }


def _memory(held: dict[str, int], compiled: Any, too_large: int) -> Memory:
    stats = compiled and compiled.memory_analysis()
    held = held | {
        # the compiler's "HLO temporaries" that are too large are its arguments too
        "temporaries": stats.temp_size_in_bytes if stats else too_large - sum(held.values()),
        "code": stats.generated_code_size_in_bytes if stats else 0,
    }
    peak = stats.peak_memory_in_bytes if stats else 0
    return Memory(**held, peak=peak or sum(held.values()))


def _local(tree: Any) -> int:
    """Bytes of a tree of shapes in one device's memory."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding.memory_kind != HOST:
            total += (
                int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int)) * leaf.dtype.itemsize
            )
    return total


def optimised(folder: str) -> str:
    """The text of the program; `as_text` fails on some programs with asynchronous collectives."""
    files = sorted(Path(folder).glob("*after_optimizations.txt"), key=lambda f: f.stat().st_size)
    return files[-1].read_text()


def _size(number: str, unit: str | None) -> float:
    return float(number) * _UNITS[unit or "B"]
