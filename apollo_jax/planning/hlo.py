# SPDX-License-Identifier: Apache-2.0
"""What a compiled program does, read off its optimised HLO: products, kernels, exchanges.

The compiler's own cost analysis counts the body of a loop once and a Pallas kernel not at all;
here every instruction counts as often as its loops run, and the attention kernels by the shapes of
their operands. All figures are per device and run of the program.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16, "c64": 64, "token": 0}
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|branch_computations|called_computations)=\{?([^,}\s]*)")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # [2,4]T(1,0)
_NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + _IOTA + r"\))?\s*\{([^}]*)\}"
)
# Products of an attention kernel: two forward; backward it makes the scores again.
_KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


@dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclass(frozen=True)
class Collective:
    """One kind of exchange among the devices of one kind of group."""

    kind: str
    axes: tuple[str, ...]  # of the mesh
    count: float
    bytes: float  # that one device sends
    asynchronous: float  # bytes of those that run beside computation


@dataclass
class Totals:
    """What the program does on one device."""

    flops: float = 0.0  # of products
    kernel_flops: float = 0.0  # of Pallas kernels, in `flops` too
    unknown_kernels: set[str] = field(default_factory=set)
    collectives: list[Collective] = field(default_factory=list)


class Module:
    """The computations of an HLO text and how often each runs."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                current[found[1]] = _parse(found[1], found[2])
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
                stack += [(c, count * n) for c, n in self._callees(instruction)]
        return times

    def _callees(self, i: Instruction) -> Iterator[tuple[str, float]]:
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

    def _trips(self, condition: str, body: str) -> float:
        """Loops count from 0 to the constant that their condition compares with, by their step."""
        compared = next(self._within(condition, "compare"))
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
        inside = [c for name, _ in self._callees(after) for c in self._constants(name)]
        return max([1, *inside])

    def _within(self, name: str, opcode: str) -> Iterator[Instruction]:
        """Instructions of this kind in a computation and in those that it calls."""
        for i in self.computations[name].values():
            if i.opcode == opcode:
                yield i
            for called, _ in self._callees(i):
                yield from self._within(called, opcode)

    def _constants(self, name: str) -> list[int]:
        values = (i.operands[0] for i in self._within(name, "constant") if i.operands)
        return [int(v) for v in values if v.isdigit()]

    def _constant(self, computation: str, name: str) -> int | None:
        i = self.computations[computation].get(name)
        if i is None or i.opcode != "constant" or not i.operands or not i.operands[0].isdigit():
            return None
        return int(i.operands[0])


def totals(text: str, mesh: dict[str, int]) -> Totals:
    """Sums over a run of the program; `mesh` is axis -> size in the order of the devices."""
    module, total = Module(text), Totals()
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for name, times in module.runs().items():
        computation = module.computations[name]
        for i in computation.values():
            if i.opcode in ("convolution", "dot"):
                total.flops += times * _product(i, computation)
            elif i.opcode == "custom-call" and 'target="tpu_custom_call"' in i.attributes:
                flops = _kernel(i)
                if flops is None:
                    total.unknown_kernels.add(i.name.partition(".")[0])
                total.flops += times * (flops or 0.0)
                total.kernel_flops += times * (flops or 0.0)
            elif (kind := i.opcode.removesuffix("-start")) in _COLLECTIVES:
                axes, size = _group(i.attributes, mesh)
                sent = times * _sent(kind, i, size)
                row = sums[kind, axes]
                row[0] += times
                row[1] += sent
                beside = i.opcode.endswith("-start") or "async_collective" in name
                row[2] += sent if beside else 0.0
    total.collectives = [Collective(*key, *row) for key, row in sums.items()]
    total.collectives.sort(key=lambda c: -c.bytes)
    return total


def _parse(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    stop = _closing(rest, len(opcode))
    inside = re.sub(r"/\*.*?\*/", "", rest[len(opcode) + 1 : stop - 1])
    operands = tuple(o.strip().split(" ")[-1].lstrip("%") for o in inside.split(",") if o.strip())
    return Instruction(name, kind, opcode.strip(), operands, rest[stop:])


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place + 1
    return len(text)


def shapes(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of every array in a type."""
    found = _SHAPE.findall(type_text)
    return [(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in found]


def _bytes(dtype: str, dims: tuple[int, ...]) -> float:
    bits = _BITS.get(dtype)
    if bits is None:
        bits = int(re.sub(r"\D", "", dtype.split("e")[0]) or 8)
    return math.prod(dims) * bits / 8


def _product(i: Instruction, computation: dict[str, Instruction]) -> float:
    """2 x multiplications; a convolution's by the window positions that lie inside its input."""
    (_, out), *_ = shapes(i.type)
    left, right = (shapes(computation[o].type)[0][1] for o in i.operands[:2])
    if i.opcode == "dot":
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        contracted = [int(n) for n in axes[1].split(",") if n] if axes else []
        return 2.0 * math.prod(out) * math.prod(left[n] for n in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None
    of_left, of_right, of_out = labels.groups()
    pairs = 1.0
    spatial = [c for c in of_left if c.isdigit()]
    for n, label in enumerate(spatial):
        sizes = (left[of_left.index(label)], right[of_right.index(label)])
        pairs *= _positions(*sizes, out[of_out.index(label)], _window(i.attributes, n))
    features = right[of_right.index("i")]
    return 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * features * pairs


def _window(attributes: str, n: int) -> tuple[int, int, int, int]:
    """(stride, low padding, input dilation, window dilation) of spatial dimension n."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    parts = dict(p.split("=") for p in found[1].split(" ")) if found else {}
    stride, into, window = (
        int(parts[k].split("x")[n]) if k in parts else 1
        for k in ("stride", "lhs_dilate", "rhs_dilate")
    )
    low = int(parts["pad"].split("x")[n].split("_")[0]) if "pad" in parts else 0
    return stride, low, into, window


def _positions(size: int, kernel: int, out: int, window: tuple[int, int, int, int]) -> int:
    stride, low, into, dilation = window
    length, count = (size - 1) * into + 1, 0
    for k in range(kernel):
        at = k * dilation - low
        count += sum(
            0 <= at + o * stride < length and (at + o * stride) % into == 0 for o in range(out)
        )
    return count


def _kernel(i: Instruction) -> float | None:
    """FLOPs of an attention kernel, None for a kernel that is not known here."""
    products = next((n for k, n in _KERNEL_PRODUCTS.items() if i.name.startswith(k)), None)
    found = re.search(r"operand_layout_constraints=\{(.*?\})\}", i.attributes)
    if products is None or found is None:
        return None
    operands = shapes(found[1])
    blocks = operands[0][1]
    floats = [dims for dtype, dims in operands if dtype in ("bf16", "f32") and len(dims) >= 3]
    integers = sum(dtype == "s32" for dtype, _ in operands)
    *outer, length, width = floats[0]
    keys = floats[1][-2]
    flops = 2.0 * products * math.prod(outer) * length * keys * width
    if integers > 2:  # beside two segment ids the queries' places: a causal mask
        rows, columns = blocks[-2:]
        flops *= (rows * columns + max(rows, columns)) / (2 * rows * columns)
    return flops


def _sent(kind: str, i: Instruction, size: int) -> float:
    """Bytes that one device of a group of `size` sends, by the usual ring algorithms."""
    arrays = shapes(i.type)
    if i.opcode.endswith("-start"):  # (operands, results, ...)
        arrays = arrays[1:2] if kind != "all-reduce" else arrays
    whole = sum(_bytes(*a) for a in arrays)
    share = (size - 1) / max(size, 1)
    if kind == "reduce-scatter":
        return whole * (size - 1)
    return {"all-gather": share, "all-reduce": 2 * share, "all-to-all": share}.get(kind, 1) * whole


def _group(attributes: str, mesh: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """(mesh axes along which a collective's groups lie, devices in a group)."""
    first = _first_group(attributes, mesh)
    strides, step = {}, 1
    for axis, size in reversed(mesh.items()):
        strides[axis] = step
        step *= size
    places = [{a: n // strides[a] % mesh[a] for a in mesh} for n in first]
    axes = tuple(a for a in mesh if len({p[a] for p in places}) > 1)
    return axes, max(len(first), 1)


def _first_group(attributes: str, mesh: dict[str, int]) -> list[int]:
    devices = math.prod(mesh.values())
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return [int(pairs[1]), int(pairs[2])]
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(n) for n in listed[1].split(",")]
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=" + _IOTA, attributes):
        return _iota(iota[2], iota[3]).reshape(-1)[: int(iota[1])].tolist()
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + _IOTA + r"\))?\s*\{([^}]*)\}",
        attributes,
    ):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        ids = _iota(named[2] or str(devices), named[3]).reshape(list(sizes.values()))
        chosen = re.findall(r"'([^']+)'", named[4])
        return (
            ids[tuple(slice(None) if axis in chosen else 0 for axis in sizes)].reshape(-1).tolist()
        )
    return list(range(devices))


def _iota(dims: str, order: str | None) -> np.ndarray:
    """0, 1, ... in the shape "2,4", its axes in the order "1,0"."""
    shape = [int(n) for n in dims.split(",")]
    axes = [int(n) for n in order.split(",")] if order else None
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes)
