# SPDX-License-Identifier: Apache-2.0
"""The small files beside the weights: configs, tokenizers, modelling code; kept byte for byte."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SUFFIXES = {".json", ".txt", ".py", ".md", ".model", ".jinja", ""}  # no suffix: LICENSE
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
REPORT = "conversion_report.json"  # of one conversion: the next one does not take it along

Files = dict[str, bytes]


def read(folder: Path) -> Files:
    """The companions in `folder` by name. FileNotFoundError if it has no config.json."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    if not (folder / CONFIG).is_file():
        here = ", ".join(p.name for p in sorted(folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} has no {CONFIG} (it holds {here})")
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in SUFFIXES]
    taken = [p for p in files if not p.name.startswith(".") and p.name != REPORT]
    return {p.name: p.read_bytes() for p in taken}


def below(folder: Path, skip: Iterable[str]) -> Files:
    """Every file under `folder` by its path there, but for those under the folders `skip`."""
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    skipped = tuple(f"{name}/" for name in skip)
    return {n: p.read_bytes() for n, p in files.items() if not n.startswith(skipped)}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` under `folder`; a name may be a path."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def parse(files: Mapping[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    """The JSON object in one of the files. ValueError naming it if it holds none."""
    try:
        content = json.loads(files[name])
    except ValueError as error:
        raise ValueError(f"{folder / name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{folder / name} must hold one JSON object")
    return content


def dump(content: Mapping[str, Any]) -> bytes:
    """JSON as the published files are written."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def state_dtype(files: Files, dtype: str) -> Files:
    """The files with every config.json saying that the tensors are `dtype`."""
    said = dict(torch_dtype=dtype, dtype=dtype, model_dtype=f"torch.{dtype}")
    out = dict(files)
    for name in files:
        if name.rpartition("/")[2] == CONFIG:
            content = json.loads(files[name])
            for part in (content, *(v for v in content.values() if isinstance(v, dict))):
                part.update({key: value for key, value in said.items() if key in part})
            out[name] = dump(content)
    return out


def sync(path: Path) -> None:
    """Have a file, or everything under a folder, on disk before it gets its final name."""
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
