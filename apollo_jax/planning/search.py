# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax plan search`: which mesh, rematerialisation and rows a recipe should have on a slice.

From the config's own layout the search walks to neighbours: a prime factor moved from one mesh axis
to another, the next rematerialisation, half as many rows of twice the length or in twice as many
microbatches, half the clip slots, or the reverse. What arithmetic refuses is never compiled. It
goes on from whatever no other layout beats in step time bound, peak memory and clip slots, and ends
when all neighbours of these have been looked at. Until something fits it goes on from what the
compiler found to need the least, then from what arithmetic refused.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from apollo_jax import meshes, sharding
from apollo_jax.config import Experiment, load
from apollo_jax.config_values import parse_overrides
from apollo_jax.planning import jobs
from apollo_jax.planning.layouts import Layout, Outcome, neighbours, pareto
from apollo_jax.planning.show import writable
from apollo_jax.planning.topology import Topology, parse, use_compiler_only
from apollo_jax.training import checks
from apollo_jax.training.step import build
from data_pipeline.frame_shard_writer import write_atomic

_GIB = 2**30
CODE = 0.25 * _GIB  # room for the machine code, which is not made: 0.1 for a real step
LATE = "not compiled: the limit of compilations (--limit) was reached"
FAILED = "the compiler failed"
_REFUSED = 30  # layouts that arithmetic refuses from which the walk goes on all the same

console = Console(highlight=False, soft_wrap=True)


class Arithmetic:
    """What is known of a layout without compiling it."""

    def __init__(self, experiment: Experiment, topology: Topology):
        self.experiment, self.topology = experiment, topology
        self.divisors = checks.weight_divisors(experiment)
        self.machine = checks.Machine(topology.slices, tpu=True)
        self.hbm = topology.chip.hbm / topology.chip.devices
        one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        self.state = build(experiment, one).abstract

    def refusal(self, layout: Layout) -> Outcome | None:
        """Why the layout cannot run, if that can be said."""
        data = self.experiment.data
        if layout.length < min(data.length, data.max_clips * data.tokens_per_clip):
            longest = data.max_clips * data.tokens_per_clip
            return Outcome(layout, refused=f"cuts samples: they have up to {longest} visual tokens")
        if layout.clips < min(data.clips, data.max_clips):
            return Outcome(layout, refused=f"cuts samples: they have up to {data.max_clips} clips")
        filled = max(
            layout.length // data.tokens_per_clip, data.clips * layout.length // data.length
        )
        if layout.clips > filled:
            why = f"has clip slots to spare: the visual tokens of {filled} clips fill its rows"
            return Outcome(layout, refused=why)
        try:
            experiment = layout.of(self.experiment)
        except ValueError as error:
            return Outcome(layout, refused=str(error).splitlines()[-1].strip())
        for why in checks.refusals(experiment, layout.sizes, self.divisors, self.machine):
            return Outcome(layout, refused=why)
        gradients = checks.gradients_held(experiment, self.state)
        needed = checks.on_device(checks.held_bytes(self.state, gradients), layout.sizes)
        if needed > self.hbm:
            what = "weights, moments and gradients alone"
            return Outcome(layout, peak=needed, refused=_too_large(needed, self.hbm, what))
        return None

    def start(self) -> Layout:
        """The config's own layout, or the nearest mesh that divides. ValueError if none does."""
        data, train = self.experiment.data, self.experiment.train
        asked = {axis: getattr(self.experiment.mesh, axis) for axis in sharding.MESH_AXES}
        fixed = {axis: size for axis, size in asked.items() if size > 0}
        every = meshes.every(self.devices, sharding.MESH_AXES)
        layouts = (
            Layout(
                tuple(sizes.values()),
                train.remat,
                data.batch_size,
                data.length,
                data.clips,
                train.accumulate,
            )
            for sizes in meshes.nearest(fixed, every, count=self.devices**2)
        )
        refused = []
        for layout in layouts:
            why = self.refusal(layout)
            if why is None or why.peak:
                return layout
            refused.append(why.refused)
        raise ValueError(f"no mesh over the {self.devices} devices works: {refused[0]}")

    @property
    def devices(self) -> int:
        return self.topology.chips * self.topology.chip.devices


def search(
    start: Layout,
    refusal: Callable[[Layout], Outcome | None],
    compiled: Callable[[Sequence[Layout]], Iterator[Outcome]],
    limit: int,
) -> dict[Layout, Outcome]:
    """The outcome of every layout that was looked at; at most `limit` of them are compiled.

    Args:
      refusal: what arithmetic alone refuses, else None.
      compiled: the outcomes of some layouts, in any order.
    """
    outcomes: dict[Layout, Outcome] = {}
    unfit: dict[Layout, tuple[bool, float]] = {}  # to go on from, the smallest first
    patience, waiting = _REFUSED, [start]
    while waiting:
        refused = {layout: why for layout in waiting if (why := refusal(layout))}
        run = [layout for layout in waiting if layout not in refused]
        late = {layout: Outcome(layout, refused=LATE) for layout in run[limit:]}
        ran = {outcome.layout: outcome for outcome in compiled(run[:limit])}
        limit -= len(ran)
        outcomes |= refused | late | ran
        # What arithmetic knows is a lower bound, so it comes after all that was compiled.
        unfit |= {layout: (True, why.peak) for layout, why in refused.items() if why.peak}
        unfit |= {layout: (False, o.peak or math.inf) for layout, o in ran.items() if o.refused}
        waiting = _new((o.layout for o in pareto(outcomes.values())), outcomes)
        while not (waiting or late or pareto(outcomes.values())) and unfit and patience:
            best = min(unfit, key=unfit.__getitem__)
            patience -= unfit.pop(best)[0]
            waiting = _new([best], outcomes)
    return outcomes


def _new(layouts: Iterable[Layout], known: Mapping[Layout, Outcome]) -> list[Layout]:
    """The neighbours of some layouts that are not known yet."""
    found = dict.fromkeys(n for layout in layouts for n in neighbours(layout))
    return [layout for layout in found if layout not in known]


def _too_large(needed: float, hbm: float, what: str) -> str:
    return f"does not fit: {what} take {needed / _GIB:.2f} GiB, {(needed - hbm) / _GIB:.2f} over"


def outcome_of(layout: Layout, facts: Mapping[str, Any] | jobs.Failed) -> Outcome:
    """Reads a plan's facts."""
    if isinstance(facts, jobs.Failed):
        return Outcome(layout, refused=f"{FAILED}: {facts}")
    peak = facts["memory"]["peak"] + CODE
    if not facts["fits"] or peak > facts["hbm_bytes"]:
        largest = facts["largest"][0] if facts["largest"] else (0, "?")
        why = _too_large(peak, facts["hbm_bytes"], "its buffers")
        why += f"; the largest has {largest[0] / _GIB:.2f} GiB: {largest[1]}"
        return Outcome(layout, peak=peak, refused=why)
    return Outcome(layout, facts["bound"]["step_seconds"], peak)


def explained(outcomes: Mapping[Layout, Outcome]) -> dict[Layout, str]:
    """Why each layout outside the Pareto set is outside it."""
    front = pareto(outcomes.values())
    reasons = {}
    for outcome in outcomes.values():
        if outcome.refused:
            reasons[outcome.layout] = outcome.refused
        elif outcome not in front:
            better = next(o for o in front if o.beats(outcome))
            reasons[outcome.layout] = f"{outcome}: dominated by {better.layout} ({better})"
    return reasons


def main(argv: list[str]) -> None:
    """Search the mesh, remat, rows, clips and accumulation of a recipe for a TPU slice."""
    parser = argparse.ArgumentParser(
        "apollo-jax plan search",
        description=main.__doc__,
        epilog="Any field of the config can be set: --config.train.loss_chunk=512. What has been "
        "compiled is kept (APOLLO_PLANS names the folder), so an interrupted search continues.",
    )
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]")
    parser.add_argument("--topology", required=True, help="as for apollo-jax plan")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time, 2-4 GB each")
    parser.add_argument("--limit", type=int, default=40, help="compilations at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    args, rest = parser.parse_known_args(argv)
    if args.limit < 0:
        raise ValueError(f"--limit {args.limit}: compilations at most, 0 for arithmetic alone")
    writable(args.json)
    use_compiler_only()
    overrides = parse_overrides(rest)
    topology = parse(args.topology)
    topology.devices()  # says so now if the compiler is not there
    known = Arithmetic(load(args.config, overrides), topology)
    done = 0

    def compiled(layouts: Sequence[Layout]) -> Iterator[Outcome]:
        nonlocal done
        wanted = {}
        for layout in layouts:
            changes = tuple((overrides | dict(layout.overrides())).items())
            wanted[jobs.Job(args.config, changes, args.topology)] = layout
        for job, facts in jobs.run(list(wanted), jobs.default_cache(), args.jobs):
            outcome = outcome_of(wanted[job], facts)
            done += 1
            console.print(f"{done:3d} {wanted[job]}: {outcome}", markup=False)
            yield outcome

    try:
        outcomes = search(known.start(), known.refusal, compiled, args.limit)
    except KeyboardInterrupt:
        console.print(f"stopped; {done} compiled layouts are kept, the same command continues")
        raise SystemExit(130) from None
    show(outcomes)
    if args.json:
        facts = {"config": args.config, "topology": args.topology, "overrides": overrides}
        text = json.dumps(facts | as_json(outcomes), indent=1) + "\n"
        write_atomic(args.json, text.encode())
    if not pareto(outcomes.values()):
        raise SystemExit(1)


def show(outcomes: Mapping[Layout, Outcome]) -> None:
    """Prints the Pareto set, and why everything beside it is not in it."""
    front = pareto(outcomes.values())
    table = Table("layout", "step >= s", "peak GiB", title="not beaten", title_justify="left")
    for outcome in front:
        peak = f"{outcome.peak / _GIB:.2f}"
        table.add_row(str(outcome.layout), f"{outcome.seconds:.3g}", peak)
    reasons = explained(outcomes)
    console.print("beside them")
    for layout, why in sorted(reasons.items(), key=lambda item: (item[1], str(item[0]))):
        console.print(f"  {layout}: {why}", markup=False)
    console.print(table if front else f"[red]{_nothing(outcomes)}[/]", markup=True)
    for outcome in front:
        flags = [f"--config.{name}={value}" for name, value in outcome.layout.overrides()]
        console.print(f"  {outcome.layout}:\n    {' '.join(flags)}", markup=False)


def _nothing(outcomes: Mapping[Layout, Outcome]) -> str:
    """Why no layout is left, and what to do."""
    whys = [outcome.refused for outcome in outcomes.values()]
    if LATE in whys:
        return "nothing that was compiled fits, and more is to be tried: a larger --limit goes on"
    if any(why.startswith(FAILED) for why in whys) and not any(o.peak for o in outcomes.values()):
        return "nothing could be compiled: see what the compiler said, and docs/plan.md"
    return "nothing fits: more chips, or fewer rows a step"


def as_json(outcomes: Mapping[Layout, Outcome]) -> dict[str, Any]:
    """The search's result as its JSON has it."""

    def one(outcome: Outcome) -> dict[str, Any]:
        bounds = {"step_seconds": outcome.seconds, "peak_bytes": outcome.peak}
        return dict(outcome.layout.overrides()) | bounds

    refused = explained(outcomes)
    return {
        "pareto": [one(outcome) for outcome in pareto(outcomes.values())],
        "refused": [one(outcomes[layout]) | {"why": why} for layout, why in refused.items()],
    }
