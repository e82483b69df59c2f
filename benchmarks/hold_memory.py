# SPDX-License-Identifier: Apache-2.0
"""Freed memory stays with a process that imports this before what starts threads (torch)."""

from apollo_jax import cpu

cpu.keep_freed_memory()
HELD = True
