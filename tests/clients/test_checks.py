"""Decisions about requests that a proxy asks about: `Check` over gRPC and `/v1/forward-auth` over HTTP.

It tests what each demand lets pass, which headers carry the identity, and that every outcome is an explicit answer.
`test_mesh` puts real proxies in front. The forged tokens of `test_forgeries` are presented here too.
"""

import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from support import forgeries, jose
from support.admin import AnyByRest, Somebody
from support.checks import CHECK, IDENTITY, WAYS, ByCheck, message
from support.client import Person
from support.http import Rest
from support.services import ServiceAccount
from support.wait import wait_until
from test_operations import scrape

MISSING = "this call needs an access token"


@pytest.fixture(scope="module")
def server(embedded_server):
    """The engine makes no difference to what is decided in memory."""
    return embedded_server


@pytest.fixture(params=WAYS)
def proxy(request, server):
    return WAYS[request.param](server)


def bearer(token: str) -> str:
    return f"Bearer {token}"


@pytest.fixture(scope="module")
def admin(server):
    return Somebody(AnyByRest(Rest(server)), server.engine, "admin")


@pytest.fixture(scope="module")
def service(server, admin):
    return ServiceAccount(AnyByRest(Rest(server)), admin, "worker")


def test_a_good_token_passes_with_the_identity_of_its_person(proxy, server, client):
    person, tokens = client.newcomer()
    claims = jose.claims_of(tokens.access_token)
    answer = proxy.ask(bearer(tokens.access_token))
    assert (answer.status, answer.removed) == (200, set())
    assert answer.headers == {
        "x-postern-user-id": claims["sub"],
        "x-postern-session-id": claims["sid"],
        "x-postern-username": person.username,
        "x-postern-email": person.email,
        "x-postern-roles": "user",
        "x-postern-subject-type": "user",
    }
    if isinstance(proxy, ByCheck):
        same = ("sub", "sid", "client_id", "username", "email", "email_verified", "roles", "iat", "exp")
        assert answer.claims == {name: claims[name] for name in same} | {"subject_type": "user"}


def test_a_service_passes_as_a_service_and_never_with_an_address(proxy, service):
    token = service.token()
    answer = proxy.ask(bearer(token), require_service="true")
    assert (answer.status, answer.removed) == (200, {"x-postern-email"})
    assert answer.headers == {
        "x-postern-user-id": service.id,
        "x-postern-session-id": service.key["id"],
        "x-postern-username": service.name,
        "x-postern-roles": "worker",
        "x-postern-subject-type": "service",
    }
    assert proxy.ask(bearer(token), require_role="worker").status == 200
    assert proxy.ask(bearer(token), require_verified_email="true").status == 403


def test_who_presents_no_token_is_told_so_or_is_nobody(proxy):
    answer = proxy.ask()
    assert (answer.status, answer.challenge, answer.body) == (401, "Bearer", MISSING)
    assert proxy.ask("Basic YTpi").status == 401
    for other_scheme in ([], ["Basic YTpi"]):
        answer = proxy.ask(*other_scheme, allow_anonymous="true")
        assert (answer.status, answer.headers, answer.removed) == (200, {}, IDENTITY)


def test_a_bad_token_is_not_nobody(proxy, session, client):
    good = bearer(session.access_token)
    bad = {
        "nonsense": ["Bearer nonsense"],
        "nothing after the scheme": ["Bearer"],
        "a refresh token": [bearer(session.refresh_token)],
        "the same twice": [good, good],
        "two schemes": ["Basic YTpi", good],
        "not UTF-8": [f"{good}\xff"],
    }
    _, other = client.newcomer()
    client.logout(other.refresh_token)
    bad["a session that has ended"] = [bearer(other.access_token)]
    for demands in ({}, {"allow_anonymous": "true"}):
        for name, values in bad.items():
            answer = proxy.ask(*values, **demands)
            assert answer.status == 401, name
            assert answer.challenge.startswith('Bearer error="invalid_token", error_description="'), name
            assert answer.body, name


def test_a_demand_that_is_not_met_is_forbidden(proxy, server, session, admin):
    user, as_admin = bearer(session.access_token), bearer(admin.credential)
    for demand in ({"require_role": "admin"}, {"require_service": "true"}, {"require_verified_email": "true"}):
        answer = proxy.ask(user, **demand)
        assert (answer.status, bool(answer.body)) == (403, True), demand
        assert answer.challenge.startswith('Bearer error="insufficient_scope"'), demand
        assert proxy.ask(user, **dict.fromkeys(demand, "false" if "true" in demand.values() else "user")).status == 200
        assert proxy.ask(**demand).status == 401, "without a token nobody says what it would need"
    assert proxy.ask(as_admin, require_role="admin").status == 200


def test_a_verified_address_is_what_the_token_says(proxy, server, client):
    person = Person()
    user = client.sign_up(person)
    server.engine.execute("UPDATE users SET email_verified = true WHERE email = ?", person.email)
    assert user.email == person.email
    token = bearer(client.login(person).access_token)
    assert proxy.ask(token, require_verified_email="true", require_role="user").status == 200


MISTAKES = {
    "an unknown name": {"require_rol": "admin"},
    "another case": {"Require_Role": "admin"},
    "an empty role": {"require_role": ""},
    "two roles": {"require_role": "admin,user"},
    "no boolean": {"require_service": "yes"},
    "a boolean in another case": {"allow_anonymous": "True"},
    "a contradiction": {"allow_anonymous": "true", "require_role": "user"},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_demand_that_is_not_understood_lets_nobody_pass(proxy, server, admin, mistake):
    operations = Rest(server, "ops_addr")
    before = scrape(operations).value("postern_checks_total", outcome="misconfigured")
    for values in ([bearer(admin.credential)], []):
        answer = proxy.ask(*values, **MISTAKES[mistake])
        assert (answer.status, answer.body) == (403, "this route is not configured correctly")
    assert scrape(operations).value("postern_checks_total", outcome="misconfigured") == before + 2


def test_a_mistake_is_named_in_the_log_and_the_log_is_not_flooded(embedded, start_server):
    server = start_server(embedded)
    proxy = ByCheck(server)
    for _ in range(100):
        proxy.ask(require_rol="admin")
    lines = [line for line in server.log if "demands that are not understood" in line]
    assert 1 <= len(lines) <= 11, len(lines)
    assert "require_rol" in lines[0]
    assert "require_role, require_verified_email" in lines[0], "it names the demands that there are"


def test_whatever_cannot_be_read_is_denied_by_an_answer_and_not_by_an_error(server):
    proxy = ByCheck(server)
    too_large = message("CheckRequest")()
    too_large.attributes.request.http.headers["cookie"] = "a" * 70_000
    not_utf8 = bytes.fromhex("0a0d220b12091a070a0161120 2c328".replace(" ", ""))
    for name, body in {
        "too large": too_large.SerializeToString(),
        "not a message": b"\xff\xff\xff",
        "a header that is not UTF-8": not_utf8,
    }.items():
        answer = proxy.send(body)
        assert (answer.status, answer.body.startswith("this request cannot be checked")) == (403, True), name
    assert proxy.send(b"").status == 401, "an empty message asks about a request without headers"
    # Other RPCs keep their errors.
    with pytest.raises(grpc.RpcError):
        server.client.send_bytes("/postern.auth.v1.TokenService/IntrospectToken", b"\xff\xff\xff")


def test_a_check_needs_no_token_of_its_own_and_a_bad_one_does_not_matter(server, session):
    proxy = ByCheck(server)
    request = message("CheckRequest")()
    request.attributes.request.http.headers["authorization"] = bearer(session.access_token)
    reply = server.client.send_bytes(CHECK, request.SerializeToString(), metadata=[("authorization", "Bearer x")])
    assert message("CheckResponse").FromString(reply).status.code == 0
    assert proxy.ask().status == 401


def test_no_forged_token_passes(proxy, session, jwks):
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        forged = forgeries.of(session.access_token, jwks, f"http://127.0.0.1:{elsewhere.getsockname()[1]}")
        assert len(forged) > 60
        took = []
        for name, token in forged.items():
            for demands in ({}, {"allow_anonymous": "true"}):
                started = time.monotonic()
                answer = proxy.ask(bearer(token), **demands)
                took.append(time.monotonic() - started)
                assert answer.status == 401, name
        elsewhere.setblocking(False)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
    print(f"{len(forged)} forged tokens: {statistics.median(took) * 1000:.1f} ms, at most {max(took) * 1000:.1f} ms")


def test_a_demotion_and_a_logout_count_at_the_next_question(proxy, server, client, admin):
    person, tokens = client.newcomer()
    user = jose.claims_of(tokens.access_token)["sub"]
    way = AnyByRest(Rest(server))
    token = bearer(tokens.access_token)
    for roles, status in ((["user", "editor"], 200), (["user"], 403)):
        way.ok("SetUserRoles", credential=admin.credential, user_id=user, roles=roles)
        assert proxy.ask(token, require_role="editor").status == status
    client.logout(tokens.refresh_token)
    assert proxy.ask(token).status == 401


def test_all_checks_of_a_mesh_over_one_connection_are_answered(server, session):
    """A mesh has thousands of requests, and asks over one connection."""
    proxy, token = ByCheck(server), bearer(session.access_token)
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: proxy.ask(token).status, range(2_000)))
    assert set(answers) == {200}


def test_each_answer_is_counted_by_its_outcome(embedded, start_server):
    server = start_server(embedded)
    proxy, operations = ByCheck(server), Rest(server, "ops_addr")
    _, tokens = server.client.newcomer()
    token = bearer(tokens.access_token)
    proxy.ask(token)
    proxy.ask(allow_anonymous="true")
    proxy.ask()
    proxy.ask(token, require_role="admin")
    proxy.ask(nonsense="true")
    proxy.send(b"\xff")
    outcomes = ("allowed", "anonymous", "unauthenticated", "forbidden", "misconfigured", "unavailable")
    wait_until(
        "each is counted once",
        lambda: [scrape(operations).value("postern_checks_total", outcome=outcome) for outcome in outcomes] == [1] * 6,
    )
    method = CHECK.removeprefix("/")
    assert scrape(operations).value("postern_rpcs_total", method=method, code="OK") == 5
    assert scrape(operations).value("postern_rpcs_total", method=method, code="INVALID_ARGUMENT") == 1
