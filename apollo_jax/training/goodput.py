# SPDX-License-Identifier: Apache-2.0
"""Goodput: what the wall time of a run goes to, every second to one kind."""

import contextlib
import time
from collections.abc import Iterator

KINDS = ("start", "compile", "data", "step", "checkpoint", "evaluation")


class Goodput:
    """Adds up seconds by kind, from its making on; "step" is the one that trains.

    Steps run while the loop does other things, so the waiting for them is what counts as "step",
    and the other kinds are what held the loop up.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "start", time.perf_counter()

    def turn(self, kind: str) -> str:
        """From now on time is of this kind; returns the kind it was."""
        before, now = self._kind, time.perf_counter()
        self.seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Time in here is of this kind, and after it of the kind it was before."""
        before = self.turn(kind)
        try:
            yield
        finally:
            self.turn(before)

    def held_up(self) -> float:
        """Seconds so far in which the loop neither stepped nor waited for data."""
        self.turn(self._kind)
        return sum(self.seconds[kind] for kind in ("compile", "checkpoint", "evaluation"))

    def shares(self) -> dict[str, float]:
        """`goodput/KIND`: its share of the time so far; together 1."""
        self.turn(self._kind)
        whole = sum(self.seconds.values()) or 1.0
        return {f"goodput/{kind}": seconds / whole for kind, seconds in self.seconds.items()}

    def line(self) -> str:
        """The shares in words, those that train first."""
        shares = {name.partition("/")[2]: share for name, share in self.shares().items()}
        trained, whole = shares.pop("step"), sum(self.seconds.values())
        others = ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items())
        return f"goodput: {trained:.1%} of {whole:,.0f} s in steps; {others}"
