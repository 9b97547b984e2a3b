"""How many statements each call costs PostgreSQL, counted in its own log."""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from support import forgeries, jose, pb
from support.admin import Somebody
from support.checks import WAYS
from support.client import Person
from support.engine import Postgres
from support.keys import published_keys
from support.oauth import INTROSPECT, OAuth, Service
from support.outbox import settle
from support.services import INVALID_CLIENT, ServiceAccount, introspect
from support.transports import ByGrpc
from support.wait import wait_until

CALLS = 5
# What a replica does by itself: it reads the log of revocations and the keys, and looks for mails and sends them. It
# reads the keys every minute, and when a token names one that it does not know, every few seconds at most.
BY_ITSELF = (
    "SELECT number, session_id",
    "SELECT kid, algorithm",
    "SELECT count(*) FILTER",
    "UPDATE mail_outbox SET attempts",
    "DELETE FROM",
    # It looks for rows to delete, and once for hashes that are stronger than its own.
    "SELECT subject FROM (SELECT subject FROM login_attempts",
    "SELECT DISTINCT CASE WHEN length(password_hash)",
)
# The transaction in which a mail is prepared that is about to be sent.
PREPARING = (
    "BEGIN",
    "SELECT id FROM users",
    "SELECT u.id",
    "SELECT id FROM mail_outbox",
    "INSERT INTO one_time",
    "COMMIT",
)


@pytest.fixture
def logged(cluster):
    """An empty database that logs every statement."""
    engine = Postgres(cluster)
    engine.execute(f"ALTER DATABASE \"{engine.database}\" SET log_statement = 'all'")
    cluster.disconnect(engine.database)
    yield engine
    engine.close()


@pytest.fixture
def statements(cluster, logged):
    """What calls send to the database, without what the replica does by itself."""

    def of(call, *, ignored=BY_ITSELF) -> list[str]:
        position = cluster.log_position()
        call()
        sent = cluster.statements_since(position, logged.database)
        return [statement for statement in sent if not statement.startswith(ignored)]

    return of


@pytest.fixture
def server(logged, start_server):
    return start_server(logged)


@pytest.fixture
def client(server):
    return server.client


def times(call, people) -> None:
    for person in people:
        call(person)


@pytest.fixture
def people(client):
    """Some people who have signed up, and the tokens of their sessions. Their mails are sent."""
    found = [client.newcomer() for _ in range(CALLS)]
    time.sleep(1)
    return found


def test_a_login_is_two_statements_whether_its_password_is_right_or_wrong(client, people, statements):
    right = statements(lambda: times(client.login, [person for person, _ in people]))
    assert len(right) == 2 * CALLS, right

    def wrong(person):
        with pytest.raises(grpc.RpcError):
            client.login(person)

    guesses = [replace(person, password=Person().password) for person, _ in people]
    sent = statements(lambda: times(wrong, guesses))
    assert len(sent) == 2 * CALLS, sent
    unknown = [Person() for _ in range(CALLS)]
    sent = statements(lambda: times(wrong, unknown))
    assert len(sent) == 2 * CALLS, sent


def test_a_refresh_a_look_at_oneself_and_a_logout_are_one_statement_each(client, people, statements):
    sent = statements(lambda: times(lambda found: client.me(found[1].access_token), people))
    assert len(sent) == CALLS, sent
    refreshed = []
    sent = statements(lambda: times(lambda found: refreshed.append(client.refresh(found[1].refresh_token)), people))
    assert len(sent) == CALLS, sent
    sent = statements(lambda: times(lambda tokens: client.logout(tokens.refresh_token), refreshed))
    assert len(sent) == CALLS, sent


def test_a_sign_up_is_one_statement(client, people, statements):
    new = [Person() for _ in range(CALLS)]
    sent = statements(lambda: times(client.sign_up, new), ignored=BY_ITSELF + PREPARING)
    assert len(sent) == CALLS, sent


def test_a_token_is_introspected_by_oauth_without_a_statement(logged, start_server, statements):
    """By a token of a service; and by its secret, but for the first time in a minute."""
    server = start_server(logged)
    service, oauth = Service(server), OAuth(server)
    person = Somebody(service.way)
    token, bearer = person.tokens["accessToken"], service.bearer()
    forged = [jose.with_header(token, kid="x"), jose.with_header(token, jku="http://127.0.0.1:9"), f"{token}A", "x"]
    forged.append(person.tokens["refreshToken"])
    oauth.ok(INTROSPECT, {"token": token}, authorization=bearer)
    time.sleep(1)

    def ask(authorization: str) -> None:
        for _ in range(CALLS):
            assert oauth.ok(INTROSPECT, {"token": token}, authorization=authorization)["active"]
            for dead in forged:
                assert oauth.ok(INTROSPECT, {"token": dead}, authorization=authorization) == {"active": False}

    sent = statements(lambda: ask(bearer))
    assert not sent, sent
    sent = statements(lambda: ask(service.basic()))
    assert len(sent) == 1, sent
    assert sent[0].startswith("SELECT"), "a use of a key is written once an hour"


def test_a_replica_at_rest_sends_at_most_three_statements_a_second(client, people, statements):
    assert people
    seconds = 6
    sent = statements(lambda: time.sleep(seconds), ignored=())
    assert len(sent) <= 3 * seconds, sent


@pytest.fixture
def service(client, logged, people) -> ServiceAccount:
    assert people
    way = ByGrpc(client)
    account = ServiceAccount(way, Somebody(way, logged, "admin"), "reader")
    settle(logged)
    return account


def test_a_token_of_a_service_is_one_statement_and_no_write_but_the_first_in_an_hour(service, statements, size):
    first = statements(service.token)
    assert [statement.split()[0] for statement in first] == ["SELECT", "UPDATE"], first
    count = size(200, 1_000)
    with ThreadPoolExecutor(8) as pool:
        sent = statements(lambda: list(pool.map(lambda _: service.token(), range(count))))
    assert len(sent) == count, sent[:10]
    assert {statement.split()[0] for statement in sent} == {"SELECT"}, sent[:10]


def test_all_bad_credentials_of_a_service_cost_the_same_statement(logged, service, statements):
    way, others = service.way, [ServiceAccount(service.way, service.admin) for _ in range(4)]
    disabled, deleted, keyless, expired = others
    disabled.change("DisableServiceAccount")
    deleted.change("DeleteServiceAccount")
    keyless.delete_key()
    past = datetime.now(UTC) - timedelta(seconds=1)
    logged.execute("UPDATE service_keys SET expire_time = ? WHERE id = ?", past, uuid.UUID(expired.key["id"]))
    known = [(account.id, account.secret) for account in others]
    unknown = [(str(uuid.uuid4()), service.secret), ("nonsense", service.secret), (service.id, "wrong")]
    costs = {}
    for client_id, secret in known + unknown:
        credentials = {"client_id": client_id, "client_secret": secret}
        sent = statements(lambda it=credentials: way.refused("IssueServiceToken", *INVALID_CLIENT, **it))
        costs[tuple(statement.split(" WHERE ")[0] for statement in sent)] = client_id
    assert [len(sent) for sent in costs] == [1], costs


def test_introspection_sends_no_statement_whatever_the_token_is(server, client, logged, service, statements):
    _, pair = client.newcomer()
    _, ended = client.newcomer()
    client.logout(ended.refresh_token)
    dead = [ended.access_token, pair.refresh_token]
    live = [pair.access_token, service.token()]
    settle(logged)
    keys, way = published_keys(server), ByGrpc(client)
    for token in live:
        dead += forgeries.of(token, keys).values()

    def introspect_all() -> None:
        for token in live * 50:
            assert introspect(way, token)["active"]
        for token in dead:
            assert not introspect(way, token)["active"], token

    sent = statements(introspect_all)
    assert not sent, sent


def test_a_login_that_is_refused_for_overload_is_no_statement(cluster, logged, start_server, statements):
    # One hash takes seconds, so that nobody gets a place while the test lasts.
    server = start_server(logged, hash_threads=1, hash_queue=1, argon2_memory_kib=262_144, argon2_iterations=24)
    client, position = server.client, cluster.log_position()

    def busy():
        with pytest.raises(grpc.RpcError):
            client.login(Person())

    def attempts() -> list[str]:
        sent = cluster.statements_since(position, logged.database)
        return [statement for statement in sent if statement.startswith("WITH attempt")]

    def refused(_):
        with pytest.raises(grpc.RpcError) as refusal:
            client.login(Person())
        assert refusal.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, refusal.value

    with ThreadPoolExecutor(30) as pool:
        hashing = [pool.submit(busy) for _ in range(2)]
        # Each has its place before it sends its only statement.
        wait_until("both places are taken", lambda: len(attempts()) == len(hashing))
        sent = statements(lambda: list(pool.map(refused, range(20))))
    assert not sent, sent


def test_a_decision_about_a_request_is_no_statement(server, people, statements):
    """Neither for a live token nor for one that is not: introspection, Check, and the same over HTTP."""
    ways = [ask(server) for ask in WAYS.values()]
    tokens = [found[1].access_token for found in people]

    def ask():
        for token in (*tokens, "nonsense", f"{tokens[0]}A"):
            server.client.call("IntrospectToken", pb.IntrospectTokenRequest(token=token))
            for way in ways:
                way.ask(f"Bearer {token}", require_role="user")
        for way in ways:
            way.ask()

    assert statements(ask) == []
