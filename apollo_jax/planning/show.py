# SPDX-License-Identifier: Apache-2.0
"""A plan's facts as tables in the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 2**30
_NAMED = 6  # of the largest buffers


def show(console: Console, facts: Mapping[str, Any]) -> None:
    """Prints a plan from its facts."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
    console.print(
        f"[bold]{facts['experiment']}[/] on {facts['topology']}: {facts['chips']} chips, {mesh}",
        highlight=False,
    )
    _memory(console, facts)
    if not facts["fits"]:
        need = sum(v for k, v in facts["memory"].items() if k != "peak") - facts["hbm_bytes"]
        hbm = facts["hbm_bytes"] / GIB
        console.print(f"[red]does not fit[/] into {hbm:.2f} GiB: {need / GIB:.2f} GiB too many")
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
        if name == "peak":
            table.add_section()
        table.add_row(name, f"{value / GIB:.3g}", f"{value / hbm:.0%}")
        if name == "temporaries":
            for kind, size in facts["temporaries_at_peak"].items():
                if size > 0.001 * value:
                    table.add_row(f"  {kind}", f"{size / GIB:.3g}", "", style="dim")
    console.print(table)
    for size, text in facts["largest"][:_NAMED]:
        console.print(f"  {size / GIB:6.3g} GiB  {text}", highlight=False, markup=False)


def _flops(console: Console, facts: Mapping[str, Any]) -> None:
    console.print(
        f"needed {facts['model_flops'] / 1e12:,.3g} TFLOP per chip and step, executed "
        f"{facts['executed_flops'] / 1e12:,.3g} ({facts['bound']['remat_overhead']:.2f}x: "
        f"recomputation and padding), {facts['kernel_flops'] / 1e12:,.3g} of them in kernels"
    )
    if facts["kernels_not_counted"]:
        names = ", ".join(facts["kernels_not_counted"])
        console.print(f"[yellow]not counted[/], kernels of unknown FLOPs: {names}")
    if facts["compiler_flags"]:
        console.print(
            "[yellow]compiled with[/] "
            f"{facts['compiler_flags']}: without it the compiler failed; train with it in "
            "LIBTPU_INIT_ARGS"
        )


def _exchanges(console: Console, facts: Mapping[str, Any]) -> None:
    exchanges = Table("exchange", "along", "network", "times", "GiB sent", "hidden", "s", "waited")
    for c in facts["collectives"]:
        share = f"{c['asynchronous'] / c['bytes']:.0%}" if c["bytes"] else "-"
        exchanges.add_row(
            c["kind"],
            ", ".join(c["axes"]) or "-",
            c["network"],
            f"{c['count']:.0f}",
            f"{c['bytes'] / GIB:.3g}",
            share,
            f"{c['seconds']:.3g}",
            f"{c['waited_seconds']:.3g}",
        )
    console.print(exchanges)


def _bound(console: Console, facts: Mapping[str, Any]) -> None:
    bound, given = facts["bound"], facts["input"]
    console.print(
        f"step >= [bold]{bound['step_seconds']:.3g} s[/] (products {bound['compute_seconds']:.3g}, "
        f"main memory {bound['memory_seconds']:.3g}, exchanges {bound['exchange_seconds']:.3g}, of "
        f"which waited for {bound['exposed_exchange_seconds']:.3g}): at most "
        f"{bound['mfu_ceiling']:.0%} MFU, {bound['tokens_per_second']:,.0f} tokens/s, "
        f"{bound['frames_per_second']:,.0f} frames/s"
    )
    console.print(
        f"each host loads {given['frames_per_second_per_host']:,.0f} frames/s, "
        f"{given['bytes_per_second_per_host'] / 1e6:,.0f} MB/s: "
        f"{given['cores_per_host']:.1f} of its {given['host_cpus']} cores at "
        f"{given['frames_per_cpu_second']:,} frames per CPU-second"
    )
    if cost := facts.get("cost"):
        console.print(
            f"at {cost['usd_per_chip_hour']:g} USD per chip and hour: {cost['usd_per_step']:.2f} "
            f"USD per step, {cost['usd_per_million_rows']:,.0f} per million rows, "
            f"{cost['usd_per_billion_tokens']:,.0f} per billion tokens, "
            f"{cost['usd_per_million_samples']:,.0f} per million samples "
            f"({cost['samples_per_step']} to a step, the published epoch's), "
            f"{cost['usd_of_the_run']:,.0f} for the run"
        )
    console.print(f"[dim]assumed: {'; '.join(bound['assumptions'])}[/]")
