# SPDX-License-Identifier: Apache-2.0
"""Writing big_vision's .npz: what numpy.savez writes, array by array and block by block."""

import zipfile
from pathlib import Path

import numpy as np

from apollo_jax.checkpoints.checkpoint import Part
from apollo_jax.checkpoints.rules import apollo as layout
from apollo_jax.checkpoints.sources import Source, Stored, blocks
from apollo_jax.checkpoints.translate import Renamed, is_float, to_dialect

NUMBERED, SCANNED = "big_vision", "big_vision-scan"


def write_big_vision(path: Path, part: Part, dtype: str | None, *, scan: bool) -> None:
    """Write a tower as big_vision reads it; `scan` stacks the layers, as SigLIP 2 has them.

    Raises ValueError if big_vision has no such model.
    """
    rules = layout.RULES_BY_CONFIG[type(part.config)]
    config = part.published_config
    known = {d.name: d for d in getattr(rules, "dialects", lambda *_: ())(part.config, config)}
    name = SCANNED if scan else NUMBERED
    if name not in known:
        kind = rules.__name__.rpartition(".")[2]
        raise ValueError(f"big_vision has no {kind}; --to big_vision takes siglip and siglip2")
    write_npz(path, cast(to_dialect(part.tensors, known[name]), dtype))


def cast(source: Source, dtype: str | None) -> Source:
    """Floating-point tensors in `dtype`, if one is given."""
    if dtype is None:
        return source
    stored = {
        name: Stored(s.file, s.shape, dtype if is_float(s.dtype) else s.dtype)
        for name, s in source.stored.items()
    }
    return Renamed(source, {name: name for name in stored}, stored)


def write_npz(path: Path, source: Source) -> None:
    """Write all tensors of `source` to an uncompressed .npz."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, stored in source.stored.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as file:
                header = dict(descr=_descr(stored.dtype), fortran_order=False, shape=stored.shape)
                np.lib.format.write_array_header_1_0(file, header)
                for block in blocks(source, name):
                    file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)


def _descr(dtype: str) -> str:
    return "|V2" if dtype == "bfloat16" else np.dtype(dtype).str  # bfloat16 as numpy saves it
