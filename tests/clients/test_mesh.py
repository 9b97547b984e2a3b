"""The configurations of `docs/mesh.md`, in a real Envoy and a real nginx, in front of a small service.

It tests what each lets pass and which identity reaches the service: without a token, with tokens of people, admins and
services, after a logout and a change of roles, with identity headers that the client made up, and while Postern or
PostgreSQL is away. What Postern answers to a proxy is tested in `test_checks`.
"""

import json
import re
import statistics
import time

import grpc
import pytest
import yaml

from support import jose
from support.admin import AnyByRest, Somebody
from support.checks import IDENTITY
from support.client import Person
from support.engine import Postgres
from support.http import Rest
from support.mesh import App, MeshEnvoy, MeshNginx, configurations
from support.postgres import Cluster
from support.proxies import find
from support.services import ServiceAccount
from support.wait import wait_until

ISSUER = "https://auth.example.com"
# The promised time in seconds.
PROMISE = 1.0
# How long Postern decides from memory.
FROM_MEMORY = 30

ASKING = ("envoy-ext-authz.yaml", "nginx.conf")
ALL = (*ASKING, "envoy-jwt-authn.yaml")
ENVOY_ALONE = pytest.mark.parametrize("proxy", ["envoy-ext-authz.yaml"], indirect=True, scope="module")
THAT_ASK = pytest.mark.parametrize("proxy", ASKING, indirect=True, scope="module")

# What a client might send to pass as an admin.
SPOOFED = [
    ("x-postern-user-id", "01890000-0000-7000-8000-000000000000"),
    ("X-POSTERN-USER-ID", "01890000-0000-7000-8000-000000000001"),
    ("X-Postern-Session-Id", "01890000-0000-7000-8000-000000000002"),
    ("X-Postern-Username", "root"),
    ("X-Postern-Email", "root@example.com"),
    ("X-Postern-Roles", "admin"),
    ("x-postern-roles", "user,admin"),
    ("x-postern-subject-type", "service"),
]


@pytest.fixture(scope="module")
def server(embedded_server):
    """The engine makes no difference to what is decided in memory."""
    return embedded_server


@pytest.fixture(scope="module")
def settings():
    return {"issuer": ISSUER}


@pytest.fixture(scope="module")
def app():
    app = App().start()
    yield app
    app.close()


def start_proxy(name: str, server, app, directory, left_out):
    """A proxy of the page by the name of its file."""
    if name == "nginx.conf":
        executable = find("nginx") or left_out("Postern behind nginx: run `scripts/tools nginx`")
        return MeshNginx(executable, server, app, directory).start()
    return MeshEnvoy(name, server, app, directory).start()


@pytest.fixture(scope="module", params=ALL)
def proxy(request, server, app, tmp_path_factory, left_out):
    proxy = start_proxy(request.param, server, app, tmp_path_factory.mktemp("proxy"), left_out)
    if request.param == "envoy-jwt-authn.yaml":
        _, tokens = server.client.newcomer()
        wait_until("Envoy has the keys", lambda: proxy.get("/", tokens.access_token).status == 200)
    yield proxy
    proxy.close()


@pytest.fixture
def start_in_front(app, tmp_path, left_out):
    """Starts a proxy of the page in front of another server."""
    started = []

    def start(name: str, server):
        directory = tmp_path / f"proxy-{len(started)}"
        directory.mkdir()
        started.append(start_proxy(name, server, app, directory, left_out))
        return started[-1]

    yield start
    for proxy in started:
        proxy.close()


@pytest.fixture(scope="module")
def admin(server):
    return Somebody(AnyByRest(Rest(server)), server.engine, "admin")


def identity_of(token: str) -> dict[str, str]:
    claims = jose.claims_of(token)
    values = {
        "x-postern-user-id": claims["sub"],
        "x-postern-session-id": claims["sid"],
        "x-postern-username": claims["username"],
        "x-postern-email": claims.get("email", ""),
        "x-postern-roles": ",".join(claims["roles"]),
        "x-postern-subject-type": claims["subject_type"],
    }
    return {name: value for name, value in values.items() if value}


def expected(proxy, token: str) -> dict[str, str]:
    """The identity that reaches the service. jwt_authn cannot write roles as a header."""
    identity = identity_of(token)
    if isinstance(proxy, MeshEnvoy) and proxy.verifies_itself:
        del identity["x-postern-roles"]
    return identity


def test_without_a_token_nobody_passes(proxy):
    for path in ("/", "/orders?id=1", "/admin/users"):
        answer = proxy.get(path)
        assert answer.status == 401, path
        assert answer.headers["www-authenticate"].startswith("Bearer"), path
    assert proxy.get("/", "nonsense").status == 401
    assert proxy.get("/", headers=[("authorization", "Basic YTpi")]).status == 401


def test_a_good_token_passes_with_its_identity(proxy, session):
    answer = proxy.get("/orders?id=1", session.access_token)
    assert (answer.status, answer.path) == (200, "/orders?id=1")
    assert answer.identity == expected(proxy, session.access_token)
    posted = proxy.get("/orders", session.access_token, method="POST", body=b"two of them")
    assert (posted.status, json.loads(posted.body)["body"]) == (200, "two of them")
    assert posted.identity == expected(proxy, session.access_token)


def test_made_up_identity_is_replaced(proxy, session):
    answer = proxy.get("/", session.access_token, headers=SPOOFED)
    assert (answer.status, answer.identity) == (200, expected(proxy, session.access_token))


def test_made_up_identity_is_removed_where_postern_is_not_asked(proxy, session):
    for token in (None, session.access_token):
        answer = proxy.get("/healthz", token, headers=SPOOFED)
        assert (answer.status, answer.identity) == (200, {})


@ENVOY_ALONE
def test_made_up_identity_is_removed_for_anonymous_callers(proxy, session):
    answer = proxy.get("/public/news", headers=SPOOFED)
    assert (answer.status, answer.identity) == (200, {})
    answer = proxy.get("/public/news", session.access_token, headers=SPOOFED)
    assert (answer.status, answer.identity) == (200, identity_of(session.access_token))
    assert proxy.get("/public/news", "nonsense").status == 401


def test_a_header_that_cgi_would_take_for_one_of_the_identity_does_not_arrive(proxy, session):
    for path in ("/", "/healthz"):
        for name in ("x_postern_user_id", "X_Postern_User_Id", "x-postern_roles"):
            answer = proxy.get(path, session.access_token, headers=[(name, "admin")])
            if answer.status == 200:
                assert "admin" not in answer.identity.values(), name
            else:
                assert answer.status == 400, name


def test_a_route_for_admins_is_for_admins_however_it_is_spelled(proxy, session, admin):
    for path in (
        "/admin/users",
        "/public/../admin/users",
        "/public/%2e%2e/admin/users",
        "//admin/users",
        "/./admin/users",
    ):
        assert proxy.get(path, session.access_token).status == 403, path
        assert proxy.get(path).status == 401, path
        answer = proxy.get(path, admin.credential)
        assert (answer.status, answer.identity) == (200, expected(proxy, admin.credential)), path
    for path in ("/public%2f../admin/users", "/public/..%2fadmin/users"):
        answer = proxy.get(path, session.access_token)
        # nginx decodes the slash and finds the route for admins.
        assert answer.status in (400, 403), path


@ENVOY_ALONE
def test_a_route_for_services_is_for_services(proxy, server, session, admin):
    account = ServiceAccount(AnyByRest(Rest(server)), admin, "worker")
    token = account.token()
    answer = proxy.get("/internal/stock", token, headers=SPOOFED)
    assert (answer.status, answer.identity) == (200, identity_of(token))
    for person in (session.access_token, admin.credential):
        assert proxy.get("/internal/stock", person).status == 403
    account.delete_key()
    assert proxy.get("/internal/stock", token).status == 401


@ENVOY_ALONE
def test_two_tokens_are_none(proxy, session):
    again = [("authorization", f"Bearer {session.access_token}")]
    for path in ("/", "/public/news"):
        assert proxy.get(path, session.access_token, headers=again).status == 401
        assert proxy.get(path, headers=[("authorization", b"Bearer \xe9".decode("latin-1"))]).status == 401


@ENVOY_ALONE
def test_grpc_calls_pass_with_their_identity_and_are_refused_with_a_status(proxy, session, server, client):
    seen = proxy.call(session.access_token, [(name.lower(), value) for name, value in SPOOFED])
    assert {pair for pair in seen if pair[0] in IDENTITY} == set(identity_of(session.access_token).items())
    _, ended = client.newcomer()
    client.logout(ended.refresh_token)
    for token, message in ((None, "this call needs an access token"), (ended.access_token, "the session has ended")):
        with pytest.raises(grpc.RpcError) as refused:
            proxy.call(token)
        assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.UNAUTHENTICATED, message)


@ENVOY_ALONE
def test_the_claims_are_there_for_the_access_log(proxy, session):
    path = f"/orders/{Person().username}"
    assert proxy.get(path, session.access_token).status == 200
    caller = jose.claims_of(session.access_token)["sub"]
    wait_until(
        "the line is there", lambda: [line for line in proxy.log().splitlines() if path in line and caller in line]
    )


@THAT_ASK
def test_a_refusal_says_why(proxy, session, client):
    _, ended = client.newcomer()
    client.logout(ended.refresh_token)
    for path, token, challenge in (
        ("/", None, "Bearer"),
        ("/", ended.access_token, 'Bearer error="invalid_token", error_description="the session has ended"'),
    ):
        assert proxy.get(path, token).headers["www-authenticate"] == challenge


@THAT_ASK
def test_postern_away_is_503_and_never_a_pass(proxy, embedded, start_server, start_in_front):
    other = start_server(embedded)
    mine = start_in_front("nginx.conf" if isinstance(proxy, MeshNginx) else "envoy-ext-authz.yaml", other)
    _, tokens = other.client.newcomer()
    assert mine.get("/", tokens.access_token).status == 200
    other.stop()
    for path in ("/", "/admin/users", *([] if isinstance(proxy, MeshNginx) else ["/public/news"])):
        for token in (tokens.access_token, "nonsense", None):
            assert mine.get(path, token).status == 503, path
    assert mine.get("/healthz").status == 200, "nobody asks Postern about this one"
    other.start()
    wait_until("it passes again", lambda: mine.get("/", tokens.access_token).status == 200)


def test_what_another_replica_revokes_is_refused_within_a_second(cluster, binary, start_server, start_in_front, size):
    """A logout and a demotion at one replica, behind an Envoy that asks another one."""
    engine = Postgres(cluster)
    first, second = start_server(engine), start_server(engine)
    proxy = start_in_front("envoy-ext-authz.yaml", second)
    way = AnyByRest(Rest(first))
    admin = Somebody(way, engine, "admin")
    took = {"logout": [], "demotion": []}

    def seconds_until_refused(path: str, person: Somebody, status: int) -> float:
        started = time.monotonic()
        wait_until("it is refused", lambda: proxy.get(path, person.credential).status == status, pause=0.005)
        return time.monotonic() - started

    for _ in range(size(5, 50)):
        person = Somebody(way, engine, "admin")
        assert proxy.get("/admin/users", person.credential).status == 200
        way.ok("SetUserRoles", credential=admin.credential, user_id=person.id, roles=["user"])
        took["demotion"].append(seconds_until_refused("/admin/users", person, 403))
        assert proxy.get("/", person.credential).status == 200
        way.ok("Logout", refresh_token=person.tokens["refreshToken"])
        took["logout"].append(seconds_until_refused("/", person, 401))
    for what, seconds in took.items():
        print(f"{what}: median {statistics.median(seconds):.3f} s, at most {max(seconds):.3f} s")
        assert statistics.median(seconds) <= PROMISE, what


def test_without_postgresql_requests_are_decided_from_memory(
    postgres_binaries, start_server, start_in_front, pytestconfig
):
    """For 30 seconds, which only nightly runs wait for; then they are denied with 503."""
    cluster = Cluster(postgres_binaries)
    try:
        server = start_server(Postgres(cluster.start()))
        proxy = start_in_front("envoy-ext-authz.yaml", server)
        client = server.client
        _, live = client.newcomer()
        _, ended = client.newcomer()
        client.logout(ended.refresh_token)
        assert proxy.get("/", live.access_token).status == 200
        cluster.stop()
        stopped = time.monotonic()
        wait_until("Postern has noticed", lambda: client.health() == "NOT_SERVING")
        assert proxy.get("/", live.access_token).identity == identity_of(live.access_token)
        assert proxy.get("/", ended.access_token).status == 401
        if pytestconfig.getoption("nightly"):
            wait_until("it is denied", lambda: proxy.get("/", live.access_token).status == 503)
            lasted = time.monotonic() - stopped
            print(f"decided from memory for {lasted:.1f} s")
            assert FROM_MEMORY - 2 <= lasted <= FROM_MEMORY + 5
            answer = proxy.get("/", live.access_token)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert answer.body == b"access tokens cannot be checked at the moment"
            assert proxy.get("/", "nonsense").status == 401, "that one is bad whatever the log says"
            assert proxy.get("/public/news").status == 200, "nothing of this one could be revoked"
        cluster.start()
        wait_until("it passes again", lambda: proxy.get("/", live.access_token).status == 200)
    finally:
        cluster.remove()


def test_envoy_keeps_the_keys_as_long_as_it_may(server):
    allowed = Rest(server).get("/.well-known/jwks.json").header("cache-control")
    kept = re.search(r"cache_duration: (\d+)s", configurations()["envoy-jwt-authn.yaml"])[1]
    assert allowed == f"public, max-age={kept}"


def test_every_other_configuration_of_the_page_is_sound_yaml():
    found = configurations()
    assert {"envoy-ext-authz.yaml", "envoy-jwt-authn.yaml", "nginx.conf", "traefik-dynamic.yaml"} <= set(found)
    kinds = set()
    for name, text in found.items():
        if name.endswith(".yaml"):
            for document in yaml.safe_load_all(text):
                assert isinstance(document, dict), name
                if "apiVersion" in document:
                    kinds.add(document["kind"])
    assert kinds >= {"RequestAuthentication", "AuthorizationPolicy", "IstioOperator", "Deployment", "Server"}
