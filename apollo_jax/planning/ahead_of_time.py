# SPDX-License-Identifier: Apache-2.0
"""Compiles an experiment's real train step for a TPU topology, on a machine without one."""

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
from apollo_jax.planning import flops, hlo
from apollo_jax.planning.topology import Topology
from apollo_jax.training import losses, stages
from apollo_jax.training.state import TrainState, abstract_model, merge, split
from apollo_jax.training.step import Program, batch_sums, build
from data_pipeline.batch import Batch, empty_batch

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_LARGE = re.compile(r"\(([\d.]+)([KMGT])?\) exceeds available \w+ \(([\d.]+)([KMGT])\)")
_BUFFER = re.compile(r"\s*[\d.]+\w+\(\s*\d+%\);\s*([\d.]+)([KMG]?)i?B?;\s*\d*;\s*\d+; (.+)")
_LARGEST = 8  # buffers that are named


@dataclass(frozen=True)
class Memory:
    """Bytes per device. `temporaries` holds activations, gradients and the compiler's copies."""

    params: int  # that train
    frozen: int
    moments: int  # of the optimizer
    batch: int
    temporaries: int
    code: int
    peak: int  # what must be there at once

    @property
    def resident(self) -> int:
        return self.params + self.frozen + self.moments


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step."""

    fits: bool
    memory: Memory
    totals: hlo.Totals | None  # None if it did not fit
    largest: list[tuple[int, str]] = field(default_factory=list)  # temporaries: bytes, shape
    seconds: float = 0.0


def abstract_batch(experiment: Experiment, mesh: Any) -> Batch:
    """The global batch as shapes on the mesh."""
    data = experiment.data
    frames = data.frames_per_clip, data.frame_size, data.layout
    row = empty_batch(1, data.length, data.clips, *frames)
    shapes = [(data.batch_size, *x.shape[1:]) for x in row]

    def shape(x: np.ndarray, shape: tuple[int, ...], place: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=place)

    return Batch(*map(shape, row, shapes, sharding.batch_shardings(shapes, mesh)))


def compile_step(experiment: Experiment, topology: Topology) -> Compiled:
    """Compiles the train step for the topology; a step that does not fit is an answer, no error.

    Raises ValueError for a mesh or batch that does not divide.
    """
    mesh = sharding.make_mesh(experiment.mesh, topology.devices())
    program = build(experiment, mesh)  # before the mesh is set: it computes a few constants
    batch = abstract_batch(experiment, mesh)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = program.lower(batch)
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            too_large = _TOO_LARGE.search(str(error))
            if too_large is None:
                raise
            temporaries = round(_size(too_large[1], too_large[2]))
            memory = _memory(program, batch, temporaries, 0)
            return Compiled(False, memory, None, _largest(folder), time.perf_counter() - began)
        seconds = time.perf_counter() - began
        stats = compiled.memory_analysis()
        assert stats is not None
        memory = _memory(
            program, batch, stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
        )
        totals = hlo.totals(_optimised(folder), dict(mesh.shape))
        return Compiled(True, memory, totals, _largest(folder), seconds)


def model_flops(experiment: Experiment) -> float:
    """FLOPs that a step of this experiment needs: products of its loss's gradient.

    Counted without rematerialisation; the decoder's causal attention by half.
    """
    train = replace(experiment.train, remat="none", loss_chunk=0)
    trained = stages.trained_components(experiment.optimizer.learning_rates)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices("cpu")[:1])
    graphdef, shapes = abstract_model(experiment.model, train, trained, mesh)
    plain = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in shapes.items()}
    params, frozen = split(plain, trained)
    one_row = replace(experiment, data=replace(experiment.data, batch_size=1))
    batch = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), abstract_batch(one_row, mesh)
    )

    def loss(params: Any, frozen: Any, batch: Batch) -> jax.Array:
        return losses.mean(batch_sums(merge(graphdef, params, frozen), batch, train))[0]

    llm, length = experiment.model.llm, experiment.data.length
    products = 4.0 * length**2 * llm.hidden_size * llm.num_hidden_layers
    passes = 3  # the gradient passes through the decoder in every stage
    row = flops.count(jax.grad(loss), params, frozen, batch) - passes * products / 2
    return row * experiment.data.batch_size


def _memory(program: Program, batch: Batch, temporaries: int, code: int) -> Memory:
    state: TrainState = program.abstract
    held = {
        "params": _local(state.params),
        "frozen": _local(state.frozen),
        "moments": _local(state.opt_state),
        "batch": _local(batch),
        "temporaries": temporaries,
        "code": code,
    }
    return Memory(**held, peak=sum(held.values()))


def _local(tree: Any) -> int:
    """Bytes of a tree of shapes on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += (
            int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int)) * leaf.dtype.itemsize
        )
    return total


def _optimised(folder: str) -> str:
    """The text of the program; `as_text` fails on some programs with asynchronous collectives."""
    files = sorted(Path(folder).glob("*after_optimizations.txt"), key=lambda f: f.stat().st_size)
    return files[-1].read_text()


def _largest(folder: str) -> list[tuple[int, str]]:
    """The largest buffers in the chip's main memory, from the compiler's own report."""
    reports = sorted(Path(folder).glob("*memory-usage-report.txt"), key=lambda f: f.stat().st_size)
    if not reports:
        return []
    main_memory = reports[-1].read_text().partition("Memory Space: vmem")[0]
    rows = {
        (round(_size(found[1], found[2])), found[3])
        for line in main_memory.splitlines()
        if (found := _BUFFER.match(line))
    }
    return sorted(rows, reverse=True)[:_LARGEST]


def _size(number: str, unit: str | None) -> float:
    return float(number) * _UNITS[unit or "B"]
