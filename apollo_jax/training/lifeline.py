# SPDX-License-Identifier: Apache-2.0
"""Lifeline: every process holds a connection to process 0, which sees so at once that one is dead.

A system closes the connections of a process that ends, however it ends. A machine that is gone
closes nothing: that is left to jax's heartbeats. Who loses process 0 is ended by jax at once.
"""

import asyncio
import contextlib
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

_KEY = "apollo/lifeline"
_SECONDS = 10  # that a process tries to reach process 0
_held: list[socket.socket] = []


def hold(client: Any, address: str, me: int, gone: Callable[[int], object]) -> None:
    """Hold the connection for as long as this process lives.

    Args:
      client: of jax's coordination service; by it the others learn where process 0 listens.
      address: HOST:PORT of that service.
      me: the number of this process.
      gone: called in a thread of process 0 with the number of a process that has ended.
    """
    if me == 0:
        listening, secret = _listen(), secrets.token_hex(8)
        client.key_value_set(_KEY, f"{listening.getsockname()[1]} {secret}")
        run = _watch(listening, secret, gone)
        threading.Thread(target=asyncio.run, args=(run,), daemon=True).start()
        return
    port, secret = client.blocking_key_value_get(_KEY, 60_000).split()
    host = address.rpartition(":")[0].strip("[]")
    try:
        _held.append(socket.create_connection((host, int(port)), _SECONDS))
        _held[-1].sendall(f"{secret} {me}\n".encode())
    except OSError as error:
        print(
            f"process {me}: no connection to process 0 at {host}:{port} ({error}): if this process "
            "dies, the others learn it from its heartbeat alone",
            file=sys.stderr,
            flush=True,
        )


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # it may be switched off all the same
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


async def _watch(listening: socket.socket, secret: str, gone: Callable[[int], object]) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said, _, number = (await reader.readline()).decode().strip().partition(" ")
        if said == secret:
            with contextlib.suppress(OSError):
                await reader.read()  # nothing comes but the end
            gone(int(number))
        writer.close()

    server = await asyncio.start_server(connected, sock=listening, backlog=socket.SOMAXCONN)
    await server.serve_forever()
