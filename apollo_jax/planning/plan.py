# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax plan`: memory, FLOPs, exchanges and a step-time bound of a recipe on a TPU slice.

The train step that `apollo-jax train` would run is compiled by the TPU's own compiler, here. What
the plan cannot know: how far a real run stays behind the bound.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apollo_jax import sharding
from apollo_jax.config import Experiment, load, parse_overrides
from apollo_jax.planning import fit_book, search
from apollo_jax.planning.ahead_of_time import Compiled, compile_step, model_flops
from apollo_jax.planning.topology import SLICES, Topology, parse, use_compiler_only
from apollo_jax.training import checks

_GIB = 2**30
ASSUMPTIONS = (
    "chips' published peak rates, no time for anything else",
    "exchanges that the compiler starts ahead of use are hidden behind computation",
    "every batch is full",
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

    @property
    def executed_flops(self) -> float:
        """Of the products and kernels that run, per chip and step."""
        assert self.compiled.totals is not None
        return self.compiled.totals.flops * self.topology.chip.devices

    @property
    def compute_seconds(self) -> float:
        return self.executed_flops / self.topology.chip.flops

    @property
    def exchange_seconds(self) -> tuple[float, float]:
        """Of all exchanges, and of those that computation waits for."""
        assert self.compiled.totals is not None
        chip = self.topology.chip
        everything = sum(c.bytes for c in self.compiled.totals.collectives) * chip.devices
        hidden = sum(c.asynchronous for c in self.compiled.totals.collectives) * chip.devices
        return everything / chip.ici_bandwidth, (everything - hidden) / chip.ici_bandwidth

    @property
    def step_seconds(self) -> float:
        """A lower bound: computation and what it waits for, or all exchanges if longer."""
        everything, exposed = self.exchange_seconds
        return max(self.compute_seconds + exposed, everything)

    def facts(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        memory = asdict(self.compiled.memory)
        facts: dict[str, Any] = {
            "experiment": self.experiment,
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "mesh": self.mesh,
            "fits": self.compiled.fits,
            "hbm_bytes": self.topology.chip.hbm / self.topology.chip.devices,
            "memory": memory,
            "largest": self.compiled.largest,
            "compile_seconds": self.compiled.seconds,
            "batch": {"rows": self.rows, "tokens": self.tokens, "frames": self.frames},
            "model_flops": self.needed_flops,
        }
        if self.compiled.totals is None:
            return facts
        everything, exposed = self.exchange_seconds
        step = self.step_seconds
        return facts | {
            "executed_flops": self.executed_flops,
            "kernel_flops": self.compiled.totals.kernel_flops * self.topology.chip.devices,
            "kernels_not_counted": sorted(self.compiled.totals.unknown_kernels),
            "collectives": [asdict(c) for c in self.compiled.totals.collectives],
            "bound": {
                "compute_seconds": self.compute_seconds,
                "exchange_seconds": everything,
                "exposed_exchange_seconds": exposed,
                "step_seconds": step,
                "mfu_ceiling": self.needed_flops / self.topology.chip.flops / step,
                "tokens_per_second": self.tokens / step,
                "frames_per_second": self.frames / step,
                "frames_per_second_per_host": self.frames / step / self.topology.hosts,
                "assumptions": ASSUMPTIONS,
            },
        }


def plan(experiment: Experiment, topology: Topology) -> Plan:
    """Compiles the experiment for the topology. ValueError for a mesh that does not divide."""
    mesh = sharding.make_mesh(experiment.mesh, topology.devices())
    data = experiment.data
    checks.layout(experiment, mesh.shape)
    return Plan(
        experiment=experiment.name,
        topology=topology,
        mesh=dict(mesh.shape),
        compiled=compile_step(experiment, topology),
        needed_flops=model_flops(experiment) / topology.chips,
        rows=data.batch_size,
        tokens=data.batch_size * data.length,
        frames=data.batch_size * data.clips * data.frames_per_clip,
    )


def show(console: Console, plan: Plan) -> None:
    """Prints the plan."""
    chip, memory = plan.topology.chip, plan.compiled.memory
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    console.print(
        f"[bold]{plan.experiment}[/] on {plan.topology.name}: {plan.topology.chips} chips, {mesh}"
    )
    hbm = chip.hbm / chip.devices
    table = Table("memory per device", "GiB", "of its HBM")
    for name, value in asdict(memory).items():
        if name == "peak":
            table.add_section()
        table.add_row(name, f"{value / _GIB:.2f}", f"{value / hbm:.0%}")
    console.print(table)
    for size, shape in plan.compiled.largest[:4]:
        console.print(f"  {size / _GIB:6.2f} GiB  {shape}", highlight=False)
    if not plan.compiled.fits:
        console.print(f"[red]does not fit[/] into {hbm / _GIB:.2f} GiB. {_advice(plan)}")
        return
    facts = plan.facts()
    bound = facts["bound"]
    remat = plan.executed_flops / plan.needed_flops
    console.print(
        f"needed {plan.needed_flops / 1e12:.1f} TFLOP per chip and step, executed "
        f"{plan.executed_flops / 1e12:.1f} ({remat:.2f}x: recomputation and padding)"
    )
    exchanges = Table("exchange", "along", "times", "GiB sent", "beside computation")
    for c in plan.compiled.totals.collectives if plan.compiled.totals else ():
        share = f"{c.asynchronous / c.bytes:.0%}" if c.bytes else "-"
        along = ", ".join(c.axes) or "-"
        exchanges.add_row(c.kind, along, f"{c.count:.0f}", f"{c.bytes / _GIB:.3f}", share)
    console.print(exchanges)
    console.print(
        f"step >= {bound['step_seconds']:.3f} s (computation {bound['compute_seconds']:.3f}, "
        f"exchanges {bound['exchange_seconds']:.3f}, of which waited for "
        f"{bound['exposed_exchange_seconds']:.3f}): at most {bound['mfu_ceiling']:.0%} MFU, "
        f"{bound['tokens_per_second']:,.0f} tokens/s, {bound['frames_per_second']:,.0f} frames/s "
        f"({bound['frames_per_second_per_host']:,.0f} from each host)"
    )
    console.print(f"[dim]assumed: {'; '.join(ASSUMPTIONS)}[/]")


def _advice(plan: Plan) -> str:
    memory = plan.compiled.memory
    if memory.resident > 0.7 * plan.topology.chip.hbm / plan.topology.chip.devices:
        return "Most of it are weights and moments: more chips on mesh.fsdp, or train less of it."
    return (
        "Most of it are temporaries: fewer data.clips or a shorter data.length per row, fewer rows "
        "per chip (data.batch_size), train.remat=full, or a smaller train.loss_chunk."
    )


def main(argv: list[str]) -> None:
    """Compile a recipe for a TPU slice, on this machine, and say what it needs."""
    if argv[:1] == ["search"]:
        return search.main(argv[1:])
    if argv[:1] == ["book"]:
        return fit_book.main(argv[1:])
    parser = argparse.ArgumentParser(
        "apollo-jax plan",
        description=main.__doc__,
        epilog="Any field of the config can be set: --config.data.batch_size=64",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]")
    parser.add_argument(
        "--topology", required=True, help=f"CHIP:AxB[xC], N*CHIP:AxB, or {', '.join(SLICES)}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write it there")
    args, rest = parser.parse_known_args(argv)
    use_compiler_only()
    experiment = load(args.config, parse_overrides(rest))
    made = plan(experiment, parse(args.topology))
    show(Console(), made)
    if args.json:
        args.json.write_text(json.dumps(made.facts(), indent=1) + "\n")
    if not made.compiled.fits:
        raise SystemExit(1)
