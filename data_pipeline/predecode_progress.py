# SPDX-License-Identifier: Apache-2.0
"""What a predecode job shows while it runs and says at its end."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_SECONDS = 10.0  # between progress lines where there is no terminal
_EXAMPLES = 3  # of every reason


@dataclass(frozen=True)
class PredecodeReport:
    """What a job stored and what it left out, by reason with examples.

    `unfinished` counts the shards that others have yet to make; then the numbers are those of the
    shards that this process was to make.
    """

    output: str | Path
    stored: int
    frames: int
    shards: int
    bytes: int
    quarantined: dict[str, int]
    seconds: float
    unfinished: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    def text(self) -> str:
        """A few lines for people."""
        bad = sum(self.quarantined.values())
        lines = [
            f"{self.output}: {self.stored} of {self.stored + bad} media stored, "
            f"{self.frames} frames in {self.shards} shards, {self.bytes / 1e6:.1f} MB, "
            f"{self.seconds:.1f} s"
        ]
        if bad:
            where = "" if self.unfinished else f" (see {self.output}/quarantine.jsonl)"
            lines.append(f"quarantined {bad}{where}:")
        for reason, count in self.quarantined.items():
            lines.append(f"  {count} {reason}, such as {'; '.join(self.examples[reason])}")
        if self.unfinished:
            lines.append(
                f"{self.unfinished} shards are still to be made by the other tasks; the last one "
                "completes the set (should one have failed: run it, or this without --task, again)"
            )
        return "\n".join(lines)


def report(
    output: str | Path, sidecars: Iterable[dict[str, Any]], start: float, unfinished: int = 0
) -> PredecodeReport:
    """Sums up shards; `start` is a time.monotonic()."""
    stored = frames = shards = size = 0
    reasons: dict[str, int] = defaultdict(int)
    examples: dict[str, list[str]] = defaultdict(list)
    for sidecar in sidecars:
        shards += 1
        stored += len(sidecar["media"])
        frames += sum(row["stored_frames"] for row in sidecar["media"])
        size += sidecar["bytes"]
        for entry in sidecar["rejected"]:
            reasons[entry["reason"]] += 1
            if len(examples[entry["reason"]]) < _EXAMPLES:
                examples[entry["reason"]].append(f"{entry['id']} ({entry['detail']})")
    ordered = dict(sorted(reasons.items(), key=lambda item: -item[1]))
    seconds = time.monotonic() - start
    return PredecodeReport(
        output, stored, frames, shards, size, ordered, seconds, unfinished, dict(examples)
    )


class ProgressDisplay:
    """A bar on a terminal, a line now and then in a log; `frames` counts those decoded."""

    def __init__(self, enabled: bool, total: int, done: int, bad: int):
        self.total, self.done, self.bad, self.frames = total, done, bad, 0
        console = Console(stderr=True)
        self._lines = enabled and not console.is_terminal
        self._start, self._printed = time.monotonic(), -_LINE_SECONDS
        columns = (
            TextColumn("predecode"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        hidden = not enabled or self._lines
        self._bar = Progress(*columns, console=console, disable=hidden)
        self._task = self._bar.add_task("", total=total, note="")

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        self.show()
        return self

    def __exit__(self, *_: object) -> None:
        self._printed = -_LINE_SECONDS  # the last line is always printed
        self.show()
        self._bar.stop()

    def count(self, bad: bool) -> None:
        """One more medium is done."""
        self.done += 1
        self.bad += bad

    def show(self, frames: int | None = None) -> None:
        self.frames = self.frames if frames is None else frames
        note = f"{self.frames} frames decoded, {self.bad} quarantined"
        self._bar.update(self._task, completed=self.done, note=note)
        seconds = time.monotonic() - self._start
        if self._lines and seconds - self._printed >= _LINE_SECONDS:
            self._printed = seconds
            line = f"predecode: {self.done}/{self.total} media, {note}, {seconds:.0f} s"
            print(line, file=sys.stderr, flush=True)
