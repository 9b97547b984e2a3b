"""A real PgBouncer (Debian's) in front of one database of the private cluster.

PgBouncer refuses to run as root, so root runs it as the user `postgres`. It is stopped by its process id.
"""

import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from support.as_postgres import give_to_postgres, start
from support.engine import Postgres
from support.ports import free_port
from support.wait import wait_until


def find_pgbouncer() -> str | None:
    return shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")


class PgBouncer:
    """One pooler in `session` or `transaction` mode, with as few other settings as Postern needs."""

    def __init__(self, executable: str, database_url: str, mode: str):
        server = urlsplit(database_url)
        self._database = server.path.removeprefix("/")
        self._port = free_port()
        self._directory = Path(tempfile.mkdtemp(prefix="postern-pgbouncer-"))
        self._process: subprocess.Popen | None = None
        self._executable = executable
        self._ini = self._directory / "pgbouncer.ini"
        self._ini.touch(0o600)
        self._ini.write_text(
            "[databases]\n"
            f"{self._database} = host={server.hostname} port={server.port} user={server.username}"
            f" password={server.password}\n"
            "[pgbouncer]\n"
            "listen_addr = 127.0.0.1\n"
            f"listen_port = {self._port}\n"
            "unix_socket_dir =\n"
            # Callers need no password. PgBouncer logs in to PostgreSQL with its own.
            "auth_type = any\n"
            f"pool_mode = {mode}\n"
            "default_pool_size = 40\n"
            # The PostgreSQL client of Postern sends this parameter with every connection.
            "ignore_startup_parameters = extra_float_digits\n"
        )
        give_to_postgres(self._directory, self._ini)

    @property
    def url(self) -> str:
        return f"postgres://postern@127.0.0.1:{self._port}/{self._database}"

    def start(self) -> "PgBouncer":
        self._process = start([self._executable, self._ini], self._directory)
        wait_until("PgBouncer accepts connections", self._accepts)
        return self

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(30)
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _log(self) -> Path:
        return self._directory / "log"

    def _accepts(self) -> bool:
        assert self._process.poll() is None, f"PgBouncer ended: {self._log.read_text()[-2000:]}"
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=5).close()
        except OSError as error:
            raise AssertionError(str(error)) from None
        return True


class BehindPgBouncer(Postgres):
    """An empty database that Postern reaches through PgBouncer only. The SQL of the tests goes straight to it."""

    def __init__(self, cluster, executable: str, mode: str, migrated: bool):
        super().__init__(cluster, migrated)
        self._pgbouncer = PgBouncer(executable, self.direct_url, mode)
        try:
            self._pgbouncer.start()
        except BaseException:
            self.close()
            raise

    @property
    def direct_url(self) -> str:
        """The URL without PgBouncer."""
        return self._cluster.url(self.database)

    def settings(self) -> dict[str, str]:
        return {**super().settings(), "database_url": self._pgbouncer.url}

    def close(self) -> None:
        self._pgbouncer.close()
        super().close()
