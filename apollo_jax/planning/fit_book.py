# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax plan book`: what each shipped recipe needs of each TPU slice it is laid out for.

The slices of a recipe are its config file's own (SLICES). The book is benchmarks/fit.json, and
docs/fit.md for reading; a test compiles some of its entries again.
"""

import argparse
import fnmatch
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from apollo_jax import meshes
from apollo_jax.config import load, load_module
from apollo_jax.planning import jobs
from apollo_jax.planning.topology import parse
from data_pipeline.frame_shard_writer import write_atomic

_GIB, _TERA = 2**30, 1e12
CONFIGS = ("apollo_1p5b", "apollo_3b", "apollo_7b", "large_batch/apollo_7b_sft")
TOLERANCE = 0.02  # of memory, FLOPs, bytes and the bound, before the book counts as out of date
_FACTS = (
    "chips",
    "mesh",
    "hbm_bytes",
    "memory",
    "batch",
    "model_flops",
    "fits",
)
_BOUND = ("compute_seconds", "exposed_exchange_seconds", "step_seconds", "mfu_ceiling",
          "tokens_per_second", "frames_per_second_per_host")  # fmt: skip

console = Console(highlight=False, soft_wrap=True)


def entries(configs: Path = Path("configs")) -> dict[str, jobs.Job]:
    """Every recipe on every slice, "apollo_7b:sft,v5p-128", in the order of the book."""
    found = {}
    for name in CONFIGS:
        path = configs / f"{name}.py"
        for stage, slices in load_module(path).SLICES.items():
            for topology in slices:
                spec = f"{stage},{topology}"
                found[f"{name}:{spec}"] = jobs.Job(f"{path}:{spec}", (), topology)
    return found


def config_hash(job: jobs.Job) -> str:
    """Of the config's fields that the compiled step depends on and that are not at their defaults.

    So an option that is new does not make the book another one, where no recipe uses it.
    """
    experiment = load(job.config)
    groups = {name: _chosen(getattr(experiment, name)) for name in ("train", "optimizer", "mesh")}
    chosen = jobs.step_fields(asdict(experiment)) | groups
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def _chosen(value: Any) -> Any:
    """Of a dataclass: the fields that differ from their defaults, by name."""
    if not is_dataclass(value):
        return value
    given = {f: getattr(value, f.name) for f in fields(value)}
    return {
        f.name: _chosen(v)
        for f, v in given.items()
        if v != (f.default if f.default_factory is MISSING else f.default_factory())
    }


def entry(job: jobs.Job, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the book keeps of a plan: all that the same compiler finds again."""
    experiment = load(job.config)
    kept = {name: facts[name] for name in _FACTS}
    head = {"config": config_hash(job), "remat": experiment.train.remat}
    if not facts["fits"]:
        return head | kept
    return head | kept | {
        "executed_flops": facts["executed_flops"],
        "collectives": facts["collectives"],
        "bound": {name: facts["bound"][name] for name in _BOUND},
    }  # fmt: skip


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Figures of an entry that differ by more than TOLERANCE of what they are a part of."""
    before, after = _figures(old), _figures(new)
    wholes = {"bytes": before["bytes sent"], "bound": before.get("bound.step_seconds", 0.0)}
    found = []
    for name in before | after:
        was, now = before.get(name, 0.0), after.get(name, 0.0)
        whole = wholes.get(name.split()[0].partition(".")[0], was)
        if abs(now - was) > TOLERANCE * whole:
            found.append(f"{name}: {was:.6g} in the book, {now:.6g} now")
    return found


def _figures(entry: Mapping[str, Any]) -> dict[str, float]:
    figures: dict[str, float] = defaultdict(float)
    figures |= {f"memory.{kind}": size for kind, size in entry["memory"].items()}
    figures |= {name: entry.get(name, 0.0) for name in ("model_flops", "executed_flops")}
    figures["bytes sent"] = sum(c["bytes"] for c in entry.get("collectives", ()))
    for c in entry.get("collectives", ()):
        figures[f"bytes sent by {c['kind']} along {' x '.join(c['axes'])}"] += c["bytes"]
        figures["bytes sent beside computation"] += c["asynchronous"]
    bound = entry.get("bound", {})
    names = ("step_seconds", "exposed_exchange_seconds")
    return figures | {f"bound.{name}": bound[name] for name in names if bound}


def markdown(book: Mapping[str, Any]) -> str:
    """docs/fit.md."""
    lines = [_HEAD.format(versions=", ".join(f"{k} {v}" for k, v in book["versions"].items()))]
    by_slice = defaultdict(list)
    for name, found in book["entries"].items():
        recipe, _, topology = name.partition(",")
        by_slice[topology].append((recipe, found))
    for topology, rows in by_slice.items():
        chip, devices = parse(topology).chip, parse(topology).chip.devices
        hbm = f"{chip.hbm / devices / _GIB:.2f} GiB for each of its {devices} devices"
        hbm = hbm if devices > 1 else f"{chip.hbm / _GIB:.2f} GiB"
        lines.append(f"\n## {topology}\n\n{parse(topology).chips} chips, {hbm}.\n")
        lines += _table(_COLUMNS, [_row(*row) for row in rows])
        lines.append("")
        lines += _table(_EXCHANGES, [_exchange_row(*row) for row in rows])
    return "\n".join(lines) + "\n"


_HEAD = """<!-- Written by `apollo-jax plan book`: change the configs or the code, not this. -->
# What the recipes need of a TPU

Every stage of Apollo-1.5B, 3B and 7B, and the last one at a large batch (figures are of its largest
update), on every slice that its config has a mesh for, as compiled by the TPU's own compiler
({versions}): `--config configs/apollo_7b.py:sft,v5p-128` is one row. No row was measured on a TPU.
Memory and FLOPs are what the compiled program states; step time and tokens per second are bounds
that a real run stays behind (`apollo-jax plan` prints their assumptions).

Memory is GiB per device: what trains and what is frozen, the optimizer's moments, temporaries
(activations, gradients, the compiler's copies) and the peak, also as a share of the device's own.
FLOPs are TFLOP per chip and step; `x` is executed over needed: recomputation, padding, attention
blocks that a mask leaves empty. The second table says what one device sends along each mesh axis
in a step, in GiB, and how much of it the compiler runs beside computation.

The mesh for another slice: `apollo-jax plan search --config FILE:STAGE --topology SLICE`."""
_COLUMNS = (
    "recipe", "mesh", "remat", "trains", "frozen", "moments", "temporaries", "peak", "needed", "x",
    "step >= s", "MFU <=", "tokens/s <=",
)  # fmt: skip
_EXCHANGES = ("recipe", "data", "fsdp", "context", "tensor", "several", "beside")


def _row(recipe: str, found: Mapping[str, Any]) -> list[str]:
    memory, bound = found["memory"], found.get("bound")
    peak = f"{memory['peak'] / _GIB:.2f} ({memory['peak'] / found['hbm_bytes']:.0%})"
    kinds = ("params", "frozen", "moments", "temporaries")
    row = [f"`{recipe}`", f"`{meshes.text(found['mesh'])}`", found["remat"]]
    row += [f"{memory[kind] / _GIB:.2f}" for kind in kinds]
    row += [peak, f"{found['model_flops'] / _TERA:.0f}"]
    if bound is None:
        return [*row, "does not fit", "", "", ""]
    overhead = found["executed_flops"] / found["model_flops"]
    rate = f"{bound['tokens_per_second']:,.0f}"
    return [*row, f"{overhead:.2f}", f"{bound['step_seconds']:.2f}",
            f"{bound['mfu_ceiling']:.0%}", rate]  # fmt: skip


def _exchange_row(recipe: str, found: Mapping[str, Any]) -> list[str]:
    sent: dict[str, float] = defaultdict(float)
    beside = 0.0
    for collective in found.get("collectives", ()):
        axes = collective["axes"]
        sent[axes[0] if len(axes) == 1 else "several"] += collective["bytes"]
        beside += collective["asynchronous"]
    total = sum(sent.values())
    cells = [f"{sent[axis] / _GIB:.2f}" if sent[axis] else "" for axis in _EXCHANGES[1:-1]]
    return [f"`{recipe}`", *cells, f"{beside / total:.0%}" if total else ""]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|---|" + "---:|" * (len(columns) - 1)
    yield from (f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str]) -> None:
    """Compile the shipped recipes for their TPU slices and write the fit book."""
    parser = argparse.ArgumentParser("apollo-jax plan book", description=main.__doc__)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="such as '*_7b:*,v5p-*'")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time, 2-4 GB each")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/fit.json"), metavar="FILE")
    parser.add_argument("--markdown", type=Path, default=Path("docs/fit.md"), metavar="FILE")
    args = parser.parse_args(argv)
    every = entries()
    names = {job: name for name, job in every.items() if fnmatch.fnmatch(name, args.only)}
    if not names:
        raise ValueError(f"--only {args.only} names no entry; they are {', '.join(every)}")
    versions = jobs.versions()
    old = json.loads(args.json.read_text()) if args.json.exists() else {"entries": {}}
    if old["entries"] and old["versions"] != versions:
        console.print(f"{args.json} is of {old['versions']}: a new book, of {versions}")
        old["entries"] = {}
    found, failures = dict(old["entries"]), 0
    try:
        for job, facts in jobs.run(list(names), jobs.default_cache(), args.jobs):
            if isinstance(facts, jobs.Failed):
                failures += 1
                console.print(f"{names[job]}: the compiler failed: {facts}", markup=False)
                continue
            found[names[job]] = entry(job, facts)
            _say(names[job], found[names[job]], len(names))
            kept = {name: found[name] for name in every if name in found}
            _write(args.json, args.markdown, {"versions": versions, "entries": kept})
    except KeyboardInterrupt:
        console.print("stopped; what is compiled is kept, the same command continues")
        raise SystemExit(130) from None
    if failures or not all(found[name]["fits"] for name in names.values() if name in found):
        raise SystemExit(1)


def _say(name: str, found: Mapping[str, Any], total: int) -> None:
    peak, hbm = found["memory"]["peak"] / _GIB, found["hbm_bytes"] / _GIB
    step = f"step >= {found['bound']['step_seconds']:.3g} s" if found["fits"] else "does not fit"
    console.print(f"{name} (of {total}): {peak:.2f} of {hbm:.2f} GiB, {step}", markup=False)


def _write(json_path: Path, markdown_path: Path, book: Mapping[str, Any]) -> None:
    for path, text in (
        (json_path, json.dumps(book, indent=1) + "\n"),
        (markdown_path, markdown(book)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
