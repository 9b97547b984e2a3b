"""The errors that a command or the start can end with, as the second part of `docs/errors.md` lists them.

Each row of that table is produced here with the real binary: its message, as the last thing on standard error, and
its exit code. The cases are named by a part of the message that no other row has, so a row without a case fails, and so does
a case without a row.
"""

import os
import re
import shutil
import socket
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from psycopg import sql

from support import pb, wrong_tls
from support.as_postgres import as_postgres
from support.client import Person
from support.engine import Postgres, Sqlite, new_master_key
from support.environment import own_environment
from support.pgbouncer import BehindPgBouncer, find_pgbouncer
from support.ports import free_port
from support.server import CHEAP_HASHES
from support.terminal import at_a_terminal

ANY_PORTS = dict.fromkeys(("grpc_addr", "http_addr", "ops_addr"), "127.0.0.1:0")
NOBODY = "01890000-0000-7000-8000-000000000000"
DATABASE, KEY = "postern.db", "postern.db.key"
EVERY = "…"


@dataclass
class Row:
    """One row of the table."""

    message: str
    code: int

    def matches(self, text: str) -> bool:
        parts = [re.escape(part) for part in self.message.split(EVERY)]
        return re.fullmatch(".*".join(parts), " ".join(text.split())) is not None


def rows() -> list[Row]:
    text = (pb.REPOSITORY / "docs/errors.md").read_text()
    [_, part] = text.split("\n## The command line\n")
    found = re.findall(r"^\| (`+)(.+?)\1 \| (\d+) \|", part, re.M)
    return [Row(message.strip(), int(code)) for _, message, code in found]


class Place:
    """Where a command runs: a directory of its own, and the database in it unless the settings name another one."""

    def __init__(self, binary: Path, directory: Path, request):
        self.binary, self.directory, self._request = binary, directory, request
        self.data = directory / "data"
        self._engines = []

    def run(self, *arguments: str, stdin: str | bytes = "", **settings) -> tuple[int, str]:
        """Runs a command. Returns its exit code and its message."""
        ended = self.ended(*arguments, stdin=stdin, **settings)
        return ended.returncode, message_of(ended.stderr)

    def ended(self, *arguments: str, stdin: str | bytes = "", how=None, **settings) -> subprocess.CompletedProcess:
        stdin = stdin.encode() if isinstance(stdin, str) else stdin
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": self.directory, **(how or {})}
        command = [options.pop("binary", self.binary), *arguments]
        # A server that starts does not end, and so exceeds the time limit.
        return subprocess.run(command, env=self.environment(**settings), input=stdin, timeout=120, **options)

    def environment(self, **settings) -> dict[str, str]:
        return own_environment(**{"log_format": "json", "data_dir": self.data, **ANY_PORTS, **CHEAP_HASHES, **settings})

    def made(self, *arguments: str, **options) -> None:
        """Runs a command that must succeed."""
        ended = self.ended(*arguments, **options)
        assert ended.returncode == 0, ended.stderr

    def with_account(self, *roles: str, **settings) -> Person:
        """A database with its keys and one account."""
        person = Person()
        named = ["--username", person.username, "--email", person.email]
        self.made("user", "create", *named, *(f"--role={role}" for role in roles), stdin=person.password, **settings)
        return person

    @property
    def cluster(self):
        return self._request.getfixturevalue("cluster")

    def postgres(self, migrated: bool = True) -> Postgres:
        self._engines.append(Postgres(self.cluster, migrated=migrated))
        return self._engines[-1]

    def left_out(self, what: str):
        self._request.getfixturevalue("left_out")(what)

    def keep(self, engine) -> None:
        self._engines.append(engine)

    def close(self) -> None:
        for engine in reversed(self._engines):
            engine.close()


def message_of(stderr: bytes) -> str:
    """The last message, which follows the lines of the log."""
    text = stderr.decode()
    [*_, last] = re.split(r"^(?:postern: |(?=error: ))", text, flags=re.M)
    return last.strip()


CASES: dict[str, Callable[[Place], tuple[int, str]]] = {}


def case(fragment: str):
    """Names a function that produces the row with this fragment."""

    def add(produce):
        CASES[fragment] = produce
        return produce

    return add


def serve(fragment: str, **settings) -> None:
    """A start that these settings end."""
    CASES[fragment] = lambda place: place.run("serve", **settings)


def new_user(fragment: str, stdin: str | bytes = "an unlikely password", **changes: str) -> None:
    """A new account that is refused."""
    named = {"username": "ada", "email": "ada@example.com", **changes}
    arguments = [f"--{name}={value}" for name, value in named.items()]
    CASES[fragment] = lambda place: place.run("user", "create", *arguments, stdin=stdin)


# -- settings ------------------------------------------------------------------------------------------------------

CASES["error: "] = lambda place: place.run("user", "creat")
serve("settings are wrong", issuer="not a url", audience="a b")
serve("no setting has this name", acces_token_ttl="5m")
serve("are both set", master_key="a", master_key_file="b")
CASES["would show a secret"] = lambda place: place.run("serve", "--master-key=hunter2")
serve("must be an IP address and a port", grpc_addr="localhost:50051")
serve("must be a whole number", hash_threads="many")
serve("is not in", hash_threads="0")
serve("write it like 15m", access_token_ttl="soon")
serve("must be … or …", reflection="perhaps")
serve("=: must not be empty", data_dir="")
serve("POSTERN_LOG=", log="a=b=c")
serve("a collector is written like", OTEL_EXPORTER_OTLP_ENDPOINT="localhost:4317")
serve("must be grpc", OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf")
serve("must be headers such as", OTEL_EXPORTER_OTLP_HEADERS="hunter2")
serve("must be always_on", OTEL_TRACES_SAMPLER="sometimes")
serve("a number from 0 to 1", OTEL_TRACES_SAMPLER_ARG="2")
serve("POSTERN_TRUSTED_PROXIES", trusted_proxies="10.0.0.0/33")
serve("POSTERN_CORS_ORIGINS", cors_origins="https://app.example.com/")
serve("POSTERN_SERVICE_NAME", service_name="a\nb")
serve("must not be … (… to …)", refresh_retry_window="2h")
serve("must not be longer than", access_token_ttl="1h", refresh_token_ttl="1m")
serve("keep the published keys for a moment", signing_key_publish_ahead="4s")
serve("a key is published for so long", signing_key_rotation="1h")
serve("are the same port", grpc_addr="127.0.0.1:5000", http_addr="127.0.0.1:5000")
serve("is not loopback", grpc_addr="0.0.0.0:5000")
serve("URL of a host", issuer="not a url")
serve("RFC 8414", issuer="https://auth.example.com?tenant=1")
serve("POSTERN_AUDIENCE", audience="a b")
serve("POSTERN_MAIL_URL …", mail_url="smtp://user:hunter2@")
serve("POSTERN_MAIL_FROM", mail_from="nobody")
serve("{token} at most once", verify_email_url="a.example")
serve("POSTERN_…MASTER_KEY… is not 32 bytes", previous_master_key="c2hvcnQ=")
serve("is a placeholder", master_key="A" * 43 + "=")
serve("is required with PostgreSQL", database_url="postgres://a:b@127.0.0.1:1/x")
serve("has no meaning without", tls_cert="cert.pem")
serve("POSTERN_SERVICE_IDENTITIES=", service_identities="spiffe://example.org")
serve("POSTERN_TLS_…: … cannot be read", tls_cert="/nowhere/cert", tls_key="/nowhere/key")
serve("_FILE: … cannot be read", master_key_file="/nowhere/key")
serve("must begin with postgres://", database_url="mysql://localhost/x")
serve("not a usable PostgreSQL URL", database_url="postgres://a:b@localhost:port/x", master_key=new_master_key())


@case("POSTERN_…: is not UTF-8")
def not_utf_8(place):
    environment = {**place.environment(), "POSTERN_ISSUER": os.fsdecode(b"\xff")}
    ended = subprocess.run([place.binary, "serve"], env=environment, capture_output=True, timeout=60)
    return ended.returncode, message_of(ended.stderr)


@case("use pg_dump")
def backup_of_postgres(place):
    return place.run("backup", "copy", database_url="postgres://a:b@127.0.0.1:1/x")


CASES.update(wrong_tls.CASES)


# -- the embedded database -----------------------------------------------------------------------------------------


@case("cannot be created")
def a_directory_below_a_file(place):
    (place.directory / "file").touch()
    return place.run("serve", data_dir=place.directory / "file/data")


@case("permission denied")
def files_of_another_user(place):
    if os.geteuid() != 0:
        place.made("migrate")
        place.data.chmod(0o500)
        return place.run("serve")
    # The directory of the tests is closed to other users, and so may be that of the binary.
    with tempfile.TemporaryDirectory(prefix="postern-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        binary = shutil.copy(place.binary, directory)
        place.made("migrate", data_dir=directory / "data")
        how = {"cwd": "/", "binary": binary, **as_postgres()}
        ended = place.ended("serve", data_dir=directory / "data", how=how)
        assert str(directory / "data") in ended.stderr.decode()
        assert b"waiting" not in ended.stderr, "nothing is waited for"
        # In a directory of its own, the file alone is somebody else's.
        account = as_postgres()
        os.chown(directory / "data", account["user"], account["group"])
        again = place.ended("serve", data_dir=directory / "data", how=how)
        assert str(directory / "data" / DATABASE) in message_of(again.stderr)
        assert (again.returncode, ended.returncode) == (1, 1)
        return again.returncode, message_of(again.stderr)


@case("the database is not private")
def a_public_file_of_another_user(place):
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user")
    place.made("migrate")
    os.chown(place.data / DATABASE, as_postgres()["user"], -1)
    (place.data / DATABASE).chmod(0o666)
    return place.run("serve")


@case("is POSTERN_DATA_DIR or POSTERN_DATABASE_URL right?")
def a_mistyped_directory(place):
    return place.run("user", "list")


@case("is not a database of Postern")
def another_file(place):
    file = place.directory / "file"
    sqlite3.connect(file).execute("CREATE TABLE users (id)").connection.close()
    said = place.run("serve", database_url=f"sqlite:{file}")
    assert sqlite3.connect(file).execute("SELECT name FROM sqlite_master").fetchall() == [("users",)]
    text = place.directory / "text"
    text.write_text("This is not a database.")
    assert place.run("serve", database_url=f"sqlite:{text}")[0] == said[0]
    return said


@case("error returned from database")
def a_damaged_file(place):
    place.made("migrate")
    with (place.data / DATABASE).open("r+b") as file:
        # The table of tables, behind the header.
        file.seek(100)
        file.write(b"\xff" * 3_000)
    return place.run("user", "list")


@case("(os error …)")
def a_long_name(place):
    return place.run("serve", database_url=f"sqlite:{place.directory}/{'x' * 300}")


@case("the database is broken")
def a_lost_table(place):
    place.with_account()
    Sqlite(place.data).execute("DROP TABLE user_roles")
    return place.run("user", "list")


@case("another process has locked")
def a_locked_file(place):
    place.made("migrate")
    connection = sqlite3.connect(place.data / DATABASE)
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("BEGIN EXCLUSIVE")
    try:
        return place.run("user", "list")
    finally:
        connection.close()


@case("is missing or empty")
def a_key_alone(place):
    place.with_account()
    for path in place.data.glob(f"{DATABASE}*"):
        if path.name != KEY:
            path.unlink()
    return place.run("serve")


@case("its master key … does not")
def a_lost_key(place):
    place.with_account()
    (place.data / KEY).unlink()
    return place.run("serve")


@case("restore this file")
def a_changed_key(place):
    place.with_account()
    (place.data / KEY).write_text("changed")
    return place.run("serve")


@case("cannot be decrypted: POSTERN_MASTER_KEY")
def another_key(place):
    person = place.with_account()
    said = place.run("serve", master_key=new_master_key())
    for arguments in (["keys", "list"], ["user", "disable", "--email", person.email]):
        assert place.run(*arguments, master_key=new_master_key()) == said, arguments
    return said


@case("unknown algorithm")
def a_key_of_another_version(place):
    place.with_account()
    Sqlite(place.data).execute("UPDATE signing_keys SET algorithm = 'ES512'")
    return place.run("keys", "list")


@case("has no signing key yet")
def a_new_database(place):
    place.made("migrate")
    return place.run("keys", "list")


# -- PostgreSQL ----------------------------------------------------------------------------------------------------


def at(url: str) -> dict[str, str]:
    return {"database_url": url, "master_key": new_master_key()}


@case("connection refused")
def no_server(place):
    return place.run("user", "list", **at(f"postgres://a:b@127.0.0.1:{free_port()}/x"))


@case("cannot be resolved")
def no_host(place):
    return place.run("user", "list", **at("postgres://a:b@nowhere.invalid/x"))


@case("no answer within")
def a_silent_server(place):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        return place.run("user", "list", **at(f"postgres://a:b@127.0.0.1:{silent.getsockname()[1]}/x"))


@case("now: TLS: ")
def no_tls(place):
    return place.run("user", "list", **at(f"{place.cluster.url('postgres')}?sslmode=require"))


@case("takes no writes")
def a_standby(place):
    engine = place.postgres()
    statement = sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on")
    place.cluster.execute(statement.format(sql.Identifier(engine.database)))
    return place.run("user", "list", **engine.settings())


def at_once(place, *arguments: str, **settings) -> tuple[int, str]:
    """A start that waiting could not mend, and that does not wait."""
    ended = place.ended(*arguments, **settings)
    assert b"waiting" not in ended.stderr, ended.stderr
    return ended.returncode, message_of(ended.stderr)


@case("refuses the password of user")
def a_wrong_password(place):
    url = place.cluster.url("postgres").replace(place.cluster.password, "hunter2")
    code, said = at_once(place, "serve", **at(url))
    assert "hunter2" not in said
    return code, said


@case("does not let user")
def a_role_that_may_not_log_in(place):
    place.cluster.execute("DROP ROLE IF EXISTS gate")
    place.cluster.execute("CREATE ROLE gate NOLOGIN PASSWORD 'gate'")
    return at_once(place, "serve", **at(url_of(place, "gate", "postgres")))


def url_of(place, role: str, database: str) -> str:
    server = place.cluster.url(database).rpartition("@")[2]
    return f"postgres://{role}:{role}@{server}"


@case("has no database …")
def no_such_database(place):
    return at_once(place, "migrate", **at(place.cluster.url("nowhere")))


@case("lacks rights in database")
def a_role_without_rights(place):
    engine = place.postgres(migrated=False)
    place.cluster.execute("DROP ROLE IF EXISTS guest")
    place.cluster.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'")
    said = at_once(place, "migrate", **at(url_of(place, "guest", engine.database)))
    # The tables are there, and the role may not read them.
    place.made("migrate", **engine.settings())
    assert "lacks rights" in at_once(place, "serve", **at(url_of(place, "guest", engine.database)))[1]
    return said


@case("it lacks migration")
def no_tables(place):
    return at_once(place, "serve", **place.postgres(migrated=False).settings())


@case("the migrations could not be applied")
def a_table_of_somebody_else(place):
    engine = place.postgres(migrated=False)
    engine.execute("CREATE TABLE users (id integer)")
    return at_once(place, "migrate", **engine.settings())


@case("another process migrates the database")
def a_migration_that_does_not_end(place):
    if not place._request.config.getoption("nightly"):
        pytest.skip("it waits for a minute, in nightly runs only")
    engine = place.postgres(migrated=False)
    with place.cluster.connect(engine.database) as connection:
        connection.execute("SELECT pg_advisory_lock(x'00706f737465726e'::bigint)")
        return place.run("migrate", **engine.settings())


@case("the encoding of the database is")
def latin_1(place):
    engine = place.postgres(migrated=False)
    engine.close()
    statement = "CREATE DATABASE {} TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"
    place.cluster.execute(sql.SQL(statement).format(sql.Identifier(engine.database)))
    return at_once(place, "migrate", **engine.settings())


@case("a connection pooler gives")
def transaction_pooling(place):
    pgbouncer = find_pgbouncer() or place.left_out("PgBouncer: install it")
    engine = BehindPgBouncer(place.cluster, pgbouncer, "transaction", migrated=False)
    place.keep(engine)
    return at_once(place, "migrate", **engine.settings())


# -- the rest of a start, and the other commands -------------------------------------------------------------------


@case("cannot listen there")
def a_port_that_is_taken(place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return place.run("serve", http_addr=f"127.0.0.1:{taken.getsockname()[1]}")


@case("cannot be used for mails")
def no_directory_for_mails(place):
    (place.directory / "file").touch()
    return place.run("serve", mail_url=f"file:{place.directory}/file/mails")


@case("does not answer")
def no_server_to_ask(place):
    return place.run("healthcheck", grpc_addr=f"127.0.0.1:{free_port()}")


new_user("username …", username="a b")
new_user("email …", email="nobody")
new_user("password …", stdin="password1")
new_user("roles …", role="Admin")
new_user("there is no password", stdin="")
new_user("the password is not UTF-8", stdin=b"\xff\xff\xff\xff\xff\xff\xff\xff")
CASES["query …"] = lambda place: place.run("user", "list", "--query", "x" * 255)
CASES["name must be"] = lambda place: place.run("service", "create", "--name=No Name")
CASES["reason …"] = lambda place: place.run("user", "disable", "--email=a@example.com", "--reason", "x" * 501)


@case("are not the same: run the command again")
def two_passwords(place):
    arguments = ["user", "create", "--username=ada", "--email=ada@example.com"]
    code, seen = at_a_terminal(place.binary, place.environment(), arguments, ["one password", "another password"])
    return code, message_of(seen.replace("\r", "").encode())


def service(place, *arguments: str) -> tuple[int, str]:
    """A command about the service account `worker`, which has a key."""
    place.made("service", "create", "--name=worker")
    place.made("service", "key", "create", "--name=worker")
    return place.run("service", *arguments)


CASES["description …"] = lambda place: service(place, "key", "create", "--name=worker", "--description=a\nb")
CASES["key must be an id"] = lambda place: service(place, "key", "delete", "--name=worker", "--key=first")
CASES["no such service account"] = lambda place: service(place, "disable", "--name=nobody")
CASES["another service account"] = lambda place: service(place, "create", "--name=worker")
CASES["no such key of this"] = lambda place: service(place, "key", "delete", "--name=worker", f"--key={NOBODY}")
CASES["expire_time …"] = lambda place: service(place, "key", "create", "--name=worker", "--expires-in=0s")


@case("service_account_id …")
def too_many_keys(place):
    place.made("service", "create", "--name=worker")
    for _ in range(20):
        place.made("service", "key", "create", "--name=worker")
    return place.run("service", "key", "create", "--name=worker")


@case("has this email address")
def a_taken_address(place):
    person = place.with_account()
    return place.run("user", "create", "--username=other", f"--email={person.email}", stdin="an unlikely password")


@case("has this username")
def a_taken_name(place):
    person = place.with_account()
    named = [f"--username={person.username}", "--email=other@example.com"]
    return place.run("user", "create", *named, stdin="an unlikely password")


@case("there is no such user")
def nobody(place):
    place.with_account()
    return place.run("user", "enable", "--email=nobody@example.com")


@case("no such signing key")
def no_key(place):
    place.with_account()
    return place.run("keys", "revoke", "unknown")


@case("no such enabled user")
def a_disabled_account(place):
    person = place.with_account()
    place.made("user", "disable", f"--email={person.email}")
    return place.run("user", "reset-password-link", f"--email={person.email}")


@case("the last enabled admin")
def the_last_admin(place):
    person = place.with_account("admin")
    return place.run("user", "delete", f"--email={person.email}")


@case("File exists")
def an_existing_copy(place):
    place.made("migrate")
    (place.directory / "copy").touch()
    return place.run("backup", "copy")


@case("standard output cannot be written")
def a_full_disk(place):
    with open("/dev/full", "wb") as full:
        ended = place.ended("openapi", how={"stdout": full})
    return ended.returncode, message_of(ended.stderr)


# -- the tests -----------------------------------------------------------------------------------------------------


def row_of(fragment: str) -> Row:
    found = [row for row in rows() if fragment in row.message]
    assert len(found) == 1, f"{fragment!r} is in {len(found)} rows of the table"
    return found[0]


@pytest.mark.parametrize("fragment", CASES)
def test_an_error_is_as_the_table_has_it(binary, tmp_path, request, fragment):
    row = row_of(fragment)
    place = Place(binary, tmp_path, request)
    try:
        code, said = CASES[fragment](place)
    finally:
        place.close()
    assert row.matches(said), said
    assert code == row.code
    assert "internal error" not in said
    assert "panicked" not in said


def test_every_row_of_the_table_is_produced():
    produced = [row_of(fragment).message for fragment in CASES]
    assert sorted(produced) == sorted(row.message for row in rows())
