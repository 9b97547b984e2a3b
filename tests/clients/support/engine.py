"""The two database engines: the settings that choose one, and SQL to look at what was written.

Each object is one empty database. Its SQL bypasses Postern on purpose: a test uses it to check what was really written,
and to make changes that no RPC can make.
"""

import base64
import copy
import secrets
import sqlite3
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from psycopg import sql

from support.environment import own_environment

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def new_master_key() -> str:
    """32 bytes in base64, as `POSTERN_MASTER_KEY` requires."""
    return base64.b64encode(secrets.token_bytes(32)).decode()


class Engine:
    """What both engines share. SQL uses `?` for parameters."""

    name: str
    wants_migration: bool

    def settings(self) -> dict[str, str]:
        """The `POSTERN_*` settings of a server on this database."""
        raise NotImplementedError

    def secrets(self) -> set[str]:
        """The values among these settings that must never be logged."""
        return set()

    def query(self, statement: str, *parameters) -> list[tuple]:
        raise NotImplementedError

    def execute(self, statement: str, *parameters) -> int:
        """Changes rows and returns how many it changed."""
        raise NotImplementedError

    def tables(self) -> list[str]:
        raise NotImplementedError

    def as_id(self, id: uuid.UUID):
        """An id as a parameter."""
        raise NotImplementedError

    def as_time(self, moment: datetime):
        """A time as a parameter."""
        raise NotImplementedError

    def to_time(self, stored) -> datetime:
        """Converts the stored value of a column into a time."""
        raise NotImplementedError

    def counts(self) -> dict[str, int]:
        """How many rows each table holds."""
        counts = (f"SELECT '{table}', count(*) FROM \"{table}\"" for table in self.tables())
        return dict(self.query(" UNION ALL ".join(counts)))

    def emails(self) -> set[str]:
        """The address of every account."""
        return {row[0] for row in self.query("SELECT email FROM users")}

    def dump(self) -> str:
        """Every row of every table as text, to search for what must not be there."""
        rows = (row for table in self.tables() for row in self.query(f'SELECT * FROM "{table}"'))
        return "\n".join(repr(tuple(_as_text(value) for value in row)) for row in rows)

    def backups(self) -> dict[str, bytes]:
        """The contents of the database's files and dumps, by name."""
        raise NotImplementedError

    def close(self) -> None:
        """Removes the database."""


class Sqlite(Engine):
    """The embedded default: a data directory of its own, migrated by `serve`."""

    name = "sqlite"
    wants_migration = False

    def __init__(self, data_directory: Path):
        self.data_directory = data_directory

    def settings(self) -> dict[str, str]:
        return {"data_dir": str(self.data_directory)}

    def query(self, statement: str, *parameters) -> list[tuple]:
        connection = self._connect()
        try:
            return connection.execute(statement, parameters).fetchall()
        finally:
            connection.close()

    def execute(self, statement: str, *parameters) -> int:
        connection = self._connect()
        try:
            return connection.execute(statement, parameters).rowcount
        finally:
            connection.close()

    def tables(self) -> list[str]:
        rows = self.query("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        return [row[0] for row in rows]

    def as_id(self, id: uuid.UUID) -> bytes:
        return id.bytes

    def as_time(self, moment: datetime) -> int:
        return (moment - EPOCH) // timedelta(microseconds=1)

    def to_time(self, stored: int) -> datetime:
        return EPOCH + timedelta(microseconds=stored)

    def backups(self) -> dict[str, bytes]:
        files = {file.name: file.read_bytes() for file in self.data_directory.glob("postern.db*")}
        connection = self._connect()
        try:
            files[".dump"] = "\n".join(connection.iterdump()).encode()
        finally:
            connection.close()
        return files

    @contextmanager
    def version(self) -> Iterator[Callable[[], int]]:
        """A number that differs whenever somebody else has changed the database."""
        connection = self._connect()
        try:
            yield lambda: connection.execute("PRAGMA data_version").fetchone()[0]
        finally:
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        file = self.data_directory / "postern.db"
        assert file.exists(), f"the contract's database file {file.name} is not in the data directory"
        return sqlite3.connect(file, timeout=10, isolation_level=None)


class Postgres(Engine):
    """A database of its own in a cluster: a copy of the cluster's template if there is one, else empty."""

    name = "postgres"

    def __init__(self, cluster, migrated: bool = True):
        self._cluster = cluster
        self.database = f"postern_{secrets.token_hex(6)}"
        self.master_key = new_master_key()
        # A copy of the template is migrated already; any other database needs `postern migrate`.
        self.wants_migration = not (migrated and cluster.template)
        template = "template1" if self.wants_migration else cluster.template
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        self._cluster.execute(statement.format(sql.Identifier(self.database), sql.Identifier(template)))

    def settings(self) -> dict[str, str]:
        return {"database_url": self._cluster.url(self.database), "master_key": self.master_key}

    def secrets(self) -> set[str]:
        return {self.master_key, self._cluster.password}

    def query(self, statement: str, *parameters) -> list[tuple]:
        return self._cluster.execute(statement.replace("?", "%s"), parameters, self.database).fetchall()

    def execute(self, statement: str, *parameters) -> int:
        return self._cluster.execute(statement.replace("?", "%s"), parameters, self.database).rowcount

    def tables(self) -> list[str]:
        return [row[0] for row in self.query("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]

    def as_id(self, id: uuid.UUID) -> uuid.UUID:
        return id

    def as_time(self, moment: datetime) -> datetime:
        return moment

    def to_time(self, stored: datetime) -> datetime:
        return stored

    def on(self, cluster) -> "Postgres":
        """The copy of this database in a copy of its cluster."""
        same = copy.copy(self)
        same._cluster = cluster
        return same

    def backups(self) -> dict[str, bytes]:
        return {"pg_dump": self._cluster.dump(self.database)}

    def connections_in_transaction(self) -> int:
        """How many of the server's connections sit inside a transaction and do nothing."""
        statement = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND state LIKE 'idle in transaction%%'"
        return self._cluster.execute(statement, (self.database,)).fetchone()[0]

    def close(self) -> None:
        if not self._cluster.running:
            return
        self._cluster.disconnect(self.database)
        self._cluster.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(self.database)))


def make_template(cluster, binary: Path) -> None:
    """Migrates one database. All later databases of the cluster are copies of it."""
    template = Postgres(cluster)
    environment = own_environment(**template.settings())
    migrated = subprocess.run([binary, "migrate"], env=environment, capture_output=True, text=True, timeout=120)
    assert migrated.returncode == 0, f"postern migrate failed:\n{migrated.stderr}"
    cluster.template = template.database


def _as_text(value) -> str:
    return bytes(value).decode("latin-1") if isinstance(value, bytes | memoryview) else str(value)
