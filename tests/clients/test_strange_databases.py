"""PostgreSQL databases that are not like the one of the other tests.

It tests a locale in which `lower` is not ASCII's, an encoding other than UTF-8, a database that is read-only for a
while, and a real PgBouncer in front of the database. A database that stops is tested in `test_outage`.
"""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from psycopg import sql

from support.admin import Somebody, any_way, command, everything
from support.client import SERVICE, Client, Person
from support.engine import Postgres
from support.expect import expect_error, expect_unauthenticated, failure_of, judge
from support.http import Rest
from support.pgbouncer import BehindPgBouncer, find_pgbouncer
from support.rows import check_all
from support.wait import wait_until

# Addresses of a server that must not start, on which it cannot collide with another one.
ANY_PORTS = dict.fromkeys(("grpc_addr", "http_addr", "ops_addr"), "127.0.0.1:0")
POSTGRES_ALONE = pytest.mark.parametrize("engine", ["postgres"], indirect=True)
TURKISH = "LOCALE_PROVIDER icu ICU_LOCALE 'tr' ENCODING 'UTF8'"
LATIN1 = "ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"


class CreatedWith(Postgres):
    """An empty database that was created with these options of CREATE DATABASE, and that is not migrated."""

    def __init__(self, cluster, options: str):
        super().__init__(cluster, migrated=False)
        self.close()
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE template0 {}")
        cluster.execute(statement.format(sql.Identifier(self.database), sql.SQL(options)))


@pytest.fixture
def created_with(cluster):
    """Creates a database with options of CREATE DATABASE."""
    created = []

    def create(options: str) -> CreatedWith:
        created.append(CreatedWith(cluster, options))
        return created[-1]

    yield create
    for engine in created:
        engine.close()


def refused(binary, engine, *arguments: str, **settings) -> str:
    """Runs a command that must fail, and returns its error message. A server that starts exceeds the time limit."""
    ended = command(binary, engine, *arguments, **ANY_PORTS, **settings)
    assert ended.returncode != 0, f"{arguments} was accepted: {ended.stdout}{ended.stderr}"
    assert "panicked at" not in ended.stderr
    return ended.stderr


# -- locale and encoding -------------------------------------------------------------------------------------------


def test_two_cases_of_a_username_are_one_name_in_a_database_with_a_turkish_locale(created_with, start_server):
    client = start_server(created_with(TURKISH)).client

    def check(pair) -> None:
        first, second = pair
        client.sign_up(Person(username=first))
        taken = (grpc.StatusCode.ALREADY_EXISTS, "USERNAME_TAKEN")
        expect_error(lambda: client.sign_up(Person(username=second)), *taken)

    # In Turkish, the lower case of I is ı, and the upper case of i is İ.
    check_all([("minka", "MINKA"), ("ILI", "ili"), ("Izmir", "iZMIR")], check)


def test_a_search_finds_every_case_in_a_database_with_a_turkish_locale(created_with, start_server):
    server = start_server(created_with(TURKISH))
    with any_way("gRPC", server) as way:
        admin = Somebody(way, server.engine, "admin")
        way.sign_up(Person(username="MINKA", email="info@example.com"))
        way.sign_up(Person(username="ILI"))
        way.sign_up(Person(username="izmir"))

        def check(row) -> None:
            query, username = row
            users = everything(way, "ListUsers", admin.credential, "users", query=query)
            assert [user["username"] for user in users] == [username]

        queries = {
            "MINKA": ("MINK", "mink", "MINKA", "minka", "MiNkA", "INFO@", "info@"),
            "ILI": ("IL", "il", "ILI", "ili", "iLi"),
            "izmir": ("IZ", "iz", "IZMIR", "izmir"),
        }
        check_all([(query, username) for username in queries for query in queries[username]], check)


def expect_encoding_named(said: str) -> None:
    assert "LATIN1" in said, said
    assert "UTF8" in said or "UTF-8" in said, said


@pytest.mark.parametrize("arguments", [["migrate"], ["serve"]], ids=lambda arguments: arguments[0])
def test_a_database_that_is_not_utf_8_is_refused_by_name(binary, created_with, arguments):
    engine = created_with(LATIN1)
    expect_encoding_named(refused(binary, engine, *arguments))
    assert engine.tables() == []


def test_a_database_that_is_not_utf_8_is_refused_even_if_an_earlier_version_migrated_it(
    binary, cluster, postgres_binaries, created_with
):
    engine = created_with(LATIN1)
    restore = [postgres_binaries / "psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1"]
    restore += ["--dbname", cluster.url(engine.database)]
    subprocess.run(restore, input=cluster.dump(cluster.template), check=True, capture_output=True, timeout=60)
    assert "users" in engine.tables()

    for arguments in (["serve"], ["migrate"]):
        expect_encoding_named(refused(binary, engine, *arguments))


# -- read-only for a while -----------------------------------------------------------------------------------------


@pytest.fixture
def switched_over(cluster, engine, start_server):
    """A running server, and what makes the database read-only as a switchover does, and writable again."""
    name = sql.Identifier(engine.database)
    server = start_server(engine)

    def set_read_only() -> None:
        cluster.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(name))
        end = (
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE datname = %s AND application_name = 'postern'"
        )
        assert cluster.execute(end, (engine.database,)).fetchall(), "the server had connections"

    def set_writable() -> None:
        """Leaves the connections as they are. Those that began in between stay read-only."""
        cluster.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(name))

    return server, set_read_only, set_writable


def health_of(server) -> tuple[set[str], int]:
    """The health of the server and of its service, and the HTTP status of `/readyz`."""
    return {server.client.health(service) for service in ("", SERVICE)}, Rest(server, "ops_addr").get("/readyz").status


def wait_for_health(server, health: str, status: int) -> None:
    started = time.monotonic()
    wait_until(f"{health} and {status}", lambda: expect_health(server, health, status))
    print(f"{health} after {time.monotonic() - started:.1f} s")


def expect_health(server, health: str, status: int) -> bool:
    assert health_of(server) == ({health}, status)
    return True


@POSTGRES_ALONE
def test_a_server_whose_database_takes_no_writes_is_not_ready(switched_over):
    server, set_read_only, _ = switched_over
    person, _ = server.client.newcomer()

    set_read_only()
    # The documented time is a second. A busy machine may take longer.
    wait_for_health(server, "NOT_SERVING", 503)

    # The server opens new connections meanwhile, which take no writes either.
    for _ in range(30):
        expect_health(server, "NOT_SERVING", 503)
        judge(failure_of(lambda: server.client.login(person)), grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        time.sleep(0.1)


@POSTGRES_ALONE
def test_a_database_that_takes_writes_again_heals_the_server_without_a_restart(switched_over):
    server, set_read_only, set_writable = switched_over
    client = server.client
    person, tokens = client.newcomer()
    # More connections than one, so that several are read-only afterwards.
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: client.login(person), range(16)))

        set_read_only()
        judge(failure_of(lambda: client.login(person)), grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        wait_for_health(server, "NOT_SERVING", 503)
        set_writable()
        # The documented time is five seconds. A busy machine may take longer.
        wait_for_health(server, "SERVING", 200)

        assert all(pool.map(lambda _: client.login(person), range(20)))
    assert client.refresh(tokens.refresh_token)
    assert client.newcomer()


# -- PgBouncer -----------------------------------------------------------------------------------------------------


@pytest.fixture
def behind_pgbouncer(cluster, left_out):
    """Creates a database behind a PgBouncer of its own, in this mode."""
    executable = find_pgbouncer() or left_out("PgBouncer: install Debian's pgbouncer")
    created = []

    def create(mode: str, migrated: bool) -> BehindPgBouncer:
        created.append(BehindPgBouncer(cluster, executable, mode, migrated))
        return created[-1]

    yield create
    for engine in created:
        engine.close()


def test_everything_works_through_pgbouncer_in_session_mode(binary, behind_pgbouncer, start_server):
    engine = behind_pgbouncer("session", migrated=False)
    for _ in range(2):
        migrated = command(binary, engine, "migrate")
        assert migrated.returncode == 0, migrated.stderr

    server = start_server(engine, database_notifications="false")
    live(server.client)
    # The second run gets connections from PgBouncer that the first one has used.
    server.restart()
    live(server.client)
    server.stop()


def live(client: Client) -> None:
    """Makes the calls of a session, on several connections of the server."""
    person, tokens = client.newcomer()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: client.login(person), range(16)))
    fresh = client.refresh(tokens.refresh_token)
    assert client.me(fresh.access_token).email == person.email
    client.logout(fresh.refresh_token)
    expect_unauthenticated(lambda: client.refresh(fresh.refresh_token), "REFRESH_TOKEN_INVALID")
    expect_unauthenticated(lambda: client.me(fresh.access_token), "SESSION_REVOKED")


@pytest.mark.parametrize("notifications", ["true", "false"])
def test_pgbouncer_in_transaction_mode_stops_the_start_which_says_what_to_set(binary, behind_pgbouncer, notifications):
    engine = behind_pgbouncer("transaction", migrated=True)
    # The first start may leave prepared statements on connections of PgBouncer that the next one gets.
    for _ in range(3):
        assert "pool_mode=session" in refused(binary, engine, "serve", database_notifications=notifications)


def test_migrating_through_pgbouncer_in_transaction_mode_never_waits_for_ever(binary, behind_pgbouncer):
    engine = behind_pgbouncer("transaction", migrated=False)
    straight = {"database_url": engine.direct_url}
    # `command` has a time limit of 60 seconds.
    for _ in range(3):
        ended = command(binary, engine, "migrate")
        assert ended.returncode == 0 or "pool_mode=session" in ended.stderr, ended.stderr
        # Nothing that it left on a connection of PgBouncer may block others.
        ended = command(binary, engine, "migrate", **straight)
        assert ended.returncode == 0, ended.stderr
