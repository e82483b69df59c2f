# SPDX-License-Identifier: Apache-2.0
"""A plan's facts as tables in the terminal, and the files that they may go to."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30
_NAMED = 6  # of the largest buffers


def short(value: float, digits: int = 3) -> str:
    """`digits` of them, or all of those before the point."""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def writable(*files: Path | None) -> None:
    """ValueError, before minutes of work, for a file that cannot be written after them."""
    for file in files:
        if file is not None and file.is_dir():
            raise ValueError(f"{file} is a folder; name a file in it")
        if file is not None and not os.access(file.parent, os.W_OK):
            why = "cannot be written to" if file.parent.is_dir() else "is no folder"
            raise ValueError(f"{file} cannot be written: {file.parent} {why}")


def too_many(facts: Mapping[str, Any]) -> float:
    """Bytes per device that a step needs beyond those that the device has."""
    return sum(v for k, v in facts["memory"].items() if k != "peak") - facts["hbm_bytes"]


def flags(facts: Mapping[str, Any]) -> str:
    """What it means that the compiler was given more flags than usual."""
    return (
        f"{facts['compiler_flags']}: without it the compiler failed; train with it in "
        "LIBTPU_INIT_ARGS"
    )


def starved(facts: Mapping[str, Any]) -> str:
    """What it means that the hosts have too few cores to load what a step takes; "" = enough."""
    given, bound = facts["input"], facts["bound"]
    short_of = given["cores_per_host"] / given["host_cpus"]
    if short_of <= 1:
        return ""
    return (
        f"with all their cores they load a step in {short(short_of * bound['step_seconds'])} s, "
        "longer than it takes; docs/data.md says how fast which frames are loaded"
    )


def show(console: Console, facts: Mapping[str, Any]) -> None:
    """Prints a plan from its facts."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
    console.print(
        f"[bold]{facts['experiment']}[/] on {facts['topology']}: {facts['chips']} chips, {mesh}",
        highlight=False,
    )
    if (count := facts["batch"].get("microbatches", 1)) > 1:
        console.print(
            f"a step is an update from {count} microbatches, {facts['batch']['rows']} rows"
        )
    _memory(console, facts)
    if not facts["fits"]:
        hbm, more = facts["hbm_bytes"] / GIB, too_many(facts) / GIB
        console.print(f"[red]does not fit[/] into {hbm:.2f} GiB: {more:.2f} GiB too many")
    if facts["advice"]:
        console.print("to save memory:" if facts["fits"] else "what to change:")
        for line in facts["advice"]:
            console.print(f"  {line}", highlight=False)
    if not facts["fits"]:
        return
    _flops(console, facts)
    _exchanges(console, facts)
    _bound(console, facts)


def _memory(console: Console, facts: Mapping[str, Any]) -> None:
    hbm = facts["hbm_bytes"]
    table = Table("memory per device", "GiB", "of its HBM")
    for name, value in facts["memory"].items():
        if name == "accumulated" and not value:
            continue
        if name == "peak":
            table.add_section()
        table.add_row(name, short(value / GIB), f"{value / hbm:.0%}")
        if name == "temporaries":
            for kind, size in facts["temporaries_at_peak"].items():
                if size > 0.001 * value:
                    table.add_row(f"  {kind}", short(size / GIB), "", style="dim")
    console.print(table)
    for size, text in facts["largest"][:_NAMED]:
        console.print(f"  {short(size / GIB):>6} GiB  {text}", highlight=False, markup=False)


def _flops(console: Console, facts: Mapping[str, Any]) -> None:
    console.print(
        f"needed {short(facts['model_flops'] / 1e12)} TFLOP per chip and step, executed "
        f"{short(facts['executed_flops'] / 1e12)} ({facts['bound']['remat_overhead']:.2f}x: "
        f"recomputation and padding), {short(facts['kernel_flops'] / 1e12)} of them in kernels"
    )
    if facts["kernels_not_counted"]:
        names = ", ".join(facts["kernels_not_counted"])
        console.print(f"[yellow]not counted[/], kernels of unknown FLOPs: {names}")
    if facts["compiler_flags"]:
        console.print(f"[yellow]compiled with[/] {flags(facts)}")


def _exchanges(console: Console, facts: Mapping[str, Any]) -> None:
    head = ("along", "network", "times", "GiB sent", "hidden", "s", "waited")
    exchanges = Table(box=None, padding=(0, 1, 0, 0))
    # Kinds may be broken between words alone, so that they can be told apart in 80 columns.
    words = [word for c in facts["collectives"] for word in c["kind"].split()]
    exchanges.add_column("exchange", min_width=max(map(len, words), default=0))
    for name in head:
        exchanges.add_column(name)
    for c in facts["collectives"]:
        share = f"{c['asynchronous'] / c['bytes']:.0%}" if c["bytes"] else "-"
        exchanges.add_row(
            c["kind"],
            ", ".join(c["axes"]) or "-",
            c["network"],
            f"{c['count']:.0f}",
            short(c["bytes"] / GIB),
            share,
            short(c["seconds"]),
            short(c["waited_seconds"]),
        )
    console.print(exchanges)


def _bound(console: Console, facts: Mapping[str, Any]) -> None:
    bound, given = facts["bound"], facts["input"]
    seconds = {k: short(v) for k, v in bound.items() if k.endswith("_seconds")}
    console.print(
        f"step >= [bold]{seconds['step_seconds']} s[/] (products {seconds['compute_seconds']}, "
        f"main memory {seconds['memory_seconds']}, exchanges {seconds['exchange_seconds']}, of "
        f"which waited for {seconds['exposed_exchange_seconds']}): at most "
        f"{bound['mfu_ceiling']:.0%} MFU, {bound['tokens_per_second']:,.0f} tokens/s, "
        f"{bound['frames_per_second']:,.0f} frames/s"
    )
    console.print(
        f"each host loads {given['frames_per_second_per_host']:,.0f} frames/s, "
        f"{given['bytes_per_second_per_host'] / 1e6:,.0f} MB/s: "
        f"{given['cores_per_host']:.1f} of its {given['host_cpus']} cores at "
        f"{given['frames_per_cpu_second']:,} frames per CPU-second"
    )
    if why := starved(facts):
        console.print(f"[yellow]the hosts cannot feed the chips[/]: {why}")
    if cost := facts.get("cost"):
        samples = (
            f"{cost['usd_per_million_samples']:,.0f} per million samples "
            f"({cost['samples_per_step']:g} to a step), "
            if "samples_per_step" in cost
            else ""
        )
        console.print(
            f"at {cost['usd_per_chip_hour']:g} USD per chip and hour: "
            f"{short(cost['usd_per_step'])} USD per step, "
            f"{cost['usd_per_million_rows']:,.0f} per million rows, "
            f"{cost['usd_per_billion_tokens']:,.0f} per billion tokens, "
            f"{samples}{cost['usd_of_the_run']:,.0f} for the run"
        )
    console.print(f"[dim]assumed: {'; '.join(bound['assumptions'])}[/]")
