# SPDX-License-Identifier: Apache-2.0
"""The same input through a checkpoint here and in transformers: differences layer by layer.

Theirs is what was written, loaded strictly by their own class; ours is what was read. Both compute
in float32 on the CPU, one after the other, so that one of them is in memory at a time.

    {"class": "Qwen2ForCausalLM", "transformers": "5.23.0", "input": [1, 64],
     "layers": [DIFFERENCE, ...],   of the first layer's input, then of every layer's output
     "output": DIFFERENCE,          of the logits or the normed features, where ours computes them
     "kl": 3e-12,                   of the logits: theirs from ours, mean over positions
     "rounded": ["float32 to bfloat16"]}
    {"skipped": why}                nothing was compared
    {"failed": why}                 the conversion is wrong

DIFFERENCE: {"max_abs": of all elements, "relative": the same as a share of the largest element}
"""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from apollo_jax.checkpoints import oracle
from apollo_jax.checkpoints.checkpoint import Checkpoint, Part, write_part
from apollo_jax.checkpoints.pretrained import build
from apollo_jax.checkpoints.translate import is_float
from apollo_jax.models import qwen2

NO_TORCH = "PyTorch and transformers are not installed (pip install 'apollo_jax[torch]')"
TOLERANCE = 1e-3  # relative, if nothing was rounded: more is no rounding error of float32
ROOM = 2  # a model is loaded if this many of it fit in the free memory


def compare(
    before: Mapping[str, Part],
    after: Mapping[str, Part],
    folders: Mapping[str, Path],
    scratch: Path,
) -> dict[str, dict[str, Any]]:
    """For each part by name, how far ours and theirs are apart (see above).

    Args:
      before: what was read.
      after: what was written, opened again.
      folders: where transformers can read a part; the others are exported for it below `scratch`.
    """
    try:
        import torch  # noqa: F401  # pyright: ignore[reportMissingImports]
        import transformers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {name: dict(skipped=NO_TORCH) for name in before}
    with oracle.quiet():
        return {
            name: _compare(part, after[name], folders.get(name), scratch)
            for name, part in before.items()
        }


def said(found: Mapping[str, Any]) -> str:
    """One part's result in a line."""
    if reason := found.get("skipped"):
        return f"not compared: {reason}"
    every = [*found["layers"], *filter(None, [found["output"]])]
    worst = max(difference["relative"] for difference in every)
    text = f"{len(found['layers']) - 1} layers within {_short(worst)} of transformers"
    if found["kl"] is not None:
        text += f", logits KL {_short(found['kl'])}"
    return "; ".join([text, *(f"rounded from {r}" for r in found["rounded"])])


def _short(x: float) -> str:
    return f"{x:.1e}".replace("e-0", "e-").replace("e+00", "") if x else "0"


def _compare(before: Part, after: Part, folder: Path | None, scratch: Path) -> dict[str, Any]:
    name = oracle.class_name(after.published_config)
    if reason := _obstacle(name, after, folder, scratch):
        return dict(skipped=reason)
    if folder is not None:
        return _run(name, before, after, folder)
    with tempfile.TemporaryDirectory(dir=scratch, prefix=f"activations.tmp-{os.getpid()}-") as made:
        write_part(Path(made), after)
        return _run(name, before, after, Path(made))


def _obstacle(name: str, part: Part, folder: Path | None, scratch: Path) -> str:
    """Why a part is not compared, or ""."""
    import transformers  # pyright: ignore[reportMissingImports]

    config = part.published_config
    kind = config.get("model_type") or (config.get("architectures") or ["this part"])[0]
    if not name:
        return f"transformers has no class for {oracle.OTHERWISE.get(kind, kind)}"
    if not hasattr(transformers, name):
        return f"transformers {transformers.__version__} has no {name}"
    needed = ROOM * sum(4 * math.prod(s.shape) for s in part.tensors.stored.values())
    if needed > (free := free_memory()):
        return f"it takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    written = sum(s.nbytes for s in part.tensors.stored.values())
    if folder is None and written > (free := shutil.disk_usage(scratch).free):
        return f"it takes {written / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free"
    return ""


def free_memory() -> float:
    """Bytes that this process may still take; infinite where the system does not say."""
    free, group = math.inf, Path("/sys/fs/cgroup")
    try:
        free = 1024 * _fields(Path("/proc/meminfo"))["MemAvailable:"]
        limit = (group / "memory.max").read_text().strip()
        if limit.isdigit():
            used = int((group / "memory.current").read_text())
            cache = _fields(group / "memory.stat")["inactive_file"]
            free = min(free, int(limit) - used + cache)
    except (OSError, KeyError):
        pass  # not a Linux, or no limit of its own
    return free


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {name: int(value) for name, value, *_ in map(str.split, path.read_text().splitlines())}


def _run(name: str, before: Part, after: Part, folder: Path) -> dict[str, Any]:
    import transformers  # pyright: ignore[reportMissingImports]

    x = oracle.fixed_input(before.config)
    try:
        states, output = oracle.run(name, folder, before.config, x)
    except ValueError as error:
        return dict(failed=str(error))
    if not all(np.isfinite(state).all() for state in states):
        return dict(skipped="its activations are not finite")
    found: dict[str, Any] = _ours(before, x, states, output)
    found["rounded"] = rounded(before, after)
    apart = [d["relative"] for d in (*found["layers"], *filter(None, [found["output"]]))]
    far = next((i for i, relative in enumerate(apart) if not relative <= TOLERANCE), None)
    if far is not None and not found["rounded"]:
        where = f"hidden state {far}" if far < len(found["layers"]) else "output"
        return dict(failed=f"{where} is {_short(apart[far])} away from {name}'s")
    about = {"class": name, "transformers": transformers.__version__, "input": list(x.shape)}
    return about | found


def rounded(before: Part, after: Part) -> list[str]:
    """The changes of dtype that lose digits."""
    was, now = before.tensors.stored, after.tensors.stored
    pairs = {(was[n].dtype, now[n].dtype) for n in was if n in now and is_float(was[n].dtype)}
    return sorted(f"{old} to {new}" for old, new in pairs if not np.can_cast(old, new, "safe"))


class Telling(nnx.Module):
    """Layers that tell what they take and give."""

    def __init__(self, layers: nnx.Module, tell: Callable[[Any, Any], None]):
        self.layers, self.tell = layers, tell

    def __call__(self, x: jax.Array, *args: Any) -> tuple[jax.Array, Any]:
        y, rest = self.layers(x, *args)
        self.tell(x, y)
        return y, rest


def _ours(
    part: Part, x: np.ndarray, states: list[np.ndarray], output: np.ndarray | None
) -> dict[str, Any]:
    """Ours on the same input, against the states and the output of theirs."""
    cpu, layers = jax.local_devices(backend="cpu")[0], []

    def tell(taken: jax.Array, given: jax.Array) -> None:
        if not layers:
            layers.append(difference(taken, states[0]))
        layers.append(difference(given, states[len(layers)]))

    # Not compiled, each layer of the scan is called by itself, with numbers that can be looked at.
    with jax.default_device(cpu), jax.disable_jit():
        model = build(Checkpoint(part.config, {"": part}), device=cpu)
        model.layers = Telling(model.layers, tell)
        if isinstance(model, qwen2.Qwen2):
            assert output is not None
            hidden, _ = model(model.embed(jnp.asarray(x)), positions=jnp.arange(x.shape[1])[None])
            logits = np.asarray(model.unembed(hidden))
            return dict(layers=layers, output=difference(logits, output), kl=kl(logits, output))
        out = model(jnp.asarray(x))
    last = None if output is None else difference(out, output)
    return dict(layers=layers, output=last, kl=None)


def difference(ours: Any, theirs: np.ndarray) -> dict[str, float]:
    """Largest absolute difference, and that as a share of their largest element."""
    most = float(np.abs(np.asarray(ours).reshape(theirs.shape) - theirs).max())
    largest = float(np.abs(theirs).max())
    return dict(max_abs=_round(most), relative=_round(most / largest if largest else most))


def _round(x: float) -> float:
    return float(f"{x:.3g}")


def kl(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Kullback-Leibler divergence of the distributions of two [1, L, V] logits, mean over L."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (ours, theirs))
    return _round(max(0.0, float((np.exp(p) * (p - q)).sum(axis=-1).mean())))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
