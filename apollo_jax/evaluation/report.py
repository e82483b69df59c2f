# SPDX-License-Identifier: Apache-2.0
"""The report of a training story: one HTML page with everything inline, and the numbers as JSON.

Reads what the other commands leave behind: `metrics.jsonl` of the stages, `results.json` and the
responses of evaluations.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from apollo_jax.evaluation.evaluate import read_responses
from apollo_jax.evaluation.multiple_choice import paired_difference, summarise
from apollo_jax.evaluation.report_page import page
from apollo_jax.evaluation.scenes import RATE_FAMILIES

EXPECTED = {"video": ("at least", 0.85), "image": ("below", 0.45), "text": ("below", 0.40)}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage: what it is called, what it trains, on which data, its metrics."""

    name: str
    trains: str
    data: str
    metrics: Path


@dataclasses.dataclass(frozen=True)
class LiveAnswer:
    """A question that was put to the trained model through `generate`, and its reply."""

    video: str
    question: str
    reply: str
    expected: str


@dataclasses.dataclass(frozen=True)
class Story:
    """What a report tells of."""

    stages: Sequence[Stage]
    evaluation: Path  # of the trained model, an output folder of `evaluate`
    warmed_up: Path | None  # the same before the paper's stages
    unfrozen: Path | None  # the same with nothing frozen in the last stage
    live: Sequence[LiveAnswer]
    seconds: dict[str, float]  # step -> wall time


def write_report(out: Path, story: Story) -> dict:
    """Write `out`/report.json and `out`/report.html; returns the numbers."""
    results = json.loads((story.evaluation / "results.json").read_text())
    rows = {run: read_responses(story.evaluation, run) for run in results["runs"]}
    curves = {stage.name: _curve(stage.metrics) for stage in story.stages}
    numbers = {
        "headline": _headline(results["runs"]),
        "rate_questions": _rate_questions(rows),
        "freezing": _freezing(rows, story.warmed_up, story.unfrozen),
        "stages": {
            stage.name: {
                "trains": stage.trains,
                "data": stage.data,
                **_ends(curves[stage.name]),
            }
            for stage in story.stages
        },
        "live": [dataclasses.asdict(answer) for answer in story.live],
        "seconds": story.seconds,
        "evaluation": results,
    }
    _write(out / "report.json", json.dumps(numbers, indent=1))
    _write(out / "report.html", page(numbers, rows, curves))
    return numbers


def _headline(runs: dict[str, dict]) -> dict[str, dict]:
    """Accuracy on the temporal questions by what the model saw, against what is expected."""
    headline = {}
    for modality, (sense, bound) in EXPECTED.items():
        run = next((run for run in runs.values() if run["modality"] == modality), None)
        if run and run["temporal"]:
            accuracy = run["temporal"]["accuracy"]
            met = accuracy >= bound if sense == "at least" else accuracy < bound
            headline[modality] = {**run["temporal"], "expected": f"{sense} {bound:.0%}", "met": met}
    return headline


def _rate_questions(rows: dict[str, list[dict]]) -> dict | None:
    """Constant fps against uniform sampling where the answer is a length of time."""
    rate = {
        run: [row for row in answers if row["family"] in RATE_FAMILIES]
        for run, answers in rows.items()
        if run.startswith("video")
    }
    if len(rate) < 2 or not all(rate.values()):
        return None
    first, *others = rate
    return {
        "runs": {run: summarise(answers) for run, answers in rate.items()},
        "difference": {run: paired_difference(rate[first], rate[run]) for run in others},
    }


def _freezing(
    rows: dict[str, list[dict]], warmed_up: Path | None, unfrozen: Path | None
) -> dict | None:
    """Accuracy after the stages that freeze parts, before them, and with nothing frozen."""
    run = next(iter(rows))
    others = {"warm-up": warmed_up, "unfrozen": unfrozen}
    if not any(others.values()):
        return None
    final = [row for row in rows[run] if row["temporal"]]
    numbers = {"run": run, "final": summarise(rows[run])["temporal"], "difference": {}}
    for name, folder in others.items():
        if folder is not None:
            answers = read_responses(folder, run)
            numbers[name] = summarise(answers)["temporal"]
            temporal = [row for row in answers if row["temporal"]]
            numbers["difference"][name] = paired_difference(final, temporal)
    return numbers


def _curve(metrics: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def _ends(curve: list[tuple[float, float]]) -> dict:
    return {"steps": curve[-1][0], "first_loss": curve[0][1], "last_loss": curve[-1][1]}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    os.replace(partial, path)
