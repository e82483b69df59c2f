# SPDX-License-Identifier: Apache-2.0
"""Apollo video language models in pure JAX: training, conversion and evaluation for TPU pods.

model = apollo_jax.from_pretrained(path)
processor = apollo_jax.Processor.from_pretrained(path)
text = apollo_jax.generate(model, processor, video="clip.mp4", prompt="What happens?")
apollo_jax.save_pretrained(model, path)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apollo_jax.checkpoints.pretrained import (
        config_from_pretrained,
        from_pretrained,
        save_pretrained,
    )
    from apollo_jax.inference.generate import generate
    from apollo_jax.inference.processor import Processor

__all__ = ["Processor", "config_from_pretrained", "from_pretrained", "generate", "save_pretrained"]

_HOMES = {
    "Processor": "apollo_jax.inference.processor",
    "config_from_pretrained": "apollo_jax.checkpoints.pretrained",
    "from_pretrained": "apollo_jax.checkpoints.pretrained",
    "generate": "apollo_jax.inference.generate",
    "save_pretrained": "apollo_jax.checkpoints.pretrained",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import apollo_jax` stays light (no jax, no backend)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'apollo_jax' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
