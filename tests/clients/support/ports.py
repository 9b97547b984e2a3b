"""Ports for the servers of the tests.

They are below the ephemeral ports of the kernel. Otherwise a connection of another test could take the port of a server
that restarts. Each worker of pytest-xdist has its own thousand ports.
"""

import itertools
import os
import random
import socket

FIRST, EACH = 10_000, 1_000

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10
_next = itertools.count(random.randrange(EACH))


def free_port() -> int:
    """A port that nothing listens on; the next call returns another one."""
    for _ in range(EACH):
        port = FIRST + EACH * _worker + next(_next) % EACH
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"none of {EACH} ports is free")
