# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML page: sections, bars, curves and contact sheets, all inline."""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from apollo_jax.evaluation import charts
from apollo_jax.evaluation.multiple_choice import Score
from data_pipeline import video

SEEN = {"video": "video", "image": "single frame", "text": "text only"}
STRIP_FRAMES = 12

Curve = Sequence[tuple[float, float]]


def page(numbers: dict, rows: dict[str, list[dict]], curves: Mapping[str, Curve]) -> str:
    """The whole page.

    Args:
      numbers: as in report.json.
      rows: responses of every run.
      curves: (step, loss) of every stage.
    """
    style = Path(__file__).with_name("report.css").read_text()
    sections = [
        _head(numbers),
        _accuracy(numbers),
        _sampling(numbers["rate_questions"]),
        _stages(numbers, curves),
        _live(numbers["live"]),
        _sheets(rows),
        _ran(numbers),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>apollo_jax report</title><style>{style}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _head(numbers: dict) -> str:
    tiles = "".join(
        f'<div class="tile t{i}"><b>{score["accuracy"]:.1%}</b>{SEEN[modality]}'
        f'<div class="soft">interval {score["low"]:.1%} to {score["high"]:.1%}<br>'
        f"expected {score['expected']}: {_mark(score['met'])}</div></div>"
        for i, (modality, score) in enumerate(numbers["headline"].items())
    )
    total = numbers["headline"].get("video", {}).get("questions", 0)
    minutes = sum(numbers["seconds"].values()) / 60
    return (
        "<h1>A video language model, from mp4 files to answers</h1>"
        f'<p class="soft">Accuracy on {total} held-out questions that need more than one moment of '
        f"a video, with 95% intervals clustered by video. {minutes:.0f} minutes in all.</p>"
        f'<div class="tiles">{tiles}</div>'
    )


def _accuracy(numbers: dict) -> str:
    runs = {
        SEEN[run["modality"]]: run
        for run in reversed(numbers["evaluation"]["runs"].values())  # of two videos, the first
    }
    runs = {name: runs[name] for name in SEEN.values() if name in runs}
    first = next(iter(runs.values()))
    categories = list(first["categories"])
    series = {
        name: [Score(**run["categories"][category]) for category in categories]
        for name, run in runs.items()
    }
    chart = charts.bars(categories, series, chance=first["chance"])
    return (
        "<h2>What the model answers from</h2><p>The same questions, seen three ways: the video, "
        "its centre frame alone, no picture at all. What a single frame can answer says little "
        "about understanding video; the control category Static shows how that looks.</p>"
        f'<div class="card">{_legend(series)}{chart}</div>'
    )


def _sampling(rate: dict | None) -> str:
    if rate is None:
        return ""
    families = {"blink": "how often a light blinks", "dur": "how long a lamp is on"}
    series = {
        run.removeprefix("video-"): [
            *(Score(**scores["families"][family]) for family in families),
            Score(**scores["overall"]),
        ]
        for run, scores in rate["runs"].items()
    }
    chart = charts.bars([*families.values(), "both"], series, chance=0.25, height=230)
    gains = ", ".join(
        f"{_points(gain)} against {escape(run.removeprefix('video-'))}"
        for run, gain in rate["difference"].items()
    )
    return (
        "<h2>Constant frame rate or a constant number of frames</h2>"
        "<p>How often a light blinks and how long a lamp is on can only be told by a model that "
        "knows how fast the video plays. The model was trained on clips of constant frame rate. "
        f"On these questions that sampling gains {gains}.</p>"
        f'<div class="card">{_legend(series)}{chart}</div>'
    )


def _stages(numbers: dict, curves: Mapping[str, Curve]) -> str:
    cards = "".join(
        f'<div class="card"><h3>{escape(name)} <span class="soft">trains '
        f"{escape(stage['trains'])}</span></h3>{charts.line(curves[name])}"
        f'<div class="soft small">{escape(stage["data"].replace("_", " "))}</div></div>'
        for name, stage in numbers["stages"].items()
    )
    text = "<h2>Training</h2><p>Loss of each stage. "
    if freezing := numbers["freezing"]:
        text += _freezing(freezing)
    return f'{text}</p><div class="pair">{cards}</div>'


def _freezing(freezing: dict) -> str:
    """The paper's stages against what came before, and against the last with nothing frozen."""
    final, difference = f"{freezing['final']['accuracy']:.1%}", freezing["difference"]
    text = "Everything trains until the warm-up ends; the paper's stages, after it, freeze parts."
    if "warm-up" in freezing:
        text += (
            f" Accuracy from video was {freezing['warm-up']['accuracy']:.1%} before them, on "
            f"captions alone, and is {final} after them: {_points(difference['warm-up'])}."
        )
    if "unfrozen" in freezing:
        text += (
            f" With nothing frozen in the last stage it is {freezing['unfrozen']['accuracy']:.1%}: "
            f"the paper's freezing makes {_points(difference['unfrozen'])}."
        )
    return text


def _live(live: Sequence[dict]) -> str:
    if not live:
        return ""
    said = "".join(
        f'<div class="qa"><b>{escape(answer["question"].splitlines()[0])}</b><br>'
        f"{''.join(_option(o) for o in answer['question'].splitlines()[1:])}<br>"
        f"<span>{escape(answer['reply'])}</span> "
        f'<span class="soft">expected: {escape(answer["expected"])}</span></div>'
        for answer in live
    )
    return (
        "<h2>Asked live</h2><p>A video the model has never seen, three questions through the same "
        f'<code>generate</code> a user calls.</p><div class="card">{_strip(live[0]["video"])}{said}'
        "</div>"
    )


def _sheets(rows: dict[str, list[dict]]) -> str:
    """The first test video of every family: no picking of the good ones."""
    first = next(iter(rows.values()))
    shown = {row["family"] or row["category"]: row["video"] for row in reversed(first)}
    answers = {run: {row["id"]: row for row in answers} for run, answers in rows.items()}
    cards = []
    for path in reversed(shown.values()):
        asked = [row for row in first if row["video"] == path]
        questions = "".join(_asked(row, answers) for row in asked)
        cards.append(
            f'<div class="card"><h3>{escape(asked[0]["category"])} <span class="soft">'
            f"{escape(Path(path).name)}</span></h3>{_strip(path)}{questions}</div>"
        )
    return (
        "<h2>Videos, questions, answers</h2><p>The first test video of each kind, as it comes. "
        "The right option is outlined; below it, what the model answered.</p>"
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _asked(row: dict, answers: dict[str, dict]) -> str:
    options = "".join(
        _option(option, i == row["answer"]) for i, option in enumerate(row["options"])
    )
    replies = "".join(
        f'<span class="reply">{escape(run)}: <span class="{"right" if r["correct"] else "wrong"}">'
        f"{escape(r['reply'] or r['status'])}</span></span>"
        for run, rows in answers.items()
        if (r := rows.get(row["id"]))
    )
    return f'<div class="qa"><b>{escape(row["question"])}</b><br>{options}<br>{replies}</div>'


def _ran(numbers: dict) -> str:
    evaluation = numbers["evaluation"]
    times = "".join(
        f'<tr><td>{escape(step)}</td><td class="n">{seconds:.0f} s</td></tr>'
        for step, seconds in numbers["seconds"].items()
    )
    settings = {key: value for key, value in evaluation.items() if key != "runs"}
    return (
        f"<h2>What ran</h2><table><tr><th>step</th><th class='n'>time</th></tr>{times}</table>"
        f"<pre>{escape(json.dumps(settings, indent=1))}</pre>"
    )


# -------------------------------------------------------------------------------------- pieces
def _option(text: str, is_answer: bool = False) -> str:
    return f'<span class="option{" answer" if is_answer else ""}">{escape(text)}</span>'


def _points(gain: dict) -> str:
    low, high = 100 * gain["low"], 100 * gain["high"]
    return f"{100 * gain['difference']:+.1f} points (95% interval {low:+.1f} to {high:+.1f})"


def _mark(met: bool) -> str:
    return '<span class="right">met</span>' if met else '<span class="wrong">not met</span>'


def _legend(names: Iterable[str]) -> str:
    entries = "".join(
        f'<span><i style="background:var(--s{i})"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<div class="legend">{entries}</div>'


def _strip(path: str) -> str:
    """Evenly spaced frames of a video as one inline JPEG."""
    info = video.probe(path)
    indices = np.linspace(0, info.num_frames - 1, STRIP_FRAMES).round().astype(np.int64)
    frames = video.decode_frames(path, indices)  # [n, h, w, 3]
    strip = np.concatenate(list(np.pad(frames, [(0, 0), (0, 0), (0, 2), (0, 0)])), axis=1)
    file = io.BytesIO()
    Image.fromarray(strip).save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="strip" alt="frames" src="data:image/jpeg;base64,{data}">'
