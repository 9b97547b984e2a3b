"""Processes that outlive the one that started them: each has a directory with its log and its process id.

A process id is used only together with the time at which the process began, so that no signal reaches a stranger who
got the same id later.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from support.as_postgres import as_postgres
from support.wait import wait_until


def _stat(pid: int) -> tuple[str, int, int] | None:
    """The state, the parent and the start time of a process, or `None` if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[1]), int(fields[19])


def started_at(pid: int) -> int | None:
    """The start time of a process that runs, in ticks since the machine started."""
    found = _stat(pid)
    return None if found is None or found[0] in "ZX" else found[2]


def children(pid: int) -> Iterator[int]:
    """The processes that a process has started, and those that they have started."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := _stat(int(entry.name))):
            parents.setdefault(found[1], []).append(int(entry.name))
    waiting = [pid]
    while waiting:
        for child in parents.get(waiting.pop(), []):
            yield child
            waiting.append(child)


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


class Daemon:
    """One process with a directory of its own. Another object for the same directory finds the same process."""

    def __init__(self, directory: Path, command: list, environment: dict[str, str], unprivileged: bool):
        self.directory, self._command, self.environment = directory, command, environment
        self._unprivileged = unprivileged
        self._popen: subprocess.Popen | None = None

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def pid(self) -> int | None:
        """The id of the process, if it runs."""
        if self._popen is not None:
            self._popen.poll()
        try:
            known = json.loads((self.directory / "process").read_text())
        except FileNotFoundError:
            return None
        return known["pid"] if started_at(known["pid"]) == known["start"] else None

    @property
    def exit_code(self) -> int | None:
        """How it ended, if this object has started it. Its last threads may end after it was seen to end."""
        return None if self._popen is None else self._popen.wait(10)

    def start(self) -> None:
        """Starts it, as the user `postgres` if it refuses root."""
        assert self.pid is None, f"{self.name} runs already"
        with self.log.open("ab") as log:
            self._popen = subprocess.Popen(
                [str(part) for part in self._command],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **(as_postgres() if self._unprivileged else {}),
            )
        record = {"pid": self._popen.pid, "start": started_at(self._popen.pid)}
        (self.directory / "process").write_text(json.dumps(record))

    def tell(self, number: signal.Signals) -> None:
        """Sends it a signal, if it runs."""
        if (pid := self.pid) is not None:
            send([pid], number)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def stop(self, number: signal.Signals = signal.SIGTERM, within: float = 60) -> None:
        """Sends a signal and waits until the process has ended; a stopped one is continued first."""
        self.tell(number)
        self.tell(signal.SIGCONT)
        wait_until(f"{self.name} ends after {number.name}", lambda: self.pid is None, within, pause=0.02)

    def expect_running(self) -> None:
        assert self.pid is not None, f"{self.name} has ended; its log ends:\n{self.tail()}"

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""


def now() -> float:
    """The clock of all measurements: seconds, monotonic."""
    return time.monotonic()
