# SPDX-License-Identifier: Apache-2.0
"""What lies in the chip's main memory at the peak, from the compiler's dump of its assignment.

The dump gives every temporary a place, a size and the span of the schedule in which it lives. What
occupies memory at the fullest moment is named by the operation that made it, and sorted by when it
is born and dies: before, during or after the backward pass.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from apollo_jax.planning.exchanges import KINDS
from apollo_jax.planning.hlo_module import Instruction, Module
from apollo_jax.planning.hlo_work import work

SAVED = "kept for the backward pass"
GRADIENTS = "gradients"
EXCHANGED = "gathered or summed over chips"
FORWARD = "working memory, forward"
BACKWARD = "working memory, backward"
GAPS = "padding and gaps"  # what the temporaries take beyond the buffers
_VALUE = re.compile(
    r" value: <\d+ ([\w.\-]+)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)"
)
_LIVES = re.compile(r"    ([\w.\-]+)\{([\d,]*)\}:(\d+)-(\d+)$")
_MADE_AT = re.compile(r"    (\d+):([\w.\-]+)$")


@dataclass(frozen=True)
class Buffer:
    """A temporary: bytes, "bf16[28,16384]", when it lives, and the line of the model behind it."""

    bytes: int
    shape: str
    kind: str
    source: str  # "qwen2.py:84 Mlp.__call__", or "" for the compiler's own
    part: str  # of the model: "qwen2", "siglip", "losses", ...

    @property
    def text(self) -> str:
        return f"{self.shape} {self.source or 'made by the compiler'} ({self.kind})"


@dataclass(frozen=True)
class _Value:
    instruction: Instruction | None
    slot: tuple[int, int]  # offset, size
    type: str
    born: int
    dies: int

    @property
    def shape(self) -> str:
        return re.sub(r"\{[^}]*\}", "", self.type)


def at_peak(folder: str | Path, module: Module) -> list[Buffer]:
    """The temporaries in main memory at the fullest moment, largest first; [] without a dump."""
    dumps = [sorted(Path(folder).glob(f"*-{n}.txt")) for n in ("live-range", "buffer-assignment")]
    if not all(dumps):
        return []
    lives, sequence = _live_ranges(dumps[0][-1].read_text())
    values = _values(dumps[1][-1].read_text(), lives, module)
    if not values:
        return []
    first, last = _backward(module, sequence)
    slots: dict[tuple[int, int], list[_Value]] = defaultdict(list)
    for value in values:
        slots[value.slot].append(value)
    peak = _fullest(slots)
    found = []
    for (_, size), held in slots.items():
        value = next((v for v in held if v.born <= peak <= v.dies), None)
        if value is not None:
            array = _array(value, held)
            kind = _kind(value, array[0].born, max(v.dies for v in array), first, last)
            source, part = _origin(module, [v.instruction for v in (value, *array)])
            found.append(Buffer(size, value.shape, kind, source, part))
    return sorted(found, key=lambda b: -b.bytes)


def _backward(module: Module, sequence: list[tuple[int, str]]) -> tuple[int, int]:
    """When the backward pass runs its first and its last product."""
    places = {name: (c, i) for c in module.computations.values() for name, i in c.items()}
    times = [
        at
        for at, name in sequence
        if name in places
        and "transpose(" in places[name][1].op_name
        and work(module, *places[name]).flops
    ]
    return (min(times), max(times)) if times else (len(sequence), len(sequence))


def _origin(module: Module, made: list[Instruction | None]) -> tuple[str, str]:
    """(source, part) of the first of those that made an array, else of those around them."""
    known = [i for i in made if i is not None]
    near = (n for i in known for n in _neighbours(module, i))
    for candidate in chain(known, near):
        if source := module.source(candidate):
            return source, module.part(candidate)
    return "", ""


def _neighbours(module: Module, i: Instruction) -> list[Instruction]:
    """What uses an instruction, then what it is made of."""
    around = next(c for c in module.computations.values() if c.get(i.name) is i)
    users = [u for u in around.values() if i.name in u.operands]
    return users + [around[o] for o in i.operands if o in around]


def _live_ranges(text: str) -> tuple[dict[str, tuple[int, int]], list[tuple[int, str]]]:
    """When each value lives, and (time, instruction) of the schedule."""
    lives, sequence = {}, []
    for line in text.splitlines():
        if found := _LIVES.match(line):
            lives[f"{found[1]}{{{found[2]}}}"] = int(found[3]), int(found[4])
        elif found := _MADE_AT.match(line):
            sequence.append((int(found[1]), found[2]))
        elif line.startswith("  Live ranges at"):
            break
    return lives, sequence


def _values(text: str, lives: dict[str, tuple[int, int]], module: Module) -> list[_Value]:
    """The values of the temporary allocation in main memory (that of no "color")."""
    by_name = _names(module)
    values, inside = [], False
    for line in text.splitlines():
        if line.startswith("allocation"):
            inside = "preallocated-temp" in line and "color" not in line
        elif inside and (found := _VALUE.match(line)):
            name, index, size, offset, kind = found.groups()
            life = lives.get(f"{name}{{{index or ''}}}")
            if life is not None:
                slot = int(offset), int(size)
                values.append(_Value(by_name.get(name), slot, kind, *life))
    return values


def _names(module: Module) -> dict[str, Instruction]:
    return {name: i for c in module.computations.values() for name, i in c.items()}


def _fullest(slots: dict[tuple[int, int], list[_Value]]) -> int:
    """The time at which the occupied slots are largest together."""
    changes: dict[int, int] = defaultdict(int)
    for (_, size), held in slots.items():
        end = -1
        for value in sorted(held, key=lambda v: v.born):
            if value.born > end:  # a slot that two values share is there once
                changes[value.born] += size
                changes[value.dies + 1] -= size
                end = value.dies
            elif value.dies > end:
                changes[end + 1] += size
                changes[value.dies + 1] -= size
                end = value.dies
    peak, most, now = 0, 0, 0
    for at in sorted(changes):
        now += changes[at]
        if now > most:
            peak, most = at, now
    return peak


def _array(value: _Value, held: list[_Value]) -> list[_Value]:
    """The values of a slot that are one array to the program, in the order of their birth.

    What a loop over layers keeps is allocated before it, carried by it, updated in it and handed
    on, each a value of its own, born when the one before it is last used. What has nothing to do
    with it comes into the slot later.
    """
    array, dies = [], 0
    for other in sorted((v for v in held if v.shape == value.shape), key=lambda v: v.born):
        if other.born > dies:
            if value in array:
                break
            array = []
        array.append(other)
        dies = max(dies, other.dies)
    return array


def _kind(value: _Value, born: int, dies: int, first: int, last: int) -> str:
    if value.instruction and value.instruction.opcode.removesuffix("-done") in KINDS:
        return EXCHANGED
    if born < first:
        return SAVED if dies >= first else FORWARD
    return GRADIENTS if dies > last else BACKWARD
