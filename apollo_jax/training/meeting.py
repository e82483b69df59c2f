# SPDX-License-Identifier: Apache-2.0
"""Meeting: where the processes of a run wait for each other, however late one of them comes.

Who waits hears of those who fail or die, see processes.py.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from apollo_jax.training import processes

_SECONDS = 6 * 3600
_met = itertools.count()  # calls of `meet`; the service takes every key once


def meet() -> None:
    """Wait until all processes have called this as often; the devices have no part in it."""
    if jax.process_count() > 1:
        processes.state().client.wait_at_barrier(f"apollo/meet/{next(_met)}", 1000 * _SECONDS)


def gather(values: np.ndarray) -> np.ndarray:
    """[process, ..]: what each process gives, in all of them; they may come late."""
    meet()
    return np.asarray(multihost_utils.process_allgather(values))


def together(jitted: Any) -> Callable[..., Any]:
    """`jitted`, but on CPUs none of its programs begins before all processes have compiled it.

    Gloo, by which processes on CPUs talk, gives up if one comes 30 s after another to what they
    exchange for the first time.
    """
    met = set()

    @functools.wraps(jitted)
    def call(*args: Any) -> Any:
        if jax.process_count() > 1 and jax.default_backend() == "cpu":
            leaves, structure = jax.tree.flatten(args)
            program = structure, tuple(map(np.shape, leaves))
            if program not in met:
                jitted.lower(*args).compile()
                meet()
                met.add(program)
        return jitted(*args)

    return call
