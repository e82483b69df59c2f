# SPDX-License-Identifier: Apache-2.0
"""The report: numbers that follow from the responses, a page that needs nothing else."""

import json
import re
from html.parser import HTMLParser

import pytest

from apollo_jax.evaluation import charts
from apollo_jax.evaluation.benchmark import load
from apollo_jax.evaluation.multiple_choice import LETTERS, Score, paired_difference, summarise
from apollo_jax.evaluation.report import LiveAnswer, Stage, Story, write_report

WRONG = {  # which of four questions a run gets wrong
    "video-fps": (3,),
    "video-uniform8": (2, 3),
    "image": (0, 1, 2),
    "text": (1, 2, 3),
}


def _rows(world, wrong, folder, run):
    rows = []
    for i, q in enumerate(load("apollobench_mini", world).questions):
        choice = (q.answer + (i % 4 in wrong)) % 4
        rows.append(
            {
                "id": q.id, "question": q.question, "options": q.options, "answer": q.answer,
                "video": q.video, "category": q.category, "family": q.family,
                "temporal": q.temporal, "choice": choice, "correct": choice == q.answer,
                "reply": f"<b>{LETTERS[choice]}</b>", "parse_ok": True, "status": "ok",
            }
        )  # fmt: skip
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"responses-{run}.jsonl").write_text(text)
    return rows


@pytest.fixture(scope="module")
def told(world, tmp_path_factory):
    """(folder of the report, its numbers, the rows behind them)."""
    out = tmp_path_factory.mktemp("report")
    rows = {run: _rows(world, wrong, out / "final", run) for run, wrong in WRONG.items()}
    _rows(world, (2, 3), out / "warm-up", "video-fps")
    runs = {
        run: {"modality": run.partition("-")[0], **summarise(answers)}
        for run, answers in rows.items()
    }
    (out / "final/results.json").write_text(json.dumps({"weights": "0123", "runs": runs}))
    lines = [{"step": 5, "loss": 2.5}, {"step": 8, "eval/loss": 1.0}, {"step": 10, "loss": 0.5}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = rows["video-fps"][0]
    story = Story(
        stages=[Stage("align", "the connector", "all images", out / "metrics.jsonl")],
        evaluation=out / "final",
        warmed_up=out / "warm-up",
        unfrozen=out / "warm-up",
        live=[LiveAnswer(row["video"], "What?\nx (A)\ny (B)", "<i>x (A)", "y (B)")],
        seconds={"world": 20.0, "train": 400.0},
    )
    return out, write_report(out, story), rows


def test_numbers(told):
    out, numbers, rows = told
    assert numbers == json.loads((out / "report.json").read_text())
    video = numbers["headline"]["video"]
    temporal = [row["correct"] for row in rows["video-fps"] if row["temporal"]]
    assert video["accuracy"] == sum(temporal) / len(temporal)
    assert not video["met"]
    assert numbers["headline"]["image"]["met"]
    assert numbers["stages"]["align"] == {
        "trains": "the connector", "data": "all images",
        "steps": 10, "first_loss": 2.5, "last_loss": 0.5,
    }  # fmt: skip
    for other in ("warm-up", "unfrozen"):
        gain = numbers["freezing"]["difference"][other]["difference"]
        assert gain == pytest.approx(0.25, abs=0.05)


def test_rate_questions_are_blink_and_dur(told):
    _, numbers, rows = told
    rate = [row for row in rows["video-fps"] if row["family"] in ("blink", "dur")]
    runs = numbers["rate_questions"]["runs"]
    assert runs["video-fps"]["overall"]["questions"] == len(rate)
    gain = numbers["rate_questions"]["difference"]["video-uniform8"]["difference"]
    assert (
        gain
        == runs["video-fps"]["overall"]["accuracy"]
        - (runs["video-uniform8"]["overall"]["accuracy"])
    )


def test_paired_difference_needs_the_same_questions():
    first = [{"id": str(i), "video": str(i // 2), "correct": True} for i in range(8)]
    second = [{**row, "correct": int(row["id"]) % 2 == 0} for row in first[:6]]
    gain = paired_difference(first, second)
    # Every video has one gain and one tie: the videos agree, so clustered the interval is empty.
    assert gain == {"questions": 6, "difference": 0.5, "low": 0.5, "high": 0.5}


class _Page(HTMLParser):
    VOID = ("meta", "br", "img", "rect", "line", "polyline")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text, self.images = [], [], "", 0

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href") and "data:" not in (v or "")]
        self.images += tag == "img"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_needs_nothing_else(told):
    out, _, rows = told
    html = (out / "report.html").read_text()
    page = _Page()
    page.feed(re.sub(r"(<(?:rect|line|polyline)[^>]*)/>", r"\1>", html))
    assert page.open == []
    assert page.links == []
    assert "url(" not in html
    families = {row["family"] for row in rows["video-fps"]}
    assert page.images == len(families) + 1  # and the video asked live
    assert "<i>x (A)" in page.text  # replies are shown, not interpreted
    assert "expected at least 85%: not met" in page.text


def test_bars_are_as_high_as_scores():
    svg = charts.bars(["a"], {"s": [Score(10, 0.5, 0.4, 0.6)]}, height=150)  # 100 pixels to plot
    assert 'height="50.0"' in svg
    assert "50.0% of 10 questions" in svg


@pytest.mark.parametrize("top", [0.003, 0.04, 0.9, 3.0, 7.0, 42.0, 1e4])
def test_curves_stay_inside(top):
    svg = charts.line([(1, top), (2, top / 2)], height=150)
    heights = [float(y) for y in re.findall(r",([\d.]+)", re.findall(r'points="(.*?)"', svg)[0])]
    assert 16 <= min(heights) < 116 - 100 * 0.3
