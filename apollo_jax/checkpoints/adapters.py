# SPDX-License-Identifier: Apache-2.0
"""Low-rank updates beside the weights of a file, merged as they are read."""

from typing import Any

import numpy as np

from apollo_jax.checkpoints.rules import lora
from apollo_jax.checkpoints.sources import Index, Source, concrete


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


def has_updates(source: Source) -> bool:
    """Whether some tensor is part of a low-rank update."""
    return any(lora.MARK in name for name in source.stored)
