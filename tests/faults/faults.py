"""The faults. Each is a function that injects one into a cluster under load and waits until it has healed.

The names of the rows are those of the table that `scripts/faults` prints. `heals_within` counts in seconds from the
moment from which on nothing is in the way: the new leader takes writes, or the fault is over. A client that retries as
gRPC does sees no failed call during the faults that are `spotless`.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psycopg

from faults import verdict
from faults.calls import Caller
from faults.cluster import Cluster, Replica, free_ports, http
from faults.cutter import Cutter
from faults.load import Client, Load
from faults.processes import Daemon, now
from faults.scene import Scene, make_admin
from support.faketime import SHARED_MEMORY, find_library
from support.mail import Behaviour
from support.wait import wait_until

NEW_LEADER = 15


@dataclass(frozen=True)
class Fault:
    name: str
    inject: Callable[[Scene], None]
    heals_within: float | None
    spotless: bool
    # What must be there: "previous", "disk" or "faketime".
    needs: str


FAULTS: list[Fault] = []


def fault(heals_within: float | None = None, spotless: bool = False, needs: str = ""):
    def entered(function: Callable[[Scene], None]):
        FAULTS.append(Fault(function.__name__.replace("_", "-"), function, heals_within, spotless, needs))
        return function

    return entered


# -- upgrades and restarts -----------------------------------------------------------------------------------------


@fault(spotless=True, needs="previous")
def rolling_upgrade(scene: Scene):
    """The replicas of the previous commit on its schema give way to new ones, come back, and go again."""
    for replica in scene.replicas:
        assert replica.binary == scene.previous, "the cluster has begun with another binary"
    scene.replicas[0].binary = scene.binary
    scene.cluster.migrate()
    scene.replicas[0].binary = scene.previous
    scene.go_on()
    for binary in (scene.binary, scene.previous, scene.binary):
        _roll(scene, binary)
        scene.go_on()


@fault(spotless=True)
def rolling_restart(scene: Scene):
    """One replica after the other is told to stop, ends with exit code 0 and is started again."""
    _roll(scene, scene.replicas[0].binary)


def _roll(scene: Scene, binary: Path) -> None:
    for replica in scene.replicas:
        replica.daemon.stop()
        assert replica.daemon.exit_code == 0, f"replica {replica.name} ended with {replica.daemon.exit_code}"
        replica.binary = binary
        replica.start()
        time.sleep(1)


# -- replicas ------------------------------------------------------------------------------------------------------


@fault(heals_within=5)
def replica_killed(scene: Scene):
    """SIGKILL in the middle of everything. The others serve, and a new process takes its place."""
    victim = scene.replicas[0]
    victim.daemon.kill()
    scene.go_on()
    victim.start()
    scene.healed(now())


@fault(heals_within=5)
def replica_frozen(scene: Scene):
    """SIGSTOP for longer than any call may take."""
    victim = scene.replicas[1].daemon
    victim.tell(signal.SIGSTOP)
    scene.afterwards(lambda: victim.tell(signal.SIGCONT))
    time.sleep(12)
    victim.tell(signal.SIGCONT)
    scene.healed(now())


@fault()
def clients_vanish(scene: Scene):
    """Clients cancel calls that write, after some milliseconds."""
    vanishing = [scene.new_client(number) for number in range(4)]
    scene.extras += vanishing

    def run(client) -> None:
        client.fault = "clients-vanish"
        client.sign_up()
        end = now() + 0.6 * scene.seconds
        while now() < end:
            client.vanish(
                client.random.choice(("SignUp", "SetUserRoles", "SetUserRoles")), client.random.random() * 0.04
            )

    with ThreadPoolExecutor(len(vanishing)) as pool:
        list(pool.map(run, vanishing))
    scene.healed(now())


@fault(needs="faketime")
def clocks_off(scene: Scene):
    """The clock of one replica is an hour fast, that of another an hour slow."""
    library = find_library()
    for replica, offset in zip(scene.replicas, ("+3600", "-3600"), strict=False):
        replica.extra_environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME": offset,
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        replica.restart()
        scene.afterwards(lambda replica=replica: _right_clock(replica))
    scene.healed(now())
    scene.go_on(0.5)


def _right_clock(replica: Replica) -> None:
    pid = replica.daemon.pid
    replica.extra_environment = {}
    replica.restart()
    for name in SHARED_MEMORY:
        Path(name.format(pid=pid)).unlink(missing_ok=True)


@fault()
def configuration_wrong(scene: Scene):
    """A replica with an unknown setting refuses to start and names it. The others do not notice."""
    wrong = scene.replicas[0]
    environment = {**wrong.environment(), "POSTERN_REFRESH_TOKEN_TLT": "7d"}
    started = subprocess.run([wrong.binary, "serve"], env=environment, capture_output=True, text=True, timeout=30)
    assert started.returncode != 0, "it started"
    assert "POSTERN_REFRESH_TOKEN_TLT" in started.stderr, started.stderr
    scene.healed(now())


@fault()
def embedded_killed(scene: Scene):
    """SIGKILL of a Postern with its embedded database, while clients of its own call it."""
    directory = scene.cluster.directory / "postern-embedded"
    directory.mkdir()
    kinds = ("grpc", "http", "ops")
    ports = dict(zip((f"{kind}-embedded" for kind in kinds), free_ports(len(kinds)), strict=True))
    plan = {**scene.cluster.plan, "ports": ports, "database_url": f"sqlite:{directory / 'postern.db'}"}
    server = Replica("embedded", directory, plan)
    server.binary = scene.binary
    server.start()
    scene.afterwards(server.daemon.kill)
    caller, admin = Caller(server.address), make_admin(server)
    admin.login(caller)
    clients = [Client(directory / f"client-{number}", [caller], admin) for number in range(4)]
    for client in clients:
        client.fault = "embedded-killed"
        client.settle_in()
    load = Load(clients)
    load.start()
    load.resume()
    for _ in range(3):
        scene.go_on(0.2)
        server.daemon.kill()
        server.start()
    load.pause()
    load.stop()
    scene.outcome.losses += verdict.check(clients, [caller], caller, "embedded-killed")
    scene.count(clients)


# -- PostgreSQL ----------------------------------------------------------------------------------------------------


@fault(heals_within=NEW_LEADER)
def postmaster_killed(scene: Scene):
    """SIGKILL of the leader's postmaster. Patroni starts it again, or another machine takes over."""
    leader = scene.cluster.leader()
    os.kill(leader.postmaster, signal.SIGKILL)
    wait_until("the leader is down", lambda: not leader.takes_writes(), pause=0.02)
    wait_until("some machine takes writes", lambda: _any_takes_writes(scene.cluster), deadline=90)
    scene.healed(now())


@fault(heals_within=NEW_LEADER)
def leader_killed(scene: Scene):
    """The machine of the leader loses its power: Patroni and PostgreSQL are gone at once."""
    old = scene.cluster.leader()
    old.kill()
    scene.afterwards(old.patroni.start)
    _, since = scene.cluster.wait_for_new_leader(old)
    scene.healed(since)


@fault(heals_within=NEW_LEADER)
def leader_frozen(scene: Scene):
    """The machine of the leader stands still, another one takes over, and the first wakes up and goes on."""
    old = scene.cluster.leader()
    old.freeze()
    scene.afterwards(old.thaw)
    _, since = scene.cluster.wait_for_new_leader(old)
    scene.healed(since)
    old.thaw()
    scene.go_on()


@fault(heals_within=NEW_LEADER)
def standby_killed(scene: Scene):
    """The machine of the synchronous standby loses its power. Commits wait until the other standby takes its place."""
    standby = scene.cluster.synchronous_standby()
    standby.kill()
    scene.afterwards(standby.patroni.start)
    wait_until("the other standby is synchronous", lambda: "sync" in scene.cluster.standbys().values(), 60)
    scene.healed(now())


@fault(heals_within=NEW_LEADER)
def switchover(scene: Scene):
    """An operator moves the leader to the synchronous standby."""
    _ask_patroni(scene, "/switchover", with_leader=True)


@fault(heals_within=NEW_LEADER)
def failover(scene: Scene):
    """An operator orders a failover, without naming the leader."""
    _ask_patroni(scene, "/failover", with_leader=False)


def _ask_patroni(scene: Scene, path: str, with_leader: bool) -> None:
    old = scene.cluster.leader()
    body = {"candidate": scene.cluster.synchronous_standby().name, **({"leader": old.name} if with_leader else {})}
    answers: list[tuple[int, str]] = []
    asking = threading.Thread(target=lambda: answers.append(http(old.api, path, body, timeout=90)))
    asking.start()
    _, since = scene.cluster.wait_for_new_leader(old)
    scene.healed(since)
    asking.join()
    assert answers[0][0] == 200, f"Patroni answered {answers[0]}"


def _any_takes_writes(cluster: Cluster) -> bool:
    return any(machine.takes_writes() for machine in cluster.machines)


@fault(heals_within=5)
def database_locked(scene: Scene):
    """A statement of somebody else holds the table of sessions, until all connections for writes wait."""
    with scene.cluster.leader().connect("postern") as other, other.transaction():
        other.execute("LOCK TABLE sessions IN ACCESS EXCLUSIVE MODE")
        scene.stays_fast(8)
    scene.healed(now())


@fault(heals_within=NEW_LEADER, needs="disk")
def disk_full(scene: Scene):
    """No byte is left on the disk of the leader, while it needs new segments of the log."""
    leader = scene.cluster.leader()
    filler = leader.disk / "filler"
    scene.afterwards(lambda: filler.unlink(missing_ok=True))
    with filler.open("ab", buffering=0) as file:
        _fill(file.fileno())
        end = now() + 12
        while now() < end:
            _fill(file.fileno())
            with contextlib.suppress(psycopg.Error):
                leader.query("SELECT pg_switch_wal()")
            time.sleep(0.1)
    filler.unlink()
    scene.note("the leader kept its place" if leader.takes_writes() else "the leader had ended")
    wait_until("some machine takes writes", lambda: _any_takes_writes(scene.cluster), deadline=90)
    scene.healed(now())


def _fill(file: int) -> None:
    """Makes a file longer until there is no room for one more block."""
    for size in (2**26, 2**20, 2**12):
        with contextlib.suppress(OSError):
            while True:
                os.posix_fallocate(file, os.fstat(file).st_size, size)


# -- between Postern and PostgreSQL --------------------------------------------------------------------------------


@fault()
def commit_answers_lost(scene: Scene):
    """Connections are cut after a commit and before its answer: every 20th at one of the replicas."""
    cutter = Cutter(scene.cluster.plan["ports"]["pgbouncer"])
    scene.afterwards(cutter.close)
    replica = scene.replicas[2]
    url = replica.settings["database_url"].replace(f":{scene.cluster.plan['ports']['pgbouncer']}/", f":{cutter.port}/")
    replica.restart(database_url=f"{url}?sslmode=disable")
    scene.afterwards(replica.restart)
    cutter.share = 0.05
    scene.go_on(0.5)
    wait_until("connections are cut", lambda: cutter.cuts >= 5)
    cutter.share = 0
    scene.healed(now())
    scene.note(f"{cutter.cuts} connections were cut")


@fault(heals_within=5)
def pgbouncer_restarted(scene: Scene):
    """The pooler is killed with all its connections and started again."""
    kill_and_start(scene, scene.cluster.pgbouncer)


@fault(heals_within=5)
def haproxy_restarted(scene: Scene):
    """The balancer is killed with all its connections and started again."""
    kill_and_start(scene, scene.cluster.haproxy)


def kill_and_start(scene: Scene, program: Daemon) -> None:
    program.kill()
    time.sleep(2)
    program.start()
    scene.healed(now())


@fault(heals_within=5)
def database_silent(scene: Scene):
    """Everything that is sent to the database disappears: the pooler stands still."""
    pgbouncer = scene.cluster.pgbouncer
    pgbouncer.tell(signal.SIGSTOP)
    scene.afterwards(lambda: pgbouncer.tell(signal.SIGCONT))
    scene.stays_fast(12)
    pgbouncer.tell(signal.SIGCONT)
    scene.healed(now())


@fault(spotless=True)
def etcd_member_killed(scene: Scene):
    """One of the three members of etcd is killed. The two others go on."""
    member = scene.cluster.etcd[0]
    member.kill()
    scene.afterwards(member.start)
    scene.go_on(0.5)


# -- mail ----------------------------------------------------------------------------------------------------------


@fault(spotless=True)
def smtp_gone(scene: Scene):
    """The mail server hangs, then refuses, then is gone. No call notices, and every mail arrives later."""
    scene.afterwards(scene.mailbox.recover)
    for behaviour in (Behaviour(silent=True), Behaviour(at_recipient="451 4.3.0 try again later")):
        scene.mailbox.behave(behaviour)
        scene.go_on(0.2)
    scene.mailbox.behave(Behaviour())
    scene.mailbox.go_down()
    scene.go_on(0.2)
    scene.mailbox.come_back()
