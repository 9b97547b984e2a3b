"""A database that comes back from a backup: what is revoked afterwards is refused, and nobody is logged out by it.

PostgreSQL is restored with its own tools under running servers, or to another machine. SQLite's backup is a copy of the data directory of a
server that is stopped.
"""

import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import grpc
import pytest

from support import jose
from support.admin import Somebody, any_way
from support.engine import Postgres
from support.expect import expect_unauthenticated, reason_of
from support.outbox import settle
from support.postgres import Cluster
from support.rows import check_all
from support.server import Server
from support.transports import Transport
from support.wait import wait_until

ON_POSTGRES = pytest.mark.parametrize("engine", ["postgres"], indirect=True)
# In seconds. Half of the refusals must be within PROMISE, because other tests run on the same machine. After DEADLINE a
# refusal is missing.
PROMISE, DEADLINE = 2.0, 15.0


# -- backups -------------------------------------------------------------------------------------------------------


class PostgresBackup:
    """A backup that is made and restored under the running server, by `psql` or by `pg_restore`, in one transaction."""

    def __init__(self, server: Server, file: Path, binaries: Path, tool: str = "psql"):
        self._file, self._binaries, self._tool = file, binaries, tool
        self._url = server.engine.settings()["database_url"]

    def save(self) -> None:
        form = ["--clean", "--if-exists"] if self._tool == "psql" else ["--format=custom"]
        self._run("pg_dump", *form, "--file", self._file)

    def restore(self) -> None:
        if self._tool == "psql":
            options = ["--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--file", self._file]
        else:
            options = ["--clean", "--if-exists", self._file]
        self._run(self._tool, "--single-transaction", *options)

    def _run(self, program: str, *arguments) -> None:
        command = [self._binaries / program, "--dbname", self._url, *arguments]
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr


class SqliteBackup:
    """A copy of the data directory, which is made and put back while the server is stopped."""

    def __init__(self, server: Server, copy: Path):
        self._server, self._copy = server, copy

    def save(self) -> None:
        self._server.stop()
        shutil.copytree(self._server.engine.data_directory, self._copy)
        self._server.start()

    def restore(self) -> None:
        self._server.stop()
        data = self._server.engine.data_directory
        shutil.rmtree(data)
        shutil.copytree(self._copy, data)
        self._server.start()


@pytest.fixture
def backup_of(request, tmp_path) -> Callable[[Server], PostgresBackup | SqliteBackup]:
    """A backup of the database of a server, by the means of its engine."""

    def choose(server: Server) -> PostgresBackup | SqliteBackup:
        if server.engine.name == "sqlite":
            return SqliteBackup(server, tmp_path / "backup")
        return PostgresBackup(server, tmp_path / "backup", request.getfixturevalue("postgres_binaries"))

    return choose


# -- revocations ---------------------------------------------------------------------------------------------------


class Company:
    """An admin, and people whose tokens will be revoked: all have a session."""

    def __init__(self, way: Transport, engine, each: int = 1):
        self._way = way
        self.boss = Somebody(way, engine, "admin")
        self.leavers, self.demoted, self.disabled = (
            [Somebody(way, engine, "admin") for _ in range(each)] for _ in range(3)
        )

    def revoke(self) -> None:
        """Logs out, demotes and disables them. Right after a restore a replica may refuse every access token."""
        for leaver in self.leavers:
            self._change("Logout", refresh_token=leaver.tokens["refreshToken"])
        for somebody in self.demoted:
            self._change("SetUserRoles", credential=self.boss.credential, user_id=somebody.id, roles=[])
        for somebody in self.disabled:
            self._change("DisableUser", credential=self.boss.credential, user_id=somebody.id)

    def _change(self, rpc: str, **fields) -> None:
        wait_until(f"{rpc} is answered", lambda: is_refused_with(None, self._way, rpc, **fields))

    def expect_refused(self, way: Transport) -> None:
        """Asserts that a replica refuses all of them, each for what was revoked, and most of them soon."""
        wanted = [("ListSessions", "SESSION_REVOKED", somebody) for somebody in self.leavers + self.disabled]
        wanted += [("ListUsers", "SESSION_REVOKED", somebody) for somebody in self.disabled]
        wanted += [("ListUsers", "ROLE_REQUIRED", somebody) for somebody in self.demoted]
        since, waits = time.monotonic(), []

        def check(row: tuple[str, str, Somebody]) -> None:
            rpc, reason, somebody = row
            call = partial(is_refused_with, reason, way, rpc, somebody.credential)
            wait_until(f"{rpc} is refused with {reason}", call, since + DEADLINE - time.monotonic(), pause=0.02)
            waits.append(time.monotonic() - since)

        check_all(wanted, check)
        assert sorted(waits)[len(waits) // 2] < PROMISE, waits
        for somebody in self.demoted:
            assert way.ok("ListSessions", credential=somebody.credential)


def is_refused_with(reason: str | None, way: Transport, rpc: str, credential: str | None = None, **fields) -> bool:
    """Asserts that a call is refused for this reason; `None` means that it is answered."""
    try:
        way.ok(rpc, credential=credential, **fields)
        seen = None
    except grpc.RpcError as error:
        seen = reason_of(error) or error.code().name
    assert seen == reason, f"seen {seen or 'an answer'}, wanted {reason or 'an answer'}"
    return True


@contextmanager
def frozen(server: Server):
    """Stops the process of a server meanwhile, so that it sees nothing of what happens in between."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@ON_POSTGRES
@pytest.mark.parametrize("tool", ["psql", "pg_restore"])
@pytest.mark.parametrize("before", [0, 1], ids=["empty-log", "log-with-entries"])
def test_what_is_revoked_after_a_restore_under_a_running_server_is_refused(
    engine, start_server, postgres_binaries, tmp_path, tool, before
):
    server = start_server(engine)
    backup = PostgresBackup(server, tmp_path / "backup", postgres_binaries, tool)
    with any_way("gRPC", server) as way:
        for _ in range(before):
            Company(way, engine).revoke()
        company = Company(way, engine)
        settle(engine)
        backup.save()
        lost = Company(way, engine, each=3)
        lost.revoke()
        lost.expect_refused(way)
        settle(engine)

        backup.restore()

        company.revoke()
        company.expect_refused(way)
        assert way.ok("ListUsers", credential=company.boss.credential, page_size=1)
        assert way.me(way.refresh(company.boss.tokens))


@ON_POSTGRES
@pytest.mark.parametrize("notifications", ["true", "false"], ids=["NOTIFY", "polling"])
def test_a_log_that_is_restored_and_then_grows_longer_between_two_looks_is_read_whole(
    engine, start_server, postgres_binaries, tmp_path, notifications
):
    # What happens while a replica is frozen is, to that replica, what happens between two of its looks at the log.
    server, other = (start_server(engine, database_notifications=notifications) for _ in range(2))
    backup = PostgresBackup(server, tmp_path / "backup", postgres_binaries)
    with any_way("gRPC", server) as way, any_way("gRPC", other) as other_way:
        company = Company(way, engine, each=2)
        settle(engine)
        backup.save()
        lost = Company(way, engine)
        lost.revoke()
        lost.expect_refused(other_way)
        settle(engine)
        entries = "SELECT max(number) FROM revocations"
        [(before,)] = engine.query(entries)

        with frozen(other):
            backup.restore()
            company.revoke()
            [(after,)] = engine.query(entries)
            assert after > before, "the log is longer than the one that the replica has read"

        company.expect_refused(other_way)
        company.expect_refused(way)


# -- sessions ------------------------------------------------------------------------------------------------------


def session_of(tokens) -> uuid.UUID:
    return uuid.UUID(jose.claims_of(tokens.access_token)["sid"])


def audited(engine, action: str, session: uuid.UUID) -> int:
    """How many audit events of this kind a session has."""
    statement = "SELECT count(*) FROM audit_events WHERE action = ? AND session_id = ?"
    return engine.query(statement, action, engine.as_id(session))[0][0]


@pytest.mark.parametrize("older", [0, 1], ids=["from-the-backup", "from-after-it"])
def test_the_newest_refresh_token_carries_on_after_a_restore_and_an_older_one_ends_the_session(
    engine, start_server, backup_of, older
):
    # The longest retry window, so that a slow machine does not end it.
    server = start_server(engine, refresh_retry_window="60s")
    person, first = server.client.newcomer()
    settle(engine)
    backup = backup_of(server)
    backup.save()
    tokens = [first]
    for _ in range(2):
        tokens.append(server.client.refresh(tokens[-1].refresh_token))
    newest, session = tokens[-1], session_of(first)
    settle(engine)

    backup.restore()

    carried_on = server.client.refresh(newest.refresh_token)
    assert server.client.me(carried_on.access_token).email == person.email
    assert session_of(carried_on) == session
    again = server.client.refresh(newest.refresh_token)
    assert again.refresh_token == carried_on.refresh_token, "a retry gets the same answer, as ever"
    assert audited(engine, "refresh_after_restore", session) == 1
    newest = server.client.refresh(carried_on.refresh_token)
    assert audited(engine, "refresh_after_restore", session) == 1, "that was an ordinary refresh"

    expect_unauthenticated(lambda: server.client.refresh(tokens[older].refresh_token), "REFRESH_TOKEN_INVALID")

    expect_unauthenticated(lambda: server.client.refresh(newest.refresh_token), "REFRESH_TOKEN_INVALID")
    expect_unauthenticated(lambda: server.client.me(newest.access_token), "SESSION_REVOKED")
    assert audited(engine, "refresh_reused", session) == 1
    assert server.client.login(person)


def test_a_backup_whose_own_refresh_token_has_expired_does_not_end_the_session_of_a_newer_one(
    engine, start_server, backup_of
):
    server = start_server(engine)
    _, first = server.client.newcomer()
    settle(engine)
    backup = backup_of(server)
    backup.save()
    newer = server.client.refresh(first.refresh_token)
    settle(engine)
    backup.restore()
    # As if the backup were older than the lifetime of the token in it. The newer token has a lifetime of its own.
    past = engine.as_time(datetime.now(UTC) - timedelta(minutes=1))
    assert engine.execute("UPDATE sessions SET refresh_expire_time = ?", past) == 1

    carried_on = server.client.refresh(newer.refresh_token)

    assert server.client.refresh(carried_on.refresh_token)
    assert audited(engine, "refresh_after_restore", session_of(first)) == 1


def test_a_session_that_had_ended_before_the_backup_stays_ended(engine, start_server, backup_of):
    server = start_server(engine)
    person, tokens = server.client.newcomer()
    server.client.logout(tokens.refresh_token)
    settle(engine)
    backup = backup_of(server)
    backup.save()
    assert server.client.login(person)

    backup.restore()

    expect_unauthenticated(lambda: server.client.me(tokens.access_token), "SESSION_REVOKED")
    expect_unauthenticated(lambda: server.client.refresh(tokens.refresh_token), "REFRESH_TOKEN_INVALID")


# -- another machine -----------------------------------------------------------------------------------------------


def test_people_go_on_with_what_was_restored_from_a_base_backup(start_server, postgres_binaries):
    with ExitStack() as stack:
        original = Cluster(postgres_binaries)
        stack.callback(original.remove)
        engine = Postgres(original.start(), migrated=False)
        server = start_server(engine)
        person, tokens = server.client.newcomer()
        copy = Cluster(postgres_binaries, original)
        stack.callback(copy.remove)
        late, _ = server.client.newcomer()
        # The first machine is lost.
        original.stop()
        server.kill()

        restored = start_server(engine.on(copy.start()))
        assert restored.client.login(person)
        assert restored.client.me(tokens.access_token)
        assert restored.client.refresh(tokens.refresh_token)
        expect_unauthenticated(lambda: restored.client.login(late), "INVALID_CREDENTIALS")


# -- ending all sessions -------------------------------------------------------------------------------------------


@ON_POSTGRES
def test_the_statement_of_the_documentation_ends_all_sessions(engine, start_server):
    server = start_server(engine)
    people = [server.client.newcomer() for _ in range(3)]
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    [statement] = re.findall(r"<!-- tested: test_restore.py -->\n```sql\n(.*?)```", page, re.DOTALL)

    engine.execute(statement)

    for _, tokens in people:
        wait_until("the access token is refused", lambda tokens=tokens: is_over(server, tokens.access_token))
        expect_unauthenticated(
            lambda tokens=tokens: server.client.refresh(tokens.refresh_token), "REFRESH_TOKEN_INVALID"
        )


def is_over(server: Server, access_token: str) -> bool:
    try:
        server.client.me(access_token)
    except grpc.RpcError as error:
        return reason_of(error) == "SESSION_REVOKED"
    return False
