# SPDX-License-Identifier: Apache-2.0
"""The text of a compiled program: its computations, how often each runs, and where it came from.

Only what accounting needs is read: names, types, opcodes, operands, and the attributes as text.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "token": 0}
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|called_computations)=\{?([^,}\s]*)")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
# Functions that stand between a model's layer and the operation: the caller says more.
_GO_BETWEENS = ("layers.py", "sharding.py")
_OURS = ("models", "training")
# What is a part of the model: the loss, and the files of models/ but for the whole and helpers.
LOSS = ("losses", "linear_cross_entropy", "shared_table")
_NO_PARTS = ("apollo", "layers")


@dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def op_name(self) -> str:
        """What jax called the operation: jit(update)/transpose(jvp())/.../dot_general."""
        found = re.search(r'metadata=\{op_name="([^"]*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""


class Module:
    """The computations of an HLO text and how often each runs."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
        self.devices = int(partitions[1]) if partitions else None  # of one slice
        self._tables: dict[str, list[str]] = {name: [] for name in _TABLES}
        table: list[str] | None = None
        computation: dict[str, Instruction] = {}
        lines: list[str] = []
        for line in text.splitlines():
            if line in self._tables:
                table = self._tables[line]
            elif header := _HEADER.match(line):
                _close(lines, computation)
                table, computation = None, self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif _INSTRUCTION.match(line):
                _close(lines, computation)
                lines.append(line)
            elif table is not None:
                table.append(line)
            elif lines:  # attributes of kernels go over several lines
                lines.append(line)
        _close(lines, computation)
        if not self.entry:
            raise ValueError("the text holds no HLO module")

    def runs(self) -> dict[str, float]:
        """How often each computation runs in one run of the program."""
        times: dict[str, float] = defaultdict(float)
        stack = [(self.entry, 1.0)]
        while stack:
            name, count = stack.pop()
            times[name] += count
            for instruction in self.computations[name].values():
                stack += [(c, count * n) for c, n in self.callees(instruction)]
        return times

    def callees(self, i: Instruction) -> Iterator[tuple[str, float]]:
        """The computations that an instruction runs, each with how often."""
        if i.opcode == "while":
            condition, body = (
                re.search(rf"{w}=%?([\w.\-]+)", i.attributes) for w in ("condition", "body")
            )
            assert condition is not None
            assert body is not None
            yield body[1], self._trips(condition[1], body[1])
        elif i.opcode not in ("reduce", "all-reduce", "reduce-scatter", "scatter", "sort"):
            for called in _CALLED.findall(i.attributes):
                name = called.lstrip("%")
                if name in self.computations:
                    yield name, 1.0

    def within(self, name: str) -> Iterator[Instruction]:
        """All instructions of a computation and of those that it calls."""
        for i in self.computations[name].values():
            yield i
            for called, _ in self.callees(i):
                yield from self.within(called)

    def source(self, i: Instruction) -> str:
        """Where in the model an operation was written, "qwen2.py:84 Mlp.__call__"; "" if unknown.

        The innermost frame of this project that belongs to a model or to the train step.
        """
        frames = self._frames(i)
        named = [f for f in frames if f[0].name not in _GO_BETWEENS] or frames
        return f"{named[0][0].name}:{named[0][1]} {named[0][2]}" if named else ""

    def part(self, i: Instruction) -> str:
        """The part of the model that an operation belongs to: "qwen2", "vision_tower", "losses".

        Its outermost frame in a part's file, whoever calls the part; "" outside of all parts.
        """
        files = [file for file, *_ in self._frames(i) if file.stem not in _NO_PARTS]
        parts = [f.stem for f in files if f.stem in LOSS or f.parent.name == "models"]
        return parts[-1] if parts else ""

    def _frames(self, i: Instruction) -> list[tuple[PurePath, int, str]]:
        """(file, line, function) of this project, the innermost first."""
        found = re.search(r"stack_frame_id=(\d+)", i.attributes)
        frame, frames = int(found[1]) if found else 0, []
        while frame:
            location, parent = _numbers(self._row("StackFrames", frame))[:2]
            file, function, line = _numbers(self._row("FileLocations", location))[:3]
            path = PurePath(self._row("FileNames", file).strip('"'))
            if path.parent.name in _OURS:
                name = self._row("FunctionNames", function).strip('"').replace("<locals>.", "")
                frames.append((path, line, name))
            # a frame without a parent names itself: parents are numbered from one above
            frame = parent - 1 if parent - 1 < frame else 0
        return frames

    def _row(self, table: str, number: int) -> str:
        rows = self._tables[table]
        return rows[number - 1].partition(" ")[2] if 0 < number <= len(rows) else ""

    def _trips(self, condition: str, body: str) -> float:
        """Loops count from 0 to the constant that their condition compares with, by their step."""
        compared = next(i for i in self.within(condition) if i.opcode == "compare")
        limit = max((self._constant(condition, o) or 0 for o in compared.operands), default=0)
        limit = limit or max(self._constants(condition), default=1)
        counter = next(
            (
                int(found[1])
                for i in self.computations[condition].values()
                if i.opcode == "get-tuple-element"
                and (found := re.search(r"index=(\d+)", i.attributes))
            ),
            0,
        )
        return limit / self._step(body, counter)

    def _step(self, body: str, counter: int) -> int:
        """What one iteration adds to the counter: more than 1 where the compiler unrolled."""
        *_, root = self.computations[body].values()
        if root.opcode != "tuple":
            return 1
        after = self.computations[body].get(root.operands[counter])
        if after is None:
            return 1
        if after.opcode == "add":
            return next((c for o in after.operands if (c := self._constant(body, o))), 1)
        inside = [c for name, _ in self.callees(after) for c in self._constants(name)]
        return max([1, *inside])

    def _constants(self, name: str) -> list[int]:
        found = (i.operands[0] for i in self.within(name) if i.opcode == "constant" and i.operands)
        return [int(value) for value in found if value.isdigit()]

    def _constant(self, computation: str, name: str) -> int | None:
        i = self.computations[computation].get(name)
        if i is None or i.opcode != "constant" or not i.operands or not i.operands[0].isdigit():
            return None
        return int(i.operands[0])


def shapes(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of every array in a type."""
    return [(dtype, _dims(dims)) for dtype, dims, _ in _SHAPE.findall(type_text)]


def size(type_text: str) -> float:
    """Bytes of all arrays in a type, without padding."""
    return sum(_bytes(*array) for array in shapes(type_text))


def main_memory_size(type_text: str) -> float:
    """Bytes of those arrays in a type that lie in the chip's main memory: no S(n) in the layout."""
    found = _SHAPE.findall(type_text)
    return sum(_bytes(d, _dims(dims)) for d, dims, layout in found if "S(" not in layout)


def closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _close(lines: list[str], computation: dict[str, Instruction]) -> None:
    """Parses the lines of one instruction and forgets them."""
    if lines and (found := _INSTRUCTION.match(" ".join(lines))):
        computation[found[1]] = _parse(found[1], found[2])
    lines.clear()


def _parse(name: str, text: str) -> Instruction:
    end = closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    stop = closing(rest, len(opcode))
    inside = re.sub(r"/\*.*?\*/", "", rest[len(opcode) + 1 : stop - 1])
    operands = tuple(o.strip().split(" ")[-1].lstrip("%") for o in inside.split(",") if o.strip())
    return Instruction(name, kind, opcode.strip(), operands, rest[stop:])


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _bytes(dtype: str, dims: tuple[int, ...]) -> float:
    bits = _BITS.get(dtype)
    if bits is None:
        bits = int(re.sub(r"\D", "", dtype.split("e")[0]) or 8)
    return math.prod(dims) * bits / 8


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"=(\d+)", text)] or [0, 0, 0]
