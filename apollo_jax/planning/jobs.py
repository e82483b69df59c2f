# SPDX-License-Identifier: Apache-2.0
"""Many plans: each is `apollo-jax plan` in a process of its own, and is kept on disk by content.

A process of its own, because the compiler takes gigabytes, and some programs crash it.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import apollo_jax
import data_pipeline.batch
from apollo_jax.config import load

# What decides about a plan, with all that the first of them imports from this package.
_SOURCES = ("planning.ahead_of_time", "planning.plan", "planning.flops")
_FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")  # of the environment, to the compiler


class Failed(Exception):
    """The compiler, or what it was given, failed; the text says how."""


@dataclass(frozen=True)
class Job:
    """One plan: a config, what is changed in it, and the TPU topology."""

    config: str  # FILE[:ARG]
    overrides: tuple[tuple[str, str], ...]
    topology: str

    def command(self) -> list[str]:
        """The command that makes it, but for where to."""
        changes = [f"--config.{name}={value}" for name, value in self.overrides]
        plan = [sys.executable, "-m", "apollo_jax", "plan", "--config", self.config]
        return [*plan, "--topology", self.topology, "--no-code", *changes]

    def key(self) -> str:
        """The name of its result: a hash of all that the result depends on."""
        experiment = asdict(load(self.config, dict(self.overrides)))
        flags = [os.environ.get(name) for name in _FLAGS]
        parts = [step_fields(experiment), self.topology, versions(), flags, _code()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def step_fields(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an experiment (as a dict) that shape its compiled step."""
    data = {k: experiment["data"][k] for k in ("batch_size", "length", "clips", "layout")}
    return {"data": data} | {k: experiment[k] for k in ("model", "train", "optimizer", "mesh")}


def versions() -> dict[str, str]:
    """Of what compiles; libtpu is absent where it is not installed."""
    found = {}
    for name in ("jax", "jaxlib", "flax", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def _code() -> str:
    """A hash of the code that decides about a plan, without its comments and its layout."""
    first, *others = _SOURCES
    trees = modules(first) | {name: ast.parse(_path(name).read_text()) for name in others}
    trees["batch"] = ast.parse(Path(data_pipeline.batch.__file__).read_text())
    text = "".join(ast.dump(tree) for _, tree in sorted(trees.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def modules(first: str) -> dict[str, ast.Module]:
    """A module below apollo_jax, by its name there, and all that it imports from there."""
    trees: dict[str, ast.Module] = {}
    waiting = [first]
    while waiting:
        name = waiting.pop()
        if name not in trees and _path(name).exists():
            trees[name] = ast.parse(_path(name).read_text())
            waiting += _imported(trees[name])
    return trees


def _path(module: str) -> Path:
    return Path(apollo_jax.__file__).parent / f"{module.replace('.', '/')}.py"


def _imported(tree: ast.Module) -> Iterator[str]:
    """Names below apollo_jax, some of them of modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("apollo_jax."):
            parent = f"{node.module}.".removeprefix("apollo_jax.")
            yield parent.rstrip(".")
            yield from (parent + alias.name for alias in node.names)


def default_cache() -> Path:
    """Where results are kept: APOLLO_PLANS, or a folder of the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("APOLLO_PLANS") or Path(home) / "apollo-jax" / "plans")


def run(
    jobs: Sequence[Job], folder: Path, parallel: int = 1
) -> Generator[tuple[Job, dict[str, Any] | Failed], None, None]:
    """(job, its facts or its failure) as they are done; kept results first.

    An interrupt ends the processes at once; what was done is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = {job: folder / f"{job.key()}.json" for job in jobs}
    for job, path in kept.items():
        if path.exists():
            yield job, json.loads(path.read_text())
    waiting = {job: path for job, path in kept.items() if not path.exists()}
    processes: set[subprocess.Popen] = set()
    with ThreadPoolExecutor(max(1, parallel)) as pool:
        futures = {pool.submit(_compile, j, p, processes): j for j, p in waiting.items()}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if error is not None and not isinstance(error, Failed):
                    raise error
                yield futures[future], error if isinstance(error, Failed) else future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(processes):
                process.kill()


def _compile(job: Job, path: Path, processes: set[subprocess.Popen]) -> dict[str, Any]:
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    command = [*job.command(), "--json", str(unfinished)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    processes.add(process)
    _, said = process.communicate()
    processes.discard(process)
    if process.returncode not in (0, 1) or not unfinished.exists():  # 1: it does not fit
        unfinished.unlink(missing_ok=True)
        lines = said.strip().splitlines() or [f"exit code {process.returncode}"]
        raise Failed(next((x for x in reversed(lines) if "Error: " in x), lines[-1]))
    unfinished.replace(path)
    return json.loads(path.read_text())
