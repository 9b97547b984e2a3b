"""Signals to a server: none but SIGKILL loses a call, and streams do not keep it from stopping."""

import contextlib
import os
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse

from support import metrics
from support.admin import Somebody
from support.client import Person
from support.engine import new_master_key
from support.environment import own_environment
from support.expect import failure_of, judge
from support.http import Rest
from support.ports import free_port
from support.server import STOP_DEADLINE
from support.transports import ByGrpc
from support.wait import wait_until
from support.watch import Service, connect, until_caught_up, watch

SERVING, NOT_SERVING = HealthCheckResponse.SERVING, HealthCheckResponse.NOT_SERVING
LOGINS = 3
IGNORED = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGIO]


@pytest.fixture
def busy_server(start_server, embedded):
    """A server on which a login takes long enough for a signal, and the end of its connection, in the middle of it."""
    settings = {"argon2_memory_kib": 65536, "argon2_iterations": 4, "hash_threads": 1}
    return start_server(embedded, **settings, lame_duck="0s", max_connection_age="400ms")


@contextlib.contextmanager
def logins_under_way(server):
    """Runs a block while passwords are hashed. Each login must get its answer, which is that there is no account."""
    operations = Rest(server, "ops_addr")

    def some_wait() -> bool:
        return metrics.read(operations.get("/metrics").body.decode()).value("postern_hash_queue_depth") > 0

    with ThreadPoolExecutor(LOGINS) as pool:
        logins = [pool.submit(failure_of, lambda: server.client.login(Person())) for _ in range(LOGINS)]
        wait_until("logins wait for the hasher", some_wait, pause=0.01)
        yield
        assert {login.result().code() for login in logins} == {grpc.StatusCode.UNAUTHENTICATED}


def test_signals_without_a_meaning_are_logged_and_ignored(busy_server):
    with logins_under_way(busy_server):
        for number in IGNORED:
            os.kill(busy_server.pid, number)
    for number in IGNORED:
        line = f'"signal":"{number.name}"'
        wait_until(f"{number.name} is logged", lambda line=line: any(line in logged for logged in busy_server.log))
    assert busy_server.client.health() == "SERVING"
    busy_server.stop()


def test_sigquit_stops_like_sigterm(busy_server):
    with logins_under_way(busy_server):
        busy_server.stop(signal.SIGQUIT)


def test_a_stop_is_told_to_streams_and_waits_for_none_of_them(start_server, embedded):
    server = start_server(embedded, lame_duck="0s")
    service = Service(Somebody(ByGrpc(server.client), embedded, "admin"), server)
    health = server.client.watch_health()
    assert next(health).status == SERVING
    with connect(server) as channel:
        revocations = watch(channel, service.token(), timeout=100)
        until_caught_up(revocations)
        seen = []
        with ThreadPoolExecutor(2) as pool:
            end_of_health = pool.submit(failure_of, lambda: seen.extend(health))
            end_of_revocations = pool.submit(failure_of, lambda: list(revocations))
            server.stop()
            judge(end_of_revocations.result(), grpc.StatusCode.UNAVAILABLE)
            assert end_of_health.result().code() is grpc.StatusCode.UNAVAILABLE
    assert [answer.status for answer in seen] == [NOT_SERVING]
    assert not any("were cut off" in line for line in server.log)


def test_a_stop_is_heard_while_the_database_is_waited_for(binary, tmp_path):
    nobody = f"postgres://postern@127.0.0.1:{free_port()}/postern"
    environment = own_environment(database_url=nobody, master_key=new_master_key())
    command = [binary, "serve"]
    if os.geteuid() == 0 and (unshare := shutil.which("unshare")):
        # The kernel keeps signals that it does not handle from the first process of a container.
        command = [unshare, "--pid", "--fork", "--kill-child", *command]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert any("waiting for the database" in line for line in process.stderr)
        os.kill(server_below(process.pid) if len(command) > 2 else process.pid, signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(STOP_DEADLINE) == 0, rest
    assert "stopped before it was ready" in rest


def server_below(pid: int) -> int:
    """The only child of a process, as seen from here."""
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)
