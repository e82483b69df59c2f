# SPDX-License-Identifier: Apache-2.0
"""Settings of this process for jax on a CPU."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of glibc's <malloc.h>


def keep_freed_memory() -> None:
    """Let XLA reuse the memory of the step before instead of asking the kernel for it again.

    Every execution allocates its buffers anew. glibc maps large ones for each request, so that all
    their pages are faulted in and zeroed in every step: a quarter of the time of a small model's
    train step. Call it before threads start; without glibc it does nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for option, value in ((_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):
            libc.mallopt(option, value)
