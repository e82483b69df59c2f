# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax convert`: any checkpoint in, any checkpoint out, tensor by tensor.

A source is opened as published tensors (`opening`), changed if options say so (`parts`), seen as
the target wants it (`translate`) and written block by block, under another name until it is whole.
"""

import argparse
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from apollo_jax.checkpoints import (
    activations,
    companions,
    npz,
    parts,
    proof,
    safetensors,
    weights_folder,
)
from apollo_jax.checkpoints.checkpoint import Checkpoint
from apollo_jax.checkpoints.foreign import PICKLES
from apollo_jax.checkpoints.opening import open_checkpoint, read_config
from apollo_jax.checkpoints.published import appearing, claim, write_apollo, write_parts
from apollo_jax.models import apollo

FROM = ("hf", "big_vision", "torch", "orbax")
TO = ("apollo", "hf", "big_vision", "orbax")
DTYPES = ("float32", "bfloat16", "float16")
REPORT = companions.REPORT
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

console = Console()


KEEP = parts.Changes()


def convert(
    source: str | os.PathLike | None,
    target: str | os.PathLike,
    *,
    to: str = "apollo",
    key: str = "",
    said: dict[str, Any] | None = None,
    given: dict[str, str] | None = None,
    connector: dict[str, Any] | None = None,
    only: str = "",
    changes: parts.Changes = KEEP,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    scan: bool = False,
    overwrite: bool = False,
    verify: bool = False,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Convert `source` to `target`, which appears when it is complete.

    Args:
      to: what to write, one of TO.
      key: which part of the file is meant, like "target_encoder" or "img".
      said: published config fields of a source that has no config.json.
      given: {part: path} of an Apollo, to assemble one (no source) or to replace parts of one.
      connector: published fields of a fresh connector.
      only: the one part of an Apollo to write.
      changes: to the vocabulary and the head.
      dtype, max_shard_size: of what is written; default as they were read.
      scan: big_vision's layout with stacked layers.
      verify: read the result back and compare before it appears; the report goes with it.
    Returns the checkpoint that was written, and the report (empty without `verify`).
    Raises FileExistsError, FileNotFoundError, ValueError, OSError (disk full), naming what it is.
    """
    target = Path(os.path.abspath(target))
    sources = [] if source is None else [source]
    check_apart([*sources, *(given or {}).values()], target)
    claim(target, overwrite)
    if connector and (given or {}).get(parts.CONNECTOR) != parts.FRESH:
        raise ValueError("--connector describes a fresh one: give --part connector=fresh with it")
    if given:
        if key or said:
            raise ValueError("--key and --config are of a single source, not of --part")
        checkpoint = parts.assemble(source, given, connector=connector)
    elif source is None:
        raise ValueError("give a source, or the parts to assemble: --part NAME=PATH")
    else:
        checkpoint = open_checkpoint(source, key=key, said=said)
    if only:
        checkpoint = parts.one(checkpoint, only)
    checkpoint = changes.apply(checkpoint)
    check_options(target, to, max_shard_size=max_shard_size, scan=scan)
    write = writer(checkpoint, to, dtype=dtype, max_shard_size=max_shard_size, scan=scan)
    report: dict[str, Any] = {}
    with appearing(target) as temporary:
        write(temporary)
        if verify:
            report = dict(source=str(source or given), target=str(target), to=to)
            report |= dict(changes=changes.said(), dtype=dtype)
            origin = (given or {}).get(only, source)
            report |= proof.report(checkpoint, temporary, dtype=dtype, source=origin, given=given)
            proof.check(report)
            if temporary.is_dir():
                (temporary / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    if verify and not target.is_dir():
        target.with_name(f"{target.name}.{REPORT}").write_text(json.dumps(report, indent=1) + "\n")
    return checkpoint, report


def writer(
    checkpoint: Checkpoint, to: str, *, dtype: str | None, max_shard_size: str | None, scan: bool
) -> Callable[[Path], None]:
    """What writes the checkpoint to a path. ValueError if it cannot be written so."""
    kw = dict(dtype=dtype, max_shard_size=max_shard_size)
    whole = isinstance(checkpoint.config, apollo.Config)
    if to == "apollo" and not whole:
        raise ValueError("--to apollo writes a whole Apollo; assemble one with --part NAME=PATH")
    if to == "big_vision" and whole:
        raise ValueError("--to big_vision writes one tower: choose it with --only NAME")
    match to:
        case "apollo":
            return lambda path: write_apollo(path, checkpoint, **kw)
        case "hf":
            return lambda path: write_parts(path, checkpoint, **kw)
        case "big_vision":
            return lambda path: npz.write_big_vision(path, checkpoint.parts[""], dtype, scan=scan)
        case "orbax":
            return lambda path: weights_folder.write(path, checkpoint, dtype)
    raise ValueError(f"--to {to} is unknown; known: {', '.join(TO)}")


def check_apart(sources: Iterable[str | os.PathLike], target: Path) -> None:
    """ValueError if the target lies in a source, or a source in the target; a source itself may
    be overwritten."""
    for source in sources:
        path = Path(os.path.abspath(str(source).partition(".npz:")[0]))
        if path in target.parents:
            raise ValueError(f"{target} lies inside {source}, which is read; write it elsewhere")
        if target in path.parents:
            raise ValueError(f"{source}, which is read, lies inside {target}; write it elsewhere")


def check_options(target: Path, to: str, *, max_shard_size: str | None, scan: bool) -> None:
    """ValueError for options that `to` has no use for."""
    if (to == "big_vision") != (target.suffix == ".npz"):
        kind = "an .npz" if to == "big_vision" else "a folder"
        raise ValueError(f"--to {to} writes {kind}, which {target} is not")
    if scan and to != "big_vision":
        raise ValueError(f"--scan is of big_vision's layout, not of --to {to}")
    if max_shard_size and to not in ("apollo", "hf"):
        raise ValueError(f"--max-shard-size is of safetensors, not of --to {to}")


def kind_of(path: Path) -> str:
    """Which of FROM a path is."""
    if ".npz" in path.name:
        return "big_vision"
    if path.suffix in PICKLES:
        return "torch"
    if path.is_dir() and not safetensors.is_there(path):
        found = {file.suffix for file in path.iterdir()}
        if ".npz" in found:
            return "big_vision"
        if found & {*PICKLES}:
            return "torch"
    if weights_folder.is_weights(path) or (path / "checkpoints").is_dir():
        return "orbax"
    return "hf"


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("apollo-jax convert", description=main.__doc__)
    parser.add_argument("source", type=Path, nargs="?", metavar="SRC", help="checkpoint to read")
    parser.add_argument("target", type=Path, metavar="DST", help="appears when it is complete")
    parser.add_argument("--from", dest="source_kind", choices=FROM, help="default: as found")
    parser.add_argument("--to", choices=TO, help="default: apollo for a whole one, hf for a part")
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a part of the Apollo to assemble, or to replace in SRC: a tower's name, connector "
        "(a path or 'fresh') or llm",
    )
    parser.add_argument("--only", default="", metavar="NAME", help="write this part alone")
    parser.add_argument(
        "--key", default="", help="part of the file, like target_encoder or img; ema of a run"
    )
    parser.add_argument(
        "--config",
        type=fields,
        default={},
        metavar="JSON",
        help="of a file that has none",
    )
    parser.add_argument(
        "--connector", type=fields, default={}, metavar="JSON", help="fields of a fresh one"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of what is written; default: as stored")
    parser.add_argument("--max-shard-size", metavar="5GB")
    parser.add_argument("--vocab-size", type=int, default=0, help="pad the vocabulary with zeros")
    parser.add_argument("--head", choices=("tied", "untied"), default="", help="the decoder's")
    parser.add_argument("--scan", action="store_true", help="stack big_vision's layers")
    parser.add_argument("--verify", action="store_true", help=f"read back, compare, write {REPORT}")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Convert a checkpoint: a training run, a published folder or file, or parts of an Apollo."""
    args = arguments(argv)
    source, given = args.source, named(args.part)
    if source and args.source_kind and (found := kind_of(source)) != args.source_kind:
        raise ValueError(f"--from {args.source_kind}: {source} looks like {found}")
    try:
        checkpoint, report = convert(
            source,
            args.target,
            to=args.to or _default(source, given, args.only),
            key=args.key,
            said=args.config,
            given=given,
            connector=args.connector,
            only=args.only,
            changes=parts.Changes(args.vocab_size, args.head),
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            scan=args.scan,
            overwrite=args.overwrite,
            verify=args.verify,
        )
    except ImportError as error:
        sys.exit(f"apollo-jax convert: {error}")
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        full = "the disk is full, nothing was kept of" if error.errno in FULL else "cannot write"
        raise ValueError(f"{full} {args.target}: {error}") from error
    size = sum(math.prod(s.shape) for s in checkpoint.ours.stored.values())
    name = type(checkpoint.config).__module__.rpartition(".")[2]
    console.print(f"{args.target}: {name}, {size:,} parameters in use", highlight=False)
    if report:
        summary(report)


def named(texts: list[str]) -> dict[str, str]:
    """{name: path} of NAME=PATH. ValueError for what is not like that, or given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ValueError(f"--part {text} is not like NAME=PATH")
        if name in found:
            raise ValueError(f"--part {name} is given twice: {found[name]} and {path}")
        found[name] = path
    return found


def fields(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise argparse.ArgumentTypeError(f'{text} is not like {{"num_attention_heads": 12}}')
    return content


def summary(report: dict[str, Any]) -> None:
    """The report in a few lines."""
    uses = [use for part in report["parts"].values() for use in part["source_keys"]]
    ignored = sum("ignored" in use for use in uses)
    console.print(f"source tensors: {len(uses) - ignored} used, {ignored} known and ignored")
    console.print(f"read back: {report['equal']} of {report['tensors']} tensors equal")
    for name in report["not_finite"]:
        console.print(f"not finite: {name}", style="yellow")
    for part, found in report["activations"].items():
        console.print(f"{part}: {activations.said(found)}", highlight=False, soft_wrap=True)


def _default(source: Path | None, given: dict[str, str], only: str) -> str:
    if only:
        return "hf"
    if source is None or not (source / companions.CONFIG).is_file():  # a file is of one part
        return "apollo" if given else "hf"
    return "apollo" if given or isinstance(read_config(source), apollo.Config) else "hf"
