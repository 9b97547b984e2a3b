"""Questions to Postern about requests, as a proxy asks them: `Check` over gRPC, and `/v1/forward-auth` over HTTP.

Both answers are turned into one `Answer`, for tests of what is the same. `Check` uses the messages in `third_party/`. A
real Envoy in `test_mesh` shows that those are its own.
"""

from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from urllib.parse import urlencode

from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_tools import protoc

from support import pb
from support.client import TIMEOUT
from support.http import Rest

CHECK = "/envoy.service.auth.v3.Authorization/Check"
IDENTITY = {f"x-postern-{name}" for name in ("user-id", "session-id", "username", "email", "roles", "subject-type")}
OVERWRITE = 2


@dataclass(frozen=True)
class Answer:
    """What a proxy is told about a request."""

    status: int
    # What is set in the request if it passes, and in the answer to its caller otherwise.
    headers: dict[str, str]
    body: str = ""
    removed: set[str] = field(default_factory=set)
    claims: dict = field(default_factory=dict)

    @property
    def challenge(self) -> str | None:
        return self.headers.get("www-authenticate")


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    """The messages of `third_party/`, in a pool of their own: other packages may have registered the real ones."""
    root, out = pb.REPOSITORY / "third_party", pb.generate() / "envoy.binpb"
    arguments = ["protoc", f"-I{root}", f"-I{files('grpc_tools') / '_proto'}", "--include_imports"]
    arguments += [f"--descriptor_set_out={out}", "envoy/service/auth/v3/external_auth.proto"]
    assert protoc.main(arguments) == 0, "protoc refused third_party/; its message is above"
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
        pool.Add(file)
    return pool


def message(name: str):
    """A class of the package `envoy.service.auth.v3`."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"envoy.service.auth.v3.{name}"))


class ByCheck:
    """Asks over gRPC, with the headers of the request as Envoy sends them by default, or as they came if `raw`."""

    def __init__(self, server, raw: bool = False):
        self._client, self._raw = server.client, raw

    def ask(self, *authorization: str, **demands: str) -> Answer:
        request = message("CheckRequest")()
        http = request.attributes.request.http
        if self._raw:
            http.header_map.SetInParent()
            for value in authorization:
                http.header_map.headers.add(key="authorization", raw_value=value.encode("latin-1"))
        elif authorization:
            http.headers["authorization"] = ",".join(authorization)
        request.attributes.context_extensions.update(demands)
        return self.send(request.SerializeToString())

    def send(self, request: bytes) -> Answer:
        """Asks with these bytes."""
        reply = message("CheckResponse").FromString(self._client.send_bytes(CHECK, request, timeout=TIMEOUT))
        if reply.status.code == 0:
            claims = json_format.MessageToDict(reply.dynamic_metadata)
            return Answer(200, _set(reply.ok_response), removed=set(reply.ok_response.headers_to_remove), claims=claims)
        denied = reply.denied_response
        assert reply.status.code == {401: 16, 403: 7, 503: 14}[denied.status.code]
        return Answer(denied.status.code, _set(denied), denied.body)


def _set(response) -> dict[str, str]:
    assert all(option.append_action == OVERWRITE for option in response.headers), "Envoy adds to a header by default"
    headers = {option.header.key: option.header.value for option in response.headers}
    assert len(headers) == len(response.headers)
    return headers


class ByForwardAuth:
    """Asks over HTTP."""

    def __init__(self, server):
        self._rest = Rest(server)

    def ask(self, *authorization: str, **demands: str) -> Answer:
        # http.client has no way to send a header twice: a joined value means the same.
        headers = {"authorization": ",".join(authorization)} if authorization else {}
        answer = self._rest.get(f"/v1/forward-auth?{urlencode(demands)}", headers=headers)
        wanted = IDENTITY if answer.status == 200 else {"www-authenticate", "retry-after"}
        given = {name: value for name, value in answer.headers.items() if name in wanted}
        assert answer.header("cache-control") == "no-store"
        assert answer.status == 200 or answer.header("content-type") == "text/plain; charset=utf-8"
        # Whatever is not in the answer is removed by the proxy.
        removed = IDENTITY - set(given) if answer.status == 200 else set()
        return Answer(answer.status, given, answer.body.decode(), removed)


WAYS = {
    "Check": ByCheck,
    "Check with raw headers": lambda server: ByCheck(server, raw=True),
    "forward-auth": ByForwardAuth,
}
