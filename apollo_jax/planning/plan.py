# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax plan`: memory, FLOPs, exchanges and a step-time bound of a recipe on a TPU slice.

The train step that `apollo-jax train` would run is compiled by the TPU's own compiler, here. What
the plan cannot know: how far a real run stays behind the bound.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from apollo_jax import sharding
from apollo_jax.config import Experiment, load
from apollo_jax.config_values import parse_overrides
from apollo_jax.planning import advice, diff, fit_book, report_page, search
from apollo_jax.planning.ahead_of_time import Compiled, abstract_batch, compile_step
from apollo_jax.planning.flops import model_flops
from apollo_jax.planning.show import show, writable
from apollo_jax.planning.topology import SLICES, Topology, parse, use_compiler_only
from apollo_jax.training import checks
from data_pipeline.frame_shard_writer import write_atomic

# Frames that a CPU-second of the data pipeline gives, the slowest of docs/data.md's table.
FRAMES_PER_CPU_SECOND = {"yuv420": 3900, "rgb": 2400}
ASSUMPTIONS = (
    "chips at their published peak rates, nothing slower",
    "an instruction takes as long as its FLOPs or its traffic in main memory, whichever is longer; "
    "traffic is its operands and results there, each moved once",
    "an exchange uses the links of the torus dimensions that its group spans; it hides behind what "
    "the compiler's schedule runs between its start and its end",
    "every batch is full; loading, checkpoints and evaluation take no time",
)


@dataclass(frozen=True)
class Plan:
    """A compiled recipe and what follows from it; seconds, bytes per device, FLOPs per chip."""

    experiment: str
    topology: Topology
    mesh: dict[str, int]
    compiled: Compiled
    needed_flops: float  # by the model, per chip and step
    rows: int
    tokens: int  # per step, all chips
    frames: int
    config: Experiment
    price: float = 0.0  # USD per chip and hour; 0 = not asked
    input_bytes: int = 0  # of a step's batches, all chips
    microbatches: int = 1  # of a step; with a ramp of the largest, as all that is per step

    @property
    def executed_flops(self) -> float:
        """Of the products and kernels that run, per chip and step."""
        assert self.compiled.totals is not None
        return self.compiled.totals.flops * self.topology.chip.devices

    @property
    def compute_seconds(self) -> float:
        return self.executed_flops / self.topology.chip.flops

    @property
    def memory_seconds(self) -> float:
        """Of all traffic in main memory."""
        assert self.compiled.totals is not None
        chip = self.topology.chip
        return self.compiled.totals.hbm_bytes * chip.devices / chip.hbm_bandwidth

    @property
    def exchange_seconds(self) -> tuple[float, float]:
        """Of all exchanges, and of those that computation waits for."""
        assert self.compiled.totals is not None
        found = self.compiled.totals.collectives
        return sum(c.seconds for c in found), sum(c.waited_seconds for c in found)

    @property
    def step_seconds(self) -> float:
        """A lower bound: the schedule played at peak rates, or all traffic if longer."""
        assert self.compiled.totals is not None
        return max(self.compiled.totals.seconds, self.memory_seconds)

    def facts(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        chip = self.topology.chip
        facts: dict[str, Any] = {
            "experiment": self.experiment,
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "mesh": self.mesh,
            "fits": self.compiled.fits,
            "hbm_bytes": chip.hbm / chip.devices,
            "memory": asdict(self.compiled.memory),
            "temporaries_at_peak": self.compiled.temporaries,
            "largest": self.compiled.largest,
            "compile_seconds": self.compiled.seconds,
            "compiler_flags": self.compiled.note,
            "batch": {
                "microbatches": self.microbatches,
                "rows": self.rows,
                "tokens": self.tokens,
                "frames": self.frames,
                "bytes": self.input_bytes,
            },
            "model_flops": self.needed_flops,
            "config": asdict(self.config),
            "advice": advice.lines(self.compiled, self.config, self.topology, self.mesh),
        }
        if self.compiled.totals is None:
            return facts
        totals = self.compiled.totals
        return (
            facts
            | {
                "executed_flops": self.executed_flops,
                "kernel_flops": totals.kernel_flops * chip.devices,
                "kernels_not_counted": sorted(totals.unknown_kernels),
                "hbm_bytes_moved": totals.hbm_bytes,
                "collectives": [asdict(c) for c in totals.collectives],
                "bound": self._bound(),
                "input": self._input(),
            }
            | ({"cost": self._cost()} if self.price else {})
        )

    def _bound(self) -> dict[str, Any]:
        assert self.compiled.totals is not None
        everything, exposed = self.exchange_seconds
        step = self.step_seconds
        return {
            "compute_seconds": self.compute_seconds,
            "memory_seconds": self.memory_seconds,
            "work_seconds": self.compiled.totals.work_seconds,
            "exchange_seconds": everything,
            "exposed_exchange_seconds": exposed,
            "dcn_seconds": sum(
                c.seconds for c in self.compiled.totals.collectives if c.network == "dcn"
            ),
            "step_seconds": step,
            "mfu_ceiling": self.needed_flops / self.topology.chip.flops / step,
            "remat_overhead": self.executed_flops / self.needed_flops,
            "tokens_per_second": self.tokens / step,
            "frames_per_second": self.frames / step,
            "frames_per_second_per_host": self.frames / step / self.topology.hosts,
            "assumptions": ASSUMPTIONS,
        }

    def _input(self) -> dict[str, float]:
        """What each host must load for the bound to be met, and the cores that it takes."""
        step, hosts = self.step_seconds, self.topology.hosts
        rate = FRAMES_PER_CPU_SECOND[self.config.data.layout]
        return {
            "frames_per_second_per_host": self.frames / step / hosts,
            "bytes_per_second_per_host": self.input_bytes / step / hosts,
            "frames_per_cpu_second": rate,
            "cores_per_host": self.frames / step / hosts / rate,
            "host_cpus": self.topology.chip.host_cpus,
        }

    def _cost(self) -> dict[str, float]:
        """USD at the bound; of samples only where the config knows what one takes of the rows."""
        step, train = self.step_seconds / 3600 * self.topology.chips * self.price, self.config.train
        cost = {
            "usd_per_chip_hour": self.price,
            "usd_per_step": step,
            "usd_per_million_rows": step / self.rows * 1e6,
            "usd_per_billion_tokens": step / self.tokens * 1e9,
            "usd_of_the_run": step * train.ramp.before(train.num_steps) / self.microbatches,
        }
        if not self.config.positions_per_sample:
            return cost
        samples = self.tokens / self.config.positions_per_sample
        return cost | {"samples_per_step": samples, "usd_per_million_samples": step / samples * 1e6}


def plan(experiment: Experiment, topology: Topology, price: float = 0.0, code: bool = True) -> Plan:
    """Compiles the experiment for the topology; `price` in USD per chip and hour.

    Without `code` the compiler is left before the machine code, see layout_only.

    ValueError for a mesh that does not divide, and where the compiler itself fails.
    """
    mesh = sharding.make_mesh(experiment.mesh, topology.devices())
    data = experiment.data
    checks.layout(experiment, mesh.shape, checks.Machine(topology.slices, tpu=True))
    shapes = jax.tree.leaves(abstract_batch(experiment, mesh))
    size = sum(int(np.prod(s.shape, dtype=np.int64)) * s.dtype.itemsize for s in shapes)
    count = experiment.train.ramp.most
    rows = count * data.batch_size
    return Plan(
        experiment=experiment.name,
        topology=topology,
        mesh=dict(mesh.shape),
        compiled=compile_step(experiment, topology, code),
        needed_flops=count * model_flops(experiment) / topology.chips,
        rows=rows,
        tokens=rows * data.length,
        frames=rows * data.clips * data.frames_per_clip,
        config=experiment,
        price=price,
        input_bytes=count * size,
        microbatches=count,
    )


def main(argv: list[str]) -> None:
    """Compile a recipe for a TPU slice, on this machine, and say what it needs.

    `plan diff A.json B.json` says what changed between two plans, `plan search` tries other layouts
    of a recipe, and `plan book` compiles all shipped ones.
    """
    commands = {"diff": diff.main, "search": search.main, "book": fit_book.main}
    if argv and argv[0] in commands:
        try:
            return commands[argv[0]](argv[1:])
        except ValueError as error:
            raise ValueError(f"{argv[0]}: {error}") from error
    parser = argparse.ArgumentParser(
        "apollo-jax plan",
        description=main.__doc__,
        epilog="Any field of the config can be set: --config.data.batch_size=64",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]")
    parser.add_argument(
        "--topology", required=True, help=f"CHIP:AxB[xC], N*CHIP:AxB, or {', '.join(SLICES)}"
    )
    parser.add_argument("--price", type=float, default=0.0, help="USD per chip and hour")
    parser.add_argument(
        "--no-code", action="store_true", help="stop before the machine code: a tenth of the time"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write it there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page about it")
    args, rest = parser.parse_known_args(argv)
    if not 0 <= args.price < math.inf:
        raise ValueError(f"--price {args.price:g} is not possible: above 0, or 0 for not known")
    writable(args.json, args.html)
    use_compiler_only()
    experiment, topology = load(args.config, parse_overrides(rest)), parse(args.topology)
    facts = plan(experiment, topology, args.price, not args.no_code).facts()
    show(Console(), facts)
    if args.json:
        write_atomic(args.json, (json.dumps(facts, indent=1) + "\n").encode())
    if args.html:
        chip = topology.chip
        peaks = {
            "flops": chip.flops / chip.devices,
            "hbm_bandwidth": chip.hbm_bandwidth / chip.devices,
        }
        write_atomic(args.html, report_page.page(facts, peaks).encode())
    if args.no_code:  # a thread of the compiler is left behind, which an exit would wait for
        sys.stdout.flush()
        os._exit(not facts["fits"])
    if not facts["fits"]:
        raise SystemExit(1)
