# SPDX-License-Identifier: Apache-2.0
"""How fast one device computes, reads its memory, and sends along the links that a group spans."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Of one device; FLOPs or bytes per second.

    `places` are the devices of one slice in the order of the mesh, by their coordinates in the
    torus of `shape`; without them every group has all links. A dimension of at least `wraps`
    chips closes to a ring.
    """

    flops: float
    hbm: float
    ici: float  # all links together, one way
    dcn: float
    places: tuple[tuple[int, ...], ...] = ()
    shape: tuple[int, ...] = ()
    wraps: int = 1

    def exchange_seconds(self, kind: str, sent: float, group: Sequence[int]) -> float:
        """Time in which each device of a group sends `sent` bytes; () = between slices.

        Only the links of the torus dimensions along which the group lies are used: two for each
        dimension that it fills and that closes to a ring, else one. A permutation goes over one
        link. An all-to-all passes other chips on its way, n / 4 of a ring of n on average.
        """
        if not group:
            return sent / self.dcn
        spans = self._spans(group)
        if not spans:
            return sent / self.ici
        link = self.ici / (2 * len(self.shape))
        if kind == "collective-permute":
            return sent / link
        if kind == "all-to-all":
            return max(sent * max(1.0, n / 4) / (links * link) for n, links in spans)
        return sent / (link * sum(links for _, links in spans))

    def _spans(self, group: Sequence[int]) -> list[tuple[int, int]]:
        """(chips, links) in each torus dimension along which the group lies."""
        spans = []
        places = [self.places[n] for n in group] if self.places else []
        for dimension, length in enumerate(self.shape):
            chips = len({place[dimension] for place in places})
            if chips > 1:
                spans.append((chips, 2 if chips == length >= self.wraps else 1))
        return spans
