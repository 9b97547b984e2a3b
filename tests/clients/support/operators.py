"""An operator, who has the binary and the settings of a database, and changes it by commands."""

import subprocess

from support.admin import command


class Operator:
    """One command, such as `postern user`. `tables` are those that it can change."""

    def __init__(self, binary, engine, name: str, tables: tuple[str, ...]):
        self._binary, self._engine, self._name, self._tables = binary, engine, name, tables
        if engine.wants_migration:
            assert command(binary, engine, "migrate").returncode == 0

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
        return command(self._binary, self._engine, self._name, *arguments, stdin=stdin)

    def done(self, *arguments: str, stdin: str = "") -> str:
        """Runs a command that must succeed, and returns its output."""
        ended = self.run(*arguments, stdin=stdin)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def rows(self, *arguments: str) -> list[list[str]]:
        """Runs a command that must succeed, and returns the fields of each line."""
        return [line.split("\t") for line in self.done(*arguments).splitlines()]

    def refused(self, *arguments: str, stdin: str = "") -> str:
        """Runs a command that must fail and change nothing, and returns its error message."""
        before = self._state()
        ended = self.run(*arguments, stdin=stdin)
        assert ended.returncode != 0, ended.stdout
        assert ended.stdout == ""
        assert "panicked" not in ended.stderr
        assert self._state() == before
        return ended.stderr

    def _state(self) -> list:
        return [sorted(map(repr, self._engine.query(f"SELECT * FROM {table}"))) for table in self._tables]
