# SPDX-License-Identifier: Apache-2.0
"""What a contrastive loss and its gradients need per chip, compiled for TPUs that are not there.

    python benchmarks/contrastive.py [--topologies v5e:4x4,v5e:8x8] [--json F]   (needs libtpu)

    matrix     all scores, the compiler divides the work (GSPMD)
    autodiff   a ring of scan and ppermute, differentiated by jax
    ours       apollo_jax.training.contrastive_loss

Columns: temporaries in MiB, MiB that a chip sends, and GFLOP of products over those of a matrix's
three. A program that exceeds the chip is reported with the memory it wanted.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_jax import sharding
from apollo_jax.planning import hlo, topology
from apollo_jax.training import contrastive_loss

_WANTED = re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def scores(x: Any, y: Any, scale: Any, bias: Any) -> Any:
    """float32[B, B]."""
    return scale * jnp.einsum("id,jd->ij", x, y, preferred_element_type=jnp.float32) + bias


def sigmoid_matrix(x: Any, y: Any, scale: Any, bias: Any) -> Any:
    """All scores at once."""
    z = 2.0 * jnp.eye(x.shape[0], dtype=jnp.float32) - 1.0
    return -jnp.sum(jax.nn.log_sigmoid(z * scores(x, y, scale, bias))) / x.shape[0]


def softmax_matrix(x: Any, y: Any, scale: Any, bias: Any) -> Any:
    """All scores at once."""
    found = scores(x, y, scale, bias)
    both = (jax.nn.logsumexp(found, axis=axis) for axis in (0, 1))
    return jnp.mean(sum(both) / 2 - jnp.diag(found))


def on_ring(local: Callable) -> Callable:
    """The sum of local(ring axes, size, x, y, scale, bias) over the chips, per row."""

    def loss(x: Any, y: Any, scale: Any, bias: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        axes, rows = mesh.axis_names, P(mesh.axis_names)

        def one(*a: Any) -> Any:
            return jax.lax.psum(local(axes, mesh.size, *a), axes) / x.shape[0]

        mapped = jax.shard_map(one, in_specs=(rows, rows, P(), P()), out_specs=P(), check_vma=False)
        return mapped(x, y, scale, bias)

    return loss


def hopping(axes: Any, size: int, visit: Callable, carry: Any, y: Any) -> Any:
    """carry = visit(carry, y, stop) at every stop, as a scan."""
    pairs = [(i, (i + 1) % size) for i in range(size)]

    def hop(state: Any, stop: Any) -> Any:
        carry, y = state
        return (visit(carry, y, stop), jax.lax.ppermute(y, axes, pairs)), None

    return jax.lax.scan(hop, (carry, y), jnp.arange(size))[0][0]


@on_ring
def sigmoid_autodiff(axes: Any, size: int, x: Any, y: Any, scale: Any, bias: Any) -> Any:
    """The chunks of `y` go round."""

    def visit(total: Any, y: Any, stop: Any) -> Any:
        z = jnp.where(jnp.eye(x.shape[0], dtype=bool) & (stop == 0), 1.0, -1.0)
        return total - jnp.sum(jax.nn.log_sigmoid(z * scores(x, y, scale, bias)))

    return hopping(axes, size, visit, jnp.zeros(()), y)


@on_ring
def softmax_autodiff(axes: Any, size: int, x: Any, y: Any, scale: Any, bias: Any) -> Any:
    """Each tower's rows go round the other's."""

    def normalisers(own: Any, other: Any) -> Any:
        def visit(total: Any, other: Any, stop: Any) -> Any:
            del stop
            found = jax.nn.logsumexp(scores(own, other, scale, bias), axis=1)
            return jnp.logaddexp(total, found)

        return hopping(axes, size, visit, jnp.full(own.shape[0], -1e30), other)

    right = jnp.einsum("id,id->i", x, y, preferred_element_type=jnp.float32)
    return jnp.sum((normalisers(x, y) + normalisers(y, x)) / 2 - scale * right - bias)


def sigmoid_ours(x: Any, y: Any, scale: Any, bias: Any) -> Any:
    """The mean over rows, and beside it the rows, which the log tells by source."""
    return tuple(contrastive_loss.sigmoid_loss(x, y, scale, bias))


def softmax_ours(x: Any, y: Any, scale: Any, bias: Any) -> Any:
    """The softmax has no bias."""
    del bias
    return tuple(contrastive_loss.softmax_loss(x, y, scale))


WAYS: dict[str, dict[str, Callable]] = {
    "matrix": {"sigmoid": sigmoid_matrix, "softmax": softmax_matrix},
    "autodiff": {"sigmoid": sigmoid_autodiff, "softmax": softmax_autodiff},
    "ours": {"sigmoid": sigmoid_ours, "softmax": softmax_ours},
}


def measure(way: str, loss: str, name: str, local: int, width: int, dtype: str) -> dict[str, Any]:
    """Compile value and gradients for a topology; bytes and FLOPs of one chip."""
    mesh = sharding.make_mesh(sharding.MeshConfig(), topology.parse(name).devices())
    place = NamedSharding(mesh, sharding.spec("clips"))
    rows = jax.ShapeDtypeStruct((local * mesh.size, width), jnp.dtype(dtype), sharding=place)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    facts: dict[str, Any] = dict(way=way, loss=loss, topology=name, chips=mesh.size, local=local)
    began = time.perf_counter()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        told = way == "ours"  # the losses of rows too
        step = jax.jit(jax.value_and_grad(WAYS[way][loss], (0, 1, 2, 3), has_aux=told))
        lowered = step.lower(rows, rows, scalar, scalar)
        try:
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            wanted = _WANTED.search(str(error))
            if wanted is None:
                raise
            return facts | {"fits": False, "temporaries": float(wanted[1]) * _UNITS[wanted[2]]}
        files = Path(folder).glob("*after_optimizations.txt")
        text = max(files, key=lambda f: f.stat().st_size).read_text()
    memory = compiled.memory_analysis()
    assert memory is not None
    totals = hlo.totals(text, dict(mesh.shape))
    return facts | {
        "fits": True,
        "temporaries": memory.temp_size_in_bytes,
        "collective_bytes": sum(c.bytes for c in totals.collectives),
        "flops": totals.flops,
        "flops_of_three_products": 6.0 * local * local * mesh.size * width,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="A contrastive loss, per chip")
    parser.add_argument("--topologies", default="v5e:4x4,v5e:8x8,v5e:16x16")
    parser.add_argument("--losses", default="sigmoid,softmax")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--local", type=int, default=512, help="rows of one chip")
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    topology.use_compiler_only()
    print(f"{'loss':<9}{'chips':>6}  {'way':<9}{'MiB':>10}{'sent MiB':>10}{'products':>10}{'s':>7}")
    found = []
    for loss in args.losses.split(","):
        for name in args.topologies.split(","):
            for way in args.ways.split(","):
                row = measure(way, loss, name, args.local, args.width, args.dtype)
                found.append(row)
                rest = "   does not fit"
                if row["fits"]:
                    products = row["flops"] / row["flops_of_three_products"]
                    sent = row["collective_bytes"] / 2**20
                    rest = f"{sent:>10.1f}{products:>10.2f}{row['seconds']:>7.0f}"
                memory = row["temporaries"] / 2**20
                print(f"{loss:<9}{row['chips']:>6}  {way:<9}{memory:>10.2f}{rest}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
