# SPDX-License-Identifier: Apache-2.0
"""Whether a conversion is right: what became of every key, every tensor read back and compared."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from apollo_jax.checkpoints import activations
from apollo_jax.checkpoints.checkpoint import Checkpoint, Part
from apollo_jax.checkpoints.npz import cast
from apollo_jax.checkpoints.opening import open_checkpoint
from apollo_jax.checkpoints.published import folders
from apollo_jax.checkpoints.sources import Source, blocks
from apollo_jax.checkpoints.translate import is_float
from apollo_jax.models import apollo


def report(checkpoint: Checkpoint, written: Path, *, dtype: str | None) -> dict[str, Any]:
    """Compare `written` with what it was made from.

    Returns per part the use of every source key, and per published tensor its shape, dtype, SHA-256
    and whether it came back bit for bit (in `dtype`, if that was asked for).
    """
    back = _written(checkpoint, written)
    parts = {
        name or "model": _compare(part, back[name], dtype)
        for name, part in checkpoint.parts.items()
    }
    tensors = [t for part in parts.values() for t in part["tensors"].values()]
    return dict(
        parts=parts,
        equal=sum(t["equal"] for t in tensors),
        tensors=len(tensors),
        not_finite=[
            f"{part}: {name}"
            for part, content in parts.items()
            for name, t in content["tensors"].items()
            if t["not_finite"]
        ],
        activations=activations.compare(checkpoint, written),
    )


def check(content: dict[str, Any]) -> None:
    """ValueError naming the tensors that did not come back as they were."""
    wrong = [
        f"{part}: {name}"
        for part, found in content["parts"].items()
        for name, tensor in found["tensors"].items()
        if not tensor["equal"]
    ]
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(f"the conversion is wrong in {', '.join(wrong[:10])}{more}")


def _written(checkpoint: Checkpoint, written: Path) -> dict[str, Part]:
    """The parts of what was written, by their places in `checkpoint`."""
    if isinstance(checkpoint.config, apollo.Config) and not (written / "config.json").is_file():
        names = dict(zip(checkpoint.parts, _folders(checkpoint), strict=True))
        return {at: open_checkpoint(written / name).parts[""] for at, name in names.items()}
    said = {} if written.is_dir() else checkpoint.parts[""].published_config
    return dict(open_checkpoint(written, said=_plain(said)).parts)


def _folders(checkpoint: Checkpoint) -> list[str]:
    return [name.rpartition("/")[2] for name in folders(checkpoint)]


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
    changed = sorted(
        {
            f"{was.dtype} to {before.stored[name].dtype}"
            for name, was in part.tensors.stored.items()
            if was.dtype != before.stored[name].dtype
        }
    )
    return dict(source_keys=uses, dtype_changes=changed, tensors=tensors)


def _tensor(before: Source, after: Source, name: str) -> dict[str, Any]:
    stored = before.stored[name]
    told = dict(shape=list(stored.shape), dtype=stored.dtype, not_finite=False)
    if name not in after.stored or after.stored[name].shape != stored.shape:
        return told | dict(equal=False, why="missing or of another shape")
    sums, finite = (hashlib.sha256(), hashlib.sha256()), True
    for digest, source in zip(sums, (before, after), strict=True):
        for block in blocks(source, name):
            digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            if source is before and is_float(stored.dtype):
                finite &= bool(np.isfinite(block.astype(np.float32, copy=False)).all())
    was, now = (digest.hexdigest() for digest in sums)
    equal = was == now and after.stored[name].dtype == stored.dtype
    return told | dict(equal=equal, not_finite=not finite, sha256=was)
