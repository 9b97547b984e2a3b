"""Attacks with idle connections, while the process has few file descriptors."""

import contextlib
import socket
import time
import urllib.request

import pytest
from bystander import ATTACKER, Bystander

from support.client import Client
from support.http import address_of
from support.server import Server

DESCRIPTORS = 256


@pytest.fixture
def small_server(binary, embedded, tmp_path):
    """A server that may have few file descriptors."""
    program = tmp_path / "postern"
    program.write_text(f'#!/bin/sh\nulimit -n {DESCRIPTORS}\nexec "{binary}" "$@"\n')
    program.chmod(0o755)
    (tmp_path / "server").mkdir()
    server = Server(program, embedded, tmp_path / "server", access_log="false")
    yield server.start()
    server.close()


def test_idle_connections_of_one_client_leave_room_for_the_others(small_server):
    server = small_server
    bystander = Bystander(server)
    addresses = [server.address, address_of(server, "http_addr"), address_of(server, "ops_addr")]
    lines = len(server.log)
    with bystander.watching("idle connections") as look, contextlib.ExitStack() as held:
        for number in range(3 * DESCRIPTORS):
            host, _, port = addresses[number % 3].rpartition(":")
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_connection((host, int(port)), timeout=2, source_address=ATTACKER))
        look()
        for _ in range(5):
            newcomer = Client(server.address)
            assert newcomer.health() == "SERVING", "a new gRPC connection of somebody else"
            newcomer.close()
            for address, path in ((addresses[1], "/.well-known/jwks.json"), (addresses[2], "/readyz")):
                with urllib.request.urlopen(f"http://{address}{path}", timeout=3) as answer:
                    assert answer.status == 200
            time.sleep(0.2)
    assert len(server.log) - lines < 10, "the log is not flooded"
