"""Attacks with heads of requests that never end, on many connections of one attacker."""

import contextlib
import socket

import pytest
from bystander import ATTACKER, Bystander
from support.http import address_of
from support.wait import wait_until

CONNECTIONS = 400
# A header of the static table takes one byte here and 46 in the list: 2,700 of them are a list of 121 KiB.
LIST_OF_ONE_BYTE_EACH = b"\x8f" * 2_700
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
UNFINISHED = {
    # HEADERS without END_HEADERS.
    "http/2": PREFACE + len(LIST_OF_ONE_BYTE_EACH).to_bytes(3, "big") + b"\x01\0\0\0\0\x01" + LIST_OF_ONE_BYTE_EACH,
    "http/1.1": b"GET / HTTP/1.1\r\nx-long: " + b"a" * 120 * 1024,
}


@pytest.mark.parametrize("protocol", UNFINISHED)
def test_unfinished_heads_take_a_bounded_amount_of_memory(start_server, embedded, protocol):
    server = start_server(embedded)
    bystander = Bystander(server)
    host, _, port = address_of(server, "grpc_addr" if protocol == "http/2" else "http_addr").rpartition(":")
    with bystander.watching(f"unfinished heads ({protocol})") as look, contextlib.ExitStack() as held:
        wires = []
        for _ in range(CONNECTIONS):
            wire = socket.create_connection((host, int(port)), timeout=5, source_address=ATTACKER)
            wires.append(held.enter_context(wire))
            with contextlib.suppress(OSError):
                wire.sendall(UNFINISHED[protocol])
            look()
        # The places for long heads, of which one client gets three quarters.
        wait_until("no more than have a place are open", lambda: sum(is_open(wire) for wire in wires) <= 128)
    # All of them would take 100 MiB.
    assert bystander.grown < 40


def is_open(wire: socket.socket) -> bool:
    wire.settimeout(0.01)
    try:
        while wire.recv(65_536):
            pass
    except TimeoutError:
        return True
    except OSError:
        pass
    return False
