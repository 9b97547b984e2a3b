"""The same calls by gRPC and by REST, for tests of RPCs that do not depend on the transport.

A call names an RPC of the contract and its fields as in the proto, and returns its message as proto3 JSON. An error is
checked by the rules of its transport: `expect` for gRPC, `refusal` for REST.
"""

from dataclasses import dataclass

import grpc
from google.protobuf import json_format

from support import contract, pb
from support.client import Client, Person
from support.expect import expect_error
from support.http import Rest
from support.refusal import expect_refusal

HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNAVAILABLE": 503,
}


@dataclass(frozen=True)
class Refused:
    """What a caller can see of an error, over either transport. `seen` is all of it, for comparisons."""

    message: str
    seen: object


class Transport:
    """Calls by one of the two transports. `credential` is an access token."""

    def ok(self, rpc: str, credential: str | None = None, **fields) -> dict:
        """Makes a call that must succeed."""
        raise NotImplementedError

    def refused(
        self, rpc: str, code: str, reason: str, /, naming=frozenset(), credential: str | None = None, **fields
    ) -> Refused:
        """Makes a call that must be refused with this code and reason and exactly these fields."""
        raise NotImplementedError

    def sign_up(self, person: Person) -> dict:
        return self.ok("SignUp", username=person.username, email=person.email, password=person.password)["user"]

    def login(self, person: Person) -> dict:
        """Logs in and returns the token pair."""
        return self.ok("Login", email=person.email, password=person.password)["tokens"]

    def me(self, tokens: dict) -> dict:
        return self.ok("GetMe", credential=tokens["accessToken"])["user"]

    def refresh(self, tokens: dict) -> dict:
        return self.ok("Refresh", refresh_token=tokens["refreshToken"])["tokens"]

    def expect_wrong(self, person: Person) -> None:
        """Asserts that a login with this address and password is refused."""
        login = {"email": person.email, "password": person.password}
        self.refused("Login", "UNAUTHENTICATED", "INVALID_CREDENTIALS", **login)

    def expect_dead(self, tokens: dict) -> None:
        """Asserts that a session has ended."""
        self.refused("GetMe", "UNAUTHENTICATED", "SESSION_REVOKED", credential=tokens["accessToken"])
        self.refused("Refresh", "UNAUTHENTICATED", "REFRESH_TOKEN_INVALID", refresh_token=tokens["refreshToken"])

    def expect_bad_token(self, rpc: str, token: str, **fields) -> Refused:
        """Asserts that a one-time token is refused as invalid."""
        return self.refused(rpc, "INVALID_ARGUMENT", "ONE_TIME_TOKEN_INVALID", token=token, **fields)


class ByGrpc(Transport):
    def __init__(self, client: Client):
        self._client = client

    def ok(self, rpc: str, credential: str | None = None, **fields) -> dict:
        answer = self._call(rpc, credential, fields)
        return json_format.MessageToDict(answer, always_print_fields_with_no_presence=True)

    def refused(
        self, rpc: str, code: str, reason: str, /, naming=frozenset(), credential: str | None = None, **fields
    ) -> Refused:
        wanted = grpc.StatusCode[code]
        refusal = expect_error(lambda: self._call(rpc, credential, fields), wanted, reason, fields=set(naming))
        return Refused(refusal.message, refusal)

    def _call(self, rpc: str, credential: str | None, fields: dict):
        return self._client.call(rpc, getattr(pb, f"{rpc}Request")(**fields), token=credential)


class ByRest(Transport):
    def __init__(self, rest: Rest):
        self._rest = rest

    def ok(self, rpc: str, credential: str | None = None, **fields) -> dict:
        return self._call(rpc, credential, fields).ok()

    def refused(
        self, rpc: str, code: str, reason: str, /, naming=frozenset(), credential: str | None = None, **fields
    ) -> Refused:
        answer = self._call(rpc, credential, fields)
        error = expect_refusal(answer, HTTP_STATUS[code], reason, fields=naming)
        assert error["status"] == code, error
        return Refused(error["message"], comparable(answer))

    def _call(self, rpc: str, credential: str | None, fields: dict):
        [route] = [route for route in contract.routes() if route.rpc.endswith(f".{rpc}")]
        body = fields if route.method == "POST" else None
        return self._rest.call(route.method, route.template, body, token=credential)


def comparable(answer) -> tuple:
    """An HTTP answer without the two values that are new in each: its id and the time."""
    headers = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "date")}
    return answer.status, answer.body, tuple(sorted(headers.items()))
