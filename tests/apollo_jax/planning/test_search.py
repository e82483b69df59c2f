# SPDX-License-Identifier: Apache-2.0
"""The search's arithmetic and its walk, with a compiler that is a formula."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from apollo_jax.config import load
from apollo_jax.planning import jobs, search
from apollo_jax.planning.layouts import Layout, Outcome, neighbours, pareto
from apollo_jax.planning.search import Arithmetic
from apollo_jax.planning.topology import parse

CONFIGS = Path(__file__).parents[3] / "configs"
START = Layout((1, 16, 1, 1), "full", 64, 1024, 8)


def seconds(layout: Layout) -> float:
    """Fewest seconds where fsdp is 4 and tensor 2; keeping more is faster."""
    _, fsdp, _, tensor = layout.mesh
    return abs(math.log2(fsdp / 4)) + abs(math.log2(tensor / 2)) + (layout.remat == "full") + 1


def compiled(layouts):
    for layout in layouts:
        yield Outcome(layout, seconds(layout), peak=2.0 if layout.remat == "none" else 1.0)


def test_neighbours_are_one_change_away():
    found = list(neighbours(START))
    assert len(found) == len(set(found))
    assert Layout((2, 8, 1, 1), "full", 64, 1024, 8) in found
    assert Layout((1, 16, 1, 1), "full", 32, 2048, 16) in found
    assert Layout((1, 16, 1, 1), "full", 128, 512, 4) in found
    assert all(math.prod(n.mesh) == 16 for n in found)
    assert replace(START, rows=32, accumulate=2) in found
    assert START in neighbours(replace(START, rows=32, accumulate=2))
    every = found + list(neighbours(replace(START, accumulate=4)))
    assert {n.accumulate * n.rows * n.length // 2**16 for n in every} == {1, 4}
    assert {n.accumulate * n.rows * n.clips // 2**9 for n in every} == {1, 4}


def test_the_walk_ends_at_the_best_with_all_neighbours_explained():
    outcomes = search.search(START, lambda layout: None, compiled, limit=10_000)
    front = pareto(outcomes.values())
    assert front[0].seconds == 1
    assert front[0].layout.mesh[1::2] == (4, 2)
    reasons = search.explained(outcomes)
    for best in front:
        for neighbour in neighbours(best.layout):
            assert neighbour in reasons or outcomes[neighbour] in front
    assert any("dominated by" in why for why in reasons.values())


def test_the_limit_is_kept_and_said():
    seen = []

    def count(layouts):
        seen.extend(layouts)
        yield from compiled(layouts)

    outcomes = search.search(START, lambda layout: None, count, limit=5)
    assert len(seen) == 5
    assert any("--limit" in why for why in search.explained(outcomes).values())


def test_from_what_does_not_fit_it_walks_to_less():
    def tight(layouts):
        for layout in layouts:
            peak = 32.0 / layout.mesh[1]
            yield Outcome(layout, 1.0, peak, refused="does not fit" if peak > 2.5 else "")

    wide = replace(START, mesh=(16, 1, 1, 1))
    outcomes = search.search(wide, lambda layout: None, tight, limit=500)
    assert outcomes[wide].refused
    assert pareto(outcomes.values())[0].layout.mesh[1] == 16


@pytest.fixture(scope="module")
def known():
    return Arithmetic(load(f"{CONFIGS}/apollo_7b.py:sft"), parse("v5e-256"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(mesh=(1, 256, 1, 1)), "batch_size=64 does not divide over the 256 row shards"),
        (dict(mesh=(1, 32, 1, 8)), "28 heads"),
        (dict(mesh=(2, 2, 64, 1)), "does not fit: weights, moments and gradients alone take"),
        (dict(rows=128, length=8192), "cuts samples: they have up to 19200 visual tokens"),
        (dict(rows=16, length=65_536), "positions end at 32768"),
    ],
)
def test_what_arithmetic_refuses(known, change, said):
    layout = replace(Layout((1, 64, 4, 1), "full", 64, 16_384, 112), **change)
    why = known.refusal(layout)
    assert why is not None
    assert said in why.refused


def test_the_start_is_near_the_config(known):
    start = known.start()  # its own, fsdp over everything, has four devices to a row
    assert known.refusal(start) is None
    assert start.sizes["fsdp"] == 64


def test_slices_lie_along_data():
    known = Arithmetic(load(f"{CONFIGS}/demo.py:sft"), parse("2*v5e:4x4"))
    layout = replace(known.start(), mesh=(1, 16, 1, 2))
    why = known.refusal(layout)
    assert why is not None
    assert why.refused == "mesh data=1 does not divide 2 slices"


def test_outcomes_of_plans():
    facts = {
        "fits": False,
        "memory": {"peak": 20 * 2**30},
        "hbm_bytes": 16 * 2**30,
        "largest": [[2**30, "f32[1]"]],
    }
    refused = search.outcome_of(START, facts).refused
    assert refused == (
        "does not fit: its buffers take 20.25 GiB, 4.25 over; the largest has 1.00 GiB: f32[1]"
    )
    facts |= {"fits": True, "bound": {"step_seconds": 1.5}, "memory": {"peak": 15.8 * 2**30}}
    assert "0.05 over" in search.outcome_of(START, facts).refused  # no room for its code
    facts["memory"] = {"peak": 15 * 2**30}
    assert search.outcome_of(START, facts).seconds == 1.5
    assert "failed: boom" in search.outcome_of(START, jobs.Failed("boom")).refused
