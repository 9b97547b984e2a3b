"""REST with curl, over HTTP/1.1 and HTTP/2: the main use of Postern, and the headers of every answer.

It tests well-formed requests. Malformed ones are in `test_rest_bad_input`, the comparison with Envoy is in
`test_envoy`, the keys are in `test_keys`.
"""

import json
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from support import jose
from support.client import Person
from support.engine import Postgres
from support.h2c import H2c
from support.http import Curl, Rest
from support.postgres import Cluster
from support.refusal import expect_own_headers, expect_refusal
from support.wait import wait_until

ORIGIN = "https://app.example.com"


@pytest.fixture(scope="session")
def curl(left_out) -> str:
    return shutil.which("curl") or left_out("everything with curl: run `scripts/tools curl`")


@pytest.fixture(params=["1.1", "2"], ids=["HTTP/1.1", "h2c"])
def rest(request, server, curl):
    """Calls to the shared server with curl, over each version of HTTP."""
    return Curl(server, request.param, curl)


def tampered(token: str) -> str:
    """The same token with one bit of its signature changed."""
    head, _, signature = token.rpartition(".")
    changed = bytearray(jose.decode(signature))
    changed[7] ^= 1
    return f"{head}.{jose.encode(bytes(changed))}"


def test_sign_up_log_in_refresh_who_am_i_and_log_out(rest):
    person = Person()
    made = rest.sign_up(person)
    assert made["username"] == person.username
    assert (made["emailVerified"], made["disabled"]) == (False, False), "fields that are false are there too"

    login = rest.post("/v1/auth/login", {"email": person.email, "password": person.password}).ok()
    assert login["user"] == made
    assert rest.get("/v1/me", token=login["tokens"]["accessToken"]).ok() == {"user": made}

    fresh = rest.post("/v1/auth/refresh", {"refreshToken": login["tokens"]["refreshToken"]}).ok()["tokens"]
    assert set(fresh) == set(login["tokens"])
    assert fresh["tokenType"] == "Bearer"
    assert rest.get("/v1/me", token=fresh["accessToken"]).ok() == {"user": made}

    assert rest.post("/v1/auth/logout", {"refreshToken": fresh["refreshToken"]}).ok() == {}

    ended = rest.post("/v1/auth/refresh", {"refreshToken": fresh["refreshToken"]})
    expect_refusal(ended, 401, "REFRESH_TOKEN_INVALID")
    expect_refusal(rest.get("/v1/me", token=fresh["accessToken"]), 401, "SESSION_REVOKED")


def test_the_answer_comes_in_the_version_of_http_that_was_asked(rest):
    assert rest.get("/v1/me").version == rest.version


def test_get_me_needs_a_valid_token(rest):
    _, tokens = rest.newcomer()
    expect_refusal(rest.get("/v1/me"), 401, "TOKEN_MISSING")
    expect_refusal(rest.get("/v1/me", token=tampered(tokens["accessToken"])), 401, "TOKEN_INVALID")
    expect_refusal(rest.get("/v1/me", token=tokens["refreshToken"]), 401, "TOKEN_INVALID")
    assert rest.get("/v1/me", headers={"authorization": f"bEARER {tokens['accessToken']}"}).ok()


def test_an_expired_token_is_401_and_keeps_nobody_from_refreshing(embedded, start_server, curl):
    rest = Curl(start_server(embedded, access_token_ttl="1s"), curl=curl)
    _, tokens = rest.newcomer()

    # The token is valid for one second, plus at most five seconds of leeway.
    wait_until(
        "the access token expires",
        lambda: rest.get("/v1/me", token=tokens["accessToken"]).status == 401,
        pause=0.2,
    )

    expect_refusal(rest.get("/v1/me", token=tokens["accessToken"]), 401, "TOKEN_EXPIRED")
    refresh = {"refreshToken": tokens["refreshToken"]}
    assert rest.post("/v1/auth/refresh", refresh, token=tokens["accessToken"]).ok()


def test_a_stale_or_malformed_authorization_keeps_nobody_from_a_public_route(rest):
    person, tokens = rest.newcomer()
    rest.post("/v1/auth/logout", {"refreshToken": tokens["refreshToken"]}).ok()
    login = {"email": person.email, "password": person.password}
    for value in (f"Bearer {tokens['accessToken']}", "Bearer", "nonsense", "Basic YTpi"):
        assert rest.post("/v1/auth/login", login, headers={"authorization": value}).ok()


def test_both_spellings_of_a_field_are_read(rest):
    person, tokens = rest.newcomer()
    snake = rest.post("/v1/auth/refresh", {"refresh_token": tokens["refreshToken"]}).ok()["tokens"]
    camel = rest.post("/v1/auth/refresh", {"refreshToken": snake["refreshToken"]}).ok()["tokens"]
    assert rest.post("/v1/auth/logout", {"refresh_token": camel["refreshToken"], "everywhere": True}).ok() == {}
    assert rest.login(person)


def test_every_refusal_of_the_contract_has_its_status_and_reason(rest):
    person, _ = rest.newcomer()
    again = {"username": person.username, "email": Person().email, "password": person.password}
    expect_refusal(rest.post("/v1/auth/signup", again), 409, "USERNAME_TAKEN")
    again = {"username": Person().username, "email": person.email, "password": person.password}
    expect_refusal(rest.post("/v1/auth/signup", again), 409, "EMAIL_TAKEN")
    weak = {"username": Person().username, "email": Person().email, "password": "password1"}
    expect_refusal(rest.post("/v1/auth/signup", weak), 400, "INVALID_FIELD", fields={"password"})
    nothing = rest.post("/v1/auth/signup", {})
    expect_refusal(nothing, 400, "INVALID_FIELD", fields={"username", "email", "password"})
    wrong = {"email": person.email, "password": Person().password}
    expect_refusal(rest.post("/v1/auth/login", wrong), 401, "INVALID_CREDENTIALS")


def test_wrong_and_unknown_are_the_same_answer_but_for_the_request_id(rest):
    person, _ = rest.newcomer()
    answers = [
        rest.post("/v1/auth/login", {"email": somebody.email, "password": somebody.password})
        for somebody in (replace(person, password=Person().password), Person())
    ]
    first, second = (
        (answer.status, answer.body, {k: v for k, v in answer.headers.items() if k not in ("x-request-id", "date")})
        for answer in answers
    )
    assert first == second


def test_the_request_id_comes_back_on_successes_and_on_every_refusal(rest):
    _, tokens = rest.newcomer()
    calls = [
        ("GET", "/v1/me", None, {"authorization": f"Bearer {tokens['accessToken']}"}, 200),
        ("GET", "/.well-known/jwks.json", None, {}, 200),
        ("GET", "/v1/me", None, {}, 401),
        ("POST", "/v1/auth/login", "{", {}, 400),
        ("GET", "/nowhere", None, {}, 404),
        ("GET", "/v1/auth/login", None, {}, 405),
        ("POST", "/v1/auth/login", "{}", {"content-type": "text/plain"}, 415),
        ("POST", "/v1/auth/login", "x" * 70_000, {}, 413),
    ]
    for method, path, body, headers, status in calls:
        sent = f"test-{uuid.uuid4()}"
        answer = rest.call(method, path, body, headers={**headers, "x-request-id": sent})
        assert (answer.status, answer.header("x-request-id")) == (status, sent)


def test_a_request_id_that_is_no_sane_one_is_replaced(rest):
    for sent in ("x" * 129, "two words", "é"):
        given = rest.get("/v1/me", headers={"x-request-id": sent}).header("x-request-id")
        assert given
        assert given != sent
    assert len({rest.get("/v1/me").header("x-request-id") for _ in range(3)}) == 3


def test_tokens_are_kept_by_no_cache_and_every_answer_has_the_security_headers(rest):
    person, tokens = rest.newcomer()
    login = rest.post("/v1/auth/login", {"email": person.email, "password": person.password})
    refreshed = rest.post("/v1/auth/refresh", {"refreshToken": tokens["refreshToken"]})
    me = rest.get("/v1/me", token=tokens["accessToken"])
    for answer in (login, refreshed, me):
        assert answer.ok()
        assert answer.header("cache-control") == "no-store"
        expect_own_headers(answer)
    for path in ("/openapi.json", "/.well-known/jwks.json", "/.well-known/openid-configuration"):
        answer = rest.get(path)
        assert answer.ok()
        expect_own_headers(answer)


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_a_session_knows_the_address_and_the_agent_of_a_rest_client(server, curl):
    rest = Curl(server, curl=curl)
    person = Person()
    rest.sign_up(person)
    before = {row[0] for row in server.engine.query("SELECT id FROM sessions")}
    rest.post(
        "/v1/auth/login",
        {"email": person.email, "password": person.password},
        headers={"user-agent": "otter/1.0", "x-forwarded-for": "203.0.113.9"},
    ).ok()
    rows = server.engine.query("SELECT id, client_ip, user_agent FROM sessions")
    assert [row[1:] for row in rows if row[0] not in before] == [("127.0.0.1", "otter/1.0")]


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_the_http_address_serves_no_grpc(server):
    call = {"content-type": "application/grpc", "te": "trailers"}
    answer = H2c(server).post("/postern.auth.v1.AuthService/GetMe", b"\0\0\0\0\0", headers=call)
    expect_refusal(answer, 404)


def test_an_overloaded_server_says_429_and_when_to_come_back(embedded, start_server):
    # One hash runs at a time, and takes long enough on any machine for other calls to wait in the queue.
    slow = {"argon2_memory_kib": 65536, "argon2_iterations": 6, "hash_threads": 1, "hash_queue": 1}
    rest = Rest(start_server(embedded, **slow))

    def attempt(person: Person):
        return rest.post("/v1/auth/login", {"email": person.email, "password": person.password})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(attempt, [Person() for _ in range(8)]))

    refused = [answer for answer in answers if answer.status == 429]
    assert 1 <= len(refused) < len(answers), [answer.status for answer in answers]
    for answer in refused:
        expect_refusal(answer, 429, "OVERLOADED")
    for answer in (answer for answer in answers if answer.status != 429):
        expect_refusal(answer, 401, "INVALID_CREDENTIALS")


def test_a_database_that_is_away_is_503_and_says_when_to_come_back(postgres_binaries, start_server):
    cluster = Cluster(postgres_binaries)
    try:
        rest = Rest(start_server(Postgres(cluster.start())))
        person, tokens = rest.newcomer()
        cluster.stop()
        login = {"email": person.email, "password": person.password}
        expect_refusal(rest.post("/v1/auth/login", login), 503, "STORE_UNAVAILABLE")
        expect_refusal(rest.get("/v1/me", token=tokens["accessToken"]), 503, "STORE_UNAVAILABLE")
        # Calls that need no database are still answered.
        expect_refusal(rest.get("/v1/me"), 401, "TOKEN_MISSING")
        assert rest.get("/.well-known/jwks.json").ok()
    finally:
        cluster.remove()


def preflight(rest, origin: str, path: str = "/v1/auth/login"):
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    return rest.call("OPTIONS", path, headers={"origin": origin, **asked})


def allowances(answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


def test_no_origin_may_call_unless_it_is_configured(rest):
    expect_refusal(preflight(rest, ORIGIN), 405)
    for answer in (preflight(rest, ORIGIN), rest.get("/v1/me", headers={"origin": ORIGIN})):
        assert not allowances(answer)


def test_pages_of_a_configured_origin_may_call_and_no_others(embedded, start_server, curl):
    other = "http://localhost:5173"
    rest = Curl(start_server(embedded, cors_origins=f"{ORIGIN},{other}"), curl=curl)

    for origin in (ORIGIN, other):
        answer = preflight(rest, origin)
        allowed = allowances(answer)
        assert answer.status in (200, 204)
        assert allowed["access-control-allow-origin"] == origin
        assert "POST" in allowed["access-control-allow-methods"]
        assert {"authorization", "content-type"} <= set(allowed["access-control-allow-headers"].lower().split(","))
        assert "access-control-allow-credentials" not in allowed, "only cookies would need this header"

        refused = rest.get("/v1/me", headers={"origin": origin})
        expect_refusal(refused, 401, "TOKEN_MISSING")
        assert refused.header("access-control-allow-origin") == origin
        assert "retry-after" in refused.header("access-control-expose-headers").lower()
        assert "origin" in refused.header("vary").lower()

    for stranger in ("https://evil.example.com", f"{ORIGIN}.evil.com", "http://app.example.com", "null"):
        for answer in (preflight(rest, stranger), rest.get("/v1/me", headers={"origin": stranger})):
            assert "access-control-allow-origin" not in answer.headers, stranger


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_the_openapi_description_is_what_the_command_prints(server, curl):
    printed = server.run("openapi")
    assert printed.returncode == 0, printed.stderr
    assert Curl(server, curl=curl).get("/openapi.json").ok() == json.loads(printed.stdout)
