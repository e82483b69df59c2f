# SPDX-License-Identifier: Apache-2.0
"""`apollo-jax convert`: a training run, or a published folder, to the published layout."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from apollo_jax.checkpoints import manager
from apollo_jax.checkpoints.pretrained import from_pretrained, save_pretrained
from apollo_jax.checkpoints.rules.table import parameters
from data_pipeline.tokenizer import Tokenizer


def main(argv: list[str]) -> None:
    """Write a run or a published folder in the published layout, which the PyTorch code loads."""
    parser = argparse.ArgumentParser("apollo-jax convert", description=main.__doc__)
    parser.add_argument("source", type=Path, help="workdir of a run, or a published folder")
    parser.add_argument("target", type=Path, help="folder to write; appears when it is complete")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="as stored")
    parser.add_argument("--max-shard-size", metavar="5GB")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(argv)
    model: Any = from_pretrained(args.source)
    save_pretrained(
        model,
        args.target,
        dtype=args.dtype,
        tokenizer=_tokenizer(args.source),
        max_shard_size=args.max_shard_size,
        overwrite=args.overwrite,
    )
    size = sum(leaf.size for leaf in parameters(model).values())
    Console().print(f"{args.target}: {type(model).__name__}, {size:,} parameters in use")


def _tokenizer(source: Path) -> Tokenizer | None:
    """A run's tokenizer; a published folder's travels with its other files."""
    if not manager.is_run(source):
        return None
    return Tokenizer.from_path(source / manager.TOKENIZER)
