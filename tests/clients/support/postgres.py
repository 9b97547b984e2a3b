"""A private PostgreSQL cluster with its own directory, port and socket. It is removed after the tests.

`POSTERN_TEST_PG_BIN` names the directory of the binaries. If it is not set, installed binaries are searched for. The
server refuses to run as root, so root runs it as the user `postgres`.
"""

import base64
import hashlib
import hmac
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from support.as_postgres import as_postgres, give_to_postgres, start
from support.ports import free_port
from support.wait import wait_until

USER = "postern"


def find_binaries() -> Path | None:
    """The directory that holds `initdb` and `postgres`, newest version first."""
    candidates = []
    if chosen := os.environ.get("POSTERN_TEST_PG_BIN"):
        candidates.append(Path(chosen))
    else:
        if found := shutil.which("initdb"):
            candidates.append(Path(found).resolve().parent)
        versions = Path("/usr/lib/postgresql").glob("*/bin")
        candidates.extend(sorted(versions, key=lambda path: float(path.parent.name), reverse=True))
    for candidate in candidates:
        if (candidate / "initdb").exists() and (candidate / "postgres").exists():
            return candidate
    return None


class Cluster:
    """One cluster. By default `stop` crashes it, because tests check that Postern survives a crash."""

    def __init__(self, binaries: Path, original: "Cluster | None" = None):
        """An empty one, or one from a base backup of another that runs."""
        self._binaries = binaries
        self._directory = Path(tempfile.mkdtemp(prefix="postern-pg-"))
        self.password = original.password if original else secrets.token_hex(16)
        # The migrated database of which the others are copies, once it exists.
        self.template: str | None = None
        # Connections by database and thread.
        self._kept: dict[tuple[str, int], psycopg.Connection] = {}
        self._process: subprocess.Popen | None = None
        give_to_postgres(self._directory)
        self._port = free_port()
        if original:
            self._copy(original)
        else:
            self._initialise()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def url(self, database: str) -> str:
        return f"postgres://{USER}:{self.password}@127.0.0.1:{self._port}/{database}"

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """A connection in autocommit mode."""
        return psycopg.connect(self.url(database), autocommit=True, connect_timeout=5)

    def execute(self, statement, parameters=(), database: str = "postgres") -> psycopg.Cursor:
        """Executes one statement, on a connection that this thread keeps for the next one."""
        key = database, threading.get_ident()
        connection = self._kept.get(key)
        if connection is None or connection.closed:
            connection = self._kept[key] = self.connect(database)
        return connection.execute(statement, parameters)

    def disconnect(self, database: str | None = None) -> None:
        """Closes the kept connections to a database, or to all."""
        for key in [key for key in self._kept if database in (None, key[0])]:
            self._kept.pop(key).close()

    def dump(self, database: str) -> bytes:
        """The output of `pg_dump` for a database."""
        command = [self._binaries / "pg_dump", "--dbname", self.url(database)]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=60).stdout

    def start(self) -> "Cluster":
        """Starts it on its port and waits until it answers."""
        settings = {
            "port": self._port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self._directory,
            "max_connections": 200,
            # These tests kill processes, but the machine keeps running.
            "fsync": "off",
            # `statements_since` finds the statements of a database by this prefix.
            "log_line_prefix": "%d %a ",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._process = start([self._binaries / "postgres", "-D", self._directory / "data", *options], self._directory)
        wait_until("PostgreSQL answers", self._answers)
        return self

    @contextmanager
    def serve_tls(self, cert: bytes, key: bytes) -> Iterator[None]:
        """Offers TLS with this certificate on new connections, as long as the context lasts."""
        name = f"tls-{secrets.token_hex(4)}"
        for suffix, content in (("pem", cert), ("key", key)):
            file = self._directory / f"{name}.{suffix}"
            file.write_bytes(content)
            file.chmod(0o600)
            give_to_postgres(file)
        settings = {"ssl_cert_file": f"{name}.pem", "ssl_key_file": f"{name}.key"}
        for setting, file in settings.items():
            self.execute(f"ALTER SYSTEM SET {setting} = '{self._directory / file}'")
        try:
            self._set_tls("on", self._directory / settings["ssl_cert_file"])
            yield
        finally:
            self._set_tls("off")

    def _set_tls(self, state: str, cert: Path | None = None) -> None:
        self.execute(f"ALTER SYSTEM SET ssl = {state}")
        self.execute("SELECT pg_reload_conf()")

        def is_used() -> bool:
            with self.connect() as connection:
                [[tls, file]] = connection.execute("SELECT current_setting('ssl'), current_setting('ssl_cert_file')")
            return tls == state and (cert is None or file == str(cert))

        wait_until(f"PostgreSQL has TLS {state}", is_used)

    def log_position(self) -> int:
        """The current end of the log."""
        return (self._directory / "log").stat().st_size

    def statements_since(self, position: int, database: str) -> list[str]:
        """The statements that Postern has sent since then to a database, which must have `log_statement = 'all'`."""
        with (self._directory / "log").open("rb") as log:
            log.seek(position)
            text = log.read().decode()
        logged = re.compile(rf"^{database} postern LOG:  (?:statement|execute [^:]*): (.*(?:\n\t.*)*)", re.M)
        return [" ".join(statement.split()) for statement in logged.findall(text)]

    def stop(self, with_signal: signal.Signals = signal.SIGQUIT) -> None:
        """Stops it: SIGQUIT is PostgreSQL's immediate shutdown, SIGINT its fast one."""
        self.disconnect()
        if self.running:
            self._process.send_signal(with_signal)
            self._process.wait(30)

    def remove(self) -> None:
        try:
            self.stop()
        finally:
            if self.running:
                self._process.kill()
            shutil.rmtree(self._directory, ignore_errors=True)

    def _answers(self) -> bool:
        assert self.running, f"PostgreSQL ended: {(self._directory / 'log').read_text()[-2000:]}"
        try:
            self.connect().close()
        except psycopg.OperationalError as error:
            raise AssertionError(str(error)) from None
        return True

    def _initialise(self) -> None:
        password_file = self._directory / "password"
        password_file.write_text(_cheap_verifier(self.password))
        password_file.chmod(0o600)
        give_to_postgres(password_file)
        command = [self._binaries / "initdb", "-D", self._directory / "data", "-U", USER, "--auth=scram-sha-256"]
        command += [f"--pwfile={password_file}", "--encoding=UTF8", "--no-locale", "--no-sync"]
        self._make(command)

    def _copy(self, original: "Cluster") -> None:
        """With the part of the write-ahead log that makes the copy consistent."""
        source = ["--dbname", original.url("postgres"), "--checkpoint=fast", "--wal-method=stream", "--no-sync"]
        self._make([self._binaries / "pg_basebackup", "-D", self._directory / "data", *source])

    def _make(self, command: list) -> None:
        made = subprocess.run(command, cwd=self._directory, capture_output=True, text=True, timeout=60, **as_postgres())
        if made.returncode != 0:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise RuntimeError(f"{command[0].name} failed: {made.stderr}")


def _cheap_verifier(password: str) -> str:
    """A SCRAM verifier of the password as in `pg_authid` (RFC 5803), but with 1 iteration instead of 4,096.

    PostgreSQL stores a password that looks like a verifier unchanged. Connections still authenticate with SCRAM, and
    the tests can afford thousands of them.
    """
    rounds, salt = 1, secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, rounds)
    stored_key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    salt, stored_key, server_key = (base64.b64encode(part).decode() for part in (salt, stored_key, server_key))
    return f"SCRAM-SHA-256${rounds}:{salt}${stored_key}:{server_key}"
