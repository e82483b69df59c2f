# SPDX-License-Identifier: Apache-2.0
"""A few steps of every kind of stage, as a program: WORLD WORKDIR -> the curves as JSON.

`test_golden.py` runs it, in a process of its own that has one device: what XLA makes of a step
depends on how many there are.
"""

import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import jax

from apollo_jax import config
from apollo_jax.training import contrastive
from apollo_jax.training.train import train

RATES = {
    "align": config.LearningRates(connector=1e-3),
    "vision": config.LearningRates(vision_tower=1e-3, connector=1e-3),
    "sft": config.LearningRates(connector=1e-3, llm=1e-3),
}
HERE = Path(__file__).parent
CURVES = ("loss", "grad_norm")
SIMD = ("sse4", "avx", "fma", "amx", "asimd", "sve")  # beginnings of the features that matter


LOOP = config.TrainConfig(
    num_steps=5, dtype="float32", frozen_dtype="float32", log_every=1, checkpoint_every=100
)
OPTIMIZER = config.OptimizerConfig(warmup_ratio=0.2, weight_decay=0.1)


def stage(world: Path, name: str) -> config.Experiment:
    """One layer of everything, as in small.py, on the clips, texts and padding of tiny.py."""
    small, tiny = (config.load(f"{HERE / file}:{world}") for file in ("small.py", "tiny.py"))
    model = replace(small.model, llm=replace(small.model.llm, vocab_size=400))
    data = replace(tiny.data, batch_size=4)
    optimizer = replace(OPTIMIZER, learning_rates=RATES[name])
    return config.Experiment(name, model, data, LOOP, optimizer)


def pairs(world: Path) -> contrastive.Contrastive:
    """Clips and what is said of them; every other row of a batch has no clip."""
    plain = contrastive.load(f"{HERE / 'pairs.py'}:{world}")
    data = replace(plain.data, batch_size=4)
    return replace(plain, data=data, train=LOOP, optimizer=OPTIMIZER)


def curves(workdir: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in CURVES}


def fingerprint() -> dict[str, str]:
    """What the bits depend on: the compiler, and the instructions that it may use."""
    words: set[str] = set()
    if Path("/proc/cpuinfo").exists():
        words |= set(Path("/proc/cpuinfo").read_text().split())
    simd = sorted(word for word in words if word.startswith(SIMD))
    return {"jax": jax.__version__, "cpu": " ".join([platform.machine(), *simd])}


def main(world: Path, workdir: Path) -> None:
    for name in RATES:
        assert train(stage(world, name), workdir / name)
    assert contrastive.train(pairs(world), workdir / "contrastive")
    found = {name: curves(workdir / name) for name in (*RATES, "contrastive")}
    (workdir / "curves.json").write_text(json.dumps(fingerprint() | {"curves": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
