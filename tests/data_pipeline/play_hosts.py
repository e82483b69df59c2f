# SPDX-License-Identifier: Apache-2.0
"""Plays the processes of a pod, each a process of its own: `play_hosts.py HOSTS.pickle OUT`.

HOSTS lists dicts: config, steps, process_index, process_count, stop (steps), state. What the n-th
has seen is in OUT/n.json.
"""

import hashlib
import json
import os
import pickle
import sys
import traceback
from pathlib import Path

import numpy as np

from data_pipeline.loader import Loader
from data_pipeline.tokenizer import Tokenizer


def play(host: dict) -> dict:
    """Digests and answers of every row of every step, and the state after the last."""
    config = host["config"]
    loader = Loader(
        config,
        num_steps=host["steps"],
        process_index=host["process_index"],
        process_count=host["process_count"],
    )
    if host.get("state"):
        loader.set_state(host["state"])
    tokenizer = Tokenizer.from_path(config.tokenizer)
    digests, answers, resident = [], [], []
    for _ in range(host["stop"]):
        batch, stats = next(loader)
        assert not stats.bad, stats.bad
        if host.get("look", True):
            digests.append(
                [digest([field[row] for field in batch]) for row in range(len(batch[0]))]
            )
            answers.append([said(batch, row, tokenizer) for row in range(len(batch[0]))])
        resident.append(resident_bytes())
        del batch
    found = {"digests": digests, "answers": answers, "state": loader.get_state()}
    threads = len(os.listdir("/proc/self/task"))
    loader.close()
    return found | {"threads": threads, "resident": resident}


def digest(row: list[np.ndarray]) -> str:
    return hashlib.sha256(b"".join(field.tobytes() for field in row)).hexdigest()[:16]


def said(batch, row: int, tokenizer: Tokenizer) -> list[str]:
    """Kind and number of the record of each segment."""
    names = []
    for segment in range(1, batch.segment_ids[row].max() + 1):
        learnt = (batch.segment_ids[row] == segment) & (batch.loss_weights[row] > 0)
        names.append(" ".join(tokenizer.decode(batch.targets[row][learnt]).split()[:2]))
    return names


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    hosts, out = pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
    children = []
    for number, host in enumerate(hosts):
        child = os.fork()  # before there are any threads
        if not child:
            code = 1
            try:
                (out / f"{number}.json").write_text(json.dumps(play(host)))
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
