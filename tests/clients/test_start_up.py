"""Starting the server: the command line and the configuration.

It tests the empty configuration, that a refusal to start names its cause, and the commands that act on a configured
server.
"""

import stat
import subprocess

import pytest

from support import load
from support.client import Client, Person
from support.engine import Sqlite, new_master_key
from support.environment import own_environment
from support.outbox import settle
from support.ports import free_port
from support.server import CHEAP_HASHES, READY

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


def test_the_command_line_describes_itself_to_shells_and_to_man(binary, tmp_path):
    for shell in ("bash", "zsh", "fish"):
        script = run(binary, tmp_path, "completions", shell)
        assert script.returncode == 0
        assert "healthcheck" in script.stdout
    assert run(binary, tmp_path, "man", str(tmp_path)).returncode == 0
    pages = {path.name for path in tmp_path.glob("*.1")}
    assert pages >= {"postern.1", "postern-serve.1", "postern-config-show.1", "postern-keys-rotate.1"}
    assert "POSTERN_DATABASE_URL" in (tmp_path / "postern-serve.1").read_text().replace("\\", "")
    nowhere = run(binary, tmp_path, "man", str(tmp_path / "missing"))
    assert (nowhere.returncode, nowhere.stdout) == (1, "")
    assert "missing" in nowhere.stderr


def test_healthcheck_tells_a_serving_server_from_none(embedded, start_server):
    server = start_server(embedded)
    assert server.run("healthcheck").returncode == 0
    server.stop()
    assert server.run("healthcheck").returncode != 0


# -- what is created, and who may read it --------------------------------------------------------------------------

READERS = [["user", "list"], ["keys", "list"], ["backup", "copy.db"]]
CHANGERS = [["user", step, "--email", "a@example.com"] for step in ("set-roles", "disable", "enable", "delete")]
LINK = ["user", "reset-password-link", "--email", "a@example.com"]


@pytest.mark.parametrize("arguments", [*READERS, *CHANGERS, LINK], ids=lambda arguments: "-".join(arguments[:2]))
def test_a_command_on_what_exists_creates_no_database(binary, tmp_path, arguments):
    missing, keyless = tmp_path / "mistyped", tmp_path / "migrated"
    run_in = lambda directory, *command: run(binary, tmp_path, *command, data_dir=directory)  # noqa: E731
    assert run_in(keyless, "migrate").returncode == 0
    # While SQLite has a database open, it has two more files.
    files = lambda: [path.name for path in keyless.iterdir() if not path.name.endswith(("-wal", "-shm"))]  # noqa: E731
    assert files() == ["postern.db"]

    ended = run_in(missing, *arguments)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert str(missing / "postern.db") in ended.stderr
    assert not missing.exists()

    # Nor does it create the keys of a database that has none.
    run_in(keyless, *arguments)
    assert files() == ["postern.db"]


def run(binary, directory, *arguments: str, stdin: str = "", **settings) -> subprocess.CompletedProcess:
    configured = own_environment(log_format="json", **settings)
    return subprocess.run(
        [binary, *arguments], env=configured, cwd=directory, input=stdin, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("setting", ["master_key_file", "database_url_file", "mail_url_file", "mail_password_file"])
def test_a_secret_that_others_can_read_is_made_private_and_that_is_said(binary, tmp_path, setting):
    text = {
        "master_key_file": new_master_key(),
        "database_url_file": f"sqlite:{tmp_path}/a.db",
        "mail_url_file": "smtp://user:password@127.0.0.1:1",
        "mail_password_file": "password",
    }[setting]
    file = tmp_path / "secret"
    file.write_text(text)
    file.chmod(0o644)
    more = {"mail_url": "smtp://user@127.0.0.1:1"} if setting == "mail_password_file" else {}
    named = ["--username", "ada", "--email", "ada@example.com"]
    made = run(
        binary, tmp_path, "user", "create", *named, stdin=Person().password, data_dir=tmp_path / "data",
        **{setting: file}, **more, **CHEAP_HASHES,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert str(file) in made.stderr
    assert "other users had rights" in made.stderr


def test_a_path_set_by_mistake_keeps_its_rights(binary, tmp_path):
    directory, file = tmp_path / "public", tmp_path / "public.txt"
    directory.mkdir(mode=0o755)
    file.write_text("This is not a database.")
    for path, mode in ((directory, 0o755), (file, 0o644)):
        path.chmod(mode)
        assert run(binary, tmp_path, "migrate", database_url=f"sqlite:{path}").returncode == 1
        assert stat.S_IMODE(path.stat().st_mode) == mode


# -- errors of the configuration ----------------------------------------------------------------------------------


def test_all_errors_of_a_configuration_are_told_at_once_and_no_more(refusal):
    wrong = {
        "issur": "https://auth.example.com",
        "issuer": "not a url",
        "access_token_ttl": "1h",
        "refresh_token_ttl": "1m",
        "session_max_lifetime": "soon",
        "grpc_addr": "localhost:50051",
        "reflection": "perhaps",
        "hash_threads": "0",
        "mail_from": "nobody",
        "database_url": "mysql://localhost/x",
        "mail_url": "smtp://user:password@",
    }
    said = refusal(**wrong)
    told = [line.strip() for line in said.splitlines() if line.startswith("  ")]
    assert "password" not in said
    for name in set(wrong) - {"mail_from", "refresh_token_ttl"}:
        assert [line for line in told if line.startswith(f"POSTERN_{name.upper()}")], (name, said)
    [contradiction] = [line for line in told if "POSTERN_REFRESH_TOKEN_TTL" in line]
    assert "POSTERN_ACCESS_TOKEN_TTL=1h" in contradiction
    assert f"{len(told)} settings are wrong" in said
    # The sender is derived from the URL that is wrong: it would only be noise.
    assert "POSTERN_MAIL_FROM" not in said
    assert "POSTERN_MAIL_FROM" in refusal(mail_from="nobody", issuer="https://auth.example.com")


# -- closed pipes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["user", "list"], ["openapi"], ["keys", "list"], ["--help"]], ids=" ".join)
def test_a_command_ends_quietly_when_nobody_reads_its_output(binary, start_server, embedded, arguments):
    server = start_server(embedded)
    load.insert(embedded, 1, 3_000)
    configured = own_environment(**embedded.settings())
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([binary, *arguments], env=configured, **pipes) as process:
        # All of it is closed at once, so even a short output meets a closed pipe, or none of it is lost.
        process.stdout.close()
        said = process.stderr.read()
        code = process.wait(30)
    assert said == b""
    assert code in (0, 141)
    if arguments[-1] != "--help":
        assert code == 141, "as a shell reports a tool that SIGPIPE has ended"
    assert server.client.newcomer()


def test_a_server_whose_log_nobody_reads_goes_on(binary, embedded):
    address = f"127.0.0.1:{free_port()}"
    settings = {**LOOPBACK, **embedded.settings(), **CHEAP_HASHES, "grpc_addr": address, "lame_duck": "0s"}
    # At this level there are lines about every call.
    environment = own_environment(log="debug", **settings)
    with subprocess.Popen([binary, "serve"], env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            while READY not in process.stderr.readline():
                assert process.poll() is None
            process.stderr.close()
            client = Client(address, set())
            for _ in range(5):
                client.newcomer()
            client.close()
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_a_second_server_cannot_take_a_port_that_is_in_use(embedded, start_server, refusal):
    server = start_server(embedded)
    said = refusal(grpc_addr=server.address)
    assert server.address in said or "grpc_addr" in said.lower() or "in use" in said.lower()
    assert server.client.sign_up(Person())
