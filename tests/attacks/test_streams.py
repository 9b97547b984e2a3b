"""Attacks with connections and streams: a few connections of one attacker take the service away from nobody else.

Each test prints what an honest client noticed. The attacker and the honest client have different addresses.
"""

import contextlib
import time

from bystander import Bystander
from support.http import address_of
from support.wait import wait_until
from wire import GRPC, Wire

# How long an attacker goes on.
SECONDS = 4
REFLECTION = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


@contextlib.contextmanager
def wires(address: str, count: int, **options):
    opened = []
    try:
        for _ in range(count):
            opened.append(Wire(address, **options))
        yield opened
    finally:
        for wire in opened:
            wire.close()


def go_on(attackers: list[Wire], look, act) -> None:
    """Every attacker acts again and again, whatever the server does to its connection."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        for wire in attackers:
            with contextlib.suppress(Exception):
                act(wire)
                wire.flush()
                wire.take()
        look()


def test_calls_whose_message_never_comes_take_no_place(start_server, embedded):
    server = start_server(embedded)
    bystander = Bystander(server)

    def begin_calls(wire: Wire) -> None:
        for _ in range(20):
            wire.open("/postern.auth.v1.AuthService/SignUp", GRPC, end=False)

    with bystander.watching("HEADERS without a message") as look, wires(server.address, 11) as attackers:
        go_on(attackers, look, begin_calls)
    assert bystander.grown < 60


def test_reflection_streams_with_large_messages_take_little_memory(start_server, embedded):
    server = start_server(embedded)
    bystander = Bystander(server)
    part = b"\x00" + (4 * 2**20 - 5).to_bytes(4, "big") + b"\x22" * 16_000
    with bystander.watching("unfinished messages of reflection") as look, wires(server.address, 60) as attackers:
        go_on(attackers, look, lambda wire: wire.open(REFLECTION, GRPC, part, end=False))
    assert bystander.grown < 40


def test_watching_the_health_on_thousands_of_streams_takes_a_share(start_server, embedded):
    server = start_server(embedded)
    bystander = Bystander(server)
    with bystander.watching("streams that watch the health") as look, wires(server.address, 20) as attackers:
        for wire in attackers:
            for _ in range(200):
                wire.open("/grpc.health.v1.Health/Watch", GRPC, b"\0\0\0\0\0")
            wire.flush()
            look()
        for _ in range(20):
            for wire in attackers:
                wire.take()
            look()
    assert bystander.grown < 40


def test_answers_that_nobody_takes_are_no_copies(start_server, embedded):
    server = start_server(embedded)
    bystander = Bystander(server)
    with bystander.watching("answers with a zero window") as look, wires(address_of(server, "http_addr"), 40, window=0) as attackers:
        for wire in attackers:
            for _ in range(200):
                wire.open("/openapi.json", {}, method="GET")
            wire.flush()
            wire.take()
            look()
        # The 8,000 requests are answered first, which a development build takes its time for.
        wait_until("somebody else is served meanwhile", lambda: len(bystander.times) > 20)
        look()
    assert bystander.grown < 120
