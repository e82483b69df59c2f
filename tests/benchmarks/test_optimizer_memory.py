# SPDX-License-Identifier: Apache-2.0
"""The benchmark of optimizer states runs; its figures are those of the states' shapes."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = f"{ROOT / 'configs/demo.py'}:sft"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    bench = importlib.import_module("optimizer_memory")
    monkeypatch.setattr(bench, "use_compiler_only", lambda: None)  # the tests have their devices
    yield bench
    del sys.modules["optimizer_memory"]


def test_it_measures(bench, tmp_path, monkeypatch, capsys):
    out = tmp_path / "found.json"
    given = ["optimizer_memory.py", "--config", DEMO, "--chips", "4", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", given)
    bench.main()
    found = json.loads(out.read_text())
    assert list(found) == [*bench.NAMES, "apollo, tables too", "apollo_mini, tables too"]
    held = {name: row["per_chip"] for name, row in found.items()}
    assert held["adamw"] == held["lamb"]
    assert held["lion"] == pytest.approx(held["adamw"] / 2, rel=1e-3)
    assert held["apollo_mini, tables too"] < held["apollo_mini"] < held["adamw"]
    for row in found.values():
        assert row["per_chip"] >= row["ideal"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("adamw")
    assert " 1.000 " in printed[0]
    assert len(printed) == len(found)
