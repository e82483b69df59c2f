# SPDX-License-Identifier: Apache-2.0
"""What a compiled program does, read off its optimised HLO: products, kernels, traffic, exchanges.

The compiler's own analysis counts the body of a loop once; here every instruction counts as often
as its loops run. The program's schedule is then played on a clock: an instruction takes as long as
its FLOPs or its traffic in main memory, whichever is longer; an exchange takes its links in turn,
and hides behind what the schedule runs between its start and its end, no more. All figures are per
device and run of the program.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from apollo_jax.planning import exchanges
from apollo_jax.planning.exchanges import Exchange
from apollo_jax.planning.hlo_module import Instruction, Module
from apollo_jax.planning.hlo_work import work
from apollo_jax.planning.rates import Rates

NOMINAL = Rates(flops=459e12, hbm=2765e9, ici=600e9, dcn=6.25e9)  # of a v5p


@dataclass(frozen=True)
class Collective:
    """One kind of exchange among the devices of one kind of group."""

    kind: str
    axes: tuple[str, ...]  # of the mesh
    count: float
    bytes: float  # that one device sends
    asynchronous: float  # bytes of them that are sent while it computes
    network: str = "ici"  # "dcn" between slices
    seconds: float = 0.0
    waited_seconds: float = 0.0  # of them while nothing else runs


@dataclass
class Totals:
    """What the program does on one device."""

    flops: float = 0.0  # of products
    kernel_flops: float = 0.0  # of Pallas kernels, in `flops` too
    unknown_kernels: set[str] = field(default_factory=set)
    collectives: list[Collective] = field(default_factory=list)
    hbm_bytes: float = 0.0  # read and written in main memory
    work_seconds: float = 0.0  # FLOPs or traffic, instruction by instruction
    plain_seconds: float = 0.0  # of them without products: norms, activations, copies, optimizer
    seconds: float = 0.0  # with what is waited for


def totals(text: str | Module, mesh: dict[str, int], rates: Rates = NOMINAL) -> Totals:
    """Sums over a run of the program; `mesh` is axis -> size in the order of the devices.

    Several slices are laid along the first axis. ValueError if the text holds no HLO module.
    """
    module = Module(text) if isinstance(text, str) else text
    devices = math.prod(mesh.values())
    slices = devices // (module.devices or devices)
    first = next(iter(mesh))
    player = _Player(module, mesh | {first: mesh[first] // slices}, slices, rates)
    player.run(module.entry, 1.0)
    total = player.total
    total.seconds = player.clock
    total.collectives = [
        Collective(kind, axes, count, sent, hidden, network, seconds, waited)
        for (kind, axes, network), (count, sent, hidden, seconds, waited) in player.rows.items()
    ]
    total.collectives.sort(key=lambda c: -c.bytes)
    return total


def together(parts: Sequence[tuple[Totals, int]]) -> Totals:
    """Of programs that run one after the other, each so many times."""
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0.0] * 5)
    for part, times in parts:
        for c in part.collectives:
            of_one = c.count, c.bytes, c.asynchronous, c.seconds, c.waited_seconds
            row = sums[c.kind, c.axes, c.network]
            row[:] = [a + times * b for a, b in zip(row, of_one, strict=True)]
    found = [
        Collective(kind, axes, count, sent, hidden, network, seconds, waited)
        for (kind, axes, network), (count, sent, hidden, seconds, waited) in sums.items()
    ]
    return Totals(
        flops=sum(n * t.flops for t, n in parts),
        kernel_flops=sum(n * t.kernel_flops for t, n in parts),
        unknown_kernels={name for t, _ in parts for name in t.unknown_kernels},
        collectives=sorted(found, key=lambda c: -c.bytes),
        hbm_bytes=sum(n * t.hbm_bytes for t, n in parts),
        work_seconds=sum(n * t.work_seconds for t, n in parts),
        plain_seconds=sum(n * t.plain_seconds for t, n in parts),
        seconds=sum(n * t.seconds for t, n in parts),
    )


@dataclass
class _Flying:
    """An exchange that has started."""

    row: list[float]
    sent: float
    seconds: float
    ends: float


class _Player:
    """Plays the schedule of a program's computations on a clock."""

    def __init__(self, module: Module, mesh: dict[str, int], slices: int, rates: Rates):
        self.module, self.mesh, self.slices, self.rates = module, mesh, slices, rates
        self.devices = math.prod(mesh.values())
        self.total = Totals()
        self.rows: dict[tuple, list[float]] = defaultdict(lambda: [0.0] * 5)
        self.clock = 0.0
        self.free = {"ici": 0.0, "dcn": 0.0}  # when the links have sent what they were given
        self.flying: dict[str, list[_Flying]] = defaultdict(list)

    def run(self, name: str, times: float) -> None:
        """One run of a computation, counted `times` times."""
        computation = self.module.computations[name]
        for i in computation.values():
            if i.opcode == "while":
                for body, trips in self.module.callees(i):
                    self._loop(body, trips, times)
            elif i.opcode == "conditional":
                branches = [n for n, _ in self.module.callees(i)]
                self.run(max(branches, key=lambda n: len(list(self.module.within(n)))), times)
            elif i.opcode == "call":
                for called, _ in self.module.callees(i):
                    self.run(called, times)
            else:
                self._step(computation, i, times)

    def _loop(self, body: str, trips: float, times: float) -> None:
        """The second iteration stands for all later ones: it meets what the one before started."""
        self.run(body, times)
        if trips > 1:
            before = self.clock
            self.run(body, times * (trips - 1))
            later = (self.clock - before) * (trips - 2)
            self.clock += later
            self.free = {network: at + later for network, at in self.free.items()}
            for flying in self.flying.values():
                for one in flying:
                    one.ends += later

    def _step(self, computation: dict[str, Instruction], i: Instruction, times: float) -> None:
        exchange = exchanges.find(self.module, computation, i, self.devices, self.slices)
        if exchange is None:
            self._work(computation, i, times)
            if i.opcode.endswith("-done") and i.operands:
                self._land(_key(computation, i), times)
            return
        mark = exchanges.marker(self.module, i)
        key = exchanges.channel(self.module, i) if i.opcode == "fusion" else i.name
        if mark == "done":
            self._work(computation, i, times)
            self._land(key, times)
        elif mark == "start" or i.opcode.endswith("-start") or i.opcode == "send":
            self._start(key, exchange, times)
        elif i.opcode == "fusion" and self.flying[key]:  # works while that exchange goes on
            self._work(computation, i, times)
        else:
            self._start(key, exchange, times)
            if i.opcode == "fusion" and "async_collective" in "".join(
                n for n, _ in self.module.callees(i)
            ):
                self._work(computation, i, times)
            self._land(key, times)

    def _work(self, computation: dict[str, Instruction], i: Instruction, times: float) -> None:
        cost = work(self.module, computation, i)
        self.total.flops += times * cost.flops
        self.total.kernel_flops += times * cost.kernel_flops
        self.total.unknown_kernels |= set(cost.unknown)
        self.total.hbm_bytes += times * cost.bytes
        if i.opcode.endswith("-start"):  # copies run beside everything
            return
        seconds = max(cost.flops / self.rates.flops, cost.bytes / self.rates.hbm)
        self.total.work_seconds += times * seconds
        self.total.plain_seconds += 0.0 if cost.flops else times * seconds
        self.clock += seconds

    def _start(self, key: str, exchange: Exchange, times: float) -> None:
        network = "ici" if exchange.group else "dcn"
        seconds = self.rates.exchange_seconds(exchange.kind, exchange.bytes, exchange.group)
        axes = (
            exchanges.axes(exchange.group, self.mesh)
            if exchange.group
            else (next(iter(self.mesh)),)
        )
        kind = exchange.kind + (" of the optimizer" if exchange.optimizer else "")
        row = self.rows[kind, axes, network]
        row[0] += times
        row[1] += times * exchange.bytes
        row[3] += times * seconds
        self.free[network] = max(self.clock, self.free[network]) + seconds
        self.flying[key].append(_Flying(row, exchange.bytes, seconds, self.free[network]))

    def _land(self, key: str, times: float) -> None:
        if not self.flying[key]:
            return
        one = self.flying[key].pop(0)
        waited = max(0.0, one.ends - self.clock)
        self.clock += waited
        hidden = max(0.0, 1 - waited / one.seconds) if one.seconds else 0.0
        one.row[2] += times * one.sent * round(hidden, 9)  # the clock's own rounding hides nothing
        one.row[4] += times * waited


def _key(computation: dict[str, Instruction], i: Instruction) -> str:
    """The start that a done belongs to: of what is received between slices, the send."""
    name = i.operands[0]
    while (origin := computation.get(name)) and origin.opcode == "async-update":
        name = origin.operands[0]
    if origin is not None and origin.opcode == "recv":
        met = re.search(r'rendezvous="([^"]+)"', origin.attributes)
        for other in computation.values() if met else ():
            if other.opcode == "send" and met is not None and met[0] in other.attributes:
                return other.name
    return "" if i.opcode == "send-done" else name
