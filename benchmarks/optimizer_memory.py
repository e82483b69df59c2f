# SPDX-License-Identifier: Apache-2.0
"""What each optimizer keeps per chip for a recipe, from shapes alone; AdamW is 1.

    python benchmarks/optimizer_memory.py [--config FILE:ARG] [--chips 64] [--json F]
    python benchmarks/optimizer_memory.py --compile muon --topology v5p:4x4x4 [--layers 2]

The mesh is abstract: `chips` on its fsdp axis, as v5p-128 (64 chips) has with the shipped recipe.
`ideal` is all of the state divided by the chips: a lower share per chip there is none.

With --compile, the TPU's compiler says what the update of one optimizer (gradients in, weights and
moments out) needs besides, which exchanges it makes and how many FLOPs; needs libtpu.
"""

import argparse
import json
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax
import optax
from jax.sharding import AbstractMesh, AxisType

from apollo_jax import sharding
from apollo_jax.config import Experiment, OptimizerConfig, load
from apollo_jax.planning import hlo
from apollo_jax.planning.topology import parse, use_compiler_only
from apollo_jax.training.step import build

NAMES: tuple[str, ...] = get_args(get_type_hints(OptimizerConfig)["name"])
TABLES = ("apollo", "apollo_mini")  # that may also project embeddings and heads
_MIB = 2**20


def experiment(config: str, name: str, *, tables: bool = False, layers: int = 0) -> Experiment:
    """The recipe with another optimizer, and perhaps fewer decoder layers."""
    changes = {"optimizer.name": name, "optimizer.schedule": "constant"}
    changes |= {f"optimizer.{name}.tables": "true"} if tables else {}
    changes |= {"model.llm.num_hidden_layers": str(layers)} if layers else {}
    return load(config, changes)


def state_bytes(e: Experiment, chips: int) -> dict[str, float]:
    """Bytes of optimizer state: per chip, and of all of it divided by the chips."""
    shape = {"fsdp": chips}
    axes = sharding.MESH_AXES
    mesh: Any = AbstractMesh(
        tuple(shape.get(a, 1) for a in axes), axes, axis_types=(AxisType.Auto,) * len(axes)
    )
    leaves = jax.tree.leaves(build(e, mesh).abstract.opt_state)
    held = sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in leaves)
    whole = sum(s.size * s.dtype.itemsize for s in leaves)
    return {"per_chip": held, "ideal": whole / chips}


def compiled(e: Experiment, topology: str) -> dict[str, Any]:
    """What the TPU compiler makes of the update alone."""
    mesh = sharding.make_mesh(e.mesh, parse(topology).devices())
    program = build(e, mesh)
    params, moments = program.abstract.params, program.abstract.opt_state
    places = jax.tree.map(lambda s: s.sharding, (params, moments))

    @partial(jax.jit, donate_argnums=(0, 1), out_shardings=places)
    def update(params: Any, moments: Any, grads: Any):
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = program.tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    with jax.set_mesh(mesh):
        lowered = update.lower(params, moments, params)
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        stats = lowered.compile(compiler_options=options).memory_analysis()
        assert stats is not None
        texts = Path(folder).glob("*after_optimizations.txt")
        text = max(texts, key=lambda f: f.stat().st_size).read_text()
    totals = hlo.totals(text, dict(mesh.shape))
    return {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "flops": totals.flops,
        "exchanged": sum(c.bytes for c in totals.collectives),
    }


def main() -> None:
    """Print a table, or one compiled update."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--config", default="configs/apollo_7b.py:sft")
    parser.add_argument("--chips", type=int, default=64)
    parser.add_argument("--compile", choices=NAMES)
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--layers", type=int, default=0, help="of the decoder; 0 = all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    use_compiler_only()
    if args.compile:
        found: Any = compiled(
            experiment(args.config, args.compile, layers=args.layers), args.topology
        )
        for name, value in found.items():
            scale, unit = (1e12, "TFLOP") if name == "flops" else (_MIB, "MiB")
            print(f"{name:12} {value / scale:10.2f} {unit} per chip")
    else:
        cases = [(n, False) for n in NAMES] + [(n, True) for n in TABLES]
        found = {}
        for name, tables in cases:
            bytes_ = state_bytes(experiment(args.config, name, tables=tables), args.chips)
            label = name + ", tables too" * tables
            found[label] = bytes_
            share = bytes_["per_chip"] / found[NAMES[0]]["per_chip"]
            ideal = bytes_["ideal"] / _MIB
            print(
                f"{label:24} {bytes_['per_chip'] / _MIB:8.1f} MiB {share:6.3f}  ideal {ideal:8.1f}"
            )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
