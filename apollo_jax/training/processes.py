# SPDX-License-Identifier: Apache-2.0
"""Processes: how those of a run find each other, and how they part.

Nobody waits for ever. Who waits in vain for the others to start, or runs other code or another
config than process 0, is refused before anything is compiled. Who fails leaves its last words with
process 0's service; the others read them and end too, so that whoever started them can start all
again. What dies without a word is noticed by its connection that closes, see lifeline.py, or by the
missing heartbeat.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from jaxlib import version

from apollo_jax.config_values import leaves
from apollo_jax.training import lifeline

STOPPED = 128 + signal.SIGTERM  # exit status of processes that end on it with nothing to save
AGAIN = 75  # exit status of a process that lost the others: EX_TEMPFAIL, start all of them again
_PARTING = 5.0  # seconds that one who failed waits whether all others failed too
_LISTEN = 2.0  # seconds between two looks at what others had to say
_ADDRESS = re.compile(r"(?P<place>.+:[0-9]+),(?P<count>[0-9]+),(?P<index>[0-9]+)")
_over = threading.Event()  # this process has come to its end, and knows why
heeded = threading.Event()  # a loop looks whether SIGTERM came, and saves; see stop_signal.py
_caught: set[type[Exception]] = set()  # what `leave` lets pass, see `parting`
_gone: list[int] = []  # processes that ended, as process 0 sees them
_compared = itertools.count()  # calls of `same`; the service takes every key once
# Paths and threads may be each machine's own.
_OWN = (".path", ".data_dir", "data.frames", "data.sizes", "data.tokenizer", "data.threads",
        "train.local_checkpoints")  # fmt: skip


class Again(Exception):
    """What will not be there when all processes start again: this one exits with status AGAIN."""


def add_flag(parser: argparse.ArgumentParser) -> None:
    """--distributed, as `join` takes it."""
    parser.add_argument(
        "--distributed",
        nargs="?",
        const="auto",
        default=os.environ.get("APOLLO_DISTRIBUTED"),
        metavar="HOST:PORT,COUNT,INDEX",
        help="this is one of many processes; found out by itself on TPU pods, GKE and SLURM",
    )


def join(how: str, experiment: Any) -> None:
    """Join the other processes of the run; `how` is "auto" or "HOST:PORT,COUNT,INDEX".

    `experiment` is what all of them must have alike, a dataclass with a TrainConfig `train`.

    Raises ValueError if a process differs from process 0 (all of them raise it). If not all have
    come after `train.join_seconds` this process says so and exits with status AGAIN.
    """
    seconds, where = experiment.train.join_seconds, "auto"
    address: dict[str, Any] = {}
    if how != "auto":
        found = _ADDRESS.fullmatch(how)
        if found is None or not int(found["index"]) < int(found["count"]):
            raise ValueError(
                f"--distributed {how}: must be auto or HOST:PORT,COUNT,INDEX, the port of process "
                "0 and an index from 0 to COUNT - 1"
            )
        place, count, index = found.groups()
        address = dict(coordinator_address=place, num_processes=int(count), process_id=int(index))
        where = f"process {index} of {count} at {place}"
    alarm = threading.Timer(seconds, _give_up, (where, seconds))
    alarm.daemon = True
    alarm.start()
    try:  # the alarm comes first: what jax does after its own timeout is to abort without a reason
        jax.distributed.initialize(
            **address,
            initialization_timeout=seconds + 60,
            heartbeat_timeout_seconds=experiment.train.heartbeat_seconds,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed {how}: jax finds nothing here that says who the other processes are, "
            f"as TPU pods, GKE and SLURM do ({error}); say it: --distributed HOST:PORT,COUNT,INDEX"
        ) from error
    finally:
        alarm.cancel()
    same("start", _facts(experiment), seconds)
    now = state()
    lifeline.hold(now.client, now.coordinator_address, now.process_id, _gone.append)


def _give_up(where: str, seconds: float) -> None:
    _end(
        AGAIN,
        f"{where}: waited {seconds:g} s and not all processes of the run have come. See which did "
        "not start (each of them waits for process 0, and process 0 for all), that all were given "
        "the same HOST:PORT,COUNT and that the port can be reached; then start all of them again",
    )


def _facts(experiment: Any) -> dict[str, Any]:
    """What must be the same in all processes."""
    fields = leaves(dataclasses.asdict(experiment), "config.")
    return {
        "apollo-jax code": code_digest(),
        "jax": jax.__version__,
        "jaxlib": version.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: value for name, value in fields.items() if not name.endswith(_OWN)},
    }


def code_digest() -> str:
    """A digest of the source of this package and of the data pipeline."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for package in ("apollo_jax", "data_pipeline"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def same(kind: str, facts: dict[str, Any], seconds: float) -> None:
    """ValueError, in all processes, that names those whose facts differ from process 0's.

    Nothing is compiled for it: it goes through the service that the processes joined. All of them
    call it as often, and wait for each other in it.
    """
    client, me, wait = state().client, state().process_id, round(1000 * seconds)
    if client is None:
        return
    facts, key = json.loads(json.dumps(facts)), f"apollo/same/{next(_compared)}/{kind}"
    if me == 0:
        client.key_value_set(f"{key}/facts", json.dumps(facts))
    first = json.loads(client.blocking_key_value_get(f"{key}/facts", wait))
    wrong = [
        f"{name} is {facts.get(name)!r}, process 0 has {first.get(name)!r}"
        for name in sorted(first.keys() | facts.keys())
        if first.get(name) != facts.get(name)
    ]
    if wrong:
        what = "; ".join(wrong[:5])
        client.key_value_set(f"{key}/differs/{me:06d}", f"{me} ({socket.gethostname()}): {what}")
    client.wait_at_barrier(f"{key}/heard", wait)
    differ = [text for _, text in sorted(client.key_value_dir_get(f"{key}/differs"))]
    if differ:
        client.wait_at_barrier(f"{key}/read", wait)  # the service leaves with process 0
        more = f"\n  and {len(differ) - 5} more" if len(differ) > 5 else ""
        lines = "\n  process ".join(["", *differ[:5]])
        raise ValueError(f"the processes of this run are not the same:{lines}{more}")


@contextlib.contextmanager
def parting(*caught: type[Exception]) -> Iterator[None]:
    """What goes wrong in here ends all processes: this one, with the reason, and the others soon.

    An error of all processes is raised as it is. After another one this process exits, at once and
    without the farewells that would wait for the others: with status 2 if the reason is its own,
    with AGAIN if it lost the others.

    Args:
      caught: errors that only ever come to all processes, and that the block itself catches: it
        goes on after them, so `leave` does not take them for the end.
    """
    if jax.process_count() == 1:
        yield
        return
    _over.clear()
    _caught.update(caught)
    threading.Thread(target=_listen, daemon=True).start()
    try:
        yield
    except Exception as error:
        _caught.clear()
        leave(type(error), error, None)
        raise
    finally:
        _caught.clear()
        _over.set()


def leave(kind: Any, error: BaseException | None, trace: Any) -> None:
    """The end of `parting` as an `__exit__`, where what comes after it would wait for the others.

    A save in the background is finished by all processes or by none.
    """
    del kind, trace
    if not isinstance(error, Exception) or isinstance(error, tuple(_caught)):
        return
    if jax.process_count() > 1 and not _over.is_set():
        _over.set()
        _part(error)


def _part(error: Exception) -> None:
    """Returns if all processes failed; else ends this one."""
    me, own = jax.process_index(), isinstance(error, (ValueError, OSError, Again))
    if is_loss(error):
        if not heeded.is_set() and _asked_to_stop():  # as the other was
            _stop()
        why = _heard() or _obituary() or _first_line(error)
        _say("lost", f"process {me} lost another: {_first_line(error)}")
        time.sleep(_LISTEN)
        _lost(why)
    _say("failed", f"process {me}: {error if own else repr(error)}")
    if isinstance(error, Again):
        _lost(str(error), "stops")
    try:
        state().client.wait_at_barrier("apollo/parting", round(1000 * _PARTING))
    except Exception:
        if not own:
            sys.excepthook(type(error), error, error.__traceback__)
        _end(2, f"process {me} stops alone, the others follow: {error}")


def is_loss(error: BaseException) -> bool:
    """Whether an error is what a collective makes of a process that is gone."""
    signs = ("Gloo", "Connection reset", "Connection closed", "heartbeat", "coordination service",
             "CoordinationServiceError")  # fmt: skip
    return any(sign in str(error) for sign in signs)


def _listen() -> None:
    """Ends this process, wherever it waits, when another has left its last words or is gone.

    The same where SIGTERM came to one of them and no loop heeds it: jax takes the signal.
    """
    while not _over.wait(_LISTEN):
        if not heeded.is_set() and _asked_to_stop():
            time.sleep(2 * _LISTEN if jax.process_index() == 0 else 0)  # the service goes last
            if not heeded.is_set() and not _over.is_set():
                _stop()
        gone = _obituary()  # before the words, which come before the end
        failed = _heard("failed")
        if failed and _over.wait(2 * _PARTING):  # it may be an error of all
            return
        if words := failed or _heard("lost"):
            _lost(words)
        if gone:
            _say("lost", gone)
            _lost(gone)


def _stop() -> NoReturn:
    text = "stops on a signal; there is nothing to save, the same command continues"
    _end(STOPPED, f"process {jax.process_index()} {text}")


def _asked_to_stop() -> bool:
    with contextlib.suppress(Exception):  # there is no such key before
        return bool(state().client.key_value_try_get("RECEIVED_PREEMPTION_NOTICE"))  # jax's own
    return False


def _obituary() -> str:
    return "".join(f"process {i} is gone: it was killed or crashed" for i in _gone[:1])


def _say(kind: str, words: str) -> None:
    with contextlib.suppress(Exception):  # the service goes with process 0
        state().client.key_value_set(f"apollo/{kind}/{jax.process_index():06d}", words)


def _heard(kind: str = "failed") -> str:
    with contextlib.suppress(Exception):
        said = state().client.key_value_dir_get(f"apollo/{kind}")
        return "\n".join(words for _, words in sorted(said)[:5])
    return ""


def _lost(why: str, what: str = "lost the others of the run and stops") -> NoReturn:
    time.sleep(2 * _LISTEN if jax.process_index() == 0 else 0)  # the service goes last
    _end(
        AGAIN,
        f"process {jax.process_index()} {what}: {why}\nStart all of them again with the same "
        "command: they go on from the last checkpoint",
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), repr(error))[:300]


def _end(status: int, text: str) -> NoReturn:
    """Exit now: an orderly exit would wait for processes that do not come."""
    print(f"apollo-jax: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def state() -> Any:
    """What jax knows of the processes, without asking the devices."""
    from jax._src import distributed  # there is no public way to its key-value store

    return distributed.global_state
