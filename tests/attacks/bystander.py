"""An honest client, and what it notices of an attack on the server that it uses."""

import resource
import threading
import time
from contextlib import contextmanager

import grpc

from support.client import Client

# The address of the attacker. All of 127.0.0.0/8 is this machine, so honest clients have another address.
ATTACKER = ("127.0.0.2", 0)
PAUSE = 0.02


def resident(server) -> float:
    """The resident memory of the server, in MiB."""
    with open(f"/proc/{server.pid}/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20


class Bystander:
    """Calls GetMe, Refresh and the health check in turn, each time on the same connection."""

    def __init__(self, server):
        self._server = server
        self._client = Client(server.address)
        _, tokens = self._client.newcomer()
        self._access, self._refresh = tokens.access_token, tokens.refresh_token
        self.times: list[float] = []
        self.failures: list[str] = []

    def call_all(self) -> None:
        for call in (self._me, self._refresh_once, self._client.health):
            begun = time.perf_counter()
            try:
                call()
                self.times.append((time.perf_counter() - begun) * 1_000)
            except grpc.RpcError as error:
                self.failures.append(f"{error.code()}: {error.details()}")

    def _me(self) -> None:
        self._client.me(self._access)

    def _refresh_once(self) -> None:
        self._refresh = self._client.refresh(self._refresh).refresh_token

    def p99(self) -> float:
        return sorted(self.times)[int((len(self.times) - 1) * 0.99)]

    @contextmanager
    def calling(self, seconds: float = 0):
        """Makes calls beside a block, and for so many seconds at least."""
        self.times, self.failures = [], []
        begun, done = time.monotonic(), threading.Event()

        def call_again_and_again() -> None:
            while not done.is_set() or time.monotonic() - begun < seconds:
                self.call_all()
                time.sleep(PAUSE)

        caller = threading.Thread(target=call_again_and_again)
        caller.start()
        try:
            yield
        finally:
            done.set()
            caller.join()

    @contextmanager
    def watching(self, what: str):
        """Prints what this client noticed of the attack in the block, and fails if one of its calls failed."""
        with self.calling(1):
            pass
        idle, before = self.p99(), resident(self._server)
        during = []
        with self.calling():
            yield lambda: during.append(resident(self._server))
            during.append(resident(self._server))
        calls, failed, p99 = len(self.times) + len(self.failures), len(self.failures), self.p99()
        print(
            f"{what}: {calls} honest calls, {failed} failed, p99 {p99:.0f} ms (idle {idle:.0f} ms), "
            f"{before:.0f} MiB before, {max(during):.0f} during, {resident(self._server):.0f} after"
        )
        self.grown = max(during) - before
        assert calls > 20
        assert not self.failures, self.failures[:5]

