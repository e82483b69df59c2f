# SPDX-License-Identifier: Apache-2.0
"""Compilation that ends when the program's memory is laid out.

Of the minutes that a real step takes to compile for a TPU, nine tenths go into machine code, when
everything that a plan reads is decided: products, exchanges, schedule, buffers. The compiler has no
switch for that. So it runs in a thread that is left behind, and writes what it has decided into the
folder of its reports; the process must end with `os._exit`.
"""

import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The last of the reports before the machine code; the others are complete when it is there.
_LAST = "*after_optimizations_after_buffer_assignment.txt"
# What the program allocates in the chip's main memory (other memories have a "color") for itself.
_OWN = re.compile(r"allocation \d+: size (\d+), (?:preallocated-temp|thread-local|constant)")
_TOTAL = re.compile(r"Memory Space: default.*\nTotal bytes: (\d+)")


@dataclass(frozen=True)
class LaidOut:
    """In place of a compiled program: the sizes of its memory, but for its code."""

    temp_size_in_bytes: int
    peak_memory_in_bytes: int
    generated_code_size_in_bytes: int = 0

    def memory_analysis(self) -> "LaidOut":
        """As a compiled program has it."""
        return self


def lay_out(lowered: Any, folder: str, options: dict[str, Any]) -> LaidOut:
    """Compiles until the reports in `folder` are complete; errors are those of the compiler."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            lowered.compile(compiler_options=options)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() and not any(Path(folder).glob(_LAST)):
        time.sleep(0.1)
    if errors:
        raise errors[0]
    held = Path(folder).glob("*after_optimizations-buffer-assignment.txt")
    own = _OWN.findall(_largest(held))
    report = Path(folder).glob("*after_optimizations-memory-usage-report.txt")
    total = _TOTAL.search(_largest(report))
    assert total is not None
    return LaidOut(sum(map(int, own)), int(total[1]))


def _largest(files: Iterable[Path]) -> str:
    """Of the step itself: beside it the compiler reports on small programs."""
    return max(files, key=lambda f: f.stat().st_size).read_text()
