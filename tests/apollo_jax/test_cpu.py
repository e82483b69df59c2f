# SPDX-License-Identifier: Apache-2.0
"""Freed memory stays with the process; every core gets rows."""

import os
import platform
import subprocess
import sys

import pytest

from apollo_jax import cpu

COUNT_FAULTS = """
import resource
import numpy as np
from apollo_jax import cpu

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(64 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = [faults(), faults()]
cpu.keep_freed_memory()
print(*default, faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_pages_are_faulted_in_once():
    """Of 64 MB: without the setting each time, with it the first time only."""
    run = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *default, first, second = map(int, run.stdout.split())
    assert min(*default, first) > 20 * second


def test_every_core_gets_rows(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(cpu, "cores", lambda: 3)
    cpu.use_all_cores(16, 8)
    assert os.environ["XLA_FLAGS"].endswith("count=2")
    cpu.use_all_cores(15)  # what is set stays
    assert os.environ["XLA_FLAGS"].endswith("count=2")
