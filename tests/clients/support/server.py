"""A running Postern: starts, stops, kills and restarts the real binary by its process id.

It depends on the command line, the `POSTERN_*` variables and the ready line of the log. When it is closed, it searches
the log for panics and for the secrets of its clients.
"""

import json
import signal
import subprocess
import threading
from pathlib import Path

from support.client import Client
from support.environment import own_environment
from support.ports import free_port

READY = "Postern is ready"
START_DEADLINE = 60
# The server drains for up to thirty seconds, and a busy machine needs more.
STOP_DEADLINE = 60

# The tests need many hashes, and few of them depend on what a hash costs.
CHEAP_HASHES = {"argon2_memory_kib": 1024, "argon2_iterations": 1}
# The settings of every server here, unless a test or its engine says otherwise.
DEFAULTS = {"log_format": "json", **CHEAP_HASHES}


class Server:
    """One replica on one database. `settings` are `POSTERN_*` variables in lower case, without the prefix."""

    def __init__(self, binary: Path, engine, directory: Path, **settings):
        self.engine = engine
        self.secrets: set[str] = engine.secrets()
        self.log: list[str] = []
        self._binary = binary
        self._directory = directory
        self._addresses = {name: f"127.0.0.1:{free_port()}" for name in ("grpc_addr", "http_addr", "ops_addr")}
        self._settings = {**DEFAULTS, **engine.settings(), **settings}
        self._process: subprocess.Popen | None = None
        self._client: Client | None = None
        self._reader: threading.Thread | None = None
        self._is_ready = False

    @property
    def address(self) -> str:
        return self._addresses["grpc_addr"]

    @property
    def http_address(self) -> str:
        """Known before the server starts, so that settings can name it."""
        return self._addresses["http_addr"]

    @property
    def binary(self) -> Path:
        return self._binary

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def client(self) -> Client:
        """The connection of the tests to the current process of the server."""
        if self._client is None:
            self._client = Client(self.address, self.secrets)
        return self._client

    def new_client(self) -> Client:
        """One more connection; the caller closes it."""
        return Client(self.address, self.secrets)

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Runs another command of the binary with the server's own configuration."""
        return subprocess.run(
            [self._binary, *arguments],
            env=self._environment(),
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            **options,
        )

    def begin(self, *arguments: str) -> subprocess.Popen:
        """Starts another command of the binary with the server's own configuration. The caller ends it."""
        return subprocess.Popen(
            [self._binary, *arguments],
            env=self._environment(),
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start(self) -> "Server":
        if self.engine.wants_migration:
            migrated = self.run("migrate")
            assert migrated.returncode == 0, f"postern migrate failed:\n{migrated.stderr}"
        self._process = subprocess.Popen(
            [self._binary, "serve"],
            env=self._environment(),
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # Ctrl-C must reach only the tests, which then stop the server.
            start_new_session=True,
        )
        ready_or_ended = threading.Event()
        self._reader = threading.Thread(target=self._read_log, args=(self._process, ready_or_ended), daemon=True)
        self._reader.start()
        if not ready_or_ended.wait(START_DEADLINE) or not self._is_ready:
            self.kill()
            raise AssertionError(f"no line {READY!r} within {START_DEADLINE} s; the log ends:\n{self.log_tail()}")
        return self

    def kill(self) -> None:
        """Sends SIGKILL, so that the server cannot clean up."""
        self._end(signal.SIGKILL)

    def stop(self, by: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal, and asserts that the server exits cleanly."""
        code = self._end(by)
        assert code == 0, f"{by.name} ended in exit code {code}; the log ends:\n{self.log_tail()}"

    def restart(self, **settings) -> "Server":
        """Starts again on the same data and the same ports, with these settings changed; stops first if it runs."""
        if self.running:
            self.stop()
        self._settings.update(settings)
        return self.start()

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """Kills the server and checks its log. Tests of SIGTERM call `stop` before."""
        if self.running:
            self.kill()
        text = "\n".join(self.log)
        assert "panicked at" not in text, f"the server panicked:\n{text[text.index('panicked at') - 500 :][:2000]}"
        leaked = [secret for secret in self.secrets if secret in text]
        assert not leaked, f"the log holds {len(leaked)} secrets, such as {leaked[0][:12]}…"

    def log_tail(self) -> str:
        return "\n".join(self.log[-30:])

    def _environment(self) -> dict[str, str]:
        return own_environment(**self._addresses, **self._settings)

    def _end(self, with_signal: signal.Signals) -> int:
        if self._process.poll() is None:
            self._process.send_signal(with_signal)
        try:
            code = self._process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(
                f"still running {STOP_DEADLINE} s after {with_signal.name}:\n{self.log_tail()}"
            ) from None
        finally:
            self._drop_client()
        self._reader.join(5)
        self._process.stderr.close()
        return code

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _read_log(self, process: subprocess.Popen, ready_or_ended: threading.Event) -> None:
        self._is_ready = False
        for line in process.stderr:
            self.log.append(line.rstrip("\n"))
            if self._is_ready:
                continue
            fields = _log_fields(line)
            if fields.get("message") == READY:
                # The ready line names the real addresses, because a test may have asked for any free port.
                self._addresses.update({name: fields[name] for name in self._addresses if name in fields})
                self._is_ready = True
                ready_or_ended.set()
        ready_or_ended.set()


def _log_fields(line: str) -> dict:
    """The fields of a JSON log line, whether the writer nests or flattens them."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(record, dict):
        return {}
    return {**record, **record.get("fields", {})}
