# SPDX-License-Identifier: Apache-2.0
"""What a plan says, prints, compares and draws, of made-up totals."""

import io
import json
from html.parser import HTMLParser

import pytest
from rich.console import Console

from apollo_jax.planning import diff, report_page
from apollo_jax.planning.show import show

GIB = 2**30


def printed(facts):
    file = io.StringIO()
    show(Console(file=file, width=200), facts)
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
    assert cost["usd_per_million_samples"] == pytest.approx(cost["usd_per_step"] / 256 * 1e6)
    assert cost["usd_of_the_run"] == pytest.approx(cost["usd_per_step"] * 1700)
    assert "cost" not in example().facts()
    assert json.loads(json.dumps(facts))["temporaries_at_peak"] == {
        "kept for the backward pass": 6 * GIB,
        "working memory, backward": 4 * GIB,
    }


def test_what_is_printed(example):
    text = printed(example(price=2.0).facts())
    for said in (
        "32 chips, data 2 x fsdp 8 x context 1 x tensor 2",
        "bf16[24,8,16384] qwen2.py:7 Qwen2.__call__ (kept for the backward pass)",
        "kernels of unknown FLOPs: mystery",
        "all-reduce │ data  │ dcn",
        "step >= 0.34 s",
        "of its 112 cores",
        "per million samples (256 to a step",
    ):
        assert said in text, said


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
    assert diff.changes(a, b) == [("memory: temporaries", 11.0, 12.0, "GiB")]
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


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("{}", "holds no plan")])
def test_what_is_no_plan(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        diff.read(tmp_path / "a.json")


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
    facts = example(fits=fits, price=1.0).facts()
    text = report_page.page(facts, {"flops": 197e12, "hbm_bandwidth": 819e9})
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.sources == []
    assert "url(" not in text
    assert ("roof" in text.split("<body>")[1]) is fits
    assert ("does not fit" in text) is not fits
