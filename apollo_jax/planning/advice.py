# SPDX-License-Identifier: Apache-2.0
"""What to change in a recipe that does not fit, or barely does, from what lies in memory.

Every line is computed from the buffers at the peak: which knob they scale with, and what halving
it would save.
"""

from typing import NamedTuple

from apollo_jax.config import Experiment
from apollo_jax.planning.ahead_of_time import Compiled
from apollo_jax.planning.buffers import EXCHANGED, SAVED
from apollo_jax.planning.hlo_module import LOSS
from apollo_jax.planning.topology import Topology

_GIB = 2**30
_DECODER = ("qwen2", "ring_attention", "splash_attention", "attention")
_WORTH_SAYING = 0.02  # of the memory


class Advice(NamedTuple):
    """One change: bytes per device that it would save, and how to make it."""

    saves: float
    text: str


def lines(
    compiled: Compiled, experiment: Experiment, topology: Topology, mesh: dict[str, int]
) -> list[str]:
    """Changes that save memory, the best first; [] where the step fits with a tenth to spare."""
    hbm = topology.chip.hbm / topology.chip.devices
    over = _reserved(compiled) - hbm
    if compiled.fits and over < -0.1 * hbm:
        return []
    found = sorted(_changes(compiled, experiment, mesh), key=lambda a: -a.saves)
    return [
        f"{a.text}: about {a.saves / _GIB:.1f} GiB less"
        + (", which would be enough" if a.saves >= over > 0 else "")
        for a in found
        if a.saves > _WORTH_SAYING * hbm
    ]


def _changes(compiled: Compiled, experiment: Experiment, mesh: dict[str, int]) -> list[Advice]:
    data, train, buffers = experiment.data, experiment.train, compiled.buffers
    rows = data.batch_size // (mesh["data"] * mesh["fsdp"])
    of_rows = [b for b in buffers if b.part and b.kind != EXCHANGED]
    decoder = sum(b.bytes for b in of_rows if b.part in _DECODER)
    logits = sum(b.bytes for b in of_rows if b.part in LOSS)
    vision = sum(b.bytes for b in of_rows) - decoder - logits  # encoders and connector
    saved = sum(b.bytes for b in buffers if b.kind == SAVED)
    shared = mesh["fsdp"] * mesh["tensor"]
    memory = compiled.memory
    changes = []
    if rows > 1:
        half = f"config.data.batch_size={data.batch_size // 2}, half the rows per device"
        if not train.batch_ramp:
            half += f" (train.accumulate={2 * train.accumulate} keeps the update's)"
        changes.append(Advice((decoder + vision + logits) / 2, half))
    if data.clips > 1:
        text = f"config.data.clips={data.clips // 2}, half the clips per row"
        changes.append(Advice(vision / 2, text))
    longer = f"config.mesh.context={2 * mesh['context']} (on twice the chips, or from mesh.data)"
    changes.append(Advice(decoder / 2, f"{longer}, half the positions per device"))
    if data.length > 2048:
        changes.append(Advice(decoder / 2, f"config.data.length={data.length // 2} per row"))
    if train.remat == "none":
        changes.append(Advice(0.8 * saved, "config.train.remat=full, keeping only layers' inputs"))
    elif train.remat != "full":
        changes.append(Advice(0.5 * saved, "config.train.remat=full, keeping only layers' inputs"))
    chunk = train.loss_chunk or data.length
    changes.append(Advice(logits / 2, f"config.train.loss_chunk={chunk // 2}"))
    where = f"config.mesh.fsdp={2 * mesh['fsdp']} (on twice the chips, or from mesh.data)"
    text = f"{where}: weights and moments over {2 * shared} devices instead of {shared}"
    changes.append(Advice(memory.resident / 2, text))
    return changes


def _reserved(compiled: Compiled) -> float:
    memory = compiled.memory
    return memory.resident + memory.batch + memory.temporaries + memory.code
