# SPDX-License-Identifier: Apache-2.0
"""Exchanges between devices, recognised in a compiled program whatever the compiler wrote them as.

The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice, and an all-gather
that its hardware routines do not support as an all-reduce of arrays that are zero but for one
device's part: the latter really sends as much as an all-reduce and is listed apart. Between slices
it sends through the hosts.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from apollo_jax.planning.hlo_module import Instruction, Module, shapes, size

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
GATHER_BY_REDUCE = "all-gather by all-reduce"
OPTIMIZER = "optimizer"  # the scope of its operations, which the train step opens
_COPIES = ("bitcast", "copy", "copy-start", "copy-done")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # [2,4]T(1,0)


class Exchange(NamedTuple):
    """One exchange: what one device sends, and among which devices of its slice."""

    kind: str
    bytes: float
    group: tuple[int, ...]  # places in the mesh of one slice; () between slices
    slices: int = 1  # that take part
    optimizer: bool = False  # whether the optimizer makes it, not model or loss


Computation = dict[str, Instruction]


def find(
    module: Module, computation: Computation, i: Instruction, devices: int, slices: int
) -> Exchange | None:
    """The exchange that an instruction (or the computation that it calls) makes, if any.

    Args:
      devices: of one slice.
      slices: that the program runs on.
    """
    if i.opcode == "send" and "transfer_type" in i.attributes:
        kind = re.search(r'transfer_type="(\w+)"', i.attributes)
        assert kind is not None
        name, sent = kind[1].lower().replace("_", "-"), size(computation[i.operands[0]].type)
        return Exchange(name, _share(name, sent, slices), (), slices)
    if i.opcode.removesuffix("-start") in KINDS:
        return _exchange(module, computation, i, devices)
    if i.opcode in ("fusion", "async-start"):
        for called in _inside(module, i):
            for inner in called.values():
                if inner.opcode.removesuffix("-start") in KINDS:
                    found = _exchange(module, called, inner, devices, fused=i.opcode == "fusion")
                    outside = [computation[o] for o in i.operands if o in computation]
                    if i.opcode == "async-start" and found.kind == "all-reduce":
                        whole = [v for v in outside if size(v.type)]  # and not what orders it
                        if whole and all(_is_update(module, computation, v) for v in whole):
                            return found._replace(kind=GATHER_BY_REDUCE)
                    return found
    return None


def _inside(module: Module, i: Instruction) -> Iterator[Computation]:
    """The computations that an instruction calls, and those that they call."""
    for name, _ in module.callees(i):
        yield module.computations[name]
        for inner in module.computations[name].values():
            yield from _inside(module, inner)


def marker(module: Module, i: Instruction) -> str:
    """ "start" or "done" of a fusion that begins or ends an exchange, "" of any other."""
    for name, _ in module.callees(i) if i.opcode == "fusion" else ():
        for inner in module.computations[name].values():
            if found := re.search(r'"AsyncCollective(Start|Done)"', inner.attributes):
                return found[1].lower()
    return ""


def channel(module: Module, i: Instruction) -> str:
    """What the parts of an exchange that is spread over several fusions have in common."""
    for name, _ in module.callees(i):
        for inner in module.computations[name].values():
            if inner.opcode in KINDS and (c := re.search(r"channel_id=(\d+)", inner.attributes)):
                return c[1]
    return ""


def axes(group: tuple[int, ...], mesh: dict[str, int]) -> tuple[str, ...]:
    """The axes of a (slice's) mesh along which a group of its places lies."""
    strides, step = {}, 1
    for axis, length in reversed(mesh.items()):
        strides[axis] = step
        step *= length
    places = [{a: n // strides[a] % mesh[a] for a in mesh} for n in group]
    return tuple(a for a in mesh if len({p[a] for p in places}) > 1)


def _exchange(
    module: Module, around: Computation, i: Instruction, devices: int, *, fused: bool = False
) -> Exchange:
    kind, group = i.opcode.removesuffix("-start"), _first_group(i.attributes, devices)
    arrays = shapes(i.type)
    whole = size(i.type)
    if i.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, ...)
        half = len(i.operands)
        whole = sum(size(f"{d}[{','.join(map(str, n))}]") for d, n in arrays[half : 2 * half])
    scopes = re.search(r'op_name="([^"]*)"', i.attributes)
    optimizer = scopes is not None and OPTIMIZER in scopes[1].split("/")
    users = [u.opcode for u in around.values() if i.name in u.operands]
    if kind == "all-reduce" and fused and "dynamic-slice" in users:
        sent = whole * (1 - 1 / len(group))
        return Exchange("reduce-scatter", sent, group, optimizer=optimizer)
    sent = _share(kind, whole, len(group))
    if kind == "all-reduce" and _sums_parts(module, around, i):
        kind = GATHER_BY_REDUCE
    return Exchange(kind, sent, group, optimizer=optimizer)


def _share(kind: str, whole: float, members: int) -> float:
    """Bytes that one of `members` sends, by the usual ring algorithms."""
    share = (members - 1) / max(members, 1)
    if kind == "reduce-scatter":
        return whole * (members - 1)
    return {"all-gather": share, "all-reduce": 2 * share, "all-to-all": share}.get(kind, 1) * whole


def _sums_parts(module: Module, around: Computation, i: Instruction) -> bool:
    """Whether an all-reduce adds arrays of which every device filled in only its part."""
    made = [around[o] for o in i.operands if o in around]
    return bool(made) and all(_is_update(module, around, m) for m in made)


def _is_update(module: Module, around: Computation, value: Instruction) -> bool:
    while value.opcode in _COPIES and value.operands[0] in around:
        value = around[value.operands[0]]
    if value.opcode == "fusion":
        name, _ = next(module.callees(value))
        *_, root = module.computations[name].values()
        return _is_update(module, module.computations[name], root)
    if value.opcode != "dynamic-update-slice":
        return False
    base = around.get(value.operands[0])
    return base is not None and base.opcode in ("broadcast", "parameter", "constant")


def _first_group(attributes: str, devices: int) -> tuple[int, ...]:
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=" + _IOTA, attributes):
        return tuple(_iota(iota[2], iota[3]).reshape(-1)[: int(iota[1])].tolist())
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + _IOTA + r"\))?\s*\{([^}]*)\}",
        attributes,
    ):
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = _iota(named[2] or str(devices), named[3]).reshape(list(sizes.values()))
        chosen = re.findall(r"'([^']+)'", named[4])
        first = ids[tuple(slice(None) if axis in chosen else 0 for axis in sizes)]
        return tuple(first.reshape(-1).tolist())
    return tuple(range(devices))


def _iota(dims: str, order: str | None) -> np.ndarray:
    """0, 1, ... in the shape "2,4", its axes in the order "1,0"."""
    shape = [int(n) for n in dims.split(",")]
    permutation = [int(n) for n in order.split(",")] if order else None
    return np.arange(math.prod(shape)).reshape(shape).transpose(permutation)
