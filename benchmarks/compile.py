# SPDX-License-Identifier: Apache-2.0
"""What a decoder's train step needs on a TPU slice, against MaxText's, compiled without a TPU.

    python benchmarks/compile.py [--remat full nested ...] [--maxtext PYTHON] [--json F]

Both compile the whole step (forward, backward, clip, AdamW) of the same decoder for the same rows
and the same slice: bfloat16 arithmetic, float32 parameters and moments, everything sharded over all
chips. Ours is the step that `apollo-jax train` runs, on a batch without clips. MaxText's is its own
command `train_compile` with its own defaults (full rematerialisation, splash attention), run by an
interpreter that has it installed: `pip install 'maxtext[tpu]'`, Python 3.12. It brings a compiler
of its own, and compilers differ: for one compiler, `pip install -e .` there too, and run this file
with that interpreter. Without one, the figures in REFERENCE stand in where they are of the same
shape. What a step costs in Python is the matter of step_overhead.py.

    args, temp   GiB per chip, as the compiler reports them
    TFLOP        of the products and kernels that run, per chip and step, counted in both optimised
                 programs by planning/hlo.py
    plain %      of the time that the chip works at its peak rates: what is no product and no
                 attention kernel, that is norms, activations, rotations, copies and the optimizer,
                 as far as the compiler has not fused them into products. A kernel of our own for
                 SwiGLU or norms could save no more
    CPU-s        of the whole process: imports, tracing, compilation
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from apollo_jax import sharding
from apollo_jax.config import Experiment, LearningRates, OptimizerConfig, TrainConfig
from apollo_jax.models import apollo, qwen2
from apollo_jax.models.layers import REMAT_POLICIES
from apollo_jax.planning import ahead_of_time, hlo
from apollo_jax.planning.hlo_module import Module
from apollo_jax.planning.topology import SLICES, parse, use_compiler_only
from data_pipeline.loader import DataConfig, SourceConfig

_GIB = 2**30
_NAMES = 24  # width of the table's first column
MODELS = {
    "qwen2.5-7b": qwen2.Config.qwen2p5_7b(),
    "qwen2.5-1.5b": qwen2.Config.qwen2p5_1p5b(),
}


@dataclass(frozen=True)
class Shape:
    """What is compiled: one row of `tokens` per chip."""

    model: str = "qwen2.5-7b"
    topology: str = "v5p:4x4x4"
    tokens: int = 8192
    layers: int = 0  # 0 = as published


@dataclass(frozen=True)
class Result:
    """Of one compilation; GiB and TFLOP per chip."""

    arguments: float
    temporaries: float
    tflop: float | None
    plain: float | None  # percent
    cpu_seconds: float


# MaxText with its defaults, August 2026; release 0.2.5 gives the same GiB, and the TFLOP.
REFERENCE = {Shape(): Result(1.33, 7.46, 502.0, None, 96.0)}


def decoder_only(shape: Shape, remat: str) -> Experiment:
    """The experiment whose step is compiled: text alone, so that the towers are no part of it."""
    llm = replace(MODELS[shape.model], max_position_embeddings=max(shape.tokens, 32_768))
    llm = replace(llm, num_hidden_layers=shape.layers or llm.num_hidden_layers)
    small = apollo.Config.debug()
    connector = replace(small.connector, text_hidden_size=llm.hidden_size)
    model = replace(small, connector=connector, llm=llm)
    data = DataConfig(
        sources={"none": SourceConfig("none")},
        frames=(),
        tokenizer="none",
        batch_size=parse(shape.topology).chips,
        length=shape.tokens,
        clips=0,
        frame_size=model.frame_size,
        tokens_per_clip=connector.num_output_tokens,
    )
    train = TrainConfig(
        num_steps=1000,
        remat=remat,  # pyright: ignore[reportArgumentType]
        loss_chunk=min(256, shape.tokens),
    )
    mesh = sharding.MeshConfig(data=1, fsdp=-1)
    return Experiment(
        "decoder", model, data, train, OptimizerConfig(LearningRates(llm=1e-5)), mesh=mesh
    )


def ours(shape: Shape, remat: str) -> Result:
    """Compiles our step; in a process of its own, whose CPU time it tells."""
    use_compiler_only()
    compiled = ahead_of_time.compile_step(decoder_only(shape, remat), parse(shape.topology))
    memory = compiled.memory
    held = memory.params + memory.moments + memory.batch
    sizes = held / _GIB, memory.temporaries / _GIB
    return Result(*sizes, *_work(compiled.totals), compiled.cpu_seconds)


def _work(totals: hlo.Totals | None) -> tuple[float | None, float | None]:
    """TFLOP, and the share of the time that goes into what is no product, in percent."""
    if totals is None:
        return None, None
    return totals.flops / 1e12, 100 * totals.plain_seconds / totals.work_seconds


def maxtext(python: Path, shape: Shape) -> Result:
    """MaxText's step, by its command. RuntimeError with the end of what it printed if it fails."""
    code = "import maxtext, pathlib; print(pathlib.Path(maxtext.__path__[0]) / 'configs/base.yml')"
    base = _say([python, "-c", code]).split()[-1]
    slice_name = next(name for name, full in SLICES.items() if full == shape.topology)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model_name": shape.model,
            "compile_topology": slice_name,
            "compile_topology_num_slices": 1,
            "per_device_batch_size": 1,
            "max_target_length": shape.tokens,
            "run_name": "compile",
            "base_output_directory": folder,
            "jax_cache_dir": f"{folder}/cache",  # its default would remember the run before
            "dataset_type": "synthetic",
            "hardware": "cpu",
            "enable_checkpointing": "false",
            "skip_jax_distributed_system": "true",
            "compile_xla_flags": f"--xla_dump_to={folder}/dump",
        }
        if shape.layers:
            settings |= {"base_num_decoder_layers": shape.layers, "override_model_config": "true"}
        command = [python, "-m", "maxtext.trainers.pre_train.train_compile", base]
        before = _children_seconds()
        said = _say([*command, *(f"{k}={v}" for k, v in settings.items())])
        seconds = _children_seconds() - before
        program = Module(ahead_of_time.optimised(f"{folder}/dump"))
    totals = hlo.totals(program, {"fsdp": parse(shape.topology).chips})
    argument, temporary = (
        int(re.findall(rf"\b{kind}_size_in_bytes=(\d+)", said)[-1]) for kind in ("argument", "temp")
    )
    return Result(argument / _GIB, temporary / _GIB, *_work(totals), seconds)


def _children_seconds() -> float:
    """What the processes that have ended took of the CPU, as time.process_time counts it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def libtpu_of(python: Path) -> str:
    """The version of the compiler that this interpreter has."""
    code = "import importlib.metadata; print(importlib.metadata.version('libtpu'))"
    return _say([python, "-c", code]).strip()


def _say(command: list[Any]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise RuntimeError(f"MaxText failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def _environment() -> dict[str, str]:
    """This process's, without its modules and libtpu, with what that wants where no TPU is."""
    ours = ("PYTHONPATH", "TPU_LIBRARY_PATH")  # jax sets the latter when it is imported
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "DECOUPLE_GCLOUD": "TRUE",  # MaxText's switch for machines that are not in its cloud
    }


def row(name: str, found: Result, peer: Result | None) -> str:
    """A line of the table: the figures, and the ratios to the peer's."""
    pairs = [(a, getattr(peer, k, None)) for k, a in asdict(found).items()]
    cells = ["-" if a is None else f"{a:.2f}" for a, _ in pairs]
    ratios = [f"{a / b:.2f}x" if a and b else "-" for a, b in pairs]
    columns = zip(cells, ratios, strict=True)
    return f"{name:<{_NAMES}}" + "".join(f"{c:>10}{r:>8}" for c, r in columns)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Compile a decoder's train step, also MaxText's")
    parser.add_argument("--model", default="qwen2.5-7b", choices=MODELS)
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--tokens", type=int, default=8192, help="per chip, one row")
    parser.add_argument("--layers", type=int, default=0, help="fewer than published, to be quick")
    parser.add_argument("--remat", nargs="+", default=["full"], choices=REMAT_POLICIES)
    parser.add_argument("--maxtext", type=Path, help="a Python that has MaxText installed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    shape = Shape(args.model, args.topology, args.tokens, args.layers)
    peer = maxtext(args.maxtext, shape) if args.maxtext else REFERENCE.get(shape)
    columns = ("args GiB", "temp GiB", "TFLOP", "plain %", "CPU-s")
    own = metadata.version("libtpu")
    print(f"{'libtpu ' + own:<{_NAMES}}" + "".join(f"{c:>10}{'':>8}" for c in columns))
    found: dict[str, Any] = {"shape": asdict(shape), "libtpu": own}
    if peer:
        theirs = f"libtpu {libtpu_of(args.maxtext)}" if args.maxtext else "reference"
        print(row(f"MaxText, {theirs}", peer, None), flush=True)
        found["maxtext"] = asdict(peer)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as processes:
        for remat in args.remat:
            result = processes.submit(ours, shape, remat).result()
            print(row(f"ours, {remat}", result, peer), flush=True)
            found[remat] = asdict(result)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
