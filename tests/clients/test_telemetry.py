"""Traces, the access log, and that no secret is in anything that operators see.

The traces arrive at a receiver of OTLP (`support.otlp`). The metrics, the alerts and the dashboard are in
`test_operations`.
"""

import base64
import http.client
import json
import os
import re
import secrets
import socket
import subprocess

import grpc
import pytest
import trustme

from support import pb
from support.admin import Somebody, any_way
from support.client import SERVICE, TIMEOUT, Client, Person
from support.engine import Sqlite
from support.environment import own_environment
from support.expect import failure_of
from support.http import Rest, address_of
from support.mail import RESET, VERIFY
from support.otlp import Collector
from support.ports import free_port
from support.server import CHEAP_HASHES
from support.services import ServiceAccount
from support.wait import wait_until

LOGIN, ME = f"{SERVICE}/Login", f"{SERVICE}/GetMe"
# The bounds that the page promises: how many spans wait for the collector, and how many lines for their reader.
MOST_WAITING, LINES_WAITING = 2_048, 4_096
QUICKLY = {"OTEL_BSP_SCHEDULE_DELAY": "50"}
LOST = "traces cannot be sent to OTEL_EXPORTER_OTLP_ENDPOINT and are lost"


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def start_traced(collector, start_server):
    """Starts a server that sends its traces to the collector, and quickly."""

    def start(engine, **settings):
        return start_server(engine, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, **{**QUICKLY, **settings})

    return start


class Caller:
    """A span of a client: what it sends with a call, and where the span of the call belongs."""

    def __init__(self, flags: str = "01"):
        self.trace, self.id = secrets.token_hex(16), secrets.token_hex(8)
        self.header = ("traceparent", f"00-{self.trace}-{self.id}-{flags}")


def lines(server, message: str) -> list[dict]:
    """The lines of the log with this message."""
    records = (json.loads(line) for line in server.log if line.startswith("{"))
    return [record for record in records if record["message"] == message]


def calls(server, method: str | None = None) -> list[dict]:
    """The access log, or what it has of one method."""
    found = lines(server, "a call was answered")
    return [line for line in found if method in (None, line["span"]["method"])]


def flood(address: str, requests: int) -> None:
    """Sends many requests on one connection, a hundred at a time. Each has a line and a span."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=TIMEOUT) as wire:
        for _ in range(requests // 100):
            wire.sendall(b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\n\r\n" * 100)
            received = b""
            while received.count(b"HTTP/1.1 404 ") < 100:
                received += wire.recv(65536)


# -- traces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["gRPC", "REST"])
def test_a_login_is_one_tree_in_the_trace_of_its_caller(engine, start_traced, collector, by):
    server = start_traced(engine)
    person, caller = Person(), Caller()
    server.client.sign_up(person)
    if by == "REST":
        body = {"email": person.email, "password": person.password}
        Rest(server).post("/v1/auth/login", body, headers=[caller.header]).ok()
    else:
        server.client.login(person, metadata=[caller.header])
    # The last spans are sent when the server stops.
    server.stop()

    tree = collector.tree(caller.trace)
    [root] = tree[caller.id]
    call = root
    if by == "REST":
        assert (root.name, root.kind) == ("POST /v1/auth/login", "SERVER")
        assert root.attributes == {"http.request.method": "POST", "http.response.status_code": 200}
        [call] = tree.pop(root.id)
    assert (call.name, call.kind) == (LOGIN, "INTERNAL" if by == "REST" else "SERVER")
    assert call.attributes == {"rpc.system.name": "grpc", "rpc.response.status_code": "OK"}
    parts = tree[call.id]
    assert [part.name for part in parts] == [
        "wait to hash",
        "store start_login",
        "verify password",
        "store open_session",
    ]
    database = "sqlite" if isinstance(engine, Sqlite) else "postgresql"
    for part in parts:
        in_store = part.name.startswith("store ")
        assert part.attributes == ({"db.system.name": database} if in_store else {})
        assert part.kind == ("CLIENT" if in_store else "INTERNAL")
    assert set(tree) == {caller.id, call.id}, "there is nothing else in the trace"
    for span in collector.spans():
        assert span.resource["service.name"] == "postern"
        assert span.resource["service.version"]
        assert not span.failed
        assert not span.events
    for secret in (person.email, person.username, person.password, *server.secrets):
        assert secret.encode() not in collector.bytes()

    [line] = [line for line in calls(server, LOGIN) if line["span"]["trace_id"] == caller.trace]
    assert line["code"] == "OK"


def test_a_mail_is_in_the_trace_of_the_call_that_caused_it(embedded, start_traced, collector, start_mailbox):
    mailbox = start_mailbox()
    server = start_traced(embedded, mail_url=mailbox.url)
    person, caller = Person(), Caller()
    request = pb.SignUpRequest(username=person.username, email=person.email, password=person.password)
    server.client.call("SignUp", request, metadata=[caller.header])
    token = mailbox.token(person.email, VERIFY)
    server.client.verify_email(token)
    change = Caller()
    tokens = server.client.login(person)
    request = pb.ChangePasswordRequest(current_password=person.password, new_password="another unlikely password")
    server.client.call("ChangePassword", request, token=tokens.access_token, metadata=[change.header])
    mailbox.notice(person.email)
    wait_until("both mails are marked as sent", lambda: len(lines(server, "mail sent")) == 2)
    server.stop()

    for sender, kind in ((caller, "verify_email"), (change, "password_changed")):
        tree = collector.tree(sender.trace)
        [call] = tree[sender.id]
        [mail] = [part for part in sum(tree.values(), []) if part.name == "deliver mail"]
        assert (mail.kind, mail.attributes) == ("CONSUMER", {"postern.mail.kind": kind, "postern.mail.attempt": 1})
        ancestors = {part.id: part.parent for part in sum(tree.values(), [])}
        above = mail.parent
        while above not in (call.id, ""):
            above = ancestors.get(above, "")
        assert above == call.id, "it belongs to the call, or to the step that queued it"
        assert {part.name for part in tree[mail.id]} == {"send mail", "store mail_sent"}
        assert [line["span"]["trace_id"] for line in lines(server, "mail sent") if line["kind"] == kind] == [
            sender.trace
        ]
    assert token.encode() not in collector.bytes()
    assert person.email.encode() not in collector.bytes()


def test_what_the_server_does_by_itself_and_health_checks_are_in_no_trace(embedded, start_traced, collector):
    server = start_traced(embedded)
    assert server.client.health() == "SERVING"
    failure_of(lambda: server.client.me("nonsense"))
    failure_of(lambda: server.client.send_bytes(f"/{secrets.token_hex(8)}/{secrets.token_hex(8)}", b""))
    Rest(server).get(f"/{secrets.token_hex(8)}")
    server.stop()
    spans = {span.name: span for span in collector.spans()}
    assert set(spans) == {ME, "other", "GET other"}, "a path that a client makes up is no name"
    assert all(span.parent == "" for span in spans.values())
    # A wrong token is no failure of the server.
    assert [name for name, span in spans.items() if span.failed] == ["other"]


@pytest.mark.parametrize(
    ("sampler", "alone", "sampled", "unsampled"),
    [
        ({}, True, True, False),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, False, True, False),
        (
            {"OTEL_TRACES_SAMPLER": "always_on", "OTEL_SERVICE_NAME": "auth", "OTEL_RESOURCE_ATTRIBUTES": "team=a"},
            True,
            True,
            True,
        ),
        (
            {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.0", "OTEL_SERVICE_NAME": ""},
            False,
            False,
            False,
        ),
    ],
)
def test_the_sampler_decides_which_calls_are_traced(
    embedded, start_traced, collector, sampler, alone, sampled, unsampled
):
    server = start_traced(embedded, hash_threads=1, **sampler)
    with_flag, without = Caller(), Caller("00")
    failure_of(lambda: server.client.me("nonsense"))
    for caller in (with_flag, without):
        failure_of(lambda c=caller: server.client.call("GetMe", pb.GetMeRequest(), metadata=[c.header]))
    server.stop()
    traces = {span.trace for span in collector.spans()}
    assert (with_flag.trace in traces, without.trace in traces) == (sampled, unsampled)
    assert bool(traces - {with_flag.trace, without.trace}) == alone
    # The log has the trace id also of a call that is not recorded.
    assert {with_flag.trace, without.trace} <= {line["span"].get("trace_id") for line in calls(server, ME)}
    if sampler.get("OTEL_SERVICE_NAME"):
        assert {(s.resource["service.name"], s.resource["team"]) for s in collector.spans()} == {("auth", "a")}


def test_a_collector_that_hangs_costs_no_call_and_bounded_memory(embedded, start_traced, collector):
    server = start_traced(embedded, lame_duck="0s")
    _, tokens = server.client.newcomer()
    operations = Rest(server, "ops_addr")

    def spans(outcome: str) -> int:
        name = f'postern_trace_spans_total{{outcome="{outcome}"}} '
        text = operations.get("/metrics").body.decode()
        return int(next(line for line in text.splitlines() if line.startswith(name)).rpartition(" ")[2])

    wait_until("the first spans are sent", lambda: spans("sent") > 0)
    collector.hang()
    # One batch of 512 is on its way, and the rest waits.
    flood(address_of(server, "http_addr"), MOST_WAITING + 1_000)
    assert spans("dropped") > 0
    assert server.client.me(tokens.access_token)
    server.stop()
    assert lines(server, "the last traces could not be sent")


def test_a_collector_that_is_away_is_told_once_and_found_again(embedded, start_traced, collector):
    collector.close()
    server = start_traced(embedded)

    def told() -> list[dict]:
        failure_of(lambda: server.client.me("nonsense"))
        return lines(server, LOST)

    wait_until("it is told", told)
    again = Collector(collector.port)
    try:

        def found() -> list[dict]:
            failure_of(lambda: server.client.me("nonsense"))
            return lines(server, "the collector takes traces again")

        wait_until("it is found", found)
        assert len(told()) == 1
        assert again.spans()
    finally:
        again.close()


def test_a_collector_behind_tls_is_verified(embedded, start_server, monkeypatch, tmp_path):
    right, wrong = trustme.CA(), trustme.CA()
    collector = Collector(certificate=right.issue_cert("localhost"))
    endpoint = f"https://localhost:{collector.port}"
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    try:
        wrong.cert_pem.write_to_path(tmp_path / "ca.pem")
        server = start_server(embedded, lame_duck="0s", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, **QUICKLY)
        failure_of(lambda: server.client.me("nonsense"))
        [line] = wait_until("it is told", lambda: lines(server, LOST))
        assert "certificate" in line["error"]
        right.cert_pem.write_to_path(tmp_path / "ca.pem")
        server.restart()
        failure_of(lambda: server.client.me("nonsense"))
        server.stop()
        assert [span.name for span in collector.spans()] == [ME]
    finally:
        collector.close()


# -- the access log ------------------------------------------------------------------------------------------------


def test_each_call_has_one_line_whichever_way_it_came(embedded, start_server):
    server = start_server(embedded)
    rest, id_of = Rest(server), secrets.token_hex(8)
    person, tokens = server.client.newcomer()
    rest.login(person)
    rest.get("/v1/me", token=tokens.access_token, headers={"x-request-id": id_of})
    failure_of(lambda: server.client.me("nonsense"))
    rest.get("/.well-known/jwks.json")
    rest.post("/v1/auth/login", "{not json")
    rest.get(f"/{secrets.token_hex(8)}?token=x")
    rest.call("BREW", "/v1/me")
    failure_of(lambda: server.client.send_bytes(f"/{secrets.token_hex(8)}/x", b""))
    assert server.client.health() == "SERVING"
    # Its last lines are written then.
    server.stop()

    seen = [(line["span"]["method"], line["code"]) for line in calls(server)]
    assert seen == [
        (f"{SERVICE}/SignUp", "OK"),
        (LOGIN, "OK"),
        (LOGIN, "OK"),
        (ME, "OK"),
        (ME, "UNAUTHENTICATED"),
        ("GET /.well-known/jwks.json", "200"),
        ("POST /v1/auth/login", "400"),
        ("GET other", "404"),
        ("_OTHER /v1/me", "405"),
        ("other", "UNIMPLEMENTED"),
    ]
    for line in calls(server):
        assert line["level"] == "INFO"
        assert line["peer"] == "127.0.0.1"
        assert line["span"]["request_id"]
        assert 0 < line["duration_us"] < 60_000_000
    assert calls(server, ME)[0]["span"]["request_id"] == id_of


def test_a_call_whose_client_goes_away_has_a_line_too(embedded, start_server):
    # Hashes that take a while, so that the client is gone before the end.
    server = start_server(embedded, argon2_memory_kib=65536, argon2_iterations=30, hash_threads=1)
    request = pb.LoginRequest(email=Person().email, password="an unlikely password")
    error = failure_of(lambda: server.client.call("Login", request, timeout=0.3))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    [line] = wait_until("it has a line", lambda: calls(server, LOGIN))
    assert line["code"] in ("CANCELLED", "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("settings", [{"access_log": "false"}, {"log": "info,postern::access=off"}])
def test_the_access_log_can_be_turned_off(embedded, start_server, settings):
    server = start_server(embedded, **settings)
    server.client.newcomer()
    Rest(server).get("/.well-known/jwks.json")
    server.stop()
    assert not calls(server)


def test_a_log_that_nobody_reads_stops_no_call(binary, tmp_path):
    """A pipe holds 64 KiB. The server has many more lines, and somebody stopped the program that reads them."""
    ports = {name: f"127.0.0.1:{free_port()}" for name in ("grpc_addr", "http_addr", "ops_addr")}
    environment = own_environment(
        log_format="json", data_dir=tmp_path / "data", lame_duck="0s", **CHEAP_HASHES, **ports
    )
    unread, written = os.pipe()
    process = subprocess.Popen(
        [binary, "serve"], env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=written
    )
    client = Client(ports["grpc_addr"])
    try:
        wait_until("it serves", lambda: process.poll() is None and is_serving(client))
        flood(ports["http_addr"], LINES_WAITING + 1_000)
        client.newcomer()
        exposition = http.client.HTTPConnection(ports["ops_addr"], timeout=TIMEOUT)
        exposition.request("GET", "/metrics")
        [dropped] = re.findall(
            r"^postern_log_lines_dropped_total (\d+)$", exposition.getresponse().read().decode(), re.M
        )
        assert int(dropped) > 0
        process.terminate()
        assert process.wait(30) == 0
    finally:
        client.close()
        process.kill()
        process.wait()
        os.close(unread)
        os.close(written)


def is_serving(client: Client) -> bool:
    try:
        return client.health() == "SERVING"
    except grpc.RpcError:
        return False


# -- secrets -------------------------------------------------------------------------------------------------------


def test_no_secret_reaches_logs_errors_traces_or_metrics(engine, start_traced, collector, start_mailbox):
    """Everything that handles secrets is called, rightly and wrongly, and secrets stand where they do not belong."""
    mailbox, header = start_mailbox(), secrets.token_urlsafe(24)
    server = start_traced(
        engine,
        OTEL_EXPORTER_OTLP_HEADERS=f"api-key={header}",
        mail_url=mailbox.url,
        log="info,postern=trace",
        login_max_failures=3,
    )
    client, rest = server.client, Rest(server)
    canaries, refusals = {header}, []

    def canary() -> str:
        canaries.add(made := f"canary{secrets.token_hex(16)}")
        return made

    def refused(call) -> None:
        """A call that must fail, with an error that does not repeat what was sent."""
        error = failure_of(call)
        refusals.append(f"{error.details()} {error.trailing_metadata()}")

    def rest_refused(method: str, path: str, body=None, **options) -> None:
        answer = rest.call(method, path, body, **options)
        assert answer.status >= 400, path
        refusals.append(answer.body.decode())

    person = Person(email=f"{canary()}@example.com", password=canary())
    canaries.add(person.username)
    client.sign_up(person)
    refused(lambda: client.sign_up(person))
    client.verify_email(mailbox.token(person.email, VERIFY))
    tokens = client.login(person)
    for wrong in (Person(email=person.email, password=canary()), Person(password=canary())):
        for _ in range(4):
            refused(lambda wrong=wrong: client.login(wrong))
    second = client.refresh(tokens.refresh_token)
    third = client.refresh(second.refresh_token)
    for token in (tokens.refresh_token, third.refresh_token, canary()):
        refused(lambda token=token: client.refresh(token))
    client.request_password_reset(person.email)
    new = Person(person.username, person.email, canary())
    client.reset_password(mailbox.token(person.email, RESET), new.password)
    tokens = client.login(new)
    refused(lambda: client.change_password(tokens.access_token, canary(), canary()))
    client.request_email_change(tokens.access_token, f"{canary()}@example.com", new.password)
    refused(lambda: client.verify_email(canary()))
    refused(lambda: client.me(canary()))
    # Services, by RPC and by OAuth.
    with any_way("gRPC", server) as way:
        service = ServiceAccount(way, Somebody(way, engine, "admin"), "reader")
        canaries.add(service.secret)
        canaries.add(service.token())
    basic = base64.b64encode(f"{service.id}:{canary()}".encode()).decode()
    canaries.add(basic)
    form = {"content-type": "application/x-www-form-urlencoded"}
    rest_refused(
        "POST", "/oauth2/token", "grant_type=client_credentials", headers={"authorization": f"Basic {basic}", **form}
    )
    rest_refused("POST", "/oauth2/token", f"grant_type=refresh_token&refresh_token={canary()}", headers=form)
    # Where no secret belongs: paths, queries, names of headers and of fields, broken bodies, traces.
    rest_refused("GET", f"/{canary()}/{tokens.access_token}?token={canary()}")
    rest_refused("GET", f"/v1/me?access_token={tokens.access_token}")
    rest_refused("POST", "/v1/auth/login", f'{{"email": "{person.email}", "password": "{canary()}')
    rest_refused("POST", "/v1/auth/login", f"password={canary()}", headers=form)
    rest_refused("GET", f"/verify-email?token={canary()}&token={canary()}")
    headers = {"tracestate": f"a={canary()}", "traceparent": canary(), "user-agent": canary(), "cookie": canary()}
    rest_refused("GET", "/v1/me", token=canary(), headers={**headers, canary(): canary()})
    refused(lambda: client.send_bytes(f"/{canary()}/{canary()}", b""))
    refused(lambda: client.send_bytes("Login", b"\x0a\xff" + canary().encode()))
    caller = Caller()
    state = [caller.header, ("tracestate", f"a={canary()}"), ("baggage", f"a={canary()}"), (canary(), canary())]
    refused(lambda: client.call("GetMe", pb.GetMeRequest(), token=canary(), metadata=state))
    metrics = Rest(server, "ops_addr").get("/metrics").body.decode()
    server.stop()

    assert any(sent.get("api-key") == header for sent in collector.metadata), "the collector gets its header"
    assert collector.tree(caller.trace)[caller.id], "the traces are there"
    received = collector.bytes().decode(errors="replace")
    held = {"logs": "\n".join(server.log), "errors": "\n".join(refusals), "traces": received, "metrics": metrics}
    own = canaries | {person.email, person.password, new.password} | server.secrets
    for where, text in held.items():
        found = [secret for secret in own if secret in text]
        assert not found, f"{where} hold {len(found)} secrets, such as {found[0][:12]}… in …{around(text, found[0])}…"


def around(text: str, found: str) -> str:
    position = text.index(found)
    return text[max(0, position - 120) : position + 40].replace(found, "[it]")
