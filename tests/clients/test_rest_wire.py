"""The HTTP address below the level of requests: garbage, slow clients, odd framing, and headers that gRPC interprets.

The server refuses such input or closes the connection, and it continues to serve all other clients. Requests with valid
framing and invalid contents are in `test_rest_bad_input`.
"""

import random
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor, wait

import h2.config
import h2.connection
import h2.settings
import pytest

from support.client import Person
from support.h2c import H2c
from support.http import Rest, address_of, raw
from support.refusal import expect_refusal

pytestmark = pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")

LOGIN = "/v1/auth/login"
# The server allows ten seconds for headers and for a body. A test waits this long for it to close the connection.
PATIENCE = 40

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"

GARBAGE = {
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(509),
    "zeros": bytes(4096),
    "noise": random.Random(7).randbytes(4096) + b"\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "a version from the future": b"GET /v1/me HTTP/9.9\r\nhost: x\r\n\r\n",
    "a header without a name": b"GET /v1/me HTTP/1.1\r\n: x\r\n\r\n",
    "a space in a header's name": b"GET /v1/me HTTP/1.1\r\nx y: z\r\n\r\n",
    "a bare CR in a header": b"GET /v1/me HTTP/1.1\r\nx: a\rb\r\n\r\n",
    "NUL in a header": b"GET /v1/me HTTP/1.1\r\nx: a\0b\r\n\r\n",
    "a path that is no text": b"GET /v1/m\xff\xc3 HTTP/1.1\r\nhost: x\r\n\r\n",
    "two lengths": b"POST /v1/auth/login HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}x",
    "a negative length": b"POST /v1/auth/login HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n{}",
    "a length beyond 64 bits": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999\r\n\r\n{}",
    "HTTP/2 with a ping on a stream": PREFACE + b"\x00\x00\x08\x06\x00\x00\x00\x00\x01" + bytes(8),
    "HTTP/2 with a frame of 16 MiB": PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
    "HTTP/2 with headers that are none": PREFACE + b"\x00\x00\x04\x01\x05\x00\x00\x00\x01\xff\xff\xff\xff",
}


@pytest.fixture
def rest(server):
    return Rest(server)


@pytest.fixture(autouse=True)
def lives(server):
    yield
    assert server.running
    assert Rest(server).get("/v1/me").status == 401, "the server still serves"


def statuses(received: bytes) -> list[int]:
    """The statuses of the HTTP/1.1 answers in a stream, in order. No body here contains such a line."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def request(head: str, *lines: str, body: str = "", close: bool = True) -> bytes:
    """An HTTP/1.1 request with these header lines, which no client library changes."""
    ending = ["connection: close"] if close else []
    return "\r\n".join([f"{head} HTTP/1.1", "host: postern", *lines, *ending, "", body]).encode()


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_refused_or_its_connection_is_closed(rest, garbage):
    reply = raw(rest.address, garbage, deadline=5)
    assert reply.closed, reply.received[:200]
    if reply.received.startswith(b"HTTP/1.1"):
        assert statuses(reply.received) == [400]


def test_slow_clients_are_disconnected_and_delay_no_other_client(rest):
    head = f"POST {LOGIN} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()
    begun = {
        "one letter": b"G",
        "half a line": b"GET /v1/me HT",
        "half a header": head[:-4],
        "headers that do not end": head,
        "a body that does not come": head + b"content-length: 50\r\n\r\n",
        "a body that stops": head + b'content-length: 50\r\n\r\n{"email": "a',
        "chunks that stop": head + b"transfer-encoding: chunked\r\n\r\n5\r\n{",
    }
    with ThreadPoolExecutor(len(begun) + 2) as pool:
        silent = {name: pool.submit(raw, rest.address, sent, PATIENCE) for name, sent in begun.items()}
        dripping = [
            pool.submit(drip, rest.address, head, b"x"),
            pool.submit(drip, rest.address, head + b"content-length: 500\r\n\r\n", b" "),
        ]
        slowest = 0.0
        while wait((*silent.values(), *dripping), timeout=0.1).not_done:
            started = time.monotonic()
            assert rest.get("/v1/me").status == 401
            slowest = max(slowest, time.monotonic() - started)

    # The server allows slow clients 10 s, so a call that had to wait for one would take that long.
    assert slowest < 8, f"a call took {slowest:.1f} s meanwhile"
    for name, future in silent.items():
        reply = future.result()
        assert reply.closed, f"{name}: still open after {PATIENCE} s, with {reply.received[:200]}"
        # If a body does not arrive, the server may answer 408 before it closes the connection.
        assert set(statuses(reply.received)) <= {408}, f"{name}: {reply.received[:200]}"
    assert all(future.result() for future in dripping), "a byte now and then must not keep a request open"


def drip(address: str, begun: bytes, more: bytes) -> bool:
    """Sends `begun`, then `more` every half second. Returns whether the server closed the connection."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + PATIENCE
    with socket.create_connection((host, int(port)), timeout=0.5) as wire:
        wire.sendall(begun)
        while time.monotonic() < end:
            try:
                if not wire.recv(65536):
                    return True
            except TimeoutError:
                pass
            except ConnectionResetError:
                return True
            try:
                wire.sendall(more)
            except (BrokenPipeError, ConnectionResetError):
                return True
    return False


def test_too_large_a_length_is_refused_before_the_body_is_sent(rest):
    lines = ("content-type: application/json", "content-length: 1000000")
    for expectation in ((), ("expect: 100-continue",)):
        reply = raw(rest.address, request(f"POST {LOGIN}", *lines, *expectation, close=False), deadline=10)
        assert statuses(reply.received)[-1:] == [413], reply.received[:200]


@pytest.mark.parametrize(
    ("target", "lines", "status"),
    [
        (LOGIN, ("content-type: text/plain", "content-length: 20"), 415),
        (LOGIN, ("content-type: text/plain", "transfer-encoding: chunked"), 415),
        (LOGIN, ("content-length: 20",), 415),
        (f"{LOGIN}?verbose=true", ("content-type: application/json", "content-length: 20"), 400),
        ("/v1/me?verbose=true", ("content-type: application/json", "content-length: 20"), 405),
        ("/nowhere", ("content-type: application/json", "content-length: 20"), 404),
        (LOGIN, ("content-type: application/json", "content-length: 70000"), 413),
        ("/verify-email", ("content-type: application/json", "content-length: 20"), 415),
        ("/verify-email", ("content-type: application/x-www-form-urlencoded", "content-length: 70000"), 413),
    ],
)
def test_what_the_headers_refuse_is_refused_before_the_body_is_asked_for(rest, target, lines, status):
    sent = request(f"POST {target}", *lines, "expect: 100-continue", close=False)
    began = time.monotonic()
    assert statuses(raw(rest.address, sent, deadline=20).received) == [status], "and no 100"
    assert time.monotonic() - began < 9, "the answer does not wait for the body"


def test_a_client_that_waits_for_100_continue_is_told_to_go_on(rest):
    lines = ("content-type: application/json", "content-length: 2", "expect: 100-continue")
    host, _, port = rest.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5) as wire:
        wire.sendall(request(f"POST {LOGIN}", *lines))
        received = wire.recv(65536)
        assert statuses(received) == [100]
        wire.sendall(b"{}")
        while part := wire.recv(65536):
            received += part
    assert statuses(received) == [100, 400]
    assert b"INVALID_FIELD" in received


@pytest.mark.parametrize("shape", ["one of 20 KiB", "two hundred of 100 bytes"])
def test_headers_of_20_kib_are_431_or_a_closed_connection(rest, shape):
    lines = ["x-long: " + "a" * 20_480] if shape.startswith("one") else [f"x-{n}: {'a' * 100}" for n in range(200)]
    reply = raw(rest.address, request("GET /v1/me", *lines, close=False))
    assert reply.closed or b'"code":431' in reply.received
    assert set(statuses(reply.received)) <= {431}, reply.received[:200]


def test_headers_of_20_kib_over_http_2_are_431(server):
    assert H2c(server).get("/v1/me", headers={"x-long": "a" * 20_480}).status == 431


def test_headers_of_12_kib_are_read(server, rest):
    for client in (rest, H2c(server)):
        expect_refusal(client.get("/v1/me", headers={"x-long": "a" * 12_288}), 401, "TOKEN_MISSING")


@pytest.mark.parametrize(
    "lines",
    [
        ("content-length: 5", "transfer-encoding: chunked"),
        ("transfer-encoding: chunked, identity",),
        ("transfer-encoding: gzip",),
        ("transfer-encoding: xchunked", "content-length: 5"),
    ],
    ids=lambda lines: lines[0],
)
def test_a_body_whose_end_can_be_read_in_two_ways_yields_one_answer_and_no_second_request(rest, lines):
    smuggled = request("GET /v1/me").decode()
    sent = request(f"POST {LOGIN}", "content-type: application/json", *lines, body=f"0\r\n\r\n{smuggled}", close=False)
    reply = raw(rest.address, sent, deadline=10)
    assert reply.closed
    assert len(statuses(reply.received)) <= 1, reply.received
    assert set(statuses(reply.received)) <= {400, 413, 415}, reply.received


def test_requests_on_one_connection_are_answered_in_order_also_after_refusals(rest):
    body = '{"email": 5}'
    json_of = ("content-type: application/json", f"content-length: {len(body)}")
    sent = (
        request(f"POST {LOGIN}", *json_of, body=body, close=False)
        + request("POST /nowhere", *json_of, body=body, close=False)
        + request("GET /v1/me", close=False)
        + request("GET /v1/me", *json_of, body=body, close=False)
        + request(f"PUT {LOGIN}", *json_of, body=body, close=False)
        + request("GET /.well-known/jwks.json")
    )
    assert statuses(raw(rest.address, sent).received) == [400, 404, 401, 400, 405, 200]


@pytest.mark.parametrize(
    ("target", "status"),
    [("*", 404), ("http://evil.example/v1/me", 401), ("http://evil.example/nowhere", 404), ("/v1/me#part", 401)],
)
def test_other_forms_of_a_target_reach_nothing_else(rest, target, status):
    received = raw(rest.address, request(f"GET {target}")).received
    assert statuses(received) in ([status], [400]), received[:200]


def test_a_connect_request_opens_no_tunnel(rest):
    for target in ("127.0.0.1:22", "/v1/me"):
        [status] = statuses(raw(rest.address, request(f"CONNECT {target}")).received)
        assert status in (400, 404, 405)


@pytest.mark.parametrize(
    "headers",
    [
        {"grpc-encoding": "gzip"},
        {"grpc-encoding": "nonsense"},
        {"grpc-accept-encoding": "gzip"},
        {"grpc-timeout": "soon"},
        {"grpc-status": "13"},
        {"grpc-message": "x"},
        {"te": "gzip"},
        {"x-note-bin": "%%%"},
        {"x-note": "\xff\xfe"},
        {"connection": "authorization"},
        {"upgrade": "h2c", "connection": "upgrade, http2-settings", "http2-settings": "AAMAAABkAAQAAP__"},
        {"upgrade": "websocket", "connection": "upgrade"},
        {"content-encoding": "identity"},
        {"x-http-method-override": "DELETE"},
        {"host": "evil.example"},
        {"x-forwarded-host": "evil.example", "forwarded": "host=evil.example"},
        {"cookie": "a=b"},
        {"accept": "text/html"},
        {"range": "bytes=0-1"},
    ],
    ids=lambda headers: " ".join(f"{name}: {value}" for name, value in headers.items())[:40].encode("ascii", "replace"),
)
def test_a_header_that_means_something_elsewhere_changes_no_answer(rest, headers):
    person, tokens = rest.newcomer()
    me = rest.get("/v1/me", token=tokens["accessToken"])
    assert rest.get("/v1/me", token=tokens["accessToken"], headers=headers).ok() == me.ok()
    login = {"email": person.email, "password": person.password}
    assert rest.post(LOGIN, login, headers=headers).ok()["user"] == me.ok()["user"]


def test_a_deadline_that_has_passed_is_504(rest):
    # The deadline passes before the password is hashed.
    login = {"email": Person().email, "password": Person().password}
    expect_refusal(rest.post(LOGIN, login, headers={"grpc-timeout": "1n"}), 504)


def test_two_authorizations_are_one_too_many(rest):
    _, tokens = rest.newcomer()
    good, bad = f"authorization: Bearer {tokens['accessToken']}", "authorization: Bearer nonsense"
    for lines in ((good, bad), (bad, good), (good, good)):
        received = raw(rest.address, request("GET /v1/me", *lines)).received
        assert statuses(received) == [401]
        assert b'"TOKEN_INVALID"' in received


@pytest.mark.nightly
def test_a_client_that_takes_no_answer_is_cut_off(server):
    """The server waits 30 s, and looks every ten."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    connection.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
    host, _, port = address_of(server, "http_addr").rpartition(":")
    head = {":method": "GET", ":scheme": "http", ":authority": "a", ":path": "/openapi.json"}
    connection.send_headers(1, list(head.items()), end_stream=True)
    began = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=PATIENCE + 20) as wire:
        wire.sendall(connection.data_to_send())
        while received := wire.recv(65_536):
            connection.receive_data(received)
            wire.sendall(connection.data_to_send())  # answers the pings that keep the connection alive
    assert time.monotonic() - began >= 30
