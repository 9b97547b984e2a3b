"""The files of the embedded database: what a stop leaves, what a copy needs, backups, and a key without its database.

It also tests steps that must not be half done when a database is new or fails: the first start at the same time as
another command, the creation of an admin, and a retention that would delete everything.
"""

import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from support import load
from support.admin import Somebody, any_way, command
from support.client import Person
from support.engine import Sqlite
from support.wait import wait_until

# Addresses of a server that must not start, on which it cannot collide with another one.
ANY_PORTS = dict.fromkeys(("grpc_addr", "http_addr", "ops_addr"), "127.0.0.1:0")
DATABASE, KEY = "postern.db", "postern.db.key"


def refused(binary, engine, *arguments: str, stdin: str = "", **settings) -> str:
    """Runs a command that must fail, and returns its error message. A server that starts exceeds the time limit."""
    ended = command(binary, engine, *arguments, stdin=stdin, **ANY_PORTS, **settings)
    assert ended.returncode != 0, f"{arguments} was accepted: {ended.stdout}{ended.stderr}"
    assert "panicked at" not in ended.stderr
    return ended.stderr


def creation(person: Person, *roles: str) -> dict:
    """The arguments and the input of `postern user create`."""
    named = ["user", "create", "--username", person.username, "--email", person.email]
    return {"arguments": [*named, *(part for role in roles for part in ("--role", role))], "stdin": person.password}


def create(binary, engine, person: Person, *roles: str):
    how = creation(person, *roles)
    return command(binary, engine, *how["arguments"], stdin=how["stdin"])


@dataclass
class Writing:
    """What the calls of `writers` have led to so far."""

    acknowledged: list[Person] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def wait_for_more(self) -> None:
        wanted = len(self.acknowledged) + 20
        wait_until("more sign-ups are acknowledged", lambda: len(self.acknowledged) >= wanted, pause=0.005)


@contextmanager
def writers(server, number: int = 4):
    """Signs people up and logs them in until the block ends, or until the server refuses it."""
    writing, done = Writing(), threading.Event()
    # A separate connection, because `server.client` is closed as soon as the process has ended.
    client = server.new_client()

    def write() -> None:
        while not done.is_set():
            person = Person()
            try:
                client.sign_up(person)
                writing.acknowledged.append(person)
                client.me(client.login(person).access_token)
            except grpc.RpcError as error:
                writing.refused.append(f"{error.code()}: {error.details()}")
                return

    with ThreadPoolExecutor(number) as pool:
        running = [pool.submit(write) for _ in range(number)]
        try:
            yield writing
        finally:
            done.set()
            for writer in running:
                writer.result()
            client.close()


def copy_of(database: Path, key: Path, directory: Path) -> Sqlite:
    """A new data directory with copies of these two files alone."""
    directory.mkdir(mode=0o700)
    shutil.copyfile(database, directory / DATABASE)
    shutil.copyfile(key, directory / KEY)
    for path in directory.iterdir():
        path.chmod(0o600)
    return Sqlite(directory)


# -- after a clean stop --------------------------------------------------------------------------------------------


def test_after_a_clean_stop_the_database_file_is_whole(embedded, start_server, tmp_path, size):
    server = start_server(embedded, lame_duck="0s")
    directory = embedded.data_directory
    everybody: list[Person] = []
    # Before this was fixed, a third of the stops left a log.
    for number in range(size(4, 24)):
        with writers(server) as writing:
            writing.wait_for_more()
            server.stop()
        everybody += writing.acknowledged

        # Opening the database with SQLite would move the log into it, so the test looks at the files only.
        log = directory / f"{DATABASE}-wal"
        assert not log.exists() or log.stat().st_size == 0, f"stop {number} left {log.stat().st_size} bytes in the log"
        copied = copy_of(directory / DATABASE, directory / KEY, tmp_path / f"copy-{number}")
        copy = start_server(copied)
        assert {person.email for person in everybody} <= copied.emails()
        for person in (everybody[0], *writing.acknowledged[-3:]):
            assert copy.client.login(person)
        copy.kill()
        server.start()


# -- a key without its database ------------------------------------------------------------------------------------


def no_file(_: Path) -> None:
    """Leaves out the database."""


def empty_file(database: Path) -> None:
    database.touch(0o600)


def no_tables(database: Path) -> None:
    """Makes a file such as a copy without its -wal: SQLite has written its header, and the tables are in the -wal."""
    database.touch(0o600)
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    assert database.stat().st_size > 0


@pytest.fixture(params=[no_file, empty_file, no_tables], ids=lambda make: make.__name__)
def bereft(request, start_server, tmp_path) -> Sqlite:
    """A data directory with the key of another run, and without the tables of a database."""
    complete = Sqlite(tmp_path / "complete")
    server = start_server(complete)
    server.client.newcomer()
    server.stop()
    engine = Sqlite(tmp_path / "bereft")
    engine.data_directory.mkdir(mode=0o700)
    shutil.copy(complete.data_directory / KEY, engine.data_directory / KEY)
    request.param(engine.data_directory / DATABASE)
    return engine


def expect_database_missing(said: str) -> None:
    assert KEY in said, said
    assert "missing" in said or "empty" in said, said


def test_a_key_without_its_database_stops_the_start_every_time(binary, bereft):
    before = (bereft.data_directory / KEY).read_bytes()
    # The first attempt must not create what the second one takes for a database.
    for _ in range(2):
        expect_database_missing(refused(binary, bereft, "serve"))
    assert (bereft.data_directory / KEY).read_bytes() == before


def test_a_command_does_not_create_the_database_that_is_missing_beside_a_key(binary, bereft):
    how = creation(Person(), "admin")
    expect_database_missing(refused(binary, bereft, *how["arguments"], stdin=how["stdin"]))
    # `migrate` does not need the key. Whether it creates the tables or not, there is nothing that the key has sealed.
    command(binary, bereft, "migrate")
    expect_database_missing(refused(binary, bereft, "serve"))


# -- backup --------------------------------------------------------------------------------------------------------


def test_a_backup_of_a_running_server_holds_all_that_was_acknowledged_before(embedded, start_server, tmp_path):
    server = start_server(embedded)
    # Rows that make the backup take a while, during which the server writes.
    load.insert(embedded, 1, 20_000)
    directory = tmp_path / "backups"
    directory.mkdir()
    file = directory / "today.db"

    with writers(server) as writing:
        writing.wait_for_more()
        newcomer, tokens = server.client.newcomer()
        before = list(writing.acknowledged)
        made = server.run("backup", str(file))
        assert made.returncode == 0, made.stderr
        assert not writing.refused, "a backup disturbs no writer"
        writing.wait_for_more()

    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(directory.iterdir()) == [file], "the backup is one file"
    restored = copy_of(file, embedded.data_directory / KEY, tmp_path / "restored")
    copy = start_server(restored)
    assert restored.query("PRAGMA integrity_check") == [("ok",)]
    assert {person.email for person in before} <= restored.emails()
    for person in (newcomer, before[0], before[-1]):
        assert copy.client.login(person)
    assert copy.client.me(tokens.access_token).email == newcomer.email
    assert copy.client.refresh(tokens.refresh_token)


def test_a_backup_is_never_written_over_a_file(embedded, start_server, tmp_path):
    server = start_server(embedded)
    server.client.newcomer()
    directory = tmp_path / "backups"
    directory.mkdir()
    file, other = directory / "today.db", directory / "other"
    assert server.run("backup", str(file)).returncode == 0
    other.write_text("This is not a database.")
    server.client.newcomer()
    before = {path: path.read_bytes() for path in directory.iterdir()}

    for existing in (file, other, embedded.data_directory / DATABASE):
        again = server.run("backup", str(existing))
        assert again.returncode != 0
        assert str(existing) in again.stderr, again.stderr
        assert "panicked at" not in again.stderr

    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    assert server.client.newcomer()


@pytest.mark.parametrize("engine", ["postgres"], indirect=True)
def test_a_backup_of_postgresql_is_left_to_pg_dump(binary, engine, tmp_path):
    file = tmp_path / "backup"
    assert "pg_dump" in refused(binary, engine, "backup", str(file))
    assert not file.exists()


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retention", ["100000y", "0s"])
def test_a_retention_that_keeps_nothing_or_has_no_end_stops_the_start_by_name(binary, embedded, retention):
    said = refused(binary, embedded, "serve", audit_retention=retention)
    assert "POSTERN_AUDIT_RETENTION" in said or "--audit-retention" in said, said


# -- several steps at once, and one after another ------------------------------------------------------------------


def at_once(*calls: Callable[[], object]) -> list:
    """Makes these calls at the same time, and returns their results."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [call.result() for call in [pool.submit(call) for call in calls]]


def test_a_first_start_and_a_command_at_the_same_time_both_succeed(binary, start_server, tmp_path):
    for number in range(10):
        engine, person = Sqlite(tmp_path / f"data-{number}"), Person()
        server, created = at_once(
            lambda engine=engine: start_server(engine),
            lambda engine=engine, person=person: create(binary, engine, person),
        )
        assert created.returncode == 0, f"in round {number}: {created.stderr}"
        assert server.client.login(person)
        server.kill()


@pytest.fixture
def slow_key(binary, embedded, tmp_path, left_out) -> Path:
    """The binary, but each time it opens the key file it waits, so that another process can look for it meanwhile."""
    strace = shutil.which("strace") or left_out("two processes that create the key at once: install strace")
    key = embedded.data_directory / KEY
    script = tmp_path / "slow-key"
    # With -D, strace is not the parent, so that the process of the script becomes the binary.
    script.write_text(
        f"#!/bin/sh\nexec {strace} -D -f -qq -o '{tmp_path}/trace' -P '{key}' -e trace=openat "
        f"-e inject=openat:delay_enter=500000 -- '{binary}' \"$@\"\n"
    )
    script.chmod(0o700)
    return script


@pytest.mark.nightly
def test_two_commands_that_both_find_no_key_use_the_same_one(embedded, slow_key, start_server):
    people = [Person(), Person()]
    created = at_once(*(lambda person=person: create(slow_key, embedded, person) for person in people))
    assert [ended.returncode for ended in created] == [0, 0], [ended.stderr for ended in created]
    server = start_server(embedded)
    for person in people:
        assert server.client.login(person)


NO_ADMINS = {
    "sqlite": [
        "CREATE TRIGGER no_admins BEFORE INSERT ON user_roles WHEN NEW.role = 'admin' "
        "BEGIN SELECT RAISE(ABORT, 'no admins'); END"
    ],
    "postgres": [
        "CREATE FUNCTION no_admins() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no admins'; END $$",
        "CREATE TRIGGER no_admins BEFORE INSERT ON user_roles FOR EACH ROW "
        "WHEN (NEW.role = 'admin') EXECUTE FUNCTION no_admins()",
    ],
}
ADMINS_AGAIN = {"sqlite": "DROP TRIGGER no_admins", "postgres": "DROP TRIGGER no_admins ON user_roles"}


def test_an_admin_is_created_in_one_transaction(binary, engine, start_server):
    if engine.wants_migration:
        assert command(binary, engine, "migrate").returncode == 0
    assert create(binary, engine, Person()).returncode == 0, "the tables exist now"
    for statement in NO_ADMINS[engine.name]:
        engine.execute(statement)
    before, person = engine.counts(), Person()

    ended = create(binary, engine, person, "admin")
    assert ended.returncode != 0
    assert ended.stdout == ""
    assert "panicked at" not in ended.stderr
    assert person.email not in engine.emails()
    assert engine.counts() == before

    engine.execute(ADMINS_AGAIN[engine.name])
    ended = create(binary, engine, person, "admin")
    assert ended.returncode == 0, ended.stderr
    with any_way("gRPC", start_server(engine)) as way:
        admin = way.login(person)
        assert way.me(admin)["roles"] == ["admin", "user"]
        assert way.ok("GetUser", credential=admin["accessToken"], user_id=Somebody(way).id)
