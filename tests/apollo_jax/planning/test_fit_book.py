# SPDX-License-Identifier: Apache-2.0
"""How the fit book is made and read; plans are given, none is compiled."""

import copy
import json
from pathlib import Path

import pytest

from apollo_jax.planning import fit_book, jobs

CONFIGS = Path(__file__).parents[3] / "configs"
GIB = 2**30
FACTS = {
    "chips": 64,
    "mesh": {"data": 1, "fsdp": 64, "context": 1, "tensor": 1},
    "hbm_bytes": 96 * GIB,
    "memory": dict.fromkeys(("params", "frozen", "moments", "batch", "temporaries", "code"), GIB)
    | {"peak": 6 * GIB},
    "batch": {"rows": 64, "tokens": 64 * 4096, "frames": 64 * 112},
    "model_flops": 1e14,
    "executed_flops": 1.5e14,
    "fits": True,
    "collectives": [
        dict(kind="all-gather", axes=["fsdp"], count=2, bytes=GIB, asynchronous=GIB),
        dict(kind="all-reduce", axes=["data", "fsdp"], count=1, bytes=GIB, asynchronous=0),
    ],
    "bound": dict.fromkeys(fit_book._BOUND, 0.5) | {"tokens_per_second": 524_288.0},
    "compile_seconds": 100.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def made():
    job = fit_book.entries(CONFIGS)["apollo_7b:sft,v5p-128"]
    return fit_book.entry(job, FACTS)


def test_every_recipe_has_every_slice():
    names = list(fit_book.entries(CONFIGS))
    assert len(names) == 3 * 3 * 4 + 4  # three sizes, three stages; a large batch
    assert names[0] == "apollo_1p5b:align,v5e-256"
    assert len(set(names)) == len(names)


def test_an_entry_keeps_what_can_be_found_again(made):
    assert "compile_seconds" not in made
    assert made["config"] == fit_book.config_hash(
        fit_book.entries(CONFIGS)["apollo_7b:sft,v5p-128"]
    )
    assert made["executed_flops"] == FACTS["executed_flops"]


def test_two_percent_are_let_through(made):
    new = copy.deepcopy(made)
    new["memory"]["temporaries"] *= 1.019
    new["collectives"][0]["bytes"] *= 0.97  # 1.5 % of all that is sent
    new["collectives"][0]["asynchronous"] *= 0.97
    new["bound"]["exposed_exchange_seconds"] *= 1.019
    assert not fit_book.changes(made, new)
    new["memory"]["temporaries"] *= 1.01
    new["executed_flops"] *= 0.97
    assert [line.partition(":")[0] for line in fit_book.changes(made, new)] == [
        "memory.temporaries",
        "executed_flops",
    ]


def test_what_is_sent_otherwise_is_a_change(made):
    """As many bytes, but along another axis, or no longer beside computation."""
    new = copy.deepcopy(made)
    new["collectives"][0] |= {"axes": ["data"], "asynchronous": 0}
    new["bound"]["step_seconds"] *= 1.03
    assert [line.partition(":")[0] for line in fit_book.changes(made, new)] == [
        "bytes sent by all-gather along fsdp",
        "bytes sent beside computation",
        "bound.step_seconds",
        "bytes sent by all-gather along data",
    ]


def test_the_page(made):
    large = made | {"fits": False}
    book = {
        "versions": {"jax": "1.2"},
        "entries": {"apollo_7b:sft,v5p-128": made, "apollo_7b:sft,tpu7x-64": large},
    }
    text = fit_book.markdown(book)
    assert "(jax 1.2)" in text
    assert "## v5p-128\n\n64 chips, 95.74 GiB." in text
    assert "94.75 GiB for each of its 2 devices" in text
    row = next(line for line in text.splitlines() if "`fsdp=64`" in line)
    assert "| 6.00 (6%) | 100 | 1.50 | 0.50 | 50% | 524,288 |" in row
    assert "| `apollo_7b:sft` |  | 1.00 |  |  | 1.00 | 50% |" in text


def test_the_command_continues_and_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(CONFIGS.parent)
    files = ["--json", str(tmp_path / "fit.json"), "--markdown", str(tmp_path / "fit.md")]
    asked = []

    def run(wanted, folder, parallel):
        asked.append((wanted, parallel))
        yield from ((job, FACTS) for job in reversed(wanted))

    monkeypatch.setattr(jobs, "run", run)
    fit_book.main(["--only", "*_3b:sft,v5*", "--jobs", "2", *files])
    fit_book.main(["--only", "*_1p5b:sft,v5e*", *files])
    assert [(len(wanted), parallel) for wanted, parallel in asked] == [(2, 2), (1, 1)]
    book = json.loads((tmp_path / "fit.json").read_text())
    assert list(book["entries"]) == [
        "apollo_1p5b:sft,v5e-256",
        "apollo_3b:sft,v5e-256",
        "apollo_3b:sft,v5p-128",
    ]
    assert "apollo_3b:sft" in (tmp_path / "fit.md").read_text()
    assert "6.00 of 96.00 GiB" in capsys.readouterr().out
    monkeypatch.setattr(jobs, "versions", lambda: {"jax": "9"})
    fit_book.main(["--only", "*_1p5b:sft,v5e*", *files])
    assert "a new book" in capsys.readouterr().out
    book = json.loads((tmp_path / "fit.json").read_text())
    assert (list(book["entries"]), book["versions"]) == (["apollo_1p5b:sft,v5e-256"], {"jax": "9"})
    with pytest.raises(ValueError, match="they are apollo_1p5b:align,v5e-256"):
        fit_book.main(["--only", "nonesuch", *files])
    monkeypatch.setattr(jobs, "run", lambda *a: iter([(asked[0][0][0], jobs.Failed("boom"))]))
    with pytest.raises(SystemExit):
        fit_book.main(["--only", "*_3b:sft,v5e*", *files])
    assert "compiler failed: boom" in capsys.readouterr().out
