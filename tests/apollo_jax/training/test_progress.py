# SPDX-License-Identifier: Apache-2.0
"""A live bar on a terminal, plain lines elsewhere; both say when the run will be done."""

import io
import time

import pytest
from rich.console import Console

from apollo_jax.training.progress import ProgressLine

VALUES = {
    "loss": 1.25, "accuracy": 0.5, "grad_norm": 2.0, "tokens_per_second": 12345.0,
    "frames_per_second": 67.0, "data_wait": 0.01, "mfu": 0.42,
}  # fmt: skip


@pytest.fixture
def now(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def said(terminal: bool, now: list[float]) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=200, height=20, color_system=None)
    line = ProgressLine(console, 10, 100)
    now[0] += 50.0  # the compiler's
    line.compiled(11)
    for step in (12, 13, 14, 100):
        now[0] += 1.5
        line.update(step, VALUES)
    line.close()
    return file.getvalue()


def test_a_log_gets_a_line_every_few_seconds(now):
    lines = said(False, now).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 12/100", "step 14/100", "step 100/100"]
    assert lines[0].endswith(
        "loss 1.2500  accuracy 0.500  grad norm 2  12,345 tokens/s  67 frames/s  MFU 42.0%  "
        "data wait 1%  0:02:12 left"  # 88 steps of 1.5 s
    )
    assert lines[-1].endswith("0:00:00 left")


def test_a_terminal_gets_a_bar(now):
    text = said(True, now)
    assert "compiling the first step" in text
    assert "100/100" in text
    assert "0:00:00 left loss 1.2500" in text
    assert "\x1b[?25l" in text, "it is live: the cursor is hidden"
    assert text.rstrip("\n").endswith("\x1b[?25h"), "and given back"
