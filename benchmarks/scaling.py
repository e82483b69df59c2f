# SPDX-License-Identifier: Apache-2.0
"""What a chip holds and sends as a slice grows from 16 to 4,096 chips, each with the same batch.

    python benchmarks/scaling.py [--jobs 2] [--only v5e]

Compiles Apollo-1.5B's last stage, one row to a chip, for slices of each size (no TPU is needed, but
libtpu), and writes benchmarks/scaling.json, docs/scaling.md and its picture. What is compiled is
kept (APOLLO_PLANS), so an interrupted run continues.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apollo_jax import meshes
from apollo_jax.planning import jobs
from apollo_jax.planning.topology import parse

CONFIG = "configs/apollo_1p5b.py:sft"
TOPOLOGIES = {
    "v5e": ("v5e:4x4", "v5e:8x8", "v5e:16x16", "4*v5e:16x16", "16*v5e:16x16"),
    "v5p": ("v5p:2x2x4", "v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16", "4*v5p:8x8x16"),
}
ROWS = {"v5e": (4096, 28), "v5p": (16_384, 112)}  # tokens and clips of a chip's row
LARGEST_FSDP = 128  # divides the width of every part of the model
GIB = 2**30
BOTTOM = 270  # of the picture's panels
CURVES = {  # of the picture: what, and how it is read off a point
    "peak": lambda p: p["peak"],
    "weights and moments": lambda p: p["state"],
    "sent along fsdp": lambda p: p["sent"].get("fsdp", 0),
    "sent along data": lambda p: sum(n for axes, n in p["sent"].items() if "data" in axes),
}
STYLE = """<style>
text{font:12px sans-serif;fill:#333} .title{font-weight:bold} .end{text-anchor:end}
.middle{text-anchor:middle} line{stroke:#ddd} polyline{fill:none;stroke-width:2}
</style><rect width="900" height="330" fill="#fff"/>"""
HEAD = """<!-- Written by benchmarks/scaling.py: change that, not this. -->
# From 16 to 4,096 chips

Apollo-1.5B's last stage (connector and decoder train, AdamW), one row to a chip whatever the number
of chips; parameters are cut over `fsdp`, at most 128 chips, and copied along `data`. GiB of one
device, as compiled; nothing was measured on a TPU.

![what a chip holds and sends](scaling.svg)

What grows, and why:

- **State** (weights and moments) shrinks with `fsdp` until that is 128, and stays there.
- **Temporaries** follow a chip's own row, which stays the same; what shrinks at first are the
  gradients, cut like the weights.
- **Sent along `fsdp`**: of n chips each sends (n - 1)/n of every weight that is gathered, and once
  or twice that of every gradient that is summed (see sharding.md: choosing fsdp): 15/16 at 16
  chips, all of it at ever so many.
- **Sent along `data`**: nothing without copies; with m copies 2 (m - 1)/m of the gradients of a
  chip's 128th of the weights, so it no longer grows from eight copies on. Of this the data-centre
  network between slices carries 0.1 GiB a chip at most.
- **Sent along both**: the gradient of the token table, in bfloat16, summed over all chips at once
  (2 x 0.43 GiB); between slices it is summed within each first.
- **The step** takes as long on 4,096 chips as on 16, within 3 %."""
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728")


def job(topology: str) -> jobs.Job:
    """One row to a chip; parameters cut over at most LARGEST_FSDP of them."""
    found = parse(topology)
    length, clips = ROWS[found.chip.name]
    fsdp = min(LARGEST_FSDP, found.chips // found.slices)
    changes = {
        "data.batch_size": found.chips,
        "data.length": length,
        "data.clips": clips,
        "mesh.data": found.chips // fsdp,
        "mesh.fsdp": fsdp,
    }
    return jobs.Job(CONFIG, tuple((k, str(v)) for k, v in changes.items()), topology)


def point(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of one chip: held, and sent in a step by mesh axes."""
    memory, sent = facts["memory"], {}
    for collective in facts["collectives"]:
        axes = " ".join(collective["axes"])
        sent[axes] = sent.get(axes, 0) + collective["bytes"]
    return {
        "topology": facts["topology"],
        "chips": facts["chips"],
        "mesh": facts["mesh"],
        "peak": memory["peak"],
        "state": memory["params"] + memory["frozen"] + memory["moments"],
        "temporaries": memory["temporaries"],
        "sent": sent,
        "step_seconds": facts["bound"]["step_seconds"],
        "mfu_ceiling": facts["bound"]["mfu_ceiling"],
    }


def by_chip(points: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The points by kind of chip, smallest slice first."""
    found = {c: [points[t] for t in names if t in points] for c, names in TOPOLOGIES.items()}
    return {chip: of_chip for chip, of_chip in found.items() if of_chip}


def picture(points: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """GiB of one chip over the number of chips, a panel for each kind: the text of an SVG file."""
    panels = [_panel(45 + 430 * n, *item) for n, item in enumerate(points.items())]
    for n, (name, colour) in enumerate(zip(CURVES, COLOURS, strict=True)):
        square = f'<rect x="{45 + n * 200}" y="{BOTTOM + 36}" width="12" height="12"'
        panels.append(f'{square} fill="{colour}"/>{_text(63 + n * 200, BOTTOM + 47, name)}')
    size = f'viewBox="0 0 900 {BOTTOM + 60}"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', STYLE, *panels, "</svg>\n"]
    )


def _panel(left: int, chip: str, points: Sequence[Mapping[str, Any]]) -> str:
    most = max(curve(p) for p in points for curve in CURVES.values()) / GIB
    step = 10.0 ** math.floor(math.log10(most))
    step *= next(n for n in (0.2, 0.5, 1, 2.5) if most <= 5 * n * step)  # at most five lines
    top = step * math.ceil(most / step)

    def height(gib: float) -> float:
        return BOTTOM - (BOTTOM - 30) * gib / top

    parts = [_text(left, 18, f"{chip}: GiB per chip, over chips", "title")]
    for k in range(round(top / step) + 1):
        y = height(k * step)
        parts.append(f'<line x1="{left}" x2="{left + 370}" y1="{y:.0f}" y2="{y:.0f}"/>')
        parts.append(_text(left - 6, y + 4, f"{k * step:g}", "end"))
    across = {p["chips"]: left + 15 + 340 * math.log2(p["chips"] / 16) / 8 for p in points}
    parts += [_text(x, BOTTOM + 16, f"{chips:,}", "middle") for chips, x in across.items()]
    for curve, colour in zip(CURVES.values(), COLOURS, strict=True):
        at = [(across[p["chips"]], height(curve(p) / GIB)) for p in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{line}" stroke="{colour}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in at]
    return "\n".join(parts)


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}">{text}</text>'


def page(points: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """docs/scaling.md."""
    lines = [HEAD]
    for chip, found in points.items():
        axes = sorted({axes for p in found for axes in p["sent"]})
        columns = ["chips", "mesh", "state", "temporaries", "peak"]
        columns += [f"sent: {axes or '-'}" for axes in axes] + ["step >= s", "MFU <="]
        length, clips = ROWS[chip]
        lines.append(f"\n## {chip}: one row of {length:,} tokens and {clips} clips to a chip\n")
        lines.append(f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}")
        for p in found:
            cells = [f"{p['chips']:,} (`{p['topology']}`)", f"`{meshes.text(p['mesh'])}`"]
            sizes = [p["state"], p["temporaries"], p["peak"]]
            sizes += [p["sent"].get(a, 0) for a in axes]
            cells += [f"{size / GIB:.2f}" for size in sizes]
            cells += [f"{p['step_seconds']:.2f}", f"{p['mfu_ceiling']:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compiles what is not kept yet and writes the three files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--only", default="", help="topologies whose name has this in it")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/scaling.json"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    wanted = [job(t) for names in TOPOLOGIES.values() for t in names if args.only in t]
    old = json.loads(args.json.read_text()) if args.json.exists() else {"points": []}
    known = {p["topology"]: p for p in old["points"]}
    for done, facts in jobs.run(wanted, jobs.default_cache(), args.jobs):
        if isinstance(facts, jobs.Failed):
            print(f"{done.topology}: the compiler failed: {facts}")
        elif not facts["fits"]:
            print(f"{done.topology}: does not fit")
        else:
            known[done.topology] = point(facts)
            print(f"{done.topology}: {known[done.topology]['peak'] / GIB:.2f} GiB per chip")
    every = [t for names in TOPOLOGIES.values() for t in names if t in known]
    book = {"config": CONFIG, "versions": jobs.versions(), "points": [known[t] for t in every]}
    args.json.write_text(json.dumps(book, indent=1) + "\n")
    found = by_chip(known)
    (args.docs / "scaling.svg").write_text(picture(found))
    (args.docs / "scaling.md").write_text(page(found))


if __name__ == "__main__":
    main()
