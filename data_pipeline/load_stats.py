# SPDX-License-Identifier: Apache-2.0
"""What a process's part of a batch, or of several, holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from data_pipeline.filling import Counts


@dataclass(frozen=True)
class LoadStats:
    """What this process's part of one batch holds."""

    samples: int
    tokens: int  # without padding
    clips: int
    frames: int
    bad: tuple[tuple[str, str], ...]  # (record id, reason), masked
    fill_tokens: float  # share of the token positions in use
    fill_clips: float
    sources: Mapping[str, Counts] = field(default_factory=dict)  # of those that were drawn from


def together(parts: Sequence[LoadStats]) -> LoadStats:
    """What several batches of one size hold."""
    sources: dict[str, Counts] = {}
    for name, counts in (item for part in parts for item in part.sources.items()):
        sources[name] = Counts(*map(sum, zip(sources.get(name, Counts()), counts, strict=True)))
    return LoadStats(
        samples=sum(p.samples for p in parts),
        tokens=sum(p.tokens for p in parts),
        clips=sum(p.clips for p in parts),
        frames=sum(p.frames for p in parts),
        bad=tuple(bad for p in parts for bad in p.bad),
        fill_tokens=sum(p.fill_tokens for p in parts) / len(parts),
        fill_clips=sum(p.fill_clips for p in parts) / len(parts),
        sources=sources,
    )
