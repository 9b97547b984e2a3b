"""A server whose clock is wrong, by libfaketime.

Only the server's process gets another clock; the tests and PostgreSQL keep the right one. Only the time of day is
changed, while the server runs too, as an administrator or NTP does. Timers are not.
"""

import os
import signal
from pathlib import Path

from support import metrics
from support.http import Rest
from support.server import Server
from support.wait import wait_until

PLACES = ("/usr/lib/*/faketime", "/usr/lib*/faketime", "/usr/local/lib*/faketime")
RIGHT = "+0"
# What the library makes in shared memory for each process. A process that is killed leaves it.
SHARED_MEMORY = ("/dev/shm/faketime_shm_{pid}", "/dev/shm/sem.faketime_sem_{pid}")


def find_library() -> Path | None:
    """The library that is loaded into a process to change its clock."""
    root = Path("/")
    found = (file for place in PLACES for file in root.glob(f"{place[1:]}/libfaketime.so.1"))
    return next(found, None)


class ClockedServer(Server):
    """A replica with a clock of its own. `clock` is libfaketime's offset from the right time, such as `+10d`."""

    def __init__(self, binary: Path, engine, directory: Path, library: Path, clock: str, **settings):
        super().__init__(binary, engine, directory, **settings)
        self._library, self._file = library, directory / "clock"
        self.set_clock(clock)

    def set_clock(self, clock: str) -> None:
        """Changes the clock, at once if the server runs."""
        # The server reads the file each time that it asks for the time, so the file must never be incomplete.
        new = self._file.with_suffix(".new")
        new.write_text(clock)
        os.replace(new, self._file)

    def _end(self, with_signal: signal.Signals) -> int:
        try:
            return super()._end(with_signal)
        finally:
            for name in SHARED_MEMORY:
                Path(name.format(pid=self.pid)).unlink(missing_ok=True)

    def _environment(self) -> dict[str, str]:
        return {
            **super()._environment(),
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }


def wait_for_housekeeping(server: Server) -> None:
    """Waits until a server has deleted what it considers expired, which it does first when it starts."""

    def rounds() -> float:
        text = Rest(server, "ops_addr").get("/metrics").body.decode()
        return metrics.read(text).value("postern_housekeeping_total", outcome="done")

    wait_until("housekeeping is done", rounds)
