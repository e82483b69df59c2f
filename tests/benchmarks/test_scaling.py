# SPDX-License-Identifier: Apache-2.0
"""The scaling benchmark's slices, page and picture; nothing is compiled."""

import importlib.util
import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from apollo_jax.config import load
from apollo_jax.planning.topology import parse
from apollo_jax.training import checks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks/scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_chip_has_the_same_batch(scaling):
    chips = []
    for kind, names in scaling.TOPOLOGIES.items():
        for name in names:
            overrides = dict(scaling.job(name).overrides)
            experiment = load(str(ROOT / scaling.CONFIG), overrides)
            slice_ = parse(name)
            chips.append(slice_.chips)
            mesh = {axis: getattr(experiment.mesh, axis) for axis in ("data", "fsdp")}
            mesh |= dict(context=1, tensor=1)
            assert not list(checks.refusals(experiment, mesh, {"fsdp": 128}))
            assert mesh["data"] * mesh["fsdp"] == experiment.data.batch_size == slice_.chips
            assert mesh["data"] % slice_.slices == 0
            assert (experiment.data.length, experiment.data.clips) == scaling.ROWS[kind]
    assert chips == [16, 64, 256, 1024, 4096] * 2


def test_page_and_picture(scaling):
    facts = {
        "topology": "v5e:4x4",
        "chips": 16,
        "mesh": {"data": 1, "fsdp": 16, "context": 1, "tensor": 1},
        "memory": dict(params=2**29, frozen=2**28, moments=2**28, temporaries=2**30, peak=2**31),
        "collectives": [
            {"axes": ["fsdp"], "bytes": 2**30},
            {"axes": ["fsdp"], "bytes": 2**29},
            {"axes": ["data"], "bytes": 2**28},
        ],
        "bound": {"step_seconds": 1.25, "mfu_ceiling": 0.5},
    }
    first = scaling.point(facts)
    assert first["sent"] == {"fsdp": 1.5 * 2**30, "data": 2**28}
    assert first["state"] == 2**30
    last = first | {"chips": 4096, "topology": "16*v5e:16x16"}
    text = scaling.page({"v5e": [first, last]})
    assert "| 16 (`v5e:4x4`) | `fsdp=16` | 1.00 | 1.00 | 2.00 | 0.25 | 1.50 | 1.25 | 50% |" in text
    svg = ET.fromstring(scaling.picture({"v5e": [first, last]}))
    lines = [e for e in svg.iter() if e.tag.endswith("polyline")]
    assert len(lines) == len(scaling.CURVES)
    first, last = lines[0].attrib["points"].split()
    (left, y), (right, same) = (map(float, point.split(",")) for point in (first, last))
    assert right > left
    assert y == same


def test_what_is_committed_is_made_of_the_numbers(scaling):
    points = json.loads((ROOT / "benchmarks/scaling.json").read_text())["points"]
    found = scaling.by_chip({p["topology"]: p for p in points})
    assert {chip: len(of_chip) for chip, of_chip in found.items()} == {"v5e": 5, "v5p": 5}
    assert (ROOT / "docs/scaling.md").read_text() == scaling.page(found)
    assert (ROOT / "docs/scaling.svg").read_text() == scaling.picture(found)
    for of_chip in found.values():  # what the page says of them
        steps = [p["step_seconds"] for p in of_chip]
        assert max(steps) < 1.03 * min(steps)
        assert all(p["state"] <= before["state"] for before, p in itertools.pairwise(of_chip))
        assert max(p["sent"].get("data", 0) for p in of_chip) < 0.2 * 2**30
