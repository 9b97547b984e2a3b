"""Postern behind nginx and HAProxy, as most deployments run it: what a client of the proxy gets.

Envoy is in `test_envoy`. One engine is enough: no proxy knows of the database.
"""

import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.engine import Sqlite
from support.http import Rest, address_of
from support.proxies import KINDS, Proxy, ThroughProxy, find
from support.refusal import expect_refusal
from support.server import Server
from support.wait import wait_until

LOGIN = "/v1/auth/login"
JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain"}
CHUNKED = {**JSON, "transfer-encoding": "chunked"}
# The requests that are refused before their body was read, with the status. Sizes are in bytes.
REFUSED = {
    "70 kB": (LOGIN, 70_000, JSON, 413),
    "3 MB": (LOGIN, 3_000_000, JSON, 413),
    "3 MB without their length": (LOGIN, 3_000_000, CHUNKED, 413),
    "70 kB of another type": (LOGIN, 70_000, TEXT, 415),
    "70 kB to no route": ("/nowhere", 70_000, JSON, 404),
}
TIMES = 12


@pytest.fixture(scope="module")
def server(binary, tmp_path_factory):
    """One server on SQLite that keeps idle connections for so long that the test of that need not wait for minutes."""
    directory = tmp_path_factory.mktemp("server")
    server = Server(binary, Sqlite(directory / "data"), directory, http_idle_timeout="13s")
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture(scope="module", params=KINDS)
def proxied(request, server, tmp_path_factory, left_out):
    """Calls through each kind of proxy."""
    program = KINDS[request.param][0]
    executable = find(program) or left_out(f"Postern behind {program}: run `scripts/tools {program}`")
    proxy = Proxy(request.param, executable, address_of(server, "http_addr"), tmp_path_factory.mktemp("proxy"))
    try:
        yield ThroughProxy(server, proxy.start())
    finally:
        proxy.close()


@pytest.mark.parametrize(("path", "size", "headers", "status"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refusal_arrives_every_time_although_the_body_was_not_read(proxied, path, size, headers, status):
    body = b'{"email": "' + b"x" * (size - 13) + b'"}'

    def send(_):
        return proxied.post(path, body, headers=headers)

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(send, range(TIMES)))
    assert Counter(answer.status for answer in answers) == {status: TIMES}
    for answer in answers:
        expect_refusal(answer, status)


def test_a_client_that_sends_all_before_it_reads_gets_the_refusal(server):
    """Without a proxy, up to the amount that the server reads after a refusal."""
    rest = Rest(server)
    for size in (70_000, 1_000_000):
        statuses = Counter(rest.post(LOGIN, b"x" * size).status for _ in range(TIMES))
        assert statuses == {413: TIMES}, size


def connect(server) -> socket.socket:
    host, _, port = address_of(server, "http_addr").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def head(length: int) -> bytes:
    lines = (f"POST {LOGIN} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}", "", "")
    return "\r\n".join(lines).encode()


def send_until_refused(wire: socket.socket, part: bytes, most: int, pause: float = 0) -> int:
    """Sends until the server resets the connection, and returns how many bytes it took until then."""
    sent = 0
    while sent < most:
        try:
            sent += wire.send(part)
        except OSError:
            return sent
        time.sleep(pause)
    raise AssertionError(f"{sent} bytes were sent, and the connection is still open")


def test_what_is_read_after_a_refusal_is_bounded_in_bytes_and_in_time(server):
    # A slow sender: the server gives up, although bytes come all the time.
    with connect(server) as wire:
        wire.sendall(head(10_000_000) + b"x")
        began = time.monotonic()
        send_until_refused(wire, b"x", most=600, pause=0.05)
        assert time.monotonic() - began >= 0.5, "it was read for a while"
    # A fast sender that never ends: the server has not read most of it.
    with connect(server) as wire:
        wire.sendall(head(10**12))
        sent = send_until_refused(wire, bytes(65_536), most=2**30)
        assert sent < 2**26, "what was sent beyond 1 MiB was in the buffers of the kernel"


def test_connections_that_are_drained_give_way_to_others(server):
    """They are the idle connections of their client, so whoever drips bodies takes no place from others."""
    held = []
    try:
        for _ in range(50):
            wire = connect(server)
            wire.sendall(head(10_000_000) + b"x")
            held.append(wire)
        assert Rest(server).get("/v1/me").status == 401
        wait_until("the server has closed all of them", lambda: all(is_over(wire) for wire in held), deadline=30)
    finally:
        for wire in held:
            wire.close()


def is_over(wire: socket.socket) -> bool:
    """Whether the server has let go of a connection: it resets what comes afterwards."""
    try:
        wire.sendall(b"x")
    except OSError:
        return True
    return False


# -- idle connections ---------------------------------------------------------------------------------------------


def ask(wire: socket.socket) -> None:
    wire.sendall(b"GET /v1/me HTTP/1.1\r\nhost: x\r\n\r\n")
    answer = b""
    while b'"TOKEN_MISSING"' not in answer:
        part = wire.recv(65_536)
        assert part, f"closed, with {answer!r}"
        answer += part
    assert answer.startswith(b"HTTP/1.1 401 ")


def seconds_until_closed(wire: socket.socket) -> float:
    began = time.monotonic()
    try:
        while wire.recv(65_536):
            pass
    except ConnectionResetError:
        pass
    return time.monotonic() - began


def test_an_idle_connection_lives_as_long_as_is_set_and_an_unfinished_header_ten_seconds(server):
    def idle_and_then_used() -> None:
        with connect(server) as wire:
            ask(wire)
            time.sleep(11)  # longer than a header may take
            ask(wire)

    def idle() -> float:
        with connect(server) as wire:
            ask(wire)
            return seconds_until_closed(wire)

    def unfinished() -> float:
        with connect(server) as wire:
            ask(wire)
            wire.sendall(b"GET /v1/me HT")
            return seconds_until_closed(wire)

    def begun_late() -> float:
        with connect(server) as wire:
            ask(wire)
            time.sleep(5)
            wire.sendall(b"GET /v1/me HTTP/1.1\r\nhost")
            return seconds_until_closed(wire)

    def never_used() -> float:
        with connect(server) as wire:
            return seconds_until_closed(wire)

    with ThreadPoolExecutor(5) as pool:
        used = pool.submit(idle_and_then_used)
        waits = {test.__name__: pool.submit(test) for test in (idle, unfinished, begun_late, never_used)}
    used.result()
    lived = {name: future.result() for name, future in waits.items()}
    assert lived["idle"] >= 12.9, lived
    assert lived["never_used"] >= 12.9, lived
    assert lived["unfinished"] >= 9.9, lived
    assert lived["begun_late"] >= 9.9, "counted from the first byte of the header"
    assert lived["unfinished"] < lived["idle"], lived


@pytest.mark.parametrize("value", ["0s", "2h"])
def test_an_idle_time_that_cannot_be_meant_stops_the_start(binary, embedded, tmp_path, value):
    done = Server(binary, embedded, tmp_path, http_idle_timeout=value).run("serve")
    assert done.returncode != 0
    assert "POSTERN_HTTP_IDLE_TIMEOUT" in done.stderr
