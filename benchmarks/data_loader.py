# SPDX-License-Identifier: Apache-2.0
"""The loader's other qualities, for benchmarks/data.py: packing, starting, mixing, memory, latency.

Each part returns rows of columns by name. What must begin in a fresh process is a *job* and is run
as `python benchmarks/data.py --job NAME FILE...`.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import grain
import numpy as np
from data_media import Film, Rows, cpu_seconds, data_config, write_records

from data_pipeline import sizes
from data_pipeline.loader import WINDOW, DataConfig, Loader
from data_pipeline.packing import least_rows, pack
from data_pipeline.record_files import RecordFiles

DELAY = 0.05  # seconds per read, as from an object store


# ---- packing


def packing(samples: int) -> Rows:
    """How near to the least number of rows, and how fast, with two budgets."""
    rows: Rows = {}
    for length, clips in ((4096, 80), (4096, 48), (16384, 300)):
        drawn = _sizes(samples, length, clips)
        name = f"{length} tokens, {clips} clips"
        start, used = cpu_seconds(), 0
        for at in range(0, samples, WINDOW):
            used += len(pack(drawn[at : at + WINDOW], length, clips))
        rows[f"{name}: ours"] = _packed(drawn, length, clips, used, cpu_seconds() - start) | {
            "aim": ">= 99.5"
        }
        if length == 4096:
            start = cpu_seconds()
            used = _first_fit(drawn[: samples // 4], length, clips)
            took = cpu_seconds() - start
            rows[f"{name}: Grain's first fit"] = _packed(
                drawn[: samples // 4], length, clips, used, took
            )
    return rows


def _packed(sizes: np.ndarray, length: int, clips: int, rows: int, took: float) -> dict[str, Any]:
    return {
        "% of the lower bound": 100 * least_rows(sizes, length, clips) / rows,
        "samples / CPU-s": len(sizes) / took,
    }


def _sizes(samples: int, length: int, clips: int) -> np.ndarray:
    """i32[n, 2]: 14 % text, 20 % single images, 6 % several images, 60 % videos to 32 clips."""
    rng = np.random.default_rng(0)
    kind = rng.choice(4, samples, p=[0.14, 0.2, 0.06, 0.6])
    several, video = rng.integers(2, 7, samples), rng.integers(1, 33, samples)
    slots = np.select([kind == 1, kind == 2, kind == 3], [1, several, video])
    text = rng.lognormal(5.2, 0.7, samples).astype(int) + 20
    sizes = np.stack([text + 44 * slots, slots], 1)
    return np.minimum(sizes, [length, clips]).astype(np.int32)


def _first_fit(sizes: np.ndarray, length: int, clips: int) -> int:
    """Rows that Grain's packer needs, with as many open rows as give it its best result."""
    ones = {"tokens": np.ones(length, np.int8), "clips": np.ones(clips, np.int8)}
    samples = grain.MapDataset.source(sizes.tolist()).map(
        lambda size: {name: ones[name][:n] for name, n in zip(ones, size, strict=True)}
    )
    packer = grain.experimental.FirstFitPackIterDataset(
        samples.to_iter_dataset(),
        length_struct={"tokens": length, "clips": clips},
        num_packing_bins=128,
    )
    return sum(1 for _ in packer)


# ---- fresh processes


def start(folder: Path, film: Film, records: int) -> Rows:
    """From nothing to the first batch, and from a saved state, each in a new process."""
    source = write_records(folder / "start.jsonl", records, film.id)
    config = data_config(film, {"all": source}, max_clips=8, batch_size=2, sizes=_fresh(folder))
    rows = {f"{records:,} records: cold": _job("first", config, folder)}
    state = rows[f"{records:,} records: cold"].pop("state")
    rows["after a restore, not measured"] = _job("first", config, folder, state)
    _job("measure", config, folder)
    rows["cold, measured by data check"] = _job("first", config, folder)
    rows["after a restore, measured"] = _job("first", config, folder, state)
    for row in rows.values():
        row.pop("state", None)
        row["aim"] = "first batch < 1 s"
    return rows


def _fresh(folder: Path) -> str:
    """An empty folder for what `data check` measures."""
    return tempfile.mkdtemp(dir=folder)


def _measure(config: DataConfig, _: object) -> dict[str, Any]:
    """What `data check` leaves for the loader."""
    begun, cpu = time.perf_counter(), cpu_seconds()
    for name in config.sources:
        sizes.compute(config, name, processes=os.cpu_count() or 1)
    return {"set-up, s": time.perf_counter() - begun, "set-up, CPU-s": cpu_seconds() - cpu}


def _first(config: DataConfig, state: dict[str, Any] | None) -> dict[str, Any]:
    begun, cpu = time.perf_counter(), cpu_seconds()
    with closing(Loader(config, num_steps=100)) as loader:
        opened = time.perf_counter()
        if state:
            loader.set_state(state)
        next(loader)
        first = time.perf_counter()
        took = cpu_seconds() - cpu
        while loader.get_state()["next_step"] < 3:
            next(loader)
        return {
            "opened, s": opened - begun,
            "first batch, s": first - begun,
            "CPU-s": took,
            "state": loader.get_state(),
        }


def mixture(folder: Path, film: Film, sources: int, records: int) -> Rows:
    """Opening many sources and loading the first batch; what it takes in memory and threads."""
    mixed = {
        f"source{k}": write_records(folder / f"mixed-{k}.jsonl", records // sources, film.id)
        for k in range(sources)
    }
    config = data_config(film, mixed, max_clips=8, sizes=_fresh(folder))
    return {
        f"{sources} sources, {records:,} records": _job("open", config, folder),
        "measured, once, by data check": _job("measure", config, folder),
        "then": _job("open", config, folder),
    }


def _open(config: DataConfig, _: object) -> dict[str, Any]:
    before, begun, cpu = _resident(), time.perf_counter(), cpu_seconds()
    with closing(Loader(config, num_steps=4)) as loader:
        opened, took = time.perf_counter() - begun, cpu_seconds() - cpu
        next(loader)
        return {
            "set-up, s": opened,
            "set-up, CPU-s": took,
            "first batch, s": time.perf_counter() - begun,
            "memory, MB": _resident() - before,
            "threads": threading.active_count(),
        }


def memory(folder: Path, film: Film, records: int) -> Rows:
    """Resident memory while so many records pass, after the first tenth and at the end."""
    source = write_records(folder / "memory.jsonl", records, film.id, text_share=0.97)
    config = data_config(film, {"all": source}, max_clips=2, clips=8)
    return {f"{records:,} records": _job("pass", config, folder)}


def _pass(config: DataConfig, _: object) -> dict[str, Any]:
    with open(config.sources["all"].path) as lines:
        wanted = sum(1 for _ in lines)
    seen, batch_bytes, resident = 0, 0, []
    with closing(Loader(config, num_steps=wanted)) as loader:
        for batch, stats in loader:
            seen += stats.samples
            batch_bytes = sum(array.nbytes for array in batch)
            resident.append((seen, _resident()))
            if seen >= wanted:
                break
    marks = [next(r for s, r in resident if s >= share * wanted) for share in (0.1, 0.5, 1.0)]
    names = ("MB at 10 %", "MB at 50 %", "MB at the end")
    others = {"batches": len(resident), "MB of one": batch_bytes / 1e6}
    return dict(zip(names, marks, strict=True)) | others


JOBS = {"first": _first, "measure": _measure, "open": _open, "pass": _pass}


def _job(name: str, config: DataConfig, folder: Path, state: object = None) -> dict[str, Any]:
    order = folder / "job.pickle"
    order.write_bytes(pickle.dumps((name, config, state)))
    command = [sys.executable, str(Path(__file__).with_name("data.py")), "--job", str(order)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def job(order: Path) -> None:
    """Does what `_job` asks of this fresh process; prints the result."""
    name, config, state = pickle.loads(order.read_bytes())
    print(json.dumps(JOBS[name](config, state)))


def _resident() -> float:
    """Memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


# ---- slow storage


def latency(folder: Path, film: Film, steps: int) -> Rows:
    """Frames per second of wall clock when every read sleeps, by the loader's threads."""
    source = write_records(folder / "slow.jsonl", 64, film.id, text_share=0)
    rows: Rows = {}
    read = RecordFiles.read

    def slow(self: RecordFiles, file: int, record: int) -> bytes:
        time.sleep(DELAY)
        return read(self, file, record)

    RecordFiles.read = slow
    try:
        for threads in (1, 2, 4, 8, 16, 32):
            config = data_config(
                film, {"all": source}, max_clips=2, clips=4, batch_size=32, threads=threads
            )
            begun = time.perf_counter()
            with closing(Loader(config, num_steps=steps)) as loader:
                frames = sum(stats.frames for _, stats in loader)
            rows[f"{threads} threads"] = {"frames / s": frames / (time.perf_counter() - begun)}
    finally:
        RecordFiles.read = read
    return rows
