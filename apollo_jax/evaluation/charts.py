# SPDX-License-Identifier: Apache-2.0
"""Bars and lines as inline SVG; colours come from the page's style sheet (classes s0, s1, ...)."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from apollo_jax.evaluation.multiple_choice import Score

LEFT, RIGHT, TOP, BOTTOM = 40, 62, 16, 34  # margins in pixels


def bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[Score]],
    *,
    chance: float | None = None,
    width: int = 900,
    height: int = 290,
) -> str:
    """Grouped bars of accuracies with their 95% intervals and a line at chance."""
    plot = height - TOP - BOTTOM
    slot = (width - LEFT - RIGHT) / len(groups)
    bar = min(34.0, 0.76 * slot / len(series))
    parts = _grid(width - RIGHT, plot, [(v, f"{v:.0%}") for v in (0, 0.25, 0.5, 0.75, 1)])
    for g, group in enumerate(groups):
        middle = LEFT + slot * (g + 0.5)
        parts.append(_text(middle, height - 12, group, "label middle"))
        for s, (name, scores) in enumerate(series.items()):
            x = middle + bar * (s - len(series) / 2)
            parts.append(_bar(x, bar - 2, plot, scores[g], s, f"{group}, {name}"))
    if chance is not None:
        y = TOP + plot * (1 - chance)
        end = width - RIGHT
        parts.append(f'<line class="chance" x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(end + 6, y + 4, "chance", "label"))
    return _svg(width, height, parts)


def _bar(x: float, width: float, plot: int, score: Score, series: int, name: str) -> str:
    y, low, high = (TOP + plot * (1 - v) for v in (score.accuracy, score.low, score.high))
    middle = x + width / 2
    title = (
        f"{name}: {score.accuracy:.1%} of {score.questions} questions "
        f"(95% interval {score.low:.1%} to {score.high:.1%})"
    )
    return (
        f"<g><title>{escape(title)}</title>"
        f'<rect class="s{series}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{TOP + plot - y:.1f}" rx="2"/>'
        f'<line class="whisker" x1="{middle:.1f}" x2="{middle:.1f}" '
        f'y1="{low:.1f}" y2="{high:.1f}"/>'
        + _text(middle, min(y, high) - 4, f"{100 * score.accuracy:.0f}", "value middle")
        + "</g>"
    )


def line(
    points: Sequence[tuple[float, float]],
    *,
    series: int = 0,
    width: int = 440,
    height: int = 200,
    x_name: str = "step",
) -> str:
    """One curve through (x, y) from zero upwards; y below four round grid values."""
    plot = height - TOP - BOTTOM
    last = max(x for x, _ in points) or 1
    step = _round_up(max(y for _, y in points) / 4)
    top = 4 * step
    parts = _grid(width, plot, [(i / 4, f"{i * step:g}") for i in range(5)])
    path = " ".join(
        f"{LEFT + (width - LEFT - 8) * x / last:.1f},{TOP + plot * (1 - y / top):.1f}"
        for x, y in points
    )
    parts.append(f'<polyline class="curve c{series}" points="{path}"/>')
    parts.append(_text(width - 8, height - 12, f"{x_name} {last:g}", "label end"))
    parts.append(_text(LEFT, height - 12, "0", "label"))
    return _svg(width, height, parts)


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    scale = 10.0 ** math.floor(math.log10(value or 1))
    return scale * next(factor for factor in (1, 2, 2.5, 5, 10) if value <= factor * scale)


def _grid(width: int, plot: int, marks: Sequence[tuple[float, str]]) -> list[str]:
    parts = []
    for share, text in marks:
        y = TOP + plot * (1 - share)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, text, "label end"))
    return parts


def _text(x: float, y: float, text: str, classes: str) -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'
