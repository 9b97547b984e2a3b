"""The proxies of `docs/mesh.md`: each is started with the very text of that page, in front of a small service.

Only names of hosts and ports are replaced, and for nginx the places of its files are added. The service answers with
what has reached it.
"""

import http.client
import json
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc

from support import pb
from support.checks import IDENTITY
from support.client import CHANNEL_OPTIONS, TIMEOUT
from support.envoy import Envoy
from support.http import address_of
from support.ports import free_port
from support.wait import wait_until

PAGE = pb.REPOSITORY / "docs/mesh.md"
BLOCK = re.compile(r"^```(?:yaml|nginx)\n# (?P<name>\S+?),?(?: [^\n]*)?\n(?P<text>.*?)^```$", re.M | re.S)
# What stands in the configurations, as a host and a port.
PUBLIC, ADMIN = "0.0.0.0:8000", "127.0.0.1:9901"
APP, APP_GRPC, POSTERN, POSTERN_HTTP = "app:9000", "app:9001", "postern:50051", "postern:8080"
NGINX_FILES = """
    access_log off;
    client_body_temp_path client;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
"""


def configurations() -> dict[str, str]:
    """The configurations of the page, by the file name in their first line."""
    return {found["name"]: found["text"] for found in BLOCK.finditer(PAGE.read_text())}


class App:
    """The service behind the proxy: HTTP, and gRPC. Each answers with the headers that have reached it."""

    def start(self) -> "App":
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.address = f"127.0.0.1:{self._http.server_address[1]}"
        self._grpc = grpc.server(ThreadPoolExecutor(4), handlers=[_GrpcEcho()])
        self.grpc_address = f"127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()
        return self

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(None)


class _Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        sent = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = [[name.lower(), value] for name, value in self.headers.items()]
        body = json.dumps({"path": self.path, "headers": headers, "body": sent.decode()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


class _GrpcEcho(grpc.GenericRpcHandler):
    def service(self, call):
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: json.dumps([list(pair) for pair in context.invocation_metadata()]).encode()
        )


@dataclass(frozen=True)
class Passed:
    """What came back through a proxy: the status and the headers, and what the service has seen if it was asked."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def seen(self) -> list[tuple[str, str]]:
        """The headers that reached the service."""
        return [tuple(pair) for pair in json.loads(self.body)["headers"]]

    @property
    def path(self) -> str:
        return json.loads(self.body)["path"]

    @property
    def identity(self) -> dict[str, str]:
        """The identity that reached the service. A CGI program would read underscores as hyphens."""
        found = [(name.replace("_", "-"), value) for name, value in self.seen]
        found = [(name, value) for name, value in found if name in IDENTITY]
        assert len(dict(found)) == len(found), f"a header reached the service twice: {found}"
        return dict(found)


class ThroughProxy:
    """Requests to a proxy."""

    address: str

    def get(self, path: str, token: str | None = None, headers=(), method: str = "GET", body=None) -> Passed:
        connection = http.client.HTTPConnection(self.address, timeout=TIMEOUT)
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value)
            if token is not None:
                connection.putheader("authorization", f"Bearer {token}")
            if body is not None:
                connection.putheader("content-length", len(body))
            connection.endheaders(body)
            answer = connection.getresponse()
            return Passed(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()


class MeshEnvoy(Envoy, ThroughProxy):
    """A real Envoy with a configuration of the page."""

    def __init__(self, name: str, server, app: App, directory: Path):
        super().__init__(server.address, directory)
        places = {PUBLIC: "127.0.0.1:0", ADMIN: "127.0.0.1:0", APP: app.address, APP_GRPC: app.grpc_address}
        places |= {POSTERN: server.address, POSTERN_HTTP: address_of(server, "http_addr")}
        self._configured = configurations()[name]
        # It has the keys, and asks nobody.
        self.verifies_itself = "jwt_authn" in self._configured
        for documented, real in places.items():
            self._configured = self._configured.replace(_socket(documented), _socket(real))

    def start(self) -> "MeshEnvoy":
        return self._run(self._configured)

    def call(self, token: str | None = None, metadata=()) -> list[tuple[str, str]]:
        """Calls the gRPC service, and returns the metadata that has reached it."""
        bearer = [("authorization", f"Bearer {token}")] if token else []
        with grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            reply = channel.unary_unary("/shop.Shop/Buy")(b"", metadata=[*metadata, *bearer], timeout=TIMEOUT)
        return [tuple(pair) for pair in json.loads(reply)]


def _socket(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"address: {host}, port_value: {port}"


class MeshNginx(ThroughProxy):
    """A real nginx with the configuration of the page."""

    def __init__(self, executable: str, server, app: App, directory: Path):
        self._executable, self._directory = executable, directory
        self._process: subprocess.Popen | None = None
        self.address = f"127.0.0.1:{free_port()}"
        texts = configurations()
        main = texts["nginx.conf"].replace("listen 8000;", f"listen {self.address};")
        main = main.replace(APP, app.address).replace(POSTERN_HTTP, address_of(server, "http_addr"))
        (directory / "nginx.conf").write_text(main.replace("http {\n", f"http {{{NGINX_FILES}", 1))
        (directory / "postern-question.conf").write_text(texts["postern-question.conf"])

    def start(self) -> "MeshNginx":
        command = [self._executable, "-p", self._directory, "-c", self._directory / "nginx.conf", "-e", "log"]
        command += ["-g", "daemon off; master_process off; pid pid;"]
        with (self._directory / "output").open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_until("nginx answers", self._answers)
        return self

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(30)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._directory / "output").read_text(errors="replace")[-2000:]
        try:
            return self.get("/healthz").status == 200
        except OSError as error:
            raise AssertionError(str(error)) from None
