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
from apollo_jax.models import apollo, two_towers
from apollo_jax.training import contrastive
from apollo_jax.training.train import train
from data_pipeline.loader import DataConfig, SourceConfig

RATES = {
    "align": config.LearningRates(connector=1e-3),
    "vision": config.LearningRates(vision_tower=1e-3, connector=1e-3),
    "sft": config.LearningRates(connector=1e-3, llm=1e-3),
}
CURVES = ("loss", "grad_norm")
SIMD = ("sse4", "avx", "fma", "amx", "asimd", "sve")  # beginnings of the features that matter


def data(world: Path, **changes) -> DataConfig:
    plain = DataConfig(
        sources={"all": SourceConfig(f"{world}/train.jsonl")},
        frames=(f"{world}/shards",),
        tokenizer=f"{world}/tokenizer.model",
        batch_size=4,
        length=192,
        clips=2,
        frame_size=32,
        tokens_per_clip=8,
    )
    return replace(plain, **changes)


LOOP = config.TrainConfig(
    num_steps=5, dtype="float32", frozen_dtype="float32", log_every=1, checkpoint_every=100
)
OPTIMIZER = config.OptimizerConfig(warmup_ratio=0.2, weight_decay=0.1)


def stage(world: Path, name: str) -> config.Experiment:
    """One layer of everything; clips, texts and padding."""
    debug = apollo.Config.debug(vocab_size=400)
    model = replace(
        debug,
        towers={"internvideo2": replace(debug.towers["internvideo2"], depth=2)},
        connector=replace(
            debug.connector, vision_hidden_size=64, token_input_shape=(4, 2, 2), resampler_depth=1
        ),
        llm=replace(debug.llm, num_hidden_layers=1),
    )
    optimizer = replace(OPTIMIZER, learning_rates=RATES[name])
    return config.Experiment(name, model, data(world), LOOP, optimizer)


def pairs(world: Path) -> contrastive.Contrastive:
    """Clips and what is said of them; every other row of a batch has no clip."""
    tower = replace(apollo.Config.debug().towers["siglip"], num_hidden_layers=2)
    text = two_towers.TextConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_tokens=16,
    )
    model = two_towers.Config({"siglip": tower}, text, embedding_size=32, frames_per_clip=4)
    settings = data(world, clips=1, max_clips=1, tokens_per_clip=1)
    rates = contrastive.Rates(1e-3, 1e-3, 1e-3)
    return contrastive.Contrastive("pairs", model, settings, LOOP, rates, optimizer=OPTIMIZER)


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
