# SPDX-License-Identifier: Apache-2.0
"""The benchmark of stored pixels runs: better JPEGs are larger and nearer to unstored frames."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from apollo_jax.evaluation.apollobench_mini import write_video
from apollo_jax.models import siglip

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch):
    """The command with one small tower and two of the JPEGs."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench = importlib.import_module("pixels")
    tower = siglip.Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=384,
        patch_size=64,
    )
    monkeypatch.setattr(bench, "TOWERS", {"SigLIP": tower})
    monkeypatch.setattr(bench, "STORED", [(80, "420"), (95, "444")])
    yield bench
    del sys.modules["pixels"]


def test_it_measures(bench, tmp_path, monkeypatch, capsys):
    out = tmp_path / "pixels.json"
    monkeypatch.setattr(sys, "argv", ["pixels.py", "--clips", "1", "--json", str(out)])
    bench.main()
    report = json.loads(out.read_text())
    worse, better = report["stored"]
    assert worse["kB/s"] < better["kB/s"]
    assert worse["psnr"] < better["psnr"]
    assert worse["SigLIP"] > better["SigLIP"] > 0
    assert set(report["speed"]) >= {"rgb", "yuv420 without libturbojpeg"}
    assert "| q95 4:4:4 |" in capsys.readouterr().out


def test_a_film_gives_whole_clips(bench, tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, np.zeros((40, 48, 64, 3), np.uint8))
    assert bench.film(str(path), 2).shape == (8, 48, 64, 3)
