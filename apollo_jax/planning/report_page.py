# SPDX-License-Identifier: Apache-2.0
"""A plan as one HTML page: memory as a bar, the roofline, exchanges and assumptions, all inline."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from apollo_jax.planning.show import flags, starved, too_many

GIB = 2**30
_STYLE = """
.bar { display: flex; background: var(--rule); height: 34px; border-radius: 6px; overflow: hidden; }
.bar i { display: block; height: 100%; }
.k0 { background: var(--s0); fill: var(--s0); } .k1 { background: #6c9a8b; fill: #6c9a8b; }
.k2 { background: #8d7bb0; fill: #8d7bb0; } .k3 { background: #c9b458; fill: #c9b458; }
.k4 { background: var(--s1); fill: var(--s1); } .k5 { background: var(--s2); fill: var(--s2); }
.k6 { background: #b5776d; fill: #b5776d; }
.roof { fill: none; stroke: var(--ink); stroke-width: 1.8; }
"""
_KINDS = ("params", "frozen", "moments", "batch", "temporaries", "code", "accumulated")


def page(facts: Mapping[str, Any], peaks: Mapping[str, float]) -> str:
    """The whole page.

    Args:
      facts: of a plan.
      peaks: "flops" and "hbm_bandwidth" of one device.
    """
    house = resources.files("apollo_jax.evaluation").joinpath("report.css").read_text()
    sections = [_head(facts), _memory(facts)]
    if facts["fits"]:
        sections += [_roofline(facts, peaks), _exchanges(facts), _input(facts)]
    sections.append(_asked(facts))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(facts['experiment'])}: plan</title><style>{house}{_STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _head(facts: Mapping[str, Any]) -> str:
    mesh = ", ".join(f"{axis} {n}" for axis, n in facts["mesh"].items() if n > 1) or "one device"
    title = (
        f"<h1>{escape(facts['experiment'])} on {escape(facts['topology'])}</h1>"
        f'<p class="soft">{facts["chips"]} chips, mesh {escape(mesh)}; '
        f"{facts['batch']['rows']:,} rows and {facts['batch']['tokens']:,} tokens per step.</p>"
    )
    if not facts["fits"]:
        return (
            f'{title}<p class="wrong">This step does not fit into the memory of the chip: '
            f"{too_many(facts) / GIB:.2f} GiB too many.</p>"
        )
    bound = facts["bound"]
    tiles = [
        (f"{bound['step_seconds']:.3g} s", "step, at least"),
        (f"{bound['mfu_ceiling']:.0%}", "MFU, at most"),
        (f"{facts['memory']['peak'] / facts['hbm_bytes']:.0%}", "of the memory at the peak"),
    ]
    if cost := facts.get("cost"):
        tiles.append((f"${cost['usd_per_billion_tokens']:,.0f}", "per billion tokens"))
    shown = "".join(
        f'<div class="tile t{i % 3}"><b>{value}</b>{name}</div>'
        for i, (value, name) in enumerate(tiles)
    )
    return f'{title}<div class="tiles">{shown}</div>'


def _memory(facts: Mapping[str, Any]) -> str:
    memory, hbm = facts["memory"], facts["hbm_bytes"]
    whole = max(hbm, sum(memory[k] for k in _KINDS))
    kinds = [(n, kind, memory[kind]) for n, kind in enumerate(_KINDS) if memory[kind]]
    parts = "".join(
        f'<i class="k{n}" style="width:{100 * size / whole:.2f}%" '
        f'title="{kind}: {size / GIB:.2f} GiB"></i>'
        for n, kind, size in kinds
    )
    legend = "".join(
        f'<span><i class="k{n}"></i>{kind} {size / GIB:.2f}</span>' for n, kind, size in kinds
    )
    rows = [(kind, f"{size / GIB:.2f}") for kind, size in facts["temporaries_at_peak"].items()]
    largest = [(text, f"{size / GIB:.2f}") for size, text in facts["largest"]]
    advice = "".join(f"<li>{escape(line)}</li>" for line in facts["advice"])
    return (
        f"<h2>Memory of one device</h2><p>GiB, of {hbm / GIB:.2f}. The compiler's own peak is "
        f"{memory['peak'] / GIB:.2f}.</p>"
        f'<div class="card"><div class="bar">{parts}</div><div class="legend">{legend}</div></div>'
        + _table(("temporaries at the peak", "GiB"), rows)
        + _table(("the largest of them", "GiB"), largest)
        + (f"<h3>What would save memory</h3><ul>{advice}</ul>" if advice else "")
    )


def _roofline(facts: Mapping[str, Any], peaks: Mapping[str, float]) -> str:
    bound = facts["bound"]
    rows = [
        ("products and kernels", f"{bound['compute_seconds']:.4f}"),
        ("main memory", f"{bound['memory_seconds']:.4f}"),
        ("either, instruction by instruction", f"{bound['work_seconds']:.4f}"),
        ("exchanges", f"{bound['exchange_seconds']:.4f}"),
        ("of which waited for", f"{bound['exposed_exchange_seconds']:.4f}"),
        ("of which between slices", f"{bound['dcn_seconds']:.4f}"),
        ("the step, at least", f"{bound['step_seconds']:.4f}"),
    ]
    notes = ""
    if names := facts["kernels_not_counted"]:
        notes += f"<p>Not counted, kernels of unknown FLOPs: {escape(', '.join(names))}.</p>"
    if facts["compiler_flags"]:
        notes += f"<p>Compiled with {escape(flags(facts))}.</p>"
    return (
        "<h2>Time of a step</h2><p>"
        f"The model needs {facts['model_flops'] / 1e12:,.1f} TFLOP per chip and step; "
        f"{facts['executed_flops'] / 1e12:,.1f} run ({bound['remat_overhead']:.2f}x: recomputation "
        f"and padding).</p>{notes}"
        f'<div class="pair"><div class="card">{_chart(facts, peaks)}</div>'
        f'<div class="card">{_table(("seconds", ""), rows)}</div></div>'
    )


def _chart(facts: Mapping[str, Any], peaks: Mapping[str, float]) -> str:
    """FLOPs per second over FLOPs per byte, both by powers of ten, and where this step lies."""
    flops, bandwidth = peaks["flops"], peaks["hbm_bandwidth"]
    device = facts["bound"]["compute_seconds"] * flops  # FLOPs of one device and step
    intensity = device / max(facts["hbm_bytes_moved"], 1.0)
    ridge, reached = flops / bandwidth, device / facts["bound"]["step_seconds"]
    low, high = min(ridge, intensity) / 10, max(ridge, intensity) * 10
    floor = min(reached, bandwidth * low) / 2
    width, height, left, foot = 440, 260, 52, 30

    def x(value: float) -> float:
        return left + (width - left - 12) * math.log(value / low) / math.log(high / low)

    def y(value: float) -> float:
        top, share = 14, math.log(value / floor) / math.log(2 * flops / floor)
        return top + (height - top - foot) * (1 - share)

    corners = [(low, bandwidth * low), (ridge, flops), (high, flops)]
    roof = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in corners)
    label = f"{reached / 1e12:,.1f} TFLOP/s at {intensity:,.0f} FLOPs per byte"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img"><title>{label}</title>'
        f'<polyline class="roof" points="{roof}"/>'
        f'<circle class="k4" cx="{x(intensity):.1f}" cy="{y(reached):.1f}" r="6"/>'
        f'<text class="value end" x="{width - 12}" y="{y(reached) + 26:.1f}">{label}</text>'
        f'<text class="label end" x="{width - 12}" y="{y(flops) - 5:.1f}">'
        f"{flops / 1e12:,.0f} TFLOP/s</text>"
        f'<text class="label" x="{x(low):.1f}" y="{height - 8}">{bandwidth / 1e9:,.0f} GB/s of '
        "main memory; FLOPs per byte to the right</text></svg>"
    )


def _exchanges(facts: Mapping[str, Any]) -> str:
    rows = [
        (
            c["kind"],
            ", ".join(c["axes"]) or "-",
            c["network"],
            f"{c['count']:,.0f}",
            f"{c['bytes'] / GIB:.3f}",
            f"{c['asynchronous'] / c['bytes']:.0%}" if c["bytes"] else "-",
            f"{c['seconds']:.4f}",
            f"{c['waited_seconds']:.4f}",
        )
        for c in facts["collectives"]
    ]
    head = ("exchange", "along", "network", "times", "GiB sent", "hidden", "seconds", "waited for")
    return f"<h2>Exchanges of one device</h2>{_table(head, rows)}"


def _input(facts: Mapping[str, Any]) -> str:
    bound, given = facts["bound"], facts["input"]
    rows = [
        ("tokens per second", f"{bound['tokens_per_second']:,.0f}"),
        ("frames per second", f"{bound['frames_per_second']:,.0f}"),
        ("frames per second and host", f"{given['frames_per_second_per_host']:,.0f}"),
        ("MB per second and host", f"{given['bytes_per_second_per_host'] / 1e6:,.1f}"),
        (
            f"cores per host, of {given['host_cpus']}, at "
            f"{given['frames_per_cpu_second']:,} frames per CPU-second",
            f"{given['cores_per_host']:.1f}",
        ),
    ]
    cost = [(k.replace("_", " "), f"{v:,.4g}") for k, v in facts.get("cost", {}).items()]
    why = starved(facts)
    warning = f'<p class="wrong">The hosts cannot feed the chips: {why}.</p>' if why else ""
    return f"<h2>What it takes</h2>{warning}{_table(('at the bound', ''), [*rows, *cost])}"


def _asked(facts: Mapping[str, Any]) -> str:
    assumed = "".join(
        f"<li>{escape(a)}</li>" for a in facts.get("bound", {}).get("assumptions", ())
    )
    return (
        (f"<h2>Assumed</h2><ul>{assumed}</ul>" if assumed else "")
        + "<h2>What was asked for</h2>"
        + f"<pre>{escape(json.dumps(facts['config'], indent=1))}</pre>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is text, the others are numbers."""
    classes = ["", *["n"] * (len(head) - 1)]
    cells = "".join(f'<th class="{c}">{escape(h)}</th>' for c, h in zip(classes, head, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{c}">{escape(v)}</td>' for c, v in zip(classes, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"
