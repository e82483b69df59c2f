# SPDX-License-Identifier: Apache-2.0
"""Agreement: what the processes of a run tell each other about their data.

A process that stopped alone would leave the others waiting for it. So whatever goes wrong with the
data of one is kept until all of them have heard of it, at the same step, and stop as one.
k numbers.
"""

import functools
import zlib
from collections.abc import Callable
from typing import NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from apollo_jax.training.meeting import gather, together
from apollo_jax.training.rows import Share
from data_pipeline.batch import Batch
from data_pipeline.loader import Loader, LoadStats, too_many

_NOTHING = LoadStats(0, 0, 0, 0, (), 0.0, 0.0)
_WORDS = 1500  # bytes that a process can say


class Feed:
    """A loader that does not fail alone: after an error it gives rows of padding, and keeps it.

    Rows that several processes read are counted by the first of them.
    """

    def __init__(self, loader: Loader, mine: Share):
        self.loader, self.mine = loader, mine
        self.error = ""
        self.digest = 0  # of the rows so far, if another process reads them too

    def __next__(self) -> tuple[Batch, LoadStats]:
        try:
            if not self.error:
                batch, stats = next(self.loader)
                if self.mine.count < jax.process_count():
                    for field in (batch.tokens, batch.loss_weights, batch.clip_mask):
                        self.digest = zlib.crc32(field.tobytes(), self.digest)
                return batch, stats if self.mine.first else _NOTHING
        except StopIteration:
            raise
        except Exception as error:
            if jax.process_count() == 1:
                raise
            self.error = str(error) if isinstance(error, ValueError) else repr(error)
        return self.loader.empty(), _NOTHING


def total(values: np.ndarray) -> jax.Array | np.ndarray:
    """The sum over all processes of i32[k]; called by all of them, waits for none."""
    if jax.process_count() == 1:
        return values
    rows, add = _adder()
    mine = np.zeros((jax.local_device_count(), len(values)), np.int32)
    mine[0] = values
    return add(jax.make_array_from_process_local_data(rows, mine))


@functools.cache
def _adder() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """How a row per device is laid out, and the compiled sum over them."""
    mesh = Mesh(jax.devices(), "devices")
    everywhere = NamedSharding(mesh, PartitionSpec())
    add = jax.jit(lambda rows: rows.sum(axis=0), out_shardings=everywhere)
    return NamedSharding(mesh, PartitionSpec("devices")), together(add)


def first(found: bool) -> bool:
    """What process 0 found, in all processes; called by all of them."""
    mine = bool(found) and jax.process_index() == 0
    return bool(np.asarray(total(np.array([mine], np.int32))).any())


def stop(said: str, reason: str = "") -> NoReturn:
    """ValueError, the same in all processes: the reason, and what any process has to say."""
    heard = hear(said)
    if len(set(heard)) == 1:
        lines = [heard[0]]
    else:
        lines = [f"process {number}: {text}" for number, text in enumerate(heard) if text]
    raise ValueError("\n".join([reason] * bool(reason) + lines))


def stop_if_any(said: str) -> None:
    """Raises as `stop` if any process has something to say; waits for all."""
    if jax.process_count() > 1 and any(hear(said)):
        stop(said)


def stop_if_too_many(bad: int, seen: int, share: float, latest: str) -> None:
    """Raises as `stop` if more samples than `share` were bad in all; `latest` names this one's."""
    if bad and too_many(bad, seen, share):
        reason = f"{bad} of {seen} samples could not be read, more than max_bad_share={share}"
        stop(latest, f"{reason}; the latest:")


def hear(said: str) -> list[str]:
    """What each process says."""
    if jax.process_count() == 1:
        return [said]
    text = np.zeros(_WORDS, np.uint8)
    spoken = np.frombuffer(said.encode()[:_WORDS], np.uint8)
    text[: len(spoken)] = spoken
    heard = gather(text)
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in heard]
