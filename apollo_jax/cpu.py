# SPDX-License-Identifier: Apache-2.0
"""Settings of this process for jax on a CPU."""

import ctypes
import math
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's <malloc.h>


def keep_freed_memory() -> None:
    """Let XLA reuse the memory of the step before instead of asking the kernel for it again.

    Every execution allocates its buffers anew. glibc maps large ones for each request, so that all
    their pages are faulted in and zeroed in every step: a quarter of the time of a small model's
    train step. Call it before threads start, so before torch is imported: called after that, a step
    took 1.4 times as long. Without glibc it does nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for option, value in ((_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):
            libc.mallopt(option, value)


def cores() -> int:
    """The CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores(*batch_sizes: int) -> None:
    """As many CPU devices as the batches divide over: XLA splits small models badly by itself.

    Must run before jax looks for devices; a setting of the caller's is left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        rows = math.gcd(*batch_sizes)
        count = next(n for n in range(min(cores(), 8), 0, -1) if rows % n == 0)
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"
