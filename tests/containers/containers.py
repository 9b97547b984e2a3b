"""Containers on a real engine, by way of the `docker` command, as an operator would use it."""

import json
import subprocess
import time

from support.client import Client
from support.wait import wait_until

# What docker-compose.yml and the manifests of Kubernetes set too.
HARDENED = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges:true"]
# A data directory that nothing is left of.
DATA = "--tmpfs=/var/lib/postern:uid=10001,gid=10001,mode=0700"
# Plaintext beyond the container, and hashes that are cheap: nothing here depends on their cost.
DEFAULTS = {"allow_plaintext": "true", "argon2_memory_kib": "1024", "argon2_iterations": "1", "log_format": "json"}
# To bring Compose up is one command, and a busy machine takes long for it.
COMMAND_DEADLINE = 400


def execute(*command, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Runs a command, and raises an error that shows what it printed if it fails."""
    options.setdefault("stdin", subprocess.DEVNULL if "input" not in options else None)
    ended = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=COMMAND_DEADLINE,
        check=False,
        **options,
    )
    if check and ended.returncode != 0:
        raise AssertionError(f"{' '.join(ended.args)} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    return ended


def docker(*arguments, **options) -> str:
    """The output of a `docker` command that succeeds."""
    return execute("docker", *arguments, **options).stdout.strip()


def inspect(name: str) -> dict:
    return json.loads(docker("inspect", name))[0]


def status_of(name: str) -> dict[str, str]:
    """What the kernel says about the first process of a container; the image has no tool that would tell."""
    pid = inspect(name)["State"]["Pid"]
    with open(f"/proc/{pid}/status") as lines:
        return dict(line.rstrip("\n").split(":\t", 1) for line in lines if ":\t" in line)


class Container:
    """One container. It runs until it ends, or until `remove`."""

    def __init__(self, image: str, network: str, command, options, settings: dict[str, str]):
        variables = [f"--env=POSTERN_{name.upper()}={value}" for name, value in {**DEFAULTS, **settings}.items()]
        ports = [f"--publish=127.0.0.1::{port}" for port in (50051, 8080, 9090)]
        self.id = docker(
            "run", "--detach", f"--network={network}", *HARDENED, *ports, *variables, *options, image, *command
        )
        self._client: Client | None = None

    def address(self, port: int = 50051) -> str:
        """Where a port of the container is reached from here."""
        return docker("port", self.id, f"{port}/tcp").splitlines()[0]

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = Client(self.address())
        return self._client

    def log(self) -> str:
        ended = execute("docker", "logs", self.id)
        return ended.stdout + ended.stderr

    def wait_for_log(self, text: str) -> "Container":
        def logged() -> bool:
            assert text in self.log() or inspect(self.id)["State"]["Running"], f"it ended:\n{self.log()}"
            return text in self.log()

        wait_until(f"the container logs {text!r}", logged, pause=0.2)
        return self

    def ready(self) -> "Container":
        return self.wait_for_log("Postern is ready")

    def execute(self, *command: str, **options) -> subprocess.CompletedProcess:
        return execute("docker", "exec", self.id, *command, **options)

    def terminate(self, grace: int) -> tuple[int, float]:
        """Stops it like an orchestrator: SIGTERM, then SIGKILL. Returns the exit code, and how long it took."""
        started = time.monotonic()
        docker("stop", f"--time={grace}", self.id)
        return self.exit_code(), time.monotonic() - started

    def exit_code(self) -> int:
        return int(docker("wait", self.id))

    def remove(self) -> None:
        if self._client is not None:
            self._client.close()
        docker("rm", "--force", "--volumes", self.id)
