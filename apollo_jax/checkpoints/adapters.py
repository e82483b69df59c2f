# SPDX-License-Identifier: Apache-2.0
"""Low-rank updates beside the weights of a file or a run, merged as they are read."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from apollo_jax.checkpoints.rules import lora
from apollo_jax.checkpoints.sources import Index, Source, blocks, concrete, row_blocks
from apollo_jax.models.lora import PART, Updates, is_update


class Merged:
    """A source whose LoRA updates are part of the weights, under their plain names."""

    def __init__(self, source: Source, config: dict[str, Any]):
        shapes = {name: stored.shape for name, stored in source.stored.items()}
        self.source, self._updates = source, lora.merged(shapes)
        self._names = lora.renamed(shapes)
        self._scale = {
            name: lora.scale(config, shapes[a][0]) for name, (_, a, _) in self._updates.items()
        }
        bases = {name: base for name, (base, _, _) in self._updates.items()}
        self.stored = {n: source.stored[old] for n, old in (self._names | bases).items()}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        if name not in self._updates:
            return self.source.read(self._names[name], index)
        base, a, b = self._updates[name]
        rows, columns = concrete(index, self.stored[name].shape)
        return lora.merge(
            self.source.read(base, (rows, columns)),
            self.source.read(a, (slice(None), columns)),
            self.source.read(b, (rows,)),
            self._scale[name],
        )


class Adapted:
    """The weights of a run by name, with `updates` by component (models/lora.py) part of them."""

    def __init__(self, source: Source, updates: Mapping[str, Updates]):
        self.source, self.updates = source, updates
        self.stored = {name: s for name, s in source.stored.items() if not is_update(name)}

    def _factors(self, name: str) -> tuple[str, str] | None:
        """The names of A and B of a weight that has them."""
        layer = name.removesuffix("/kernel")
        names = (f"{layer}/{PART}/a", f"{layer}/{PART}/b")
        return names if name != layer and names[0] in self.source.stored else None

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        factors = self._factors(name)
        if factors is None:
            return self.source.read(name, index)
        *layers, rows, columns = concrete(index, self.stored[name].shape)
        a = self.source.read(factors[0], (*layers, rows))
        b = self.source.read(factors[1], (*layers, slice(None), columns))
        base = self.source.read(name, (*layers, rows, columns))
        return lora.merge(base, b=a, a=b, scale=self.updates[name.partition("/")[0]].scale)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Without an update as the source has them; else by rows, which are layers in a stack."""
        return row_blocks(self, name) if self._factors(name) else blocks(self.source, name)


def has_updates(source: Source) -> bool:
    """Whether some tensor is part of a low-rank update."""
    return any(lora.MARK in name for name in source.stored)
