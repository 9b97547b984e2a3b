"""The cluster: three members of etcd, three PostgreSQL under Patroni, HAProxy, PgBouncer and three replicas of Postern.

Everything listens on loopback and lies below one directory. The files in `deploy/cluster` are used as they are; what
differs between machines is in the environment or in a small file that includes them, as on real machines.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psycopg

from faults import REPOSITORY
from faults.processes import Daemon, children, now, send
from support.as_postgres import give_to_postgres
from support.engine import new_master_key
from support.environment import own_environment
from support.postgres import find_binaries
from support.wait import wait_until

NAMES = ("one", "two", "three")
CONFIGURATION = REPOSITORY / "deploy" / "cluster"
ADMIN = "operator"
# Ports below those that kernels give to clients, and apart from those of the client tests.
PORTS = range(19_000, 19_900)


def find_program(*names: str) -> str:
    for name in names:
        for place in (name, f"/usr/sbin/{name}", str(REPOSITORY / "target/tools/bin" / name)):
            if found := shutil.which(place):
                return found
    raise SystemExit(f"{names[0]} is missing: run `scripts/tools etcd patroni haproxy pgbouncer`")


def free_ports(count: int) -> list[int]:
    """So many ports in a row that nothing listens on."""
    starts = list(range(PORTS.start, PORTS.stop - count, count))
    secrets.SystemRandom().shuffle(starts)
    for start in starts:
        with contextlib.ExitStack() as probes:
            try:
                for port in range(start, start + count):
                    probe = probes.enter_context(socket.socket())
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return list(range(start, start + count))
    raise SystemExit(f"there are no {count} free ports in a row in {PORTS}")


def http(port: int, path: str, body: dict | None = None, timeout: float = 5) -> tuple[int, str]:
    """The status and the body of an answer; status 0 if there is none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


class Machine:
    """One database machine: Patroni and its PostgreSQL."""

    def __init__(self, name: str, patroni: Daemon, plan: dict):
        self.name, self.patroni = name, patroni
        self.api, self.port = plan["ports"][f"patroni-{name}"], plan["ports"][f"postgres-{name}"]
        self._password = plan["superuser_password"]

    @property
    def disk(self) -> Path:
        """What holds its data. It may be a file system of its own."""
        return self.patroni.directory / "disk"

    @property
    def postmaster(self) -> int | None:
        try:
            pid = int((self.disk / "data/postmaster.pid").read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return None
        return pid if Path(f"/proc/{pid}").exists() else None

    def processes(self) -> list[int]:
        """All processes of the machine."""
        roots = [pid for pid in (self.patroni.pid, self.postmaster) if pid is not None]
        return [*roots, *(child for root in roots for child in children(root))]

    def connect(self, database: str = "postgres", timeout: int = 30) -> psycopg.Connection:
        parameters = {"host": "127.0.0.1", "port": self.port, "user": ADMIN, "password": self._password}
        return psycopg.connect(**parameters, dbname=database, autocommit=True, connect_timeout=timeout)

    def query(self, statement: str, database: str = "postgres", timeout: int = 30) -> list[tuple]:
        with self.connect(database, timeout) as connection:
            return connection.execute(statement).fetchall()

    def takes_writes(self) -> bool:
        """Whether its PostgreSQL is no standby, asked there and not in etcd."""
        try:
            return self.query("SELECT NOT pg_is_in_recovery()", timeout=2) == [(True,)]
        except psycopg.Error:
            return False

    def holds_the_lock(self) -> bool:
        return http(self.api, "/primary", timeout=2)[0] == 200

    def kill(self) -> None:
        """Ends all of its processes at once, as a machine that loses its power does."""
        pids = self.processes()
        send(pids, signal.SIGKILL)
        wait_until(f"machine {self.name} is down", lambda: self.patroni.pid is None and self.postmaster is None)

    def discard(self) -> None:
        """Ends it for ever. PostgreSQL need not write its data down, but it removes its shared memory."""
        self.thaw()
        self.patroni.kill()
        if (postmaster := self.postmaster) is not None:
            send([postmaster], signal.SIGQUIT)
        with contextlib.suppress(AssertionError):
            wait_until(f"PostgreSQL of {self.name} has ended", lambda: self.postmaster is None, 10)
        self.kill()

    def freeze(self) -> None:
        send(self.processes(), signal.SIGSTOP)

    def thaw(self) -> None:
        send(self.processes(), signal.SIGCONT)


class Replica:
    """One Postern. `settings` are `POSTERN_*` variables in lower case."""

    def __init__(self, name: str, directory: Path, plan: dict):
        self.name, self._plan = name, plan
        self.binary = Path(plan["binary"])
        ports = plan["ports"]
        self.grpc, self.http, self.ops = (ports[f"{kind}-{name}"] for kind in ("grpc", "http", "ops"))
        self.settings = {
            "grpc_addr": f"127.0.0.1:{self.grpc}",
            "http_addr": f"127.0.0.1:{self.http}",
            "ops_addr": f"127.0.0.1:{self.ops}",
            "database_url": plan["database_url"],
            "master_key_file": directory.parent / "master-key",
            "log_format": "json",
            # All clients here have one address, like those of a backend that makes all calls.
            "mail_limit_per_client": 0,
            **plan["settings"],
        }
        self._changes: dict = {}
        self.extra_environment: dict[str, str] = {}
        self.daemon = Daemon(directory, [], {}, unprivileged=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.grpc}"

    def environment(self) -> dict[str, str]:
        return {**own_environment(**{**self.settings, **self._changes}), **self.extra_environment}

    def start(self, **changes) -> "Replica":
        """Starts it, with these settings changed for this time, and waits until it is ready."""
        self._changes = changes
        self.daemon = Daemon(self.daemon.directory, [self.binary, "serve"], self.environment(), unprivileged=False)
        self.daemon.start()
        wait_until(f"replica {self.name} is ready", self.is_ready)
        return self

    def is_ready(self) -> bool:
        self.daemon.expect_running()
        return http(self.ops, "/readyz", timeout=2)[0] == 200

    def restart(self, **changes) -> None:
        self.daemon.stop()
        self.start(**changes)

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """Runs another command of its binary with its settings."""
        command = [self.binary, *arguments]
        return subprocess.run(
            command,
            env=self.environment(),
            cwd=self.daemon.directory,
            capture_output=True,
            text=True,
            timeout=120,
            **options,
        )


class Cluster:
    """A cluster in a directory. `create` makes one, the constructor finds one that is there."""

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            self.plan = json.loads((directory / "plan.json").read_text())
        except FileNotFoundError:
            raise SystemExit(f"there is no cluster in {directory}") from None
        ports, hosts = self.plan["ports"], ",".join(f"127.0.0.1:{self.plan['ports'][f'etcd-{name}']}" for name in NAMES)
        self.etcd = [self._etcd(name) for name in NAMES]
        self.machines = [Machine(name, self._patroni(name, hosts), self.plan) for name in NAMES]
        addresses = {"POSTGRES_LISTEN": f"127.0.0.1:{ports['haproxy']}"}
        for name in NAMES:
            addresses[f"POSTGRES_{name.upper()}"] = f"127.0.0.1:{ports[f'postgres-{name}']}"
            addresses[f"PATRONI_{name.upper()}"] = str(ports[f"patroni-{name}"])
        haproxy = [find_program("haproxy"), "-db", "-f", directory / "haproxy.cfg"]
        self.haproxy = self._daemon("haproxy", haproxy, addresses)
        self.pgbouncer = self._daemon("pgbouncer", [find_program("pgbouncer"), directory / "pgbouncer/postern.ini"])
        self.replicas = [Replica(name, directory / f"postern-{name}", self.plan) for name in NAMES]

    # -- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, directory: Path | None, binary: Path, disk_mib: int | None = None, **settings) -> "Cluster":
        """Writes the files of a cluster, in a temporary directory if none is named. Nothing runs yet.

        With `disk_mib`, each database machine has a file system in memory of that size, which only root can mount.
        """
        if directory is None:
            directory = Path(tempfile.mkdtemp(prefix="postern-cluster-"))
        directory = directory.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise SystemExit(f"{directory} is not empty")
        directory.chmod(0o711)
        kinds = ("etcd", "etcd-peer", "patroni", "postgres", "grpc", "http", "ops")
        wanted = [f"{kind}-{name}" for kind in kinds for name in NAMES] + ["haproxy", "pgbouncer"]
        ports = dict(zip(wanted, free_ports(len(wanted)), strict=True))
        words = {f"{who}_password": secrets.token_hex(16) for who in ("superuser", "replication", "rewind", "postern")}
        url = f"postgres://postern:{words['postern_password']}@127.0.0.1:{ports['pgbouncer']}/postern"
        settings = {name: str(value) for name, value in settings.items()}
        plan = {"ports": ports, **words, "database_url": url, "binary": str(binary.resolve()), "settings": settings}
        _write(directory / "plan.json", json.dumps(plan, indent=2))
        _write(directory / "master-key", new_master_key())
        for name in ("patroni.yml", "haproxy.cfg", "pgbouncer.ini"):
            shutil.copyfile(CONFIGURATION / name, directory / name)
            (directory / name).chmod(0o644)
        cluster = cls(directory)
        owned = [*cluster.etcd, cluster.haproxy, cluster.pgbouncer, *(machine.patroni for machine in cluster.machines)]
        for daemon in [*owned, *(replica.daemon for replica in cluster.replicas)]:
            daemon.directory.mkdir()
        give_to_postgres(*(daemon.directory for daemon in owned))
        for machine in cluster.machines:
            machine.disk.mkdir()
            if disk_mib is not None:
                mount = ["mount", "-t", "tmpfs", "-o", f"size={disk_mib}m", "postern-cluster", machine.disk]
                subprocess.run(mount, check=True, capture_output=True)
            give_to_postgres(machine.disk)
        cluster._write_pgbouncer()
        return cluster

    def _write_pgbouncer(self) -> None:
        ports, place = self.plan["ports"], self.pgbouncer.directory
        users = place / "userlist.txt"
        _write(users, f'"postern" "{self.plan["postern_password"]}"\n')
        _write(
            place / "postern.ini",
            "[databases]\n"
            f"postern = host=127.0.0.1 port={ports['haproxy']}\n"
            "[pgbouncer]\n"
            "listen_addr = 127.0.0.1\n"
            f"listen_port = {ports['pgbouncer']}\n"
            f"auth_file = {users}\n"
            f"%include {self.directory / 'pgbouncer.ini'}\n",
        )
        give_to_postgres(users, place / "postern.ini")

    def _daemon(self, name: str, command: list, environment: dict[str, str] | None = None) -> Daemon:
        inherited = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(self.directory)}
        return Daemon(self.directory / name, command, {**inherited, **(environment or {})}, unprivileged=True)

    def _etcd(self, name: str) -> Daemon:
        ports = self.plan["ports"]
        client, peer = (f"http://127.0.0.1:{ports[f'{kind}-{name}']}" for kind in ("etcd", "etcd-peer"))
        members = ",".join(f"{other}=http://127.0.0.1:{ports[f'etcd-peer-{other}']}" for other in NAMES)
        options = {
            "name": name,
            "data-dir": self.directory / f"etcd-{name}" / "data",
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": members,
            "initial-cluster-token": self.directory.name,
            "initial-cluster-state": "new",
            # Three members share the disk and the cores of one machine with everything else.
            "heartbeat-interval": 300,
            "election-timeout": 3000,
            "snapshot-count": 5000,
            "quota-backend-bytes": 128 * 2**20,
            "log-level": "warn",
        }
        return self._daemon(
            f"etcd-{name}", [find_program("etcd"), *(f"--{key}={value}" for key, value in options.items())]
        )

    def _patroni(self, name: str, etcd: str) -> Daemon:
        ports = self.plan["ports"]
        api, postgres = (f"127.0.0.1:{ports[f'{kind}-{name}']}" for kind in ("patroni", "postgres"))
        place = self.directory / f"postgres-{name}"
        environment = {
            "NAME": name,
            "RESTAPI_LISTEN": api,
            "RESTAPI_CONNECT_ADDRESS": api,
            "POSTGRESQL_LISTEN": postgres,
            "POSTGRESQL_CONNECT_ADDRESS": postgres,
            "POSTGRESQL_DATA_DIR": str(place / "disk/data"),
            "POSTGRESQL_BIN_DIR": str(find_binaries()),
            "POSTGRESQL_PGPASS": str(place / "pgpass"),
            "ETCD3_HOSTS": etcd,
        }
        for who, user in (("superuser", ADMIN), ("replication", "replicator"), ("rewind", "rewinder")):
            environment[f"{who.upper()}_USERNAME"] = user
            environment[f"{who.upper()}_PASSWORD"] = self.plan[f"{who}_password"]
        environment = {f"PATRONI_{key}": value for key, value in environment.items()}
        command = [find_program("patroni"), self.directory / "patroni.yml"]
        return self._daemon(f"postgres-{name}", command, environment)

    # -- up and down -----------------------------------------------------------------------------------------------

    def up(self) -> "Cluster":
        """Starts everything, makes the database, applies the migrations and waits until the replicas are ready."""
        for member in self.etcd:
            member.start()
        wait_until("etcd has a leader", lambda: http(self.plan["ports"]["etcd-one"], "/health")[0] == 200)
        for machine in self.machines:
            machine.patroni.start()
        self.haproxy.start()
        self.settle()
        with self.leader().connect() as connection:
            connection.execute(f"CREATE ROLE postern LOGIN PASSWORD '{self.plan['postern_password']}'")
            connection.execute("CREATE DATABASE postern OWNER postern")
        self.pgbouncer.start()
        self.migrate()
        for replica in self.replicas:
            replica.start()
        return self

    def migrate(self) -> None:
        def is_migrated() -> bool:
            migrated = self.replicas[0].run("migrate")
            assert migrated.returncode == 0, f"postern migrate failed:\n{migrated.stderr}"
            return True

        # On a machine that is very busy, the connection may come too late for it.
        wait_until("the schema is there", is_migrated)

    def down(self) -> None:
        """Ends every process, and removes the directory. A process that does not end is killed."""
        for daemon in [*(replica.daemon for replica in self.replicas), self.pgbouncer, self.haproxy]:
            with contextlib.suppress(AssertionError):
                daemon.stop(signal.SIGINT if daemon is self.pgbouncer else signal.SIGTERM, within=40)
            daemon.kill()
        for machine in self.machines:
            machine.discard()
        for member in self.etcd:
            member.kill()
        for machine in self.machines:
            if os.path.ismount(machine.disk):
                subprocess.run(["umount", machine.disk], check=True)
        shutil.rmtree(self.directory)

    # -- looking at it ---------------------------------------------------------------------------------------------

    def found_leader(self) -> Machine | None:
        """The machine that holds the lock and takes writes, if there is one."""
        return next((machine for machine in self.machines if machine.holds_the_lock() and machine.takes_writes()), None)

    def leader(self) -> Machine:
        """The same; waits until there is one."""
        return wait_until("a database machine leads", self.found_leader, deadline=120, pause=0.2)

    def standbys(self) -> dict[str, str]:
        """The standbys that follow the leader, each `sync` or `async`. None if nobody leads."""
        if (leader := self.found_leader()) is None:
            return {}
        statement = "SELECT application_name, sync_state FROM pg_stat_replication WHERE state = 'streaming'"
        try:
            found = dict(leader.query(statement))
        except psycopg.Error:
            return {}
        return {name: state for name, state in found.items() if name in NAMES}

    def synchronous_standby(self) -> Machine:
        """The standby that has every commit."""

        def found() -> Machine | None:
            standbys = self.standbys()
            return next((machine for machine in self.machines if standbys.get(machine.name) == "sync"), None)

        return wait_until("a standby is synchronous", found, pause=0.2)

    def settle(self) -> None:
        """Waits until the leader has two standbys, one of them synchronous."""
        wait_until("two standbys follow, one of them synchronous", self._is_whole, deadline=120, pause=0.2)

    def _is_whole(self) -> bool:
        standbys = self.standbys()
        assert sorted(standbys.values()) == ["async", "sync"], f"the standbys are {standbys}"
        return True

    def wait_for_new_leader(self, old: Machine, deadline: float = 90) -> tuple[Machine, float]:
        """The machine that takes over from another one, and when its PostgreSQL began to take writes."""
        others = [machine for machine in self.machines if machine is not old]
        end = time.monotonic() + deadline
        while now() < end:
            for machine in others:
                if machine.takes_writes():
                    return machine, now()
            time.sleep(0.05)
        raise AssertionError(f"no other machine took over from {old.name} within {deadline} s")

    def status(self) -> str:
        lines = []
        for daemon in [*self.etcd, self.haproxy, self.pgbouncer]:
            lines.append(f"{daemon.name:15} {f'process {daemon.pid}' if daemon.pid else 'down'}")
        leader, standbys = self.found_leader(), self.standbys()
        for machine in self.machines:
            role = "leader" if machine is leader else f"{standbys.get(machine.name, 'not a')} standby"
            process = f"process {machine.patroni.pid}, {role}, port {machine.port}" if machine.patroni.pid else "down"
            lines.append(f"{machine.patroni.name:15} {process}")
        for replica in self.replicas:
            state = "ready" if http(replica.ops, "/readyz")[0] == 200 else "not ready"
            where = f"gRPC {replica.address}, HTTP 127.0.0.1:{replica.http}, operations 127.0.0.1:{replica.ops}"
            process = f"process {replica.daemon.pid}, {state}, {where}" if replica.daemon.pid else "down"
            lines.append(f"{replica.daemon.name:15} {process}")
        return "\n".join(lines)

    def is_well(self) -> bool:
        return len(self.standbys()) == 2 and all(http(replica.ops, "/readyz")[0] == 200 for replica in self.replicas)


def _write(path: Path, text: str) -> None:
    """Writes a file that only its owner may read."""
    path.touch(mode=0o600)
    path.write_text(text)
