"""PostgreSQL stops under a running server and comes back.

It tests what callers and health checks see meanwhile, and that Postern recovers by itself. These tests have a cluster
of their own, which they stop. SQLite cannot fail in this way.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2

from support import pb
from support.client import SERVICE, Person
from support.engine import Postgres
from support.expect import failure_of, judge, reason_of
from support.postgres import Cluster
from support.wait import wait_until


@pytest.fixture(scope="module")
def own_cluster(postgres_binaries):
    """A cluster that these tests may stop."""
    cluster = Cluster(postgres_binaries)
    try:
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture
def outage(own_cluster, start_server):
    """A running cluster, a server on an empty database in it, and a person with a session."""
    if not own_cluster.running:
        own_cluster.start()
    server = start_server(Postgres(own_cluster))
    person, tokens = server.client.newcomer()
    return own_cluster, server, person, tokens


def expect_away(call) -> None:
    judge(failure_of(call), grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")


def test_a_health_check_for_liveness_does_not_ask_for_the_database(outage):
    cluster, server, _, _ = outage
    assert server.run("healthcheck", "--live").returncode == 0
    cluster.stop()
    wait_until("it is not ready", lambda: server.run("healthcheck").returncode == 1)
    assert server.run("healthcheck", "--live").returncode == 0
    server.stop()
    assert server.run("healthcheck", "--live").returncode == 1


def test_every_rpc_is_unavailable_while_the_database_is_away(outage):
    cluster, server, person, tokens = outage
    client = server.client
    cluster.stop()

    # First while the server still considers its connections open, then after it has noticed the outage.
    for _ in range(2):
        calls = [
            lambda: client.sign_up(Person()),
            lambda: client.login(person),
            lambda: client.login(Person()),
            lambda: client.refresh(tokens.refresh_token),
            lambda: client.logout(tokens.refresh_token),
            lambda: client.me(tokens.access_token),
            # Well-formed tokens. Only the database knows whether they are valid.
            lambda: client.verify_email("A" * 64),
            lambda: client.confirm_email_change("A" * 64),
            lambda: client.reset_password("A" * 64, Person().password),
            lambda: client.resend_verification(person.email),
            lambda: client.request_password_reset(person.email),
            lambda: client.change_password(tokens.access_token, person.password, Person().password),
            lambda: client.request_email_change(tokens.access_token, Person().email, person.password),
        ]
        with ThreadPoolExecutor(len(calls)) as pool:
            list(pool.map(expect_away, calls))


def test_bad_input_and_bad_tokens_are_told_apart_from_an_outage(outage):
    cluster, server, _, _ = outage
    cluster.stop()
    invalid = failure_of(lambda: server.client.call("SignUp", pb.SignUpRequest()))
    judge(invalid, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", fields={"username", "email", "password"})
    judge(failure_of(lambda: server.client.me("nonsense")), grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
    missing = failure_of(lambda: server.client.call("GetMe", pb.GetMeRequest()))
    judge(missing, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")


def test_health_follows_the_database_both_ways_and_calls_heal_by_themselves(outage):
    cluster, server, person, tokens = outage
    client = server.client
    made = client.me(tokens.access_token)

    cluster.stop()
    for service in ("", SERVICE):
        wait_until(
            f"health of {service!r} is NOT_SERVING",
            lambda service=service: client.health(service) == "NOT_SERVING",
        )
    expect_away(lambda: client.me(tokens.access_token))

    cluster.start()
    wait_until("the server is healed", lambda: healed(client, tokens))

    # Changes that were acknowledged before the crash are there, and everything works again.
    assert client.me(tokens.access_token) == made
    fresh = client.refresh(tokens.refresh_token)
    client.logout(fresh.refresh_token)
    assert client.login(person)
    assert client.newcomer()


def healed(client, tokens) -> bool:
    try:
        client.me(tokens.access_token)
    except grpc.RpcError as error:
        judge(error, grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        return False
    return client.health("") == client.health(SERVICE) == "SERVING"


def test_a_health_watcher_is_told_of_the_outage_and_of_its_end(outage):
    cluster, server, _, _ = outage
    seen = []
    stream = server.client.watch_health(SERVICE)

    def follow():
        try:
            for reply in stream:
                seen.append(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))
        except grpc.RpcError:
            # The stream is cancelled below, when the test has seen every status.
            return

    watcher = threading.Thread(target=follow, daemon=True)
    watcher.start()
    wait_until("the watcher sees SERVING", lambda: seen == ["SERVING"])
    cluster.stop()
    wait_until("the watcher sees NOT_SERVING", lambda: seen[-1] == "NOT_SERVING")
    cluster.start()
    wait_until("the watcher sees SERVING again", lambda: seen[-1] == "SERVING")
    stream.cancel()
    watcher.join(5)
    assert seen == ["SERVING", "NOT_SERVING", "SERVING"]


def test_impatient_sign_ups_amid_a_database_crash_lose_nothing_acknowledged_and_do_not_delay_healing(outage):
    cluster, server, _, _ = outage
    client, engine = server.client, server.engine
    acknowledged, refused, surprises = [], [], []
    done = threading.Event()

    def sign_up_again_and_again():
        while not done.is_set():
            person = Person()
            try:
                client.sign_up(person)
                acknowledged.append(person.email)
            except grpc.RpcError as error:
                # After UNAVAILABLE the account may or may not exist; after OK it must.
                refused.append(person.email)
                if reason_of(error) != "STORE_UNAVAILABLE":
                    surprises.append(f"{error.code()}: {error.details()}")

    def more_acknowledged(before: int) -> bool:
        assert not surprises, surprises
        return len(acknowledged) >= before + 20

    workers = [threading.Thread(target=sign_up_again_and_again, daemon=True) for _ in range(8)]
    for worker in workers:
        worker.start()
    try:
        wait_until("some are acknowledged", lambda: more_acknowledged(0))
        cluster.stop()
        wait_until("the server knows", lambda: client.health() == "NOT_SERVING")
        wait_until("the callers know and insist", lambda: len(refused) >= 100)
        before = len(acknowledged)
        cluster.start()
        # Callers that ignore RetryInfo keep every core busy. They must not prevent the server from recovering.
        wait_until("more are acknowledged", lambda: more_acknowledged(before))
    finally:
        done.set()
        for worker in workers:
            worker.join(20)

    assert not surprises, surprises
    assert set(acknowledged) <= engine.emails()


def test_writes_that_wait_leave_connections_to_reads(outage):
    cluster, server, _, tokens = outage
    client, database = server.client, server.engine.database
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = ? AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(40) as pool, cluster.connect(database) as other:
        with other.transaction():
            other.execute("LOCK TABLE sessions IN EXCLUSIVE MODE")
            refreshes = [pool.submit(client.refresh, tokens.refresh_token) for _ in range(40)]
            wait_until("most connections wait", lambda: server.engine.query(waiting, database)[0][0] >= 12)
            for _ in range(20):
                assert client.me(tokens.access_token)
            assert server.engine.query(waiting, database)[0][0] == 12, "three quarters of 16 connections are for writes"
        assert len({refresh.result(15).refresh_token for refresh in refreshes}) == 1
