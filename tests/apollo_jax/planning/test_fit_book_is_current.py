# SPDX-License-Identifier: Apache-2.0
"""The committed fit book: complete, of these configs, and what the compiler still says.

`make tpu` compiles two of its entries again, others every day. APOLLO_BOOK_NUMBER=738000 chooses
those of one day, "all" every entry.
"""

import datetime
import json
import os
from pathlib import Path

import pytest

from apollo_jax.planning import fit_book, jobs

ROOT = Path(__file__).parents[3]
BOOK = json.loads((ROOT / "benchmarks/fit.json").read_text())
CODE = 0.25 * 2**30  # bytes left for the machine code, which the book leaves out


def todays() -> list[str]:
    names = list(BOOK["entries"])
    number = os.environ.get("APOLLO_BOOK_NUMBER") or str(datetime.date.today().toordinal())
    if number == "all":
        return names
    return [names[int(number) % len(names)], names[(int(number) + len(names) // 2) % len(names)]]


def test_every_shipped_recipe_is_in_it_and_fits():
    jobs_by_name = fit_book.entries(ROOT / "configs")
    assert list(BOOK["entries"]) == list(jobs_by_name)
    for name, found in BOOK["entries"].items():
        assert found["fits"], name
        assert found["memory"]["peak"] + CODE <= found["hbm_bytes"], name
        assert found["config"] == fit_book.config_hash(jobs_by_name[name]), (
            f"the config of {name} has changed: apollo-jax plan book --only '{name}'"
        )


def test_the_page_is_made_of_it():
    assert (ROOT / "docs/fit.md").read_text() == fit_book.markdown(BOOK)


def test_it_is_of_the_versions_that_are_locked():
    """Else the test below would be skipped, and the book would age unseen."""
    for name, version in BOOK["versions"].items():
        lock = "lock-py311-tpu.txt" if name == "libtpu" else "lock-py311.txt"
        locked = (ROOT / "requirements" / lock).read_text().splitlines()
        assert f"{name}=={version}" in locked, f"{lock} has another {name}: apollo-jax plan book"
    assert set(BOOK["versions"]) == {"jax", "jaxlib", "flax", "libtpu"}


@pytest.mark.tpu
@pytest.mark.parametrize("name", todays())
def test_the_compiler_says_the_same(name, tmp_path, monkeypatch):
    if jobs.versions() != BOOK["versions"]:  # another Python
        pytest.skip(f"the book is of {BOOK['versions']}, here are {jobs.versions()}")
    monkeypatch.chdir(ROOT)
    job = fit_book.entries()[name]
    ((_, facts),) = jobs.run([job], tmp_path)
    assert not isinstance(facts, jobs.Failed), facts
    changes = fit_book.changes(BOOK["entries"][name], fit_book.entry(job, facts))
    assert not changes, f"new numbers belong into the book: apollo-jax plan book --only '{name}'"
