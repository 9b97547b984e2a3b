"""What the benchmarks start: PostgreSQL, a release build of Postern, and the load of `benches/load.rs`, all on loopback."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from base64 import b64encode
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TICKS = os.sysconf("SC_CLK_TCK")
PASSWORD = "correct horse battery staple"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def output_of(*command, **options) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, **options).stdout


def processes() -> dict[int, tuple[int, float]]:
    """Every process: its parent, and its CPU seconds with those of its ended children."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15])) / TICKS
    return found


class Process:
    """A program that runs until the end of a `with` block."""

    def __init__(self, *command, log: Path, **options):
        self._log = log.open("wb")
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, **options)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait(60)
        self._log.close()

    def cpu(self) -> float:
        """CPU seconds of the process and all below it."""
        known = processes()
        total, family = 0.0, {self.pid}
        for pid in sorted(known):
            parent, seconds = known[pid]
            if pid in family or parent in family:
                family.add(pid)
                total += seconds
        return total

    def memory(self) -> dict[str, float]:
        """Resident memory now and at its peak, in MiB."""
        status = (Path("/proc") / str(self.pid) / "status").read_text()
        return {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024 for name in ("VmRSS", "VmHWM")}


def wait_for(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port}")

class Bench:
    """A machine with PostgreSQL and Postern. Everything it makes is below a directory."""

    def __init__(self, directory: Path):
        self.directory = directory
        os.chmod(directory, 0o755)
        self.postern, self.load = self.build()
        self.pg_bin = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))

    def build(self) -> tuple[Path, Path]:
        subprocess.run(["cargo", "build", "--release", "--locked"], cwd=ROOT, check=True)
        built = output_of(
            "cargo", "bench", "--bench", "load", "--locked", "--no-run", "--message-format=json", cwd=ROOT
        )
        artifacts = [json.loads(line) for line in built.splitlines()]
        load = next(a["executable"] for a in artifacts if a.get("target", {}).get("name") == "load" and a.get("executable"))
        metadata = json.loads(output_of("cargo", "metadata", "--no-deps", "--format-version=1", cwd=ROOT))
        return Path(metadata["target_directory"]) / "release/postern", Path(load)

    # -- what is started ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def postgres(self):
        data, self.pg_port = self.directory / "pg", free_port()
        user = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        data.mkdir()
        if user:
            shutil.chown(data, "postgres", "postgres")
        subprocess.run(
            [self.pg_bin / "initdb", "-D", data, "-U", "postgres", "-E", "UTF8", "--locale=C", "--auth=trust"],
            check=True, stdout=subprocess.DEVNULL, cwd="/", **user,
        )  # fmt: skip
        settings = [f"port={self.pg_port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={data}"]
        settings += ["max_connections=200", "shared_buffers=256MB"]
        options = [part for setting in settings for part in ("-c", setting)]
        log = self.directory / "postgres.log"
        with Process(self.pg_bin / "postgres", "-D", data, *options, log=log, cwd="/", **user) as self.pg:
            wait_for(self.pg_port)
            self.wait_until_it_answers()
            yield
            # The fast shutdown: connections end.
            self.pg.send_signal(signal.SIGINT)

    def wait_until_it_answers(self) -> None:
        """PostgreSQL listens before it has started."""
        for _ in range(100):
            with contextlib.suppress(subprocess.CalledProcessError):
                self.sql("SELECT 1")
                return
            time.sleep(0.1)
        raise SystemExit("PostgreSQL does not answer")

    def database_url(self, name: str) -> str:
        return f"postgres://postgres@127.0.0.1:{self.pg_port}/{name}"

    def sql(self, statement: str, database: str = "postgres") -> str:
        return output_of(self.pg_bin / "psql", self.database_url(database), "-qAtc", statement).strip()

    @contextlib.contextmanager
    def server(self, database: str | None, **settings: str):
        """Postern with these settings, on a new database in PostgreSQL or on the embedded one."""
        ports = {name: free_port() for name in ("grpc", "http", "ops")}
        environment = {key: value for key, value in os.environ.items() if not key.startswith("POSTERN_")}
        environment |= {f"POSTERN_{name.upper()}_ADDR": f"127.0.0.1:{port}" for name, port in ports.items()}
        environment |= {"POSTERN_LOG": "warn", "POSTERN_LOGIN_LIMIT_PER_CLIENT": "0", "POSTERN_LAME_DUCK": "0s"}
        environment["POSTERN_SIGN_UP_LIMIT_PER_CLIENT"] = "0"
        environment["POSTERN_MAIL_URL"] = f"file:{self.directory / 'mail'}"
        environment["POSTERN_MAIL_FROM"] = "bench@example.com"
        environment |= settings
        (self.directory / "mail").mkdir(exist_ok=True)
        if database:
            self.sql(f"CREATE DATABASE {database}")
            environment["POSTERN_DATABASE_URL"] = self.database_url(database)
            environment["POSTERN_MASTER_KEY"] = b64encode(secrets.token_bytes(32)).decode()
            subprocess.run([self.postern, "migrate"], env=environment, check=True, stdout=subprocess.DEVNULL)
            # The first start makes the signing key.
            with Process(self.postern, "serve", log=self.directory / "first.log", env=environment):
                wait_for(ports["grpc"])
        else:
            environment["POSTERN_DATA_DIR"] = str(self.directory / "embedded")
        started = time.monotonic()
        with Process(self.postern, "serve", log=self.directory / "postern.log", env=environment) as server:
            while time.monotonic() - started < 30:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{ports['ops']}/readyz") as up:
                    if up.status == 200:
                        break
                time.sleep(0.002)
            server.start_ms = (time.monotonic() - started) * 1_000
            server.grpc, server.http, server.ops = (f"127.0.0.1:{ports[name]}" for name in ("grpc", "http", "ops"))
            yield server

    # -- what is used -------------------------------------------------------------------------------------------------

    def run_load(self, server: Process | None, *arguments) -> dict:
        """What `load` prints, with the CPU seconds of the server and of PostgreSQL since its clients were ready."""
        command = [self.load, *map(str, arguments)]
        with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as load:
            if server:
                for line in load.stderr:
                    if line.strip() == "ready":
                        break
                before = server.cpu(), self.pg.cpu()
            found = json.loads(load.stdout.readline())
            if server:
                found["server_cpu"], found["pg_cpu"] = server.cpu() - before[0], self.pg.cpu() - before[1]
            print(load.stderr.read(), end="")
        return found

    def post(self, server: Process, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"http://{server.http}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def somebody(self, server: Process) -> dict:
        """Somebody who is logged in."""
        name = f"b{secrets.token_hex(6)}"
        account = {"username": name, "email": f"{name}@example.com", "password": PASSWORD}
        return self.log_in(server, self.post(server, "/v1/auth/signup", account))

    def log_in(self, server: Process, account: dict) -> dict:
        return self.post(server, "/v1/auth/login", {"email": account["user"]["email"], "password": PASSWORD})
