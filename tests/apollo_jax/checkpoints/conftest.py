# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the conversion tests: encoders in their published layouts, and their contents."""

from pathlib import Path

import pytest

ENCODERS = Path(__file__).parents[2] / "fixtures" / "encoders"


@pytest.fixture(scope="session")
def encoders() -> Path:
    return ENCODERS


@pytest.fixture(scope="session")
def contents():
    """contents(folder) -> {path: bytes}, without a report."""

    def contents(folder: Path) -> dict[str, bytes]:
        files = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
        return {
            str(name): path.read_bytes()
            for name, path in files.items()
            if path.name != "conversion_report.json"
        }

    return contents
