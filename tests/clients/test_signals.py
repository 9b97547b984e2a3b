"""Signals to a server with calls in flight: none but SIGKILL loses one of them."""

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from support import metrics
from support.client import Person
from support.expect import failure_of
from support.http import Rest
from support.wait import wait_until

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
