"""Each client library: its own tests against the real server, and its example, which protects a service with it.

`clients/LANGUAGE/test` installs, generates, checks, builds and tests; the example of a language runs only after it. What
the examples do is the same in all languages, so one test drives them all over HTTP.
"""

import http.client
import json
import os
import queue
import signal
import subprocess
import threading
import time

import pytest
from staging import ROOT
from support import jose
from support.ports import free_port
from support.wait import wait_until

MINUTE = 60
# The feed of an example tells within a second what was revoked. Heartbeats come every five seconds.
TOLD, STALENESS = 1.0, 6
ROTATIONS, COOLDOWN = 3, 10


@pytest.fixture(scope="class")
def language(request, variables) -> str:
    """A language whose own tests have passed."""
    name = request.cls.language
    ran = subprocess.run(
        ["bash", ROOT / f"clients/{name}/test"],
        cwd=ROOT,
        env=own_variables(variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=15 * MINUTE,
    )
    assert ran.returncode == 0, f"clients/{name}/test failed:\n{ran.stdout[-8000:]}"
    return name


def own_variables(variables: dict[str, str], **more: str) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith("POSTERN_")}
    return {**others, **variables, **more}


class Orders:
    """The example of a language, as a process."""

    def __init__(self, language: str, variables: dict[str, str], when_unknown: str):
        self.address = f"127.0.0.1:{free_port()}"
        own = {
            # Through the proxy that can be cut. Tokens, keys and revocations all come from there or from the issuer.
            "POSTERN_GRPC_ADDR": variables["POSTERN_FEED_ADDR"],
            "ORDERS_ADDR": self.address,
            "ORDERS_WHEN_REVOCATIONS_UNKNOWN": when_unknown,
            "ORDERS_MAX_STALENESS_SECONDS": str(STALENESS),
        }
        self._process = subprocess.Popen(
            ["bash", ROOT / f"examples/orders/{language}/run"],
            cwd=ROOT,
            env=own_variables(variables, **own),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.printed: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while (line := self._lines.get(timeout=max(0, deadline - time.monotonic()))) is not None:
            if "orders is ready" in line:
                return
        raise AssertionError("the example has ended:\n" + "\n".join(self.printed))

    def call(
        self, method: str, path: str, token: str | None = None, body: dict | None = None
    ) -> tuple[int, dict, dict]:
        """The status, the headers in lower case and the JSON of an answer."""
        connection = http.client.HTTPConnection(self.address, timeout=10)
        headers = {"content-type": "application/json"} if body is not None else {}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        try:
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        parsed = json.loads(content) if content[:1] in (b"{", b"[") else {}
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, parsed

    def status(self, token: str) -> int:
        return self.call("GET", "/orders", token)[0]

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(30)

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.printed.append(line.rstrip("\n"))
            self._lines.put(line)
        self._lines.put(None)


@pytest.fixture
def start_orders(language, variables):
    started = []

    def start(when_unknown: str) -> Orders:
        orders = Orders(language, variables, when_unknown)
        started.append(orders)
        orders.wait_until_ready()
        return orders

    yield start
    for orders in started:
        orders.close()


def reason_of(body: dict) -> str | None:
    details = body.get("error", {}).get("details", [])
    return next((detail["reason"] for detail in details if detail.get("@type", "").endswith(".ErrorInfo")), None)


def seconds_until(probe) -> float:
    started = time.monotonic()
    wait_until("it is known", probe, 10, pause=0.02)
    return time.monotonic() - started


# The first test of each waits for the tests of the library.
@pytest.mark.timeout(20 * MINUTE)
class Example:
    """What the example of a language does. The tests of a class run one after the other, in one process."""

    language: str

    def test_the_example_serves_each_caller_what_is_theirs(self, stage, start_orders):
        orders = start_orders("refuse")
        ada, joan = stage.new_account(), stage.new_account()
        root, service = stage.new_account("admin"), stage.new_service()
        of_service = service.token()

        status, _, made = orders.call("POST", "/orders", ada["accessToken"], {"item": "a lamp"})
        assert (status, made["owner"], made["item"]) == (201, ada["id"], "a lamp")
        assert orders.call("POST", "/orders", joan["accessToken"], {"item": "a chair"})[0] == 201

        def owners(token: str) -> list[str]:
            return [order["owner"] for order in orders.call("GET", "/orders", token)[2]["orders"]]

        assert owners(ada["accessToken"]) == [ada["id"]]
        assert owners(joan["accessToken"]) == [joan["id"]]
        assert sorted(owners(of_service)) == sorted([ada["id"], joan["id"]])

        status, _, body = orders.call("POST", "/orders", of_service, {"item": "a desk"})
        assert (status, reason_of(body)) == (403, "USER_REQUIRED")
        status, headers, body = orders.call("DELETE", f"/orders/{made['id']}", ada["accessToken"])
        assert (status, reason_of(body)) == (403, "ROLE_REQUIRED")
        assert 'error="insufficient_scope"' in headers["www-authenticate"]
        assert orders.call("DELETE", f"/orders/{made['id']}", root["accessToken"])[0] == 204
        assert orders.call("DELETE", f"/orders/{made['id']}", root["accessToken"])[0] == 404
        assert owners(ada["accessToken"]) == []

        status, headers, body = orders.call("GET", "/orders")
        assert (status, reason_of(body)) == (401, "TOKEN_MISSING")
        assert headers["www-authenticate"].startswith("Bearer")
        status, headers, body = orders.call("GET", "/orders", "nonsense")
        assert (status, reason_of(body)) == (401, "TOKEN_INVALID")
        assert 'error="invalid_token"' in headers["www-authenticate"]
        assert orders.call("GET", "/healthz")[0] == 200
        assert orders.stop() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)

    def test_a_logout_and_a_lost_role_are_known_within_a_second(self, stage, start_orders):
        orders = start_orders("refuse")
        ada, root = stage.new_account(), stage.new_account("admin")
        assert orders.status(ada["accessToken"]) == 200
        assert orders.call("DELETE", "/orders/1000", root["accessToken"])[0] == 404

        stage.log_out(ada["refreshToken"])
        assert seconds_until(lambda: orders.status(ada["accessToken"]) == 401) < TOLD
        assert reason_of(orders.call("GET", "/orders", ada["accessToken"])[2]) == "SESSION_REVOKED"

        stage.way.ok("SetUserRoles", credential=stage.admin.credential, user_id=root["id"], roles=["user"])
        assert seconds_until(lambda: orders.call("DELETE", "/orders/1000", root["accessToken"])[0] == 403) < TOLD
        assert orders.status(root["accessToken"]) == 200

    def test_no_token_is_refused_while_the_keys_rotate(self, stage, start_orders):
        orders = start_orders("refuse")
        alive = [stage.service.token()]
        assert orders.status(alive[0]) == 200
        for _ in range(ROTATIONS):
            # A library may fetch the keys once in ten seconds. Keys are published for 24 hours before they sign, and
            # here for five seconds.
            until = time.monotonic() + COOLDOWN + 1
            while time.monotonic() < until:
                assert orders.status(alive[-1]) == 200
                time.sleep(0.1)
            kid = stage.rotate_keys()
            for _ in range(20):
                alive.append(stage.service.token())
                assert {orders.status(token) for token in alive} == {200}
            assert jose.header_of(alive[-1])["kid"] == kid

    @pytest.mark.parametrize("when_unknown", ["refuse", "accept"])
    def test_when_the_feed_is_cut_what_was_chosen_happens_and_it_heals(self, stage, start_orders, when_unknown):
        orders = start_orders(when_unknown)
        ada, joan = stage.new_account(), stage.new_account()
        stage.log_out(joan["refreshToken"])
        assert seconds_until(lambda: orders.status(joan["accessToken"]) == 401) < TOLD
        stage.cut.cut()
        try:
            if when_unknown == "refuse":
                wait_until("revocations are unknown", lambda: orders.status(ada["accessToken"]) == 503, 30)
                # What is known is still known.
                assert orders.status(joan["accessToken"]) == 401
            else:
                stage.log_out(ada["refreshToken"])
                time.sleep(STALENESS + 3)
                assert orders.status(ada["accessToken"]) == 200, "accepted although nobody knows"
                assert orders.status(joan["accessToken"]) == 401
        finally:
            stage.cut.restore()
        wanted = 200 if when_unknown == "refuse" else 401
        wait_until("the feed is back", lambda: orders.status(ada["accessToken"]) == wanted, 30)
        assert orders.status(joan["accessToken"]) == 401


class TestGo(Example):
    language = "go"


class TestJava(Example):
    language = "java"


class TestPython(Example):
    language = "python"


class TestRust(Example):
    language = "rust"


class TestTypeScript(Example):
    language = "typescript"
