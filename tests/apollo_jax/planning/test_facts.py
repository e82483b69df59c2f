# SPDX-License-Identifier: Apache-2.0
"""What a plan says, prints, compares and draws, of made-up totals."""

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from apollo_jax.config import load
from apollo_jax.planning import diff, plan, report_page, search
from apollo_jax.planning.hlo import Collective
from apollo_jax.planning.show import show

GIB = 2**30
ROOT = Path(__file__).parents[3]
PEAKS = {"flops": 197e12, "hbm_bandwidth": 819e9}


def printed(facts, width=200):
    file = io.StringIO()
    show(Console(file=file, width=width), facts)
    return file.getvalue()


def test_bounds(example):
    facts = example(price=2.0).facts()
    bound, given, cost = facts["bound"], facts["input"], facts["cost"]
    assert bound["compute_seconds"] == pytest.approx(4e12 / 197e12)
    assert bound["memory_seconds"] == pytest.approx(8e9 / 819e9)
    assert bound["step_seconds"] == 0.34  # the schedule's, longer than either
    assert bound["exchange_seconds"] == pytest.approx(0.32)
    assert bound["dcn_seconds"] == 0.3
    assert bound["remat_overhead"] == 2
    assert bound["mfu_ceiling"] == pytest.approx(2e12 / 197e12 / 0.34)
    assert given["frames_per_second_per_host"] == pytest.approx(32 * 24 / 0.34 / 8)
    assert given["cores_per_host"] == pytest.approx(32 * 24 / 0.34 / 8 / 2400)  # of RGB
    assert cost["usd_per_step"] == pytest.approx(0.34 / 3600 * 32 * 2)
    assert not any("sample" in name for name in cost)  # how many a row holds is not known
    assert cost["usd_of_the_run"] == pytest.approx(cost["usd_per_step"] * 1700)
    assert "cost" not in example().facts()
    assert json.loads(json.dumps(facts))["temporaries_at_peak"] == {
        "kept for the backward pass": 6 * GIB,
        "working memory, backward": 4 * GIB,
        "padding and gaps": GIB,
    }


def test_samples_cost_the_same_in_updates_of_any_size(example):
    """Apollo-7B's last stage has four samples to a row, also 64 times the published batch."""
    config = "configs/large_batch/apollo_7b_sft.py:muon64"
    large = load(f"{ROOT}/{config}")
    rows = large.train.ramp.most * large.data.batch_size
    cost = {}
    for name, size in (("published", 64), ("muon64", rows)):
        # an update of as many times the rows takes as many times the seconds
        one = example(price=2.0)
        totals = replace(one.compiled.totals, seconds=0.34 * size)
        made = replace(one, compiled=replace(one.compiled, totals=totals), config=large)
        tokens = size * large.data.length
        cost[name] = replace(made, rows=size, tokens=tokens).facts()["cost"]
    assert rows == 64 * 64
    assert cost["published"]["samples_per_step"] == 256
    assert cost["muon64"]["samples_per_step"] == 64 * 256
    per_million = [c["usd_per_million_samples"] for c in cost.values()]
    assert per_million[0] == pytest.approx(per_million[1])
    assert per_million[0] == pytest.approx(cost["published"]["usd_per_step"] / 256 * 1e6)


def test_what_is_printed(example):
    one = example(price=2.0)
    four_to_a_row = replace(one.config, positions_per_sample=192 / 4)
    text = printed(replace(one, config=four_to_a_row).facts())
    for said in (
        "32 chips, data 2 x fsdp 8 x context 1 x tensor 2",
        "bf16[24,8,16384] qwen2.py:7 Qwen2.__call__ (kept for the backward pass)",
        "kernels of unknown FLOPs: mystery",
        "all-reduce data  dcn",
        "step >= 0.34 s",
        "of its 112 cores",
        "per million samples (128 to a step)",
    ):
        assert said in text, said
    assert "cannot feed" not in text


def test_kinds_of_exchanges_can_be_told_apart_in_80_columns(example):
    plain = example()
    kinds = ("all-gather", "all-gather by all-reduce", "reduce-scatter", "collective-permute")
    exchanges = [
        Collective(kind, ("data", "fsdp", "context"), 1234, 12 * GIB, GIB, "ici", 0.0123, 0.00123)
        for kind in kinds
    ]
    totals = replace(plain.compiled.totals, collectives=exchanges)
    text = printed(replace(plain, compiled=replace(plain.compiled, totals=totals)).facts(), 80)
    lines = text.splitlines()
    for word in ("all-gather by", "all-reduce", "reduce-scatter", "collective-permute"):
        assert any(line.startswith(word) for line in lines), word
    assert text.count("0.00123") == len(kinds)  # seconds, in the last column
    assert "…" not in text
    assert max(map(len, lines)) <= 80


def test_hosts_that_cannot_load_the_frames_are_warned_of(example):
    facts = replace(example(), frames=32 * 24 * 1000).facts()
    cores = facts["input"]["cores_per_host"]
    assert cores > 112
    said = f"they load a step in {cores / 112 * 0.34:.3g} s"
    assert f"the hosts cannot feed the chips: with all their cores {said}" in printed(facts)
    assert said in report_page.page(facts, PEAKS)


def test_what_cannot_be_is_said_before_anything_is_compiled(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError

    monkeypatch.setattr(plan, "load", never)
    monkeypatch.setattr(search, "load", never)
    what = ["--config", "c.py", "--topology", "v5e:4x4"]
    for flag, value, said in (
        ("--price", "-3", "--price -3 is not possible"),
        ("--price", "nan", "--price nan is not possible"),
        ("--price", "inf", "--price inf is not possible"),
        ("--json", str(tmp_path / "no" / "a.json"), "no is no folder"),
        ("--html", str(tmp_path / "no" / "a.html"), "no is no folder"),
        ("--html", str(tmp_path), "is a folder; name a file in it"),
    ):
        with pytest.raises(ValueError, match=said):
            plan.main([*what, flag, value])
    for flag, value, said in (
        ("--json", str(tmp_path / "no" / "a.json"), "^search: .*no is no folder"),
        ("--limit", "-1", "^search: --limit -1"),
    ):
        with pytest.raises(ValueError, match=said):
            plan.main(["search", *what, flag, value])


def test_what_does_not_fit_comes_with_changes_that_save_most_first(example):
    facts = example(fits=False, temporaries=13 * GIB).facts()
    assert "bound" not in facts
    advice = facts["advice"]
    # 16.75 GiB of 15.75: what is saved for the backward pass is 6, the decoder's as well
    assert advice[0].startswith("config.train.remat=full, keeping only layers' inputs: about 4.8")
    assert advice[0].endswith("which would be enough")
    assert any(a.startswith("config.mesh.context=2") and "3.0 GiB" in a for a in advice)
    assert any(a.startswith("config.data.clips=3, ") and "2.0 GiB" in a for a in advice)
    assert any(a.startswith("config.mesh.fsdp=16") and "about 1.8 GiB" in a for a in advice)
    saved = [float(a.split("about ")[1].split(" ")[0]) for a in advice]
    assert saved == sorted(saved, reverse=True)
    assert "1.00 GiB too many" in printed(facts)
    assert not example(temporaries=4 * GIB).facts()["advice"]  # it has room


def test_differences(example, tmp_path, capsys):
    a = json.loads(json.dumps(example().facts()))
    b = json.loads(json.dumps(example(temporaries=12 * GIB).facts()))
    assert diff.changes(a, a) == []
    assert diff.changes(a, b) == [
        ("memory: temporaries", 11.0, 12.0, "GiB"),
        ("memory at the peak: padding and gaps", 1.0, 2.0, "GiB"),
    ]
    assert diff.config_changes(a, b) == []
    b["mesh"]["fsdp"] = 4
    b["collectives"] = b["collectives"][:1]
    assert diff.config_changes(a, b) == ["mesh.fsdp: 8 -> 4"]
    gone = {what: (old, new) for what, old, new, _ in diff.changes(a, b)}
    assert gone["all-reduce along data (dcn): sent"] == (1.0, None)
    for name, facts in (("a", a), ("b", b)):
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
    diff.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "+9.1%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("{}", "holds no plan"),
        ("[]", "holds no plan"),
        ('{"memory": {}, "mesh": {}}', "holds no plan"),
        ('{"memory": 1, "mesh": {}, "fits": true}', "holds no plan"),
        ('{"memory": {"peak": "x"}, "mesh": {}, "fits": true}', "holds no plan"),
        ('{"memory": {}, "mesh": {}, "fits": true, "collectives": [{}]}', "holds no plan"),
        ('{"memory": {}, "mesh": {}, "fits": true, "bound": 1}', "holds no plan"),
    ],
)
def test_what_is_no_plan(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"^diff: .*{said}"):
        plan.main(["diff", str(tmp_path / "a.json"), str(tmp_path / "a.json")])


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "circle", "polyline"):
            self.open.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in ("circle", "polyline"):
            assert self.open.pop() == tag


@pytest.mark.parametrize("fits", [True, False])
def test_the_page_stands_alone(example, fits):
    facts = example(fits=fits, price=1.0, temporaries=(11 if fits else 13) * GIB).facts()
    facts["memory"]["accumulated"] = 3 * GIB
    facts["compiler_flags"] = "--xla_plainer=true"
    text = report_page.page(facts, PEAKS)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.sources == []
    assert "url(" not in text
    assert ("roof" in text.split("<body>")[1]) is fits
    assert ("does not fit" in text) is not fits
    assert ("chip: 4.00 GiB too many." in text) is not fits
    assert "accumulated 3.00" in text
    for said in ("unknown FLOPs: mystery", "Compiled with --xla_plainer=true: without it"):
        assert (said in text) is fits
