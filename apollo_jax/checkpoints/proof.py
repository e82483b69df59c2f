# SPDX-License-Identifier: Apache-2.0
"""Whether a conversion is right: what became of every key, every tensor read back and compared.

The report, `conversion_report.json`:

    {"source": path or {PART: path}, "target": path, "to": layout,
     "changes": {option: value}, "dtype": what was asked for, or null,
     "parts": {PART: {
        "source": path, or "fresh" for random weights,
        "source_keys": [{"tensor": as the source names it, "to": where it went}, or
                        {"tensor": ..., "ignored": why}, ...],
        "made_up": [published tensors that no source has, written as zeros, ...],
        "dtype_changes": ["float32 to bfloat16", ...],
        "tensors": {published name: {
            "shape": [...], "dtype": of what was written, "sha256": of its bytes, little-endian,
            "equal": the same came back, "not_finite": holds a NaN or an infinity,
            "why": only if it is not equal}}}},
     "equal": how many tensors came back, "tensors": of how many,
     "not_finite": ["PART: name", ...],
     "activations": {PART: see `activations`}}

PART is a tower's name, "connector" or "llm"; of a single part its kind, like "siglip".
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apollo_jax.checkpoints import activations, weights_folder
from apollo_jax.checkpoints.checkpoint import Checkpoint, Part
from apollo_jax.checkpoints.npz import cast
from apollo_jax.checkpoints.opening import open_checkpoint
from apollo_jax.checkpoints.parts import CONNECTOR, FRESH, LLM
from apollo_jax.checkpoints.published import folders
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.sources import Source, blocks
from apollo_jax.checkpoints.translate import is_float
from apollo_jax.models import apollo


def report(
    checkpoint: Checkpoint,
    written: Path,
    *,
    dtype: str | None,
    source: str | os.PathLike | None = None,
    given: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Compare `written` with the checkpoint it was made from; see above for what is returned.

    Args:
      dtype: what the tensors were to be written in; default as they were.
      source, given: where the checkpoint came from, as `convert` was told.
    Raises ValueError if what was written cannot be opened.
    """
    names, readable = part_names(checkpoint), _published(checkpoint, written)
    back = _written(checkpoint, written, readable)
    before = {names[place]: part for place, part in checkpoint.parts.items()}
    after = {names[place]: part for place, part in back.items()}
    origin = {name: str(source or FRESH) for name in before} | {
        name: path for name, path in (given or {}).items() if name in before
    }
    parts: dict[str, dict[str, Any]] = {
        name: dict(source=origin[name]) | _compare(part, after[name], dtype)
        for name, part in before.items()
    }
    return dict(
        parts=parts,
        equal=sum(t["equal"] for part in parts.values() for t in part["tensors"].values()),
        tensors=sum(len(part["tensors"]) for part in parts.values()),
        not_finite=[
            f"{part}: {name}"
            for part, content in parts.items()
            for name, t in content["tensors"].items()
            if t["not_finite"]
        ],
        activations=activations.compare(
            before,
            after,
            {names[place]: folder for place, folder in readable.items()},
            scratch=written.parent,
        ),
    )


def check(content: dict[str, Any]) -> None:
    """ValueError naming what is not as it was."""
    wrong = [
        f"{part}: {name} ({tensor['why']})"
        for part, found in content["parts"].items()
        for name, tensor in found["tensors"].items()
        if not tensor["equal"]
    ]
    wrong += [
        f"{part}: {found['failed']}"
        for part, found in content["activations"].items()
        if "failed" in found
    ]
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"the conversion is wrong: {', '.join(wrong[:10])}{more}")


def part_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Where the model has its parts -> what a report calls them."""
    config = checkpoint.config
    if not isinstance(config, apollo.Config):
        return {"": layout.RULES_BY_CONFIG[type(config)].__name__.rpartition(".")[2]}
    names = [*config.towers, CONNECTOR, LLM]
    return dict(zip(checkpoint.parts, names, strict=True))


def _published(checkpoint: Checkpoint, written: Path) -> dict[str, Path]:
    """The published folders of the parts, by their places, where these are what was written."""
    if not written.is_dir() or weights_folder.is_weights(written):
        return {}
    if not isinstance(checkpoint.config, apollo.Config):
        return {"": written}
    own = {
        place: written / name
        for place, name in zip(checkpoint.parts, folders(checkpoint), strict=True)
    }
    if (written / "config.json").is_file():
        return own
    return {place: written / folder.name for place, folder in own.items()}


def _written(
    checkpoint: Checkpoint, written: Path, readable: Mapping[str, Path]
) -> dict[str, Part]:
    """The parts of what was written, by their places in `checkpoint`."""
    if readable and not (written / "config.json").is_file():
        return {place: open_checkpoint(f).parts[""] for place, f in readable.items()}
    said = {} if written.is_dir() else checkpoint.parts[""].published_config
    return dict(open_checkpoint(written, said=_plain(said)).parts)


def _plain(said: dict[str, Any]) -> dict[str, Any]:
    """What a file without a config.json cannot say of a tower."""
    vision = said.get("vision_config", said)
    return {name: vision[name] for name in ("image_size",) if name in vision}


def _compare(part: Part, back: Part, dtype: str | None) -> dict[str, Any]:
    before, after = cast(part.tensors, dtype), back.tensors
    tensors = {name: _tensor(before, after, name) for name in before.stored}
    for name in after.stored.keys() - before.stored.keys():
        tensors[name] = dict(equal=False, not_finite=False, why="only in what was written")
    uses = [
        {"tensor": use.tensor} | ({"to": use.goes_to} if use.goes_to else {"ignored": use.ignored})
        for use in part.uses
    ]
    changed = {
        f"{was.dtype} to {before.stored[name].dtype}"
        for name, was in part.tensors.stored.items()
        if was.dtype != before.stored[name].dtype
    }
    return dict(
        source_keys=uses,
        made_up=sorted(part.made_up),
        dtype_changes=sorted(changed),
        tensors=tensors,
    )


def _tensor(before: Source, after: Source, name: str) -> dict[str, Any]:
    was = before.stored[name]
    told = dict(shape=list(was.shape), dtype=was.dtype, equal=False, not_finite=False)
    if name not in after.stored:
        return told | dict(why="missing")
    now = after.stored[name]
    if (now.shape, now.dtype) != (was.shape, was.dtype):
        return told | dict(why=f"written as {now.dtype}{list(now.shape)}")
    told["sha256"], told["not_finite"] = _digest(before, name)
    told["equal"] = told["sha256"] == _digest(after, name)[0]
    return told if told["equal"] else told | dict(why="its bytes differ")


def _digest(source: Source, name: str) -> tuple[str, bool]:
    """SHA-256 of a tensor's bytes, and whether it holds anything but finite numbers."""
    digest, finite = hashlib.sha256(), True
    for block in blocks(source, name):
        digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        if is_float(source.stored[name].dtype):
            finite &= bool(np.isfinite(block).all())
    return digest.hexdigest(), not finite
