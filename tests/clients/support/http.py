"""REST clients as another team would write them: they send one HTTP request at a time, and correct nothing in it.

`Rest` uses Python's http.client. `Curl` makes the same calls with curl, in a chosen version of HTTP. Both remember the
secrets that they have sent and received (the fields marked `debug_redact`), so that tests can search errors and the log
for them. `raw` uses a socket, for requests that neither would send.
"""

import contextlib
import http.client
import json
import socket
import subprocess
from dataclasses import dataclass

from support.client import TIMEOUT, Person
from support.contract import secrets_in
from support.server import READY

JSON = "application/json"


def address_of(server, name: str) -> str:
    """An address of a running server from its newest ready line: `http_addr` or `ops_addr`."""
    for line in reversed(server.log):
        if READY in line:
            return json.loads(line)[name]
    raise AssertionError(f"no line {READY!r} in the log:\n{server.log_tail()}")


@dataclass(frozen=True)
class Answer:
    """One HTTP response, and the secrets of the request that it answers."""

    version: str
    status: int
    # Names are in lower case. Several headers with the same name are joined with a comma.
    headers: dict[str, str]
    body: bytes
    secrets: tuple[str, ...] = ()

    def header(self, name: str) -> str | None:
        return self.headers.get(name.lower())

    def json(self):
        return json.loads(self.body)

    def ok(self) -> dict:
        """Asserts that the call has succeeded, and returns its message."""
        assert self.status == 200, f"{self.status}: {self.body[:500]!r}"
        assert self.header("content-type") == JSON
        return self.json()


class Rest:
    """Calls to one HTTP address of a server, each on a connection of its own."""

    version = "1.1"

    def __init__(self, server, name: str = "http_addr"):
        self.address = address_of(server, name)
        self._remembered = server.secrets

    def call(self, method: str, path: str, body=None, *, token: str | None = None, headers=()) -> Answer:
        """Sends a request. A dict is sent as JSON; bytes and text are sent unchanged, with the content type of JSON."""
        written = json.dumps(body) if isinstance(body, dict) else body
        written = written.encode() if isinstance(written, str) else written
        sent = dict(headers)
        if written is not None:
            sent.setdefault("content-type", JSON)
        if token is not None:
            sent.setdefault("authorization", f"Bearer {token}")
        secrets = [*secrets_in(_read(written)), *([token] if token else [])]
        version, status, received, answered = self._exchange(method, path, sent, written)
        self._remember([*secrets, *secrets_in(_read(answered))])
        return Answer(version, status, received, answered, tuple(secrets))

    def get(self, path: str, **options) -> Answer:
        return self.call("GET", path, **options)

    def post(self, path: str, body=None, **options) -> Answer:
        return self.call("POST", path, body, **options)

    def sign_up(self, person: Person) -> dict:
        body = {"username": person.username, "email": person.email, "password": person.password}
        return self.post("/v1/auth/signup", body).ok()["user"]

    def login(self, person: Person) -> dict:
        """Logs in and returns the token pair."""
        return self.post("/v1/auth/login", {"email": person.email, "password": person.password}).ok()["tokens"]

    def newcomer(self) -> tuple[Person, dict]:
        """Signs a new person up and logs them in. Returns the person and their tokens."""
        person = Person()
        self.sign_up(person)
        return person, self.login(person)

    def _exchange(self, method: str, path: str, headers: dict, body: bytes | None):
        connection = http.client.HTTPConnection(self.address, timeout=TIMEOUT)
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            if body is not None and "transfer-encoding" not in headers:
                connection.putheader("content-length", len(body))
            for name, value in headers.items():
                connection.putheader(name, value)
            # If the server refuses the body while it is being sent, there still is an answer to read.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.endheaders(body, encode_chunked="transfer-encoding" in headers)
            response = connection.getresponse()
            return "1.1", response.status, _joined(response.getheaders()), response.read()
        finally:
            connection.close()

    def _remember(self, values) -> None:
        # Shorter strings may be in a log line by chance.
        self._remembered.update(value for value in values if 20 <= len(value) <= 4096)


class Curl(Rest):
    """The same calls with curl, in HTTP "1.1" or "2" (with prior knowledge, because negotiation needs TLS)."""

    def __init__(self, server, version: str = "1.1", curl: str = "curl"):
        super().__init__(server)
        self.version = version
        self._curl = curl

    def _exchange(self, method: str, path: str, headers: dict, body: bytes | None):
        command = [self._curl, "-q", "--silent", "--show-error", "--noproxy", "*", "--include", "--path-as-is"]
        command += ["--max-time", str(TIMEOUT), "--request", method]
        command += ["--http2-prior-knowledge" if self.version == "2" else "--http1.1"]
        for name, value in headers.items():
            command += ["--header", f"{name}: {value}"]
        if body is not None:
            command += ["--data-binary", "@-"]
        command += [f"http://{self.address}{path}"]
        done = subprocess.run(command, input=body or b"", capture_output=True, timeout=TIMEOUT + 5)
        assert done.returncode == 0, f"curl ended with {done.returncode}: {done.stderr.decode()}"
        return _parse(done.stdout)


@dataclass(frozen=True)
class Reply:
    """What came back over a socket, and whether the server then closed it."""

    received: bytes
    closed: bool


def raw(address: str, request: bytes, deadline: float = 5) -> Reply:
    """Sends these bytes and reads until the server closes, or is silent for `deadline` seconds."""
    host, _, port = address.rpartition(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=deadline) as wire:
        try:
            wire.sendall(request)
            while part := wire.recv(65536):
                received += part
        except TimeoutError:
            return Reply(received, closed=False)
        except (ConnectionResetError, BrokenPipeError):
            pass
    return Reply(received, closed=True)


def _parse(output: bytes):
    """Parses the output of `curl --include`: heads of interim responses, the head, the body."""
    while True:
        head, _, output = output.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status = first.removeprefix("HTTP/").split(" ")[:2]
        if int(status) >= 200:
            headers = [tuple(part.strip() for part in line.split(":", 1)) for line in lines]
            return version, int(status), _joined(headers), output


def _joined(headers) -> dict[str, str]:
    joined: dict[str, str] = {}
    for name, value in headers:
        name = name.lower()
        joined[name] = f"{joined[name]}, {value}" if name in joined else value
    return joined


def _read(body: bytes | None):
    """A body as JSON, or `None` if it is not JSON: then its fields are unknown."""
    try:
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None
