"""gRPC-Web, by a client in Python that frames it itself, and by a script in a real browser on another origin.

The HTTP address serves it, through the same layers as gRPC. One engine is enough.
"""

import base64
import http.server
import json
import struct
import threading
from urllib.parse import unquote

import pytest
from google.rpc import error_details_pb2, status_pb2

from support import pb
from support.client import Person
from support.h2c import H2c
from support.http import Rest, address_of
from support.refusal import expect_own_headers
from support.wait import wait_until

BINARY, TEXT = "application/grpc-web+proto", "application/grpc-web-text"
ON_SQLITE = pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")


def path(rpc: str) -> str:
    service = {"SignUp": "AuthService", "Login": "AuthService", "GetMe": "AuthService", "ListUsers": "AdminService"}[
        rpc
    ]
    return f"/{pb.PACKAGE}.{service}/{rpc}"


class Web:
    """Unary calls in one mode. The trailers are the last frame of the body, or they are headers."""

    def __init__(self, rest: Rest, mode: str):
        self.rest, self.mode = rest, mode

    def call(self, rpc: str, token: str | None = None, **fields):
        """Returns the message, or `None`, and the trailers."""
        message = getattr(pb, f"{rpc}Request")(**fields).SerializeToString()
        body = b"\0" + struct.pack(">I", len(message)) + message
        body = base64.b64encode(body) if "text" in self.mode else body
        headers = {"content-type": self.mode, "accept": self.mode, "x-grpc-web": "1"}
        answer = self.rest.post(path(rpc), body, headers=headers, token=token)
        assert answer.status == 200, answer
        assert answer.header("content-type").startswith(self.mode.removesuffix("+proto"))
        expect_own_headers(answer)
        found, trailers = None, dict(answer.headers)
        received = decode(answer.body) if "text" in self.mode else answer.body
        while received:
            flag, length = received[0], struct.unpack(">I", received[1:5])[0]
            part, received = received[5 : 5 + length], received[5 + length :]
            if flag & 0x80:
                lines = (line.split(":", 1) for line in part.decode().split("\r\n") if line)
                trailers.update({name.lower(): value.strip() for name, value in lines})
            else:
                found = getattr(pb, f"{rpc}Response").FromString(part)
        return found, trailers


def decode(text: bytes) -> bytes:
    """Base64 of several frames, each of which may end in padding of its own."""
    parts, chunk = [], b""
    for start in range(0, len(text), 4):
        chunk += text[start : start + 4]
        if chunk.endswith(b"="):
            parts.append(base64.b64decode(chunk))
            chunk = b""
    return b"".join([*parts, base64.b64decode(chunk)])


@pytest.fixture(params=[BINARY, TEXT, "application/grpc-web", "application/grpc-web-text+proto"])
def web(request, server):
    return Web(Rest(server), request.param)


def reason(trailers: dict) -> str:
    details = trailers["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(details + "=" * (-len(details) % 4)))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == pb.PACKAGE
    return info.reason


@ON_SQLITE
def test_a_client_signs_up_logs_in_and_is_refused_like_any_other(web):
    person = Person()
    made, trailers = web.call("SignUp", username=person.username, email=person.email, password=person.password)
    assert trailers["grpc-status"] == "0"
    assert made.user.email == person.email

    login, _ = web.call("Login", email=person.email, password=person.password)
    me, _ = web.call("GetMe", token=login.tokens.access_token)
    assert me.user == made.user

    nothing, trailers = web.call("GetMe")
    assert nothing is None
    assert (trailers["grpc-status"], reason(trailers)) == ("16", "TOKEN_MISSING")
    assert unquote(trailers["grpc-message"])
    _, trailers = web.call("ListUsers", token=login.tokens.access_token)
    assert (trailers["grpc-status"], reason(trailers)) == ("7", "ROLE_REQUIRED")
    _, trailers = web.call("SignUp", username=person.username, email=Person().email, password=person.password)
    assert (trailers["grpc-status"], reason(trailers)) == ("6", "USERNAME_TAKEN")
    _, trailers = web.call("Login", email=person.email, password="x" * 70_000)
    assert (trailers["grpc-status"], reason(trailers)) == ("3", "INVALID_FIELD"), "larger than 64 KiB"


@ON_SQLITE
def test_it_is_spoken_over_http_2_too(server):
    assert Web(H2c(server), BINARY).call("GetMe")[1]["grpc-status"] == "16"


@ON_SQLITE
def test_only_the_rpcs_of_the_contract_and_only_this_protocol_are_there(server):
    rest, frame = Rest(server), b"\0\0\0\0\0"
    for service in ("grpc.health.v1.Health/Check", "grpc.reflection.v1.ServerReflection/ServerReflectionInfo"):
        assert rest.post(f"/{service}", frame, headers={"content-type": BINARY}).status == 404
    for content_type in ("application/grpc", "application/grpc+proto", "application/grpc-webx", "application/json"):
        assert rest.post(path("GetMe"), frame, headers={"content-type": content_type}).status == 404, content_type
    assert rest.get(path("GetMe"), headers={"content-type": BINARY}).status == 405


@ON_SQLITE
def test_the_grpc_address_says_that_this_is_another_protocol(server):
    class Grpc(H2c):
        def __init__(self):
            super().__init__(server)
            self.address = server.address

    for content_type in (BINARY, TEXT, "application/grpc-web", "application/grpcx"):
        assert Grpc().post(path("GetMe"), b"\0\0\0\0\0", headers={"content-type": content_type}).status == 415, (
            content_type
        )
    for content_type in ("application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"):
        answer = Grpc().post(path("GetMe"), b"\0\0\0\0\0", headers={"content-type": content_type, "te": "trailers"})
        assert (answer.status, answer.header("grpc-status")) == (200, "16"), content_type


# -- in a browser -------------------------------------------------------------------------------------------------

SCRIPT = """
const call = async (path, message, token) => {
  const body = new Uint8Array(5 + message.length);
  new DataView(body.buffer).setUint32(1, message.length);
  body.set(message, 5);
  const headers = {'content-type': 'application/grpc-web+proto', 'x-grpc-web': '1', 'x-user-agent': 'test'};
  if (token) headers.authorization = `Bearer ${token}`;
  const answer = await fetch(SERVER + path, {method: 'POST', headers, body});
  const seen = {};
  for (const name of ['grpc-status', 'grpc-message', 'grpc-status-details-bin', 'x-request-id'])
    seen[name] = answer.headers.get(name);
  return {status: answer.status, seen, body: [...new Uint8Array(await answer.arrayBuffer())]};
};
Promise.all([call(ME, [], TOKEN), call(ME, [], null)]).then(
  done => { document.title = JSON.stringify(done); }, error => { document.title = JSON.stringify(String(error)); });
"""


@pytest.fixture
def app():
    """The web application of another origin: an empty page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b'<!doctype html><link rel="icon" href="data:,"><p>app</p>')

        def log_message(self, *_):
            pass

    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{site.server_port}"
    site.shutdown()
    site.server_close()


@pytest.mark.parametrize("is_allowed", [True, False], ids=["an allowed origin", "another origin"])
def test_a_script_of_an_allowed_origin_calls_rpcs(embedded, start_server, browser, app, is_allowed):
    own = start_server(embedded, cors_origins=app if is_allowed else "https://app.example.com")
    person, tokens = own.client.newcomer()
    page = browser.page(scripts=True)
    page.open(app)
    values = {"SERVER": f"http://{address_of(own, 'http_addr')}", "ME": path("GetMe"), "TOKEN": tokens.access_token}
    page.evaluate("".join(f"var {name} = {json.dumps(value)};" for name, value in values.items()) + SCRIPT + "; 0")
    title = wait_until("the calls are answered", lambda: page.evaluate("document.title"))
    done = json.loads(title)
    if not is_allowed:
        assert "Failed to fetch" in done
        return
    known, unknown = done
    received = bytes(known["body"])
    length = struct.unpack(">I", received[1:5])[0]
    assert pb.GetMeResponse.FromString(received[5 : 5 + length]).user.email == person.email
    assert b"grpc-status:0" in received[5 + length :]
    assert unknown["seen"]["grpc-status"] == "16", "scripts may read the status of a call that was refused"
    assert reason(unknown["seen"]) == "TOKEN_MISSING"
    assert unknown["seen"]["grpc-message"]
    page.close()
