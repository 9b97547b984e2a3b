"""What the tests of the client libraries need: a running Postern, a proxy before it that can be cut, and accounts.

The libraries are written in five languages, so their tests ask for all of it over HTTP (`Stage.handle`), and find the
addresses in environment variables (`Stage.variables`). `stage` runs a command with these variables.
"""

import json
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import grpc

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/clients"))

from support import jose  # noqa: E402
from support.admin import Somebody  # noqa: E402
from support.engine import Sqlite  # noqa: E402
from support.server import Server  # noqa: E402
from support.services import ServiceAccount  # noqa: E402
from support.transports import ByGrpc  # noqa: E402
from support.wait import wait_until  # noqa: E402

AUDIENCE = "orders"
# The pages of the tests in browsers are served at one of these.
BROWSER_ORIGINS = [f"http://127.0.0.1:{port}" for port in range(9455, 9460)]


class Cut:
    """A TCP proxy whose connections can be cut, as a network does that fails."""

    def __init__(self, upstream: str):
        host, port = upstream.rsplit(":", 1)
        self._upstream = (host, int(port))
        self._lock, self._open, self._is_cut = threading.Lock(), set(), False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:{}".format(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends every connection, and every new one at once."""
        with self._lock:
            self._is_cut = True
            for connection in self._open:
                _shut(connection)

    def restore(self) -> None:
        with self._lock:
            self._is_cut = False

    def close(self) -> None:
        _shut(self._listener)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream) as server:
            with self._lock:
                if self._is_cut:
                    return
                self._open |= {client, server}
            back = threading.Thread(target=_pump, args=(server, client), daemon=True)
            back.start()
            _pump(client, server)
            back.join()
            with self._lock:
                self._open -= {client, server}


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Copies bytes until one side ends, and then ends both."""
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    _shut(source)
    _shut(target)


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has ended already


class Stage:
    """A server on SQLite with an admin and a service account, and the HTTP interface for the tests of the libraries."""

    def __init__(self, binary: Path, directory: Path, **settings):
        self.directory = directory
        self.engine = Sqlite(directory / "data")
        self.server = Server(binary, self.engine, directory, **settings)
        self.issuer = f"http://{self.server.http_address}"
        # A new key signs five seconds after it was made, so that rotations can be waited for.
        self.server.restart(
            issuer=self.issuer,
            audience=AUDIENCE,
            lame_duck="0s",
            cors_origins=",".join(BROWSER_ORIGINS),
            signing_key_publish_ahead="5s",
        )
        self.cut = Cut(self.server.address)
        self.way = ByGrpc(self.server.client)
        self.admin = Somebody(self.way, self.engine, "admin")
        self._services: set[str] = set()
        self.service = self.new_service()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self.cut.close()
        self.server.close()

    def variables(self) -> dict[str, str]:
        return {
            "POSTERN_GRPC_ADDR": self.server.address,
            "POSTERN_FEED_ADDR": self.cut.address,
            "POSTERN_ISSUER": self.issuer,
            "POSTERN_AUDIENCE": AUDIENCE,
            "POSTERN_CLIENT_ID": self.service.id,
            "POSTERN_CLIENT_SECRET": self.service.secret,
            "POSTERN_STAGE": "http://127.0.0.1:{}".format(self._http.server_address[1]),
        }

    def jwks(self) -> dict:
        return json.loads(self._keys("list"))

    def private_key(self, kid: str) -> str:
        """The private half of a published key, as PEM."""
        data = self.engine.data_directory
        program = self.server.binary.parent / "examples/signing_key"
        arguments = [program, data / "postern.db", kid]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout

    def new_account(self, *roles: str) -> dict:
        """A person who has signed up and logged in."""
        somebody = Somebody(self.way, self.engine, *roles)
        person = somebody.person
        return {
            "id": somebody.id,
            "username": person.username,
            "email": person.email,
            "password": person.password,
            "accessToken": somebody.tokens["accessToken"],
            "refreshToken": somebody.tokens["refreshToken"],
        }

    def new_service(self, *roles: str) -> ServiceAccount:
        service = ServiceAccount(self.way, self.admin, *roles)
        self._services.add(service.id)
        return service

    def log_out(self, refresh_token: str) -> None:
        self.way.ok("Logout", refresh_token=refresh_token)

    def disable(self, id: str) -> None:
        """Disables a person or a service account."""
        if id in self._services:
            self.way.ok("DisableServiceAccount", credential=self.admin.credential, service_account_id=id)
        else:
            self.way.ok("DisableUser", credential=self.admin.credential, user_id=id)

    def rotate_keys(self) -> str:
        """Makes a new signing key and waits until it signs. The old one stays published. Returns the new `kid`."""
        kid = self._keys("rotate").split("\t")[0]

        def signs() -> bool:
            return jose.header_of(self.service.token())["kid"] == kid

        wait_until("the new key signs", signs, pause=0.2)
        return kid

    def handle(self, path: str, query: dict[str, list[str]], body: dict):
        """Answers a request of a test."""
        match path:
            case "/accounts":
                return self.new_account(*query.get("role", []))
            case "/services":
                service = self.new_service(*query.get("role", []))
                return {"clientId": service.id, "clientSecret": service.secret}
            case "/feed/cut":
                self.cut.cut()
            case "/feed/restore":
                self.cut.restore()
            case "/keys/rotate":
                return {"kid": self.rotate_keys()}
            case "/disable":
                self.disable(query["id"][0])
            case "/logout":
                self.log_out(body["refreshToken"])
            case _:
                raise LookupError(f"there is no {path}")
        return {}

    def _keys(self, *arguments: str) -> str:
        done = self.server.run("keys", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout


def _handler(stage: Stage) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            parts = urlsplit(self.path)
            try:
                answer, status = stage.handle(parts.path, parse_qs(parts.query), json.loads(body or b"{}")), 200
            except (LookupError, ValueError, AssertionError, grpc.RpcError) as error:
                answer, status = {"error": str(error)}, 400
            encoded = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        def log_message(self, *_) -> None:
            pass

    return Handler
