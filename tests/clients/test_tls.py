"""TLS on the three addresses, and client certificates as the credentials of services.

Real clients: grpcio with BoringSSL, and Python's ssl with OpenSSL. What each RPC asks of other callers is tested in
`test_access_matrix`.
"""

import contextlib
import datetime
import http.client
import json
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support import contract, metrics, pb
from support.admin import Somebody, session_id
from support.client import Client, Person
from support.expect import expect_error, failure_of, reason_of
from support.http import address_of
from support.server import Server
from support.tls import DAY, Authority, Certificate, get, replace, shake_hands
from support.transports import ByGrpc
from support.wait import wait_until
from support.watch import until_caught_up, watch

LOOPBACK = "127.0.0.1"
ADDRESSES = ("grpc_addr", "http_addr", "ops_addr")
BILLING = "spiffe://example.org/ns/shop/sa/billing"
STOCK = "stock.example.org"
IDENTITIES = f"{BILLING},{STOCK}"
# How many handshakes one client may have under way: three quarters of 1,024.
OF_ONE_CLIENT = 768
# How soon a replaced file is promised to be used, in seconds.
PROMISE = 5
WATCH = f"{pb.PACKAGE}.TokenService/WatchRevocations"


@dataclass
class World:
    """The authorities of one server and its clients, and where its files are."""

    servers: Authority
    clients: Authority
    directory: object
    settings: dict

    def context(self, certificate: Certificate | None = None) -> ssl.SSLContext:
        return self.servers.context(self.directory, certificate)

    @contextlib.contextmanager
    def client(self, server, certificate: Certificate | None = None):
        client = self.servers.client(server, certificate)
        yield client
        client.close()

    def serve(self, certificate: Certificate) -> None:
        """Replaces the certificate of the server on disk."""
        certificate.write(self.directory)


def make_world(directory) -> World:
    servers, clients = Authority("servers"), Authority("clients")
    files = servers.issue(LOOPBACK, "localhost").write(directory)
    ca = replace(directory / "clients.pem", clients.pem)
    return World(servers, clients, directory, {**files, "tls_client_ca": ca, "service_identities": IDENTITIES})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return make_world(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def settings(world):
    return world.settings


@pytest.fixture
def own_world(tmp_path) -> World:
    """The same for a test that changes the files."""
    directory = tmp_path / "tls"
    directory.mkdir()
    return make_world(directory)


@pytest.fixture
def server(embedded_server):
    return embedded_server


def logged(server, *words: str) -> dict:
    """The newest line of the log that has all of these words."""
    found = wait_until(
        f"{words} in the log", lambda: [line for line in server.log if all(word in line for word in words)]
    )
    return json.loads(found[-1])


def watched(client: Client, token: str | None = None, cursor: str = ""):
    return watch(client.channel, token, cursor)


def count(server, world: World, outcome: str) -> float:
    status, text = get(server, "ops_addr", "/metrics", world.context())
    assert status == 200
    return metrics.read(text.decode()).value("postern_tls_handshakes_total", outcome=outcome)


# -- handshakes that do not end ------------------------------------------------------------------------------------


def is_closed(wire: socket.socket) -> bool:
    wire.setblocking(False)
    try:
        return wire.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


@dataclass
class Siege:
    """Handshakes that one client has begun and does not go on with."""

    wires: list[socket.socket]
    # How many had timed out or were refused before.
    ended: float


@pytest.fixture(scope="module")
def siege(embedded_server, world) -> Iterator[Siege]:
    """More of them than one client may have. The tests in between run while they are open."""
    server = embedded_server
    refused, ended = count(server, world, "refused"), ended_early(server, world)
    host, _, port = address_of(server, "http_addr").rpartition(":")
    with contextlib.ExitStack() as held:
        wires = []
        for _ in range(OF_ONE_CLIENT + 20):
            wire = socket.create_connection((host, int(port)), timeout=60, source_address=("127.0.0.66", 0))
            wires.append(held.enter_context(wire))
            # The beginning of a record.
            with contextlib.suppress(OSError):
                wire.sendall(b"\x16\x03\x01\x02\x00")
        wait_until("some are refused at once", lambda: count(server, world, "refused") > refused)
        yield Siege(wires, ended)


def ended_early(server, world: World) -> float:
    return count(server, world, "timed_out") + count(server, world, "refused")


def test_a_client_that_begins_many_handshakes_leaves_room_for_others(server, world, siege):
    shake_hands(address_of(server, "http_addr"), world.context()).close()


# -- the addresses -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
@pytest.mark.parametrize("name", ADDRESSES)
def test_each_address_has_tls_1_2_and_1_3_and_tells_its_protocols(server, world, name):
    address = address_of(server, name)
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = world.context()
        context.minimum_version = context.maximum_version = version
        offers = [(["h2"], "h2"), (["http/1.1", "h2"], "h2")]
        offers += [] if name == "grpc_addr" else [(["http/1.1"], "http/1.1")]
        for offered, chosen in offers:
            context.set_alpn_protocols(offered)
            with shake_hands(address, context) as wire:
                assert (wire.version(), wire.selected_alpn_protocol()) == (version.name.replace("v1_", "v1."), chosen)

    old = world.context()
    old.set_ciphers("ALL:@SECLEVEL=0")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match="ALERT"):
        shake_hands(address, old)
    other = world.context()
    other.set_alpn_protocols(["smtp"])
    with pytest.raises(ssl.SSLError, match="(?i)application.protocol"):
        shake_hands(address, other)


@pytest.mark.parametrize("name", ADDRESSES)
def test_an_address_with_tls_takes_nothing_in_plaintext(server, name):
    host, _, port = address_of(server, name).rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as wire:
        wire.sendall(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n")
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := wire.recv(4096):
                received += part
    assert b"HTTP" not in received


def test_calls_and_probes_work_over_tls(server, world):
    with world.client(server) as client:
        person, tokens = client.newcomer()
        assert client.me(tokens.access_token).email == person.email
    body = json.dumps({"email": person.email, "password": person.password})
    headers = {"content-type": "application/json"}
    status, answer = get(server, "http_addr", "/v1/auth/login", world.context(), "POST", body, headers)
    assert status == 200, answer
    assert get(server, "ops_addr", "/readyz", world.context())[0] == 200
    assert server.run("healthcheck").stdout == "SERVING\n"


def test_an_address_with_tls_may_be_beyond_loopback(server):
    beyond = ["--grpc-addr=0.0.0.0:5000", "--http-addr=[::]:5001"]
    checked = server.run("config", "check", *beyond)
    assert checked.returncode == 0, checked.stderr


# -- the certificate of the server ---------------------------------------------------------------------------------


def shown(server, world: World, name: str = "http_addr") -> bytes:
    """The certificate that the server shows to a new connection."""
    context = world.context()
    with shake_hands(address_of(server, name), context) as wire:
        return wire.getpeercert(binary_form=True)


def wait_for_certificate(server, world: World, certificate: Certificate, name: str = "http_addr") -> None:
    wait_until("the new certificate is served", lambda: shown(server, world, name) == certificate.der)


def test_a_replaced_certificate_is_served_to_new_connections_while_old_ones_live_on(
    own_world, start_server, embedded, record_property
):
    world, server = own_world, start_server(embedded, **own_world.settings)
    with (
        world.client(server, world.clients.issue(BILLING)) as service,
        shake_hands(address_of(server, "http_addr"), world.context()) as old,
    ):
        admin_way = ByGrpc(service)
        somebody = Somebody(admin_way)
        health = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest())
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        stream = watched(service)
        until_caught_up(stream)

        # A busy machine gets further tries.
        for _ in range(3):
            next_one = world.servers.issue(LOOPBACK)
            world.serve(next_one)
            replaced = time.monotonic()
            for name in ADDRESSES:
                wait_for_certificate(server, world, next_one, name)
            took = time.monotonic() - replaced
            if took < PROMISE:
                break
        record_property("seconds until a replaced certificate is served", took)
        assert took < PROMISE

        old.sendall(b"GET /.well-known/jwks.json HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert old.recv(4096).startswith(b"HTTP/1.1 200"), "an old connection takes further calls"
        admin_way.ok("Logout", refresh_token=somebody.tokens["refreshToken"])
        assert next(stream).session_ended.session_id == session_id(somebody.tokens), "and so do its streams"
        assert health.is_active()
        stream.cancel()
        health.cancel()
    line = logged(server, "TLS with this certificate", next_one.sha256)
    assert line["expire_time"].endswith("Z")


def test_files_that_cannot_be_used_leave_the_certificate_from_before(own_world, start_server, embedded):
    world, server = own_world, start_server(embedded, **own_world.settings)
    first, second = shown(server, world), world.servers.issue(LOOPBACK)
    cert, key = world.settings["tls_cert"], world.settings["tls_key"]

    replace(cert, second.pem)
    line = logged(server, "is not the key of the first certificate")
    assert line["level"] == "ERROR"
    assert shown(server, world) == first
    cert.unlink()
    logged(server, "POSTERN_TLS_CERT", "cannot be read")
    assert shown(server, world) == first

    replace(cert, second.pem)
    replace(key, second.key)
    wait_for_certificate(server, world, second)
    told = [line for line in server.log if "cannot be used" in line]
    assert len(told) == len(set(told)) <= 3, "each fault is told once"


def test_a_client_with_another_ca_refuses_the_server_and_the_log_says_so(server, world):
    stranger = Authority("another")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(address_of(server, "http_addr"), stranger.context(world.directory))
    assert LOOPBACK in json.dumps(logged(server, "a TLS handshake failed", "UnknownCA"))
    client = stranger.client(server)
    assert failure_of(client.health).code() is grpc.StatusCode.UNAVAILABLE
    client.close()


# -- the certificates of clients -----------------------------------------------------------------------------------


def refused_handshake(server, world: World, certificate: Certificate) -> None:
    """Asserts that a client with this certificate gets nothing on any address."""
    with world.client(server, certificate) as client:
        assert failure_of(client.health).code() is grpc.StatusCode.UNAVAILABLE
    for name in ADDRESSES[1:]:
        # In TLS 1.3 the client has finished its handshake when it is refused.
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            get(server, name, "/livez", world.context(certificate))


@pytest.mark.parametrize("fault", ["another CA", "expired", "not valid yet", "for servers only"])
def test_a_client_certificate_that_does_not_hold_is_refused_and_named(server, world, fault):
    name = f"{fault.replace(' ', '-').lower()}.example.org"
    certificate = {
        "another CA": lambda: Authority("another").issue(name, BILLING),
        "expired": lambda: world.clients.issue(name, BILLING, end=-DAY / 24),
        "not valid yet": lambda: world.clients.issue(name, BILLING, begin=DAY / 24),
        "for servers only": lambda: world.clients.issue(name, BILLING, purpose=ExtendedKeyUsageOID.SERVER_AUTH),
    }[fault]()
    before = count(server, world, "certificate")

    refused_handshake(server, world, certificate)

    line = logged(server, "a client certificate was refused", certificate.sha256)
    assert line["level"] == "WARN"
    assert {name, BILLING} <= set(line["certificate"].split())
    assert line["span"]["peer"].startswith(f"{LOOPBACK}:")
    why = {"another CA": "UnknownIssuer", "expired": "expired", "not valid yet": "valid", "for servers only": "usage"}
    assert why[fault].lower() in line["error"].lower(), line["error"]
    assert count(server, world, "certificate") >= before + 3
    # Nobody else notices.
    with world.client(server) as client:
        assert client.health() == "SERVING"


@pytest.mark.parametrize("names", [(BILLING,), (STOCK.upper(),), ("other.example.org", STOCK, BILLING)])
def test_the_certificate_of_a_service_lets_it_follow_the_revocations(server, world, names):
    with world.client(server, world.clients.issue(*names)) as client:
        stream = watched(client)
        _, cursor = until_caught_up(stream)
        stream.cancel()
        assert cursor
    headers = {"content-type": "application/x-www-form-urlencoded"}
    context = world.context(world.clients.issue(*names))
    asked = get(server, "http_addr", "/oauth2/introspect", context, "POST", "token=nothing", headers)
    assert asked == (200, b'{"active":false}')


NOBODY = {
    "another name": ("spiffe://example.org/ns/shop/sa/other", "other.example.org"),
    "a name below": (f"{BILLING}/more", f"a.{STOCK}"),
    "a wildcard": ("*.example.org",),
    "two ids": (BILLING, "spiffe://example.org/ns/shop/sa/other"),
    "the id as a DNS name": ("billing",),
}


@pytest.mark.parametrize("names", NOBODY.values(), ids=NOBODY)
def test_the_certificate_of_nobody_gives_nothing_and_is_named(server, world, names):
    certificate = world.clients.issue(*names)
    with world.client(server, certificate) as client:
        expect_error(lambda: next(watched(client)), grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
        # It takes nothing away either.
        assert client.health() == "SERVING"
        client.sign_up(Person())
    headers = {"content-type": "application/x-www-form-urlencoded"}
    context = world.context(certificate)
    assert get(server, "http_addr", "/oauth2/introspect", context, "POST", "token=nothing", headers)[0] == 401
    line = logged(server, "a client certificate gives nothing", certificate.sha256)
    assert names[0] in line["certificate"]


def outcome(client: Client, rpc: str) -> tuple:
    """How a call with an empty request and without a token ends."""
    descriptor = pb.service(rpc.rpartition("/")[0].rpartition(".")[2]).methods_by_name[rpc.rpartition("/")[2]]
    try:
        reply = client.call(descriptor.name, getattr(pb, descriptor.input_type.name)())
        if descriptor.server_streaming:
            next(iter(reply))
            reply.cancel()
    except grpc.RpcError as error:
        return error.code(), reason_of(error)
    return (grpc.StatusCode.OK,)


def test_a_service_by_certificate_may_call_what_is_for_services_and_nothing_else(server, world):
    with world.client(server) as anybody, world.client(server, world.clients.issue(BILLING)) as service:
        differ = {rpc for rpc in contract.rpcs() if outcome(anybody, rpc) != outcome(service, rpc)}
        assert differ == {WATCH}
        assert outcome(service, WATCH) == (grpc.StatusCode.OK,)


def test_a_token_counts_before_a_certificate(server, world):
    with world.client(server, world.clients.issue(BILLING)) as client:
        _, tokens = client.newcomer()
        unauthenticated, denied = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED
        expect_error(lambda: next(watched(client, tokens.access_token)), denied, "SERVICE_REQUIRED")
        expect_error(lambda: next(watched(client, "nonsense")), unauthenticated, "TOKEN_INVALID")
        assert client.me(tokens.access_token)


def test_the_certificate_of_a_proxy_is_no_credential_of_its_clients(own_world, start_server, embedded):
    server = start_server(embedded, **own_world.settings, trusted_proxies=f"{LOOPBACK}/32")
    with own_world.client(server, own_world.clients.issue(BILLING)) as proxy:
        request = pb.WatchRevocationsRequest()
        stub = pb.stub("TokenService", proxy.channel)

        def follow(*metadata):
            stream = stub.WatchRevocations(request, metadata=metadata, timeout=15)
            next(stream)
            stream.cancel()

        follow()
        missing = grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING"
        expect_error(lambda: follow(("x-forwarded-for", "192.0.2.1")), *missing)


def test_an_authority_that_is_taken_away_ends_what_its_certificates_gave(own_world, start_server, embedded):
    world, server = own_world, start_server(embedded, **own_world.settings)
    with world.client(server, world.clients.issue(BILLING)) as client:
        stream = watched(client)
        until_caught_up(stream)
        replace(world.settings["tls_client_ca"], Authority("clients").pem)
        error = failure_of(lambda: [None for _ in stream])
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "certificate is no longer accepted" in error.details()
        # The connection is the old one, which goes on for what needs no credential.
        assert client.health() == "SERVING"
        expect_error(lambda: next(watched(client)), grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
    logged(server, "a client certificate is no longer accepted", BILLING)


def test_a_handshake_has_a_place_among_the_connections_of_its_client(own_world, binary, embedded, tmp_path):
    """With 256 file descriptors an address has room for 63 connections."""
    program = tmp_path / "postern"
    program.write_text(f'#!/bin/sh\nulimit -n 256\nexec "{binary}" "$@"\n')
    program.chmod(0o755)
    server = Server(program, embedded, tmp_path, **own_world.settings).start()
    address = address_of(server, "http_addr")
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as held:
        held.callback(server.close)
        wires = []
        for _ in range(100):
            wire = socket.create_connection((host, int(port)), timeout=10, source_address=("127.0.0.66", 0))
            wires.append(held.enter_context(wire))
        wait_until("the oldest gave way", lambda: sum(map(is_closed, wires)) >= 100 - 63)
        shake_hands(address, own_world.context()).close()


def introspect(wire: ssl.SSLSocket) -> int:
    """Asks on an open connection, and returns the status."""
    head = "POST /oauth2/introspect HTTP/1.1\r\nhost: a\r\ncontent-type: application/x-www-form-urlencoded\r\n"
    wire.sendall(f"{head}content-length: 13\r\n\r\ntoken=nothing".encode())
    answer = http.client.HTTPResponse(wire)
    answer.begin()
    answer.read()
    return answer.status


@pytest.mark.nightly
def test_a_certificate_that_expires_counts_no_longer_on_open_connections_and_in_resumed_sessions(server, world):
    certificate = world.clients.issue(BILLING, end=datetime.timedelta(seconds=4))
    context, address = world.context(certificate), address_of(server, "http_addr")
    with world.client(server, certificate) as client, shake_hands(address, context) as wire:
        stream = watched(client)
        until_caught_up(stream)
        assert introspect(wire) == 200
        session = wire.session
        error = failure_of(lambda: [None for _ in stream])
        assert "certificate is no longer accepted" in error.details()
        wait_until("the open connection gives nothing", lambda: introspect(wire) == 401)
        host, _, port = address.rpartition(":")
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=host, session=session) as resumed,
        ):
            assert resumed.session_reused
            assert introspect(resumed) == 401


# -- the end of the handshakes that were begun before ---------------------------------------------------------------


def test_handshakes_that_do_not_end_are_ended(server, world, siege):
    wait_until("all are closed", lambda: all(map(is_closed, siege.wires)))
    assert ended_early(server, world) - siege.ended == len(siege.wires)
    assert count(server, world, "timed_out") >= OF_ONE_CLIENT
