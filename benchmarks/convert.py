# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint and save it: seconds and memory against transformers and safetensors.

    python benchmarks/convert.py [--size 3b] [--rounds 4] [--folder D] [--json F]
    python benchmarks/convert.py --pairs [--folder D] [--json F]

Makes a random bfloat16 Apollo in the published layout, then does every job in a process of its own,
in interleaved rounds, and takes medians. The clock starts after the imports and stops when the
files are on disk. Memory is the peak that is resident, above what it was after the imports; pages
of a mapped file count, as they do for whoever sets the limit. transformers has no Apollo: it does
the decoder, which we do too. safetensors has one file in memory at a time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import convert_pairs  # beside this file
import numpy as np

from apollo_jax.checkpoints import checkpoint, published
from apollo_jax.checkpoints.sources import Index, Stored, concrete
from apollo_jax.checkpoints.translate import Arrays
from apollo_jax.models import apollo

SIZES: dict[str, Callable[[], apollo.Config]] = {
    "debug": apollo.Config.debug,
    "1.5b": apollo.Config.apollo_1p5b,
    "3b": apollo.Config.apollo_3b,
    "7b": apollo.Config.apollo_7b,
}
OURS, SAFETENSORS, TRANSFORMERS = "apollo-jax convert", "safetensors", "transformers"
JOBS = {"whole": (OURS, SAFETENSORS), "decoder": (OURS, TRANSFORMERS)}
TAKES = ("seconds", "cpu_seconds", "peak_bytes")


# ---- the checkpoint


class Random:
    """bfloat16 tensors of finite random numbers, the same at every reading of the same part."""

    def __init__(self, shapes: Mapping[str, Any]):
        self.stored = {name: Stored("", tuple(s.shape), "bfloat16") for name, s in shapes.items()}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        full = concrete(index, self.stored[name].shape)
        rng = np.random.default_rng(zlib.crc32(f"{name} {full}".encode()))
        bits = rng.integers(0, 1 << 16, [s.stop - s.start for s in full], np.uint16)
        return (bits & np.uint16(0xBFFF)).view("bfloat16")  # no exponent of all ones


def make(folder: Path, config: apollo.Config) -> int:
    """Write the published folder of a random model; the bytes of its largest tensor."""
    parts = {}
    for place, part in checkpoint.apollo_places(config).items():
        weights = Random(checkpoint.shapes(part))
        files = checkpoint.fresh_files(part, weights)
        parts[place] = checkpoint.part_of_weights(part, files, weights, Arrays({}), {})
    whole = checkpoint.Checkpoint(config, parts)
    published.write_apollo(folder, whole, dtype=None, max_shard_size=None)
    return max(stored.nbytes for p in parts.values() for stored in p.tensors.stored.values())


# ---- in a process of its own


def ours(source: Path, target: Path) -> None:
    from apollo_jax.checkpoints.convert import convert

    convert(source, target, to="apollo" if (source / "llm").is_dir() else "hf")


def with_safetensors(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in sorted(source.rglob("*")):
        written = target / path.relative_to(source)
        written.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(load_file(path), written, metadata={"format": "pt"})
        elif path.is_file():
            shutil.copy(path, written)


def with_transformers(source: Path, target: Path) -> None:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target)


WAYS = {OURS: ours, SAFETENSORS: with_safetensors, TRANSFORMERS: with_transformers}
IMPORTS = {
    OURS: "apollo_jax.checkpoints.convert",
    SAFETENSORS: "safetensors.torch",
    TRANSFORMERS: "transformers.models.qwen2.modeling_qwen2",
}


def job(way: str, source: Path, target: Path) -> dict[str, float]:
    """Do it here and say what it took."""
    __import__(IMPORTS[way])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident = _memory("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    WAYS[way](source, target)
    for path in target.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    return dict(
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu,
        peak_bytes=_memory("VmHWM") - resident,
    )


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


# ---- the comparison


def measure(folder: Path, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """what -> way -> median of each quantity."""
    found: dict[str, dict[str, list]] = {w: {n: [] for n in ways} for w, ways in JOBS.items()}
    sources = {"whole": folder / "apollo", "decoder": folder / "apollo" / "llm"}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for what, ways in JOBS.items():
            for way in ways if number % 2 else reversed(ways):  # the first reads a cold file
                found[what][way].append(_run(way, sources[what], folder / "out"))
                shutil.rmtree(folder / "out")
    return {
        what: {
            way: {q: statistics.median(took[q] for took in runs) for q in TAKES}
            for way, runs in ways.items()
        }
        for what, ways in found.items()
    }


def _run(way: str, source: Path, target: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--job", way, str(source), str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(results: dict[str, Any]) -> None:
    largest = results["largest_tensor_bytes"]
    print(f"Apollo {results['size']}, {results['bytes'] / 1e9:.2f} GB; the largest tensor has")
    print(f"{largest / 1e9:.3f} GB\n\n{'':30} {'seconds':>10} {'CPU-seconds':>12} {'peak, GB':>10}")
    for what, ways in results["load_and_save"].items():
        mine = ways[OURS]
        for way, took in ways.items():
            numbers = took["seconds"], took["cpu_seconds"], took["peak_bytes"] / 1e9
            print(
                f"{what + ', ' + way:30} {numbers[0]:10.2f} {numbers[1]:12.2f} {numbers[2]:10.3f}"
            )
            if way != OURS:
                ratio = [took[q] / max(mine[q], 1e-9) for q in TAKES]
                print(f"{'  times ours':30} {ratio[0]:9.2f}x {ratio[1]:11.2f}x {ratio[2]:9.2f}x")
        print(f"  our peak is {mine['peak_bytes'] / largest:.2f} of the largest tensor")


def run(folder: Path, size: str, rounds: int) -> dict[str, Any]:
    print(f"writing a random Apollo {size}", file=sys.stderr, flush=True)
    largest = make(folder / "apollo", SIZES[size]())
    size_bytes = sum(p.stat().st_size for p in (folder / "apollo").rglob("*") if p.is_file())
    return dict(
        size=size,
        bytes=size_bytes,
        largest_tensor_bytes=largest,
        load_and_save=measure(folder, rounds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SIZES, default="3b", help="of the Apollo")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where there is room for twice the checkpoint")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--pairs", action="store_true", help="peak memory of every pair of layouts")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        way, source, target = args.job
        print(json.dumps(job(way, Path(source), Path(target))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.pairs:
            results = convert_pairs.measure(Path(folder), convert_pairs.SIDE)
            convert_pairs.show(results)
        else:
            results = run(Path(folder), args.size, args.rounds)
            show(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
