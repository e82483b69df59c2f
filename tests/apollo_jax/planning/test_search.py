# SPDX-License-Identifier: Apache-2.0
"""The search's arithmetic and its walk, with a compiler that is a formula."""

import json
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


def same_clips(layout: Layout) -> Outcome | None:
    """Those of START, so that the walk is a short one."""
    changed = layout.clips * START.length != START.clips * layout.length
    return Outcome(layout, refused="other clips") if changed else None


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
    other_clips = {n.clips for n in found if (n.rows, n.length) == (START.rows, START.length)}
    assert other_clips == {4, 8, 16}
    same = [n for n in every if n.clips * START.length == n.length * START.clips]
    assert {n.clips_of_a_step // 2**9 for n in same} == {1, 4}


def test_neighbours_of_every_kind_come_first():
    """So that a small limit tries each: mesh, remat, longer rows, microbatches, clips."""
    changed = [
        next(
            name
            for name in ("mesh", "remat", "accumulate", "length", "clips")
            if getattr(n, name) != getattr(START, name)
        )
        for n in list(neighbours(START))[:5]
    ]
    assert changed == ["mesh", "remat", "length", "accumulate", "clips"]


def test_one_row_per_device_is_cut_for_more_microbatches_or_longer_rows():
    alone = replace(START, rows=16)
    found = [n for n in neighbours(alone) if n.rows == 8]
    assert {(n.mesh, n.accumulate, n.length) for n in found} == {
        (mesh, *rest) for mesh in ((1, 8, 2, 1), (1, 8, 1, 2)) for rest in ((2, 1024), (1, 2048))
    }


def test_fewer_clip_slots_beat_no_more():
    full = Outcome(START, 2.0, 2.0)
    half = Outcome(replace(START, clips=4), 1.0, 1.0)
    assert not half.beats(full)
    assert pareto([full, half]) == [half, full]
    assert full.beats(replace(half, seconds=2.0, peak=2.0))
    assert "64x1024 clips=4" in str(half.layout)


def test_the_walk_ends_at_the_best_with_all_neighbours_explained():
    outcomes = search.search(START, same_clips, compiled, limit=10_000)
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
    outcomes = search.search(wide, same_clips, tight, limit=500)
    assert outcomes[wide].refused
    assert pareto(outcomes.values())[0].layout.mesh[1] == 16


NEEDS = {"dots": 30, "save_qkv": 20, "save_attention": 10, "full": 0.5}


def test_a_lower_bound_does_not_end_the_walk():
    """Weights alone are less than any whole peak, and lead nowhere: remat=full fits, and is found.

    As Apollo-7B with eight rows on eight v5e: it needs three steps past what does not fit.
    """

    def weights(layout):
        return 120 / (layout.mesh[1] * layout.mesh[3])

    def refusal(layout):
        if weights(layout) > 16:
            return Outcome(layout, peak=weights(layout), refused="weights alone")
        return Outcome(layout, refused="no matter") if layout.mesh[3] > 1 else same_clips(layout)

    def tight(layouts):
        for layout in layouts:
            peak = weights(layout) + NEEDS.get(layout.remat, 99)
            yield Outcome(layout, 1.0, peak, refused="does not fit" if peak > 16 else "")

    start = replace(START, mesh=(1, 8, 1, 1), remat="dots", rows=8)
    outcomes = search.search(start, refusal, tight, limit=40)
    assert pareto(outcomes.values())[0].layout.remat == "full"


def test_the_walk_leaves_what_only_arithmetic_knows_and_what_fails_to_compile():
    """From weights that fit nowhere near, and from a fault of the compiler, on to neighbours."""

    def refusal(layout):
        peak = 100 / layout.mesh[1]
        return Outcome(layout, peak=peak, refused="weights") if peak > 20 else same_clips(layout)

    def faulty(layouts):
        for layout in layouts:
            failed = layout.remat == "full"
            yield Outcome(
                layout,
                0.0 if failed else 1.0,
                0.0 if failed else 1.0,
                "the compiler failed: x" * failed,
            )

    start = replace(START, mesh=(16, 1, 1, 1))
    outcomes = search.search(start, refusal, faulty, limit=100)
    assert pareto(outcomes.values())

    def nowhere(layout):
        return Outcome(layout, peak=1.0, refused="weights")

    assert not pareto(search.search(start, nowhere, compiled, limit=1).values())  # and it ends


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome(START, peak=9.0, refused="does not fit"), "nothing fits: more chips"),
        (Outcome(START, refused=search.LATE), "a larger --limit goes on"),
        (Outcome(START, refused=f"{search.FAILED}: x"), "nothing could be compiled"),
    ],
)
def test_why_there_is_no_answer(outcome, said, capsys):
    search.show({START: outcome})
    assert said in capsys.readouterr().out


def test_the_command_says_and_writes_what_it_found(monkeypatch, tmp_path, capsys):
    def run(wanted, folder, parallel):
        for number, job in enumerate(wanted):
            facts = {"fits": True, "memory": {"peak": 2**30 + number}, "hbm_bytes": 2**34}
            yield job, facts | {"bound": {"step_seconds": 1.0 + number}}

    monkeypatch.setattr(jobs, "run", run)
    monkeypatch.setattr(search, "use_compiler_only", lambda: None)
    monkeypatch.setattr(search.Topology, "devices", lambda _: [])
    where = ["--config", f"{CONFIGS}/demo.py:sft", "--topology", "v5e:4x4"]
    search.main([*where, "--limit", "6", "--json", str(tmp_path / "found.json")])
    text = capsys.readouterr().out
    assert "data=16 remat=none 16x192 clips=6: 1 s, 1.25 GiB" in text
    assert "--config.data.clips=6" in text
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["pareto"][0]["mesh.data"] == "16"
    assert len([r for r in found["refused"] if r["why"] == search.LATE]) > 3
    # of six compilations there is one of each kind, but for clips: these are needed
    tried = [r for r in found["refused"] if "dominated by" in r["why"]]
    for name, value in (("mesh.data", "8"), ("train.remat", "dots"), ("train.accumulate", "2")):
        assert value in {layout[name] for layout in tried}, name
    with pytest.raises(SystemExit):
        search.main([*where, "--limit", "0"])
    assert "a larger --limit goes on" in capsys.readouterr().out


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
        (dict(clips=56), "cuts samples: they have up to 150 clips"),
        (dict(clips=224), "slots to spare: the visual tokens of 128 clips"),
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
    assert why.refused == "mesh data=1 does not divide over 2 slices, which lie along it"


def test_rows_that_the_ring_does_not_take_are_not_compiled():
    known = Arithmetic(load(f"{CONFIGS}/demo.py:sft"), parse("v5e:4x4"))
    layout = replace(known.start(), mesh=(8, 1, 2, 1), length=640)
    why = known.refusal(layout)
    assert why is not None
    assert "config.data.length=640" in why.refused
    assert known.refusal(replace(layout, length=512)) is None


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
