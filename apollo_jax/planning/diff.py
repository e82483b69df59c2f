# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax plan diff A.json B.json`: what changed between two plans."""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apollo_jax.planning.show import short

GIB = 2**30
_SAME = 1e-4  # relative change that is none

Row = tuple[str, float | None, float | None, str]  # what, before, after, unit


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Row]:
    """Rows of numbers that differ between the facts of two plans; None = not there."""
    before, after = dict(_numbers(a)), dict(_numbers(b))
    rows = []
    for what, (_, unit) in (before | after).items():
        old, new = (side[what][0] if what in side else None for side in (before, after))
        if old is None or new is None or abs(new - old) > _SAME * max(abs(old), abs(new)):
            rows.append((what, old, new, unit))
    return rows


def config_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """`a.b: old -> new` for what was asked for, mesh and topology included."""
    old, new = (
        dict(_leaves({k: x[k] for k in ("experiment", "topology", "mesh", "config") if k in x}))
        for x in (a, b)
    )
    names = [n for n in {**old, **new} if old.get(n) != new.get(n)]
    return [f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in names]


def _numbers(facts: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, str]]]:
    for name, value in facts["memory"].items():
        yield f"memory: {name}", (value / GIB, "GiB")
    for kind, value in facts.get("temporaries_at_peak", {}).items():
        yield f"memory at the peak: {kind}", (value / GIB, "GiB")
    for name in ("model_flops", "executed_flops", "kernel_flops"):
        if name in facts:
            yield name.replace("_", " "), (facts[name] / 1e12, "TFLOP")
    for c in facts.get("collectives", ()):
        label = f"{c['kind']} along {', '.join(c['axes']) or '-'} ({c.get('network', 'ici')})"
        yield f"{label}: sent", (c["bytes"] / GIB, "GiB")
        yield f"{label}: not hidden", ((c["bytes"] - c["asynchronous"]) / GIB, "GiB")
    for name, value in facts.get("bound", {}).items():
        if isinstance(value, float | int):
            yield f"bound: {name.replace('_', ' ')}", (value, "")


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def read(path: Path) -> dict[str, Any]:
    """The facts in a file that `apollo-jax plan --json` wrote. ValueError for any other."""
    try:
        facts = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        whole = {"fits", "memory", "mesh"} <= facts.keys() and not changes(facts, facts)
    except (KeyError, TypeError, AttributeError):  # something in it is not what a plan has there
        whole = False
    if not whole:
        raise ValueError(f"{path} holds no plan; write one with apollo-jax plan ... --json {path}")
    return facts


def main(argv: list[str]) -> None:
    """What changed between two plans: what was asked for, memory, FLOPs, exchanges, bounds."""
    parser = argparse.ArgumentParser("apollo-jax plan diff", description=main.__doc__)
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    args = parser.parse_args(argv)
    a, b = read(args.before), read(args.after)
    console = Console(highlight=False)
    for line in config_changes(a, b) or ["the same recipe, mesh and topology"]:
        console.print(line, markup=False)
    if a["fits"] != b["fits"]:
        console.print("fits now" if b["fits"] else "[red]does not fit any more[/]")
    rows = changes(a, b)
    if not rows:
        console.print("no number changed")
        return
    table = Table("", "before", "after", "change")
    for what, old, new, unit in rows:
        change = f"{new / old - 1:+.1%}" if old and new is not None else ""
        table.add_row(what, _text(old, unit), _text(new, unit), change)
    console.print(table)


def _text(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{short(value, 4)} {unit}".strip()
