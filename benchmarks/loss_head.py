# SPDX-License-Identifier: Apache-2.0
"""Loss heads at Qwen2.5-7B's vocabulary, compiled for TPUs: temporaries, FLOPs, exchanged bytes.

    python benchmarks/loss_head.py [--topologies v5p:2x2x4,v5e:4x4] [--fsdp 16] [--tokens 8192]
        [--heads naive,positions] [--width 2048] [--chunk 512] [--json F]

Compiled is the gradient of the mean loss in hidden states and, where it trains, in the table,
laid out as in training: tokens over data and fsdp, the table's columns over fsdp, float32 where it
trains and bfloat16 where it does not; --topologies v5p:2x2x1 with --fsdp 1 is one chip alone.
Per chip:

    temp    temporaries by the compiler's own account; arguments and results are not among them
    flops   of the products that are executed, over those that no method avoids: 6 x tokens x
            vocabulary x width where the table trains, 4 x where it is frozen
    sent    bytes that a chip sends in one step

`tokamax` is its `linear_softmax_cross_entropy_loss` kernel (pip install tokamax): on one chip,
without weights, the table transposed as it wants it; its FLOPs are those of its algorithm, four
products and five with its forward pass, which the compiler does not count.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from rich.console import Console
from rich.table import Table

from apollo_jax import sharding
from apollo_jax.planning import hlo, topology
from apollo_jax.training import losses

VOCABULARY = 152_064

HEADS = ("naive", "positions", "vocabulary", "tokamax")
KINDS = ("trained", "frozen", "tied")
Loss = Callable[..., losses.Sums]


class Row(NamedTuple):
    head: str
    table: str  # one of KINDS
    topology: str
    tokens: int  # per chip
    temp_gib: float
    flops: float  # over those that no method avoids
    sent_gib: float


def naive(hidden: Any, table: Any, targets: Any, weights: Any) -> losses.Sums:
    """All logits at once, left to the compiler."""
    table = table.astype(hidden.dtype)
    logits = jnp.einsum("bld,vd->blv", hidden, table, preferred_element_type=jnp.float32)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    hits = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return losses.Sums(jnp.sum(nll * weights), jnp.sum(hits * weights), jnp.sum(weights))


def tokamax(hidden: Any, table: Any, targets: Any, weights: Any) -> losses.Sums:
    """The kernel has no weights: the sum over all positions."""
    from tokamax import linear_softmax_cross_entropy_loss  # pyright: ignore[reportMissingImports]

    flat, rows = hidden.reshape(-1, hidden.shape[-1]), table.astype(hidden.dtype)
    loss = linear_softmax_cross_entropy_loss(
        flat, targets.reshape(-1), rows.T, implementation="mosaic_tpu"
    )
    return losses.Sums(loss, jnp.zeros(()), jnp.sum(weights))


def gradient(loss: Loss, kind: str) -> Callable[..., Any]:
    """(gradients, loss) of the mean loss; a tied table embeds the inputs too."""

    def mean(hidden: Any, table: Any, targets: Any, weights: Any) -> Any:
        if kind == "tied":
            hidden = hidden + table.astype(hidden.dtype)[jnp.roll(targets, 1, axis=1)]
        return losses.mean(loss(hidden, table, targets, weights))[0]

    return jax.value_and_grad(mean, argnums=0 if kind == "frozen" else (0, 1))


def measure(head: str, kind: str, place: topology.Topology, tokens: int, args: Any) -> Row:
    """One program, compiled."""
    ours = partial(losses.cross_entropy, cut=cast(losses.Cut, head), chunk=args.chunk)
    loss = {"naive": naive, "tokamax": tokamax}.get(head, ours)
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=args.fsdp), place.devices()[: args.chips])
    rows = mesh.size

    def shape(dims: tuple[int, ...], dtype: Any, *names: str | None) -> Any:
        where = NamedSharding(mesh, sharding.spec(*names))
        return jax.ShapeDtypeStruct(dims, dtype, sharding=where)

    by_position = ("batch", "length")
    arrays = (
        shape((rows, tokens, args.width), jnp.bfloat16, *by_position, None),
        shape((VOCABULARY, args.width), jnp.bfloat16 if kind == "frozen" else jnp.float32,
              "vocab", "embed"),
        shape((rows, tokens), jnp.int32, *by_position),
        shape((rows, tokens), jnp.float32, *by_position),
    )  # fmt: skip
    places = arrays[0].sharding if kind == "frozen" else tuple(a.sharding for a in arrays[:2])
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        program = jax.jit(gradient(loss, kind), out_shardings=(None, places))
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = program.lower(*arrays).compile(compiler_options=options)
        stats = compiled.memory_analysis()
        assert stats is not None
        texts = Path(folder).glob("*after_optimizations.txt")
        text = max(texts, key=lambda f: f.stat().st_size).read_text()
    totals = hlo.totals(text, dict(mesh.shape))
    needed = (4 if kind == "frozen" else 6) * tokens * VOCABULARY * args.width
    sent = sum(c.bytes for c in totals.collectives)
    temp = stats.temp_size_in_bytes
    return Row(head, kind, place.name, tokens, temp / 2**30, totals.flops / needed, sent / 2**30)


def rows(args: Any) -> Iterator[Row]:
    for name in args.topologies:
        place = topology.parse(name)
        for tokens in map(int, args.tokens):
            for head in args.heads:
                for kind in args.tables:
                    try:
                        yield measure(head, kind, place, tokens, args)
                    except (jax.errors.JaxRuntimeError, ImportError) as error:
                        print(f"{head} {kind} {name} {tokens}: {str(error)[:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    words = partial(str.split, sep=",")
    parser.add_argument("--topologies", type=words, default=["v5p:2x2x4", "v5e:4x4"])
    parser.add_argument("--fsdp", type=int, default=16, help="devices that share the table")
    parser.add_argument("--chips", type=int, default=None, help="use only so many of them")
    parser.add_argument("--tokens", type=words, default=["8192", "32768"], help="per chip")
    parser.add_argument("--heads", type=words, default=HEADS[:3], help=", ".join(HEADS))
    parser.add_argument("--tables", type=words, default=KINDS, help=", ".join(KINDS))
    parser.add_argument("--width", type=int, default=3584, help="of the decoder")
    parser.add_argument("--chunk", type=int, default=128, help="train.loss_chunk")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    args = parser.parse_args()
    topology.use_compiler_only()
    found = []
    table = Table(*(n.replace("_gib", ", GiB") for n in Row._fields))
    for row in rows(args):
        found.append(row._asdict())
        print(" ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row), flush=True)
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
