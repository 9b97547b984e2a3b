"""The maximum age of connections: clients of a balancer of connections find new replicas, and no call fails."""

import itertools
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.client import CHANNEL_OPTIONS, Client
from support.http import address_of
from support.http2 import Shared

AGE = 0.5
# Calls that are not sent yet when the client reads GOAWAY need its transparent retries, which are on by default. The other
# tests switch all retries off.
OPTIONS = [option for option in CHANNEL_OPTIONS if option[0] != "grpc.enable_retries"]
CLIENTS = 4


@pytest.fixture
def server(start_server, embedded):
    return start_server(embedded, max_connection_age="500ms")


class Relay:
    """A balancer of connections: each goes to the next of its targets. Counts them."""

    def __init__(self, *targets: str):
        self.targets = list(targets)
        self.connections = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        for number in itertools.count():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            target = self.targets[number % len(self.targets)]
            self.connections.append(target)
            host, _, port = target.rpartition(":")
            server = socket.create_connection((host, int(port)))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=pair, daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.fixture
def relay(server):
    relay = Relay(server.address)
    yield relay
    relay.close()


def test_no_call_fails_when_connections_reach_their_age(server, relay):
    """Real gRPC clients with the options that they have by default, through a balancer that counts their connections."""
    person, tokens = server.client.newcomer()
    stop = threading.Event()

    def call_until_stopped() -> int:
        client, calls = Client(relay.address, server.secrets, OPTIONS), 0
        while not stop.is_set():
            assert client.me(tokens.access_token).username == person.username
            calls += 1
        client.close()
        return calls

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(call_until_stopped) for _ in range(CLIENTS)]
        end = time.monotonic() + 60
        while len(relay.connections) < 5 * CLIENTS and time.monotonic() < end and not any(c.done() for c in running):
            time.sleep(0.05)
        stop.set()
        assert all(calls.result() > 20 for calls in running)
    assert len(relay.connections) >= 5 * CLIENTS, "connections came to an end and were opened again"


def test_a_stream_that_goes_on_ends_with_its_connection(server):
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as ended:
            next(watch)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "begin another one" in ended.value.details()


def test_a_server_with_streams_that_go_on_stops_without_waiting_for_them(start_server, embedded):
    server = start_server(embedded)
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        begun = time.monotonic()
        server.stop()
        assert time.monotonic() - begun < 20, "calls may take 30 s to finish, but this is none"
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as ended:
            next(watch)
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


def test_an_http_2_connection_gets_goaway_even_when_it_is_idle(server):
    with Shared(server.address, deadline=30) as connection:
        assert connection.ends(), "GOAWAY without an error"


def test_http_1_1_gets_connection_close_with_an_answer_and_not_before(server):
    host, _, port = address_of(server, "http_addr").rpartition(":")
    request = f"GET /.well-known/jwks.json HTTP/1.1\r\nhost: {host}\r\n\r\n".encode()
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        begun = time.monotonic()
        answers = 0
        while True:
            wire.sendall(request)
            answer = read_answer(wire)
            assert answer.startswith(b"HTTP/1.1 200")
            answers += 1
            if b"\r\nconnection: close\r\n" in answer:
                break
            time.sleep(0.02)
        assert answers > 1
        assert time.monotonic() - begun > 0.8 * AGE
        assert wire.recv(1) == b""
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        wire.sendall(request)
        assert b"connection: close" not in read_answer(wire)
        time.sleep(3 * AGE)
        wire.sendall(request)
        assert b"connection: close" in read_answer(wire), "an idle connection still gets its answer"


def read_answer(wire: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        received += wire.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
    while len(body) < length:
        body += wire.recv(65536)
    return head + b"\r\n"


def test_zero_is_no_limit_and_a_day_the_longest(start_server, embedded):
    server = start_server(embedded, max_connection_age="0s")
    with Shared(server.address) as connection:
        connection.begin("/grpc.health.v1.Health/Check")
        assert connection.finished()[0][1].grpc_status == 0
    server.stop()
    refused = server.run("serve", "--max-connection-age", "25h")
    assert refused.returncode != 0
    assert "POSTERN_MAX_CONNECTION_AGE" in refused.stderr
