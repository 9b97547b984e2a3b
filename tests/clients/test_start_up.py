"""Starting the server: the command line and the configuration.

It tests the empty configuration, that a refusal to start names its cause, and the commands that act on a configured
server.
"""

import stat
import subprocess

import pytest

from support.client import Person
from support.engine import Sqlite, new_master_key
from support.environment import own_environment
from support.outbox import settle

# In base64 32 bytes, like a master key.
SECRET = "aHVudGVyMmh1bnRlcjJodW50ZXIyaHVudGVyMmh1bnQ="
LOOPBACK = dict.fromkeys(("grpc_addr", "http_addr", "ops_addr"), "127.0.0.1:0")


@pytest.fixture
def refusal(binary, tmp_path):
    """Starts a server that must refuse to start, and returns its output."""

    def start(*arguments: str, **settings) -> str:
        # A server that starts in spite of the error does not end, so it exceeds the time limit and the test fails.
        ended = subprocess.run(
            [binary, "serve", *arguments],
            env=own_environment(**{**LOOPBACK, "data_dir": tmp_path / "data", **settings}),
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert ended.returncode != 0
        assert "panicked at" not in ended.stderr
        return ended.stderr

    return start


class NoConfiguration(Sqlite):
    """The embedded database at its default location, the working directory."""

    def settings(self) -> dict[str, str]:
        return {}


def test_without_configuration_it_keeps_its_accounts_in_its_own_directory(start_server, tmp_path):
    data = tmp_path / "server-0" / "postern-data"
    server = start_server(NoConfiguration(data))
    person, tokens = server.client.newcomer()

    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    readable = [path.name for path in data.iterdir() if stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert not readable, f"readable to others: {readable}"

    server.restart()
    assert server.client.login(person)
    assert server.client.me(tokens.access_token)


def test_an_unknown_variable_stops_the_start_and_is_named(refusal):
    assert "POSTERN_ACCES_TOKEN_TTL" in refusal(acces_token_ttl="5m")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("access_token_ttl", "soon"),
        ("refresh_retry_window", "2h"),
        ("argon2_memory_kib", "-1"),
        ("grpc_addr", "nowhere"),
        ("reflection", "perhaps"),
    ],
)
def test_a_malformed_setting_stops_the_start_and_is_named(refusal, name, value):
    said = refusal(**{name: value})
    assert f"POSTERN_{name.upper()}" in said or f"--{name.replace('_', '-')}" in said, said


def test_postgres_without_a_master_key_stops_the_start_and_says_so(refusal, cluster):
    said = refusal(database_url=cluster.url("postgres"))
    assert "POSTERN_MASTER_KEY" in said
    assert cluster.password not in said, "the error does not contain the password of the database"


@pytest.mark.parametrize("key", ["c2hvcnQ=", "not base64 at all", "0" * 64])
def test_a_master_key_that_is_none_stops_the_start(refusal, cluster, key):
    said = refusal(database_url=cluster.url("postgres"), master_key=key)
    assert "POSTERN_MASTER_KEY" in said
    assert key not in said


@pytest.mark.parametrize(
    "argument, instead",
    [
        (f"--master-key={SECRET}", "POSTERN_MASTER_KEY_FILE"),
        (f"--database-url=postgres://ada:{SECRET}@127.0.0.1/postern", "POSTERN_DATABASE_URL_FILE"),
        (f"--database-url=postgres://127.0.0.1/postern?user=ada&password={SECRET}", "POSTERN_DATABASE_URL_FILE"),
        (f"--mail-url=smtp://ada:{SECRET}@127.0.0.1", "POSTERN_MAIL_URL_FILE"),
    ],
)
def test_a_secret_on_the_command_line_is_refused(refusal, argument, instead):
    said = refusal(argument)
    assert instead in said
    assert SECRET not in said


def test_help_offers_no_argument_for_the_master_key(binary):
    text = subprocess.run([binary, "serve", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--master-key-file" in text and "--master-key " not in text


def test_a_database_and_a_key_that_others_can_read_are_made_private(start_server, embedded):
    server = start_server(embedded)
    server.stop()
    exposed = list(embedded.data_directory.iterdir())
    assert {path.name for path in exposed} >= {"postern.db", "postern.db.key"}
    for path in exposed:
        path.chmod(0o644)
    server.start()
    assert not [path.name for path in exposed if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert [line for line in server.log if "other users had rights" in line]


@pytest.mark.parametrize("engine", ["postgres"], indirect=True)
def test_another_master_key_does_not_open_the_same_database(engine, start_server, refusal):
    server = start_server(engine)
    server.stop()

    other = new_master_key()
    said = refusal(**{**engine.settings(), "master_key": other})

    assert "master key" in said.lower() or "POSTERN_MASTER_KEY" in said
    assert other not in said


def test_migrating_again_changes_nothing(engine, start_server):
    server = start_server(engine)
    person, _ = server.client.newcomer()
    settle(engine)
    before = engine.counts()

    for _ in range(2):
        assert server.run("migrate").returncode == 0

    assert engine.counts() == before
    assert server.client.login(person)


def test_healthcheck_tells_a_serving_server_from_none(embedded, start_server):
    server = start_server(embedded)
    assert server.run("healthcheck").returncode == 0
    server.stop()
    assert server.run("healthcheck").returncode != 0


def test_a_second_server_cannot_take_a_port_that_is_in_use(embedded, start_server, refusal):
    server = start_server(embedded)
    said = refusal(grpc_addr=server.address)
    assert server.address in said or "grpc_addr" in said.lower() or "in use" in said.lower()
    assert server.client.sign_up(Person())
