# SPDX-License-Identifier: Apache-2.0
"""What test_survive.py does not come to see of the connections by which a death is noticed."""

import queue
import socket

from apollo_jax.training import lifeline


class Service:
    """Of jax's coordination service what `hold` uses."""

    def __init__(self, **facts: str):
        self.facts = facts

    def key_value_set(self, key: str, value: str) -> None:
        self.facts[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        del milliseconds
        return self.facts[key]


def test_who_does_not_know_the_secret_is_no_process():
    service, gone = Service(), queue.Queue()
    lifeline.hold(service, "localhost:1", 0, gone.put)
    (said,) = service.facts.values()
    port, secret = said.split()
    for first_words in ("GET / HTTP/1.1\n", "", "nobody 3\n", f"{secret} 5\n"):
        with socket.create_connection(("localhost", int(port))) as line:
            line.sendall(first_words.encode())
        if secret not in first_words:
            with socket.create_connection(("127.0.0.1", int(port))):
                pass
    assert gone.get(timeout=60) == 5
    assert gone.empty()


def test_goes_on_without_and_says_so(capsys):
    with socket.create_server(("localhost", 0)) as closed:
        port = closed.getsockname()[1]
    service = Service(**{"apollo/lifeline": f"{port} secret"})
    lifeline.hold(service, "localhost:1", 3, lambda process: None)
    said = capsys.readouterr().err
    assert f"process 3: no connection to process 0 at localhost:{port} (" in said
    assert "the others learn it from its heartbeat alone" in said
