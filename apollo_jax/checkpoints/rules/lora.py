# SPDX-License-Identifier: Apache-2.0
"""Low-rank updates (LoRA) in a file's tensors, as peft names them: W + alpha / r * B A.

Some LanguageBind files keep their updates beside the weights, under an encoder that peft wrapped:
`encoder.base_model.model.layers.0.temporal_attn.q_proj.{weight, lora_A.default.weight, ...}`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from apollo_jax.checkpoints.rules.clip import half_of, is_whole

WRAPPER, BASE = "base_model.model.", ".base_layer."
MARK = ".lora_"  # in every name that peft adds
A, B = ".lora_A.default.weight", ".lora_B.default.weight"

Shape = tuple[int, ...]


def merged(shapes: Mapping[str, Shape]) -> dict[str, tuple[str, str, str]]:
    """{plain name of a weight: the found names of its base, its A and its B}.

    Raises one ValueError naming every update that is incomplete, of another kind or mis-shaped.
    """
    added = [name for name in shapes if MARK in name]
    known = [name for name in added if name.endswith((A, B))]
    problems = [f"{name} is not an update we know" for name in added if name not in known]
    out = {}
    for module in dict.fromkeys(name.removesuffix(A).removesuffix(B) for name in known):
        bases = (f"{module}.weight", f"{module}{BASE}weight")
        names = tuple(n for n in (*bases, module + A, module + B) if n in shapes)
        if len(names) == 3 and names[1:] == (module + A, module + B):
            out[plain(names[0])] = names
            problems += _misshaped(module, *(tuple(shapes[n]) for n in names))
        else:
            found = ", ".join(names)
            problems.append(f"{module} needs one weight, one A and one B, found {found}")
    if problems:
        raise ValueError(f"LoRA tensors do not fit: {'; '.join(problems)}")
    return out


def _misshaped(module: str, base: Shape, a: Shape, b: Shape) -> list[str]:
    if len(a) == len(b) == 2 and a[0] == b[1] and base == (b[0], a[1]):
        return []
    return [f"{module} has weight {base}, A {a}, B {b}: not out x in, r x in, out x r"]


def renamed(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """{plain name: found name} of every tensor that is no part of an update.

    Raises ValueError as `merged` does, and if two tensors have one plain name.
    """
    parts = {name for names in merged(shapes).values() for name in names}
    names: dict[str, str] = {}
    for name in shapes:
        if name not in parts and names.setdefault(plain(name), name) != name:
            raise ValueError(f"{names[plain(name)]} and {name} are the same tensor")
    return names


def plain(name: str) -> str:
    """A name as it is without peft."""
    return name.replace(WRAPPER, "").replace(BASE, ".")


def merge(base: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """W + scale * B A, summed in float32, in W's dtype.

    Rows of W and B, or columns of W and A, give those of the result.
    """
    update = b.astype(np.float32) @ a.astype(np.float32)
    return (base.astype(np.float32) + np.float32(scale) * update).astype(base.dtype)


def scale(config: Mapping[str, Any], rank: int) -> float:
    """alpha / r of a published config.json, for updates of `rank`. ValueError if it says another.

    The published config class assumes rank 2 and alpha 16.
    """
    fields = half_of(dict(config), "vision")
    r, alpha = fields.get("lora_r", 2), fields.get("lora_alpha", 16)
    if r != rank:
        raise ValueError(f"config.json: lora_r is {r}, but the LoRA tensors have rank {rank}")
    return alpha / r


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the merged tensors: the published code adds no update to them."""
    if not is_whole(dict(config)):
        return {**config, "lora_r": 0}
    halves = {k: {**v, "lora_r": 0} for k, v in config.items() if k.startswith("vision_config")}
    return {**config, **halves}
