# SPDX-License-Identifier: Apache-2.0
"""Peak memory of every pair of layouts, for `benchmarks/convert.py --pairs`.

Each pair is one conversion in a process of its own, of a random tower or Apollo whose tensors are
few and large. Memory is the peak that is resident above what was after the imports, as a share of
the largest tensor that is read or written; pages of a mapped file count.
"""

import json
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apollo_jax.checkpoints import checkpoint, convert, npz, published
from apollo_jax.checkpoints.foreign import PICKLED_WEIGHTS
from apollo_jax.checkpoints.opening import open_checkpoint
from apollo_jax.checkpoints.rules import dinov2 as dinov2_rules
from apollo_jax.checkpoints.sources import Index, Stored, concrete
from apollo_jax.checkpoints.translate import Arrays, to_dialect
from apollo_jax.models import apollo, dinov2, qwen2, siglip

SIDE = 98_304  # makes tensors of 400 MB


class Random:
    """Tensors of finite random numbers, the same at every reading of the same part."""

    def __init__(self, shapes: Mapping[str, Any], dtype: str):
        self.stored = {name: Stored("", tuple(s.shape), dtype) for name, s in shapes.items()}

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        full, dtype = concrete(index, self.stored[name].shape), np.dtype(self.stored[name].dtype)
        rng = np.random.default_rng(zlib.crc32(f"{name} {full}".encode()))
        shape = [s.stop - s.start for s in full]
        if dtype.itemsize == 2:
            bits = rng.integers(0, 1 << 16, shape, np.uint16)
            return (bits & np.uint16(0xBFFF)).view(dtype)  # no exponent of all ones
        return rng.random(shape, dtype)


def random_part(config: Any, dtype: str) -> checkpoint.Part:
    """A part with random weights, as large as its config says."""
    weights = Random(checkpoint.shapes(config), dtype)
    files = checkpoint.fresh_files(config, weights)
    return checkpoint.part_of_weights(config, files, weights, Arrays({}), {})


def write_random(folder: Path, config: Any, dtype: str) -> int:
    """Write the published folder of a random model; the bytes of its largest tensor."""
    whole = isinstance(config, apollo.Config)
    places = checkpoint.apollo_places(config) if whole else {"": config}
    parts = {place: random_part(part, dtype) for place, part in places.items()}
    write: Any = published.write_apollo if whole else published.write_parts
    write(folder, checkpoint.Checkpoint(config, parts), dtype=None, max_shard_size=None)
    return max(stored.nbytes for p in parts.values() for stored in p.tensors.stored.values())


# ---- sources: one tensor is a factor of the model


def tower(side: int) -> siglip.Config:
    """Linears of 1024 * side numbers; two layers that Apollo uses and one that it does not."""
    return siglip.Config(
        hidden_size=1024,
        intermediate_size=side,
        num_hidden_layers=3,
        num_attention_heads=16,
        image_size=28,
        patch_size=14,
    )


def decoder(side: int) -> qwen2.Config:
    """An embedding of 1024 * side numbers, and a head that is not tied to it."""
    return qwen2.Config(
        vocab_size=side,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


def make(folder: Path, side: int) -> dict[str, int]:
    """Write every source; the bytes of the largest tensor of each, and of what it becomes."""
    sizes = {"tower": write_random(folder / "tower", tower(side), "float32")}
    sizes["decoder"] = write_random(folder / "decoder", decoder(2 * side), "bfloat16")
    for name in ("tower", "decoder"):
        convert.convert(folder / name, folder / f"{name}-orbax", to="orbax")
    opened = open_checkpoint(folder / "tower").parts[""]
    npz.write_big_vision(folder / "loop.npz", opened, None, scan=False)
    npz.write_big_vision(folder / "scan.npz", opened, None, scan=True)
    return sizes


def make_pickles(folder: Path, side: int) -> dict[str, int]:
    """The sources that take PyTorch to write."""
    import torch  # pyright: ignore[reportMissingImports]

    def save(source: Any, path: Path) -> None:
        tensors = {
            name: torch.from_numpy(np.array(source.read(name), order="C")) for name in source.stored
        }
        path.parent.mkdir(exist_ok=True)
        torch.save(tensors, path)

    part = open_checkpoint(folder / "tower").parts[""]
    save(part.tensors, folder / "bin" / PICKLED_WEIGHTS[0])
    for name in ("config.json", "preprocessor_config.json"):
        (folder / "bin" / name).write_bytes((folder / "tower" / name).read_bytes())
    config = dinov2.Config(
        hidden_size=1024, mlp_ratio=side // 1024, num_hidden_layers=3, table_size=28
    )
    authors = random_part(config, "float32")
    [dialect] = dinov2_rules.dialects(config, authors.published_config)
    view = to_dialect(authors.tensors, dialect)
    save(view, folder / "dinov2.pth")
    return {}


# name -> source, target, options
PAIRS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "hf -> orbax": ("tower", "out", ("--to", "orbax")),
    "hf -> orbax, --dtype bfloat16": ("tower", "out", ("--to", "orbax", "--dtype", "bfloat16")),
    "hf -> hf, --dtype bfloat16": ("tower", "out", ("--dtype", "bfloat16")),
    "hf -> hf, --max-shard-size": ("tower", "out", ("--max-shard-size", "100MB")),
    "hf -> hf, --verify": ("tower", "out", ("--verify",)),
    "hf -> big_vision": ("tower", "out.npz", ("--to", "big_vision")),
    "hf -> big_vision, --scan": ("tower", "out.npz", ("--to", "big_vision", "--scan")),
    "orbax -> hf": ("tower-orbax", "out", ()),
    "orbax -> hf, --dtype bfloat16": ("tower-orbax", "out", ("--dtype", "bfloat16")),
    "orbax -> hf, --verify": ("tower-orbax", "out", ("--verify",)),
    "orbax -> orbax": ("tower-orbax", "out", ("--to", "orbax")),
    "orbax -> big_vision": ("tower-orbax", "out.npz", ("--to", "big_vision")),
    "orbax -> big_vision, --scan": ("tower-orbax", "out.npz", ("--to", "big_vision", "--scan")),
    "npz -> hf": ("loop.npz", "out", ()),
    "npz -> hf, --verify": ("loop.npz", "out", ("--verify",)),
    "npz -> orbax": ("loop.npz", "out", ("--to", "orbax")),
    "npz, stacked -> hf": ("scan.npz", "out", ()),
    "npz, stacked -> orbax": ("scan.npz", "out", ("--to", "orbax")),
    "npz, stacked -> orbax, --verify": ("scan.npz", "out", ("--to", "orbax", "--verify")),
    "decoder, hf -> orbax": ("decoder", "out", ("--to", "orbax")),
    "decoder, hf -> orbax, --verify": ("decoder", "out", ("--to", "orbax", "--verify")),
    "decoder, orbax -> hf": ("decoder-orbax", "out", ()),
    "decoder, hf -> hf, --vocab-size": ("decoder", "out", ("--vocab-size", "{rows}")),
    "torch .bin -> hf": ("bin", "out", ()),
    "torch .bin -> orbax": ("bin", "out", ("--to", "orbax")),
    "torch .bin -> hf, --dtype bfloat16": ("bin", "out", ("--dtype", "bfloat16")),
    "torch .pth -> hf": ("dinov2.pth", "out", ()),
    "torch .pth -> orbax": ("dinov2.pth", "out", ("--to", "orbax")),
}


# ---- every pair


def measure(folder: Path, side: int, names: Iterable[str] = ()) -> dict[str, dict[str, float]]:
    """What each pair took, of all or of those named; `folder` must have room for ten sources."""
    largest = max(make(folder, side).values())
    if any(name.startswith("torch") for name in names or PAIRS):
        make_pickles(folder, side)
    found = {}
    for name in names or PAIRS:
        source, target, options = PAIRS[name]
        rows = [option.format(rows=2 * side + 1024) for option in options]
        words = [*rows, str(folder / source), str(folder / target)]
        command = [sys.executable, __file__, *words, "--overwrite"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        took = json.loads(done.stdout.splitlines()[-1])
        found[name] = took | dict(times_largest=took["peak_bytes"] / largest)
    return dict(found)


def show(found: Mapping[str, Mapping[str, float]]) -> None:
    """A line for each pair."""
    print(f"{'':40} {'peak, MB':>10} {'of largest':>10} {'seconds':>8}")
    for name, took in found.items():
        share = took["times_largest"]
        print(f"{name:40} {took['peak_bytes'] / 1e6:10.0f} {share:9.2f}x {took['seconds']:8.1f}")


# ---- in a process of its own


def job(argv: list[str]) -> None:
    """Convert here and say the peak of the resident bytes above those after the imports."""
    if any(word.endswith((".pth", "bin")) for word in argv):
        import torch  # noqa: F401  # pyright: ignore[reportMissingImports]
    else:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  # loads no model
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident, start = memory("VmRSS"), time.perf_counter()
    convert.main(argv)
    took = time.perf_counter() - start
    print(json.dumps(dict(peak_bytes=memory("VmHWM") - resident, seconds=took)))


def memory(field: str) -> int:
    """Bytes that the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    job(sys.argv[1:])
