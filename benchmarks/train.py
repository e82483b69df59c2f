# SPDX-License-Identifier: Apache-2.0
"""A train step's time and memory on CPU: ours against the same model in PyTorch.

    python benchmarks/train.py [--rounds 9] [--steps 2] [--threads 2] [--devices 1] [--eager]
        [--json F]

A full step (forward, backward, clip, AdamW; everything trains; float32) of the demo's model on a
batch of the demo's size, from the same published folder; train_sides.py has the two sides. PyTorch
runs eagerly and through `torch.compile` (not with --eager). Losses and gradient norms of the first
steps must agree before anything is timed. The rounds of all ways are interleaved in one process, on
the same cores, with the demo's settings. Times are per step; CPU time is that of all threads.

Peak memory is measured for each way in a process of its own, after it has compiled: what is
resident at the peak of a few steps, above what was after the imports and the batch. It holds
weights, moments, gradients and activations. Needs the torch extra.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import hold_memory  # beside this file, as train_sides; before torch
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import train_sides
from flax import nnx
from train_sides import Step

import apollo_jax
from apollo_jax.models import apollo
from data_pipeline.batch import Batch

CHECKED_STEPS, TOLERANCE = 3, 1e-3
OURS = "apollo_jax, packed"
WAYS = {  # name -> (padded, compiled), None = ours
    OURS: None,
    "PyTorch, packed": (False, False),
    "PyTorch, padded": (True, False),
    "torch.compile, packed": (False, True),
    "torch.compile, padded": (True, True),
}


def make_step(way: str, batches: tuple[Batch, Batch], folder: Path) -> Step:
    packed, alone = batches
    how = WAYS[way]
    if how is None:
        return train_sides.our_step(packed, folder)
    padded, compiled = how
    batch = alone if padded else packed
    return train_sides.torch_step(batch, folder, padded=padded, compiled=compiled)


# ---- time


def check(steps: dict[str, Step]) -> dict[str, float]:
    """Largest relative difference from ours in loss and gradient norm over the first steps."""
    first = {name: np.array([step() for _ in range(CHECKED_STEPS)]) for name, step in steps.items()}
    ours = first.pop(OURS)
    differences = {name: float(np.abs(x / ours - 1).max()) for name, x in first.items()}
    for name, difference in differences.items():
        print(f"{name}: loss and gradient norm of {CHECKED_STEPS} steps within {difference:.1e}")
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"not the same computation:\n{ours}\n{first}")
    return differences


def measure(steps: dict[str, Step], rounds: int, count: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds per step of every way in every round, wall and CPU."""
    times = {name: {"wall": [], "cpu": []} for name in steps}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                step()
            times[name]["wall"].append(1e3 * (time.perf_counter() - wall) / count)
            times[name]["cpu"].append(1e3 * (time.process_time() - cpu) / count)
    return times


def ratios(times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Median over the rounds of theirs / ours, so that load from outside hits both alike."""

    def median_ratio(theirs: Iterable[float], ours: Iterable[float]) -> float:
        return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))

    return {
        name: {clock: median_ratio(t, times[OURS][clock]) for clock, t in clocks.items()}
        for name, clocks in times.items()
    }


def show(times: dict[str, dict[str, list[float]]], faster: dict[str, dict[str, float]]) -> None:
    print(f"\n{'':22} {'wall ms':>9} {'CPU ms':>9} {'/ ours, wall':>13} {'/ ours, CPU':>12}")
    for name, clocks in times.items():
        wall, cpu = (statistics.median(t) for t in clocks.values())
        ratio = faster[name]
        print(f"{name:22} {wall:9.1f} {cpu:9.1f} {ratio['wall']:13.2f} {ratio['cpu']:12.2f}")


def use_cores(threads: int, devices: int) -> None:
    """Both sides on the same `threads` cores; must run before either looks for them."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"


# ---- memory


def peak_memory(way: str, folder: Path, args: argparse.Namespace) -> int:
    """Peak bytes of a way, found by a process of its own."""
    command = [sys.executable, __file__, "--memory-of", way, "--model", str(folder)]
    command += ["--threads", str(args.threads), "--devices", str(args.devices)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def measure_memory(way: str, folder: Path) -> int:
    """Of this process, while it does a few steps that have been compiled before."""
    batches = train_sides.make_batches()
    before = _resident("VmRSS")
    step = make_step(way, batches, folder)
    for _ in range(2):
        step()
    ctypes.CDLL(None).malloc_trim(0)  # what the compilers have freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(3):
        step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def show_memory(peaks: dict[str, int]) -> None:
    print(f"\n{'':22} {'peak MB':>9} {'/ ours':>8}")
    for name, peak in peaks.items():
        print(f"{name:22} {peak / 1e6:9.0f} {peak / peaks[OURS]:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="per round and way")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--devices", type=int, default=1, help="2: data parallel, as the demo runs")
    parser.add_argument("--eager", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # these two: a process for itself
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        use_cores(args.threads, args.devices)
        return print(measure_memory(args.memory_of, args.model))
    assert hold_memory.HELD
    use_cores(args.threads, args.devices)
    batches = packed, alone = train_sides.make_batches()
    used, slots = (packed.segment_ids > 0).mean(), packed.clip_mask.mean()
    print(
        f"packed {packed.tokens.shape}, {used:.0%} of tokens and {slots:.0%} of clip slots in use; "
        f"padded {alone.tokens.shape}; {args.threads} threads, {args.devices} devices"
    )
    ways = [way for way, how in WAYS.items() if not (args.eager and how and how[1])]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        model = apollo.Apollo(train_sides.MODEL, rngs=nnx.Rngs(0))
        apollo_jax.save_pretrained(model, folder)
        peaks = {way: peak_memory(way, folder, args) for way in ways}
        steps = {way: make_step(way, batches, folder) for way in ways}
    differences = check(steps)
    times = measure(steps, args.rounds, args.steps)
    faster = ratios(times)
    show(times, faster)
    show_memory(peaks)
    if args.json:
        settings = dict(threads=args.threads, devices=args.devices, steps=args.steps)
        numbers = dict(settings, differences=differences, ms_per_step=times, times_ours=faster)
        args.json.write_text(json.dumps(numbers | dict(peak_bytes=peaks), indent=1) + "\n")


if __name__ == "__main__":
    main()
