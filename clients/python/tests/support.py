"""What the tests share: a mint of tokens with its own key, a fake of Postern, and the stage of the real one."""

import base64
import json
import os
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from google.protobuf.timestamp_pb2 import Timestamp
from postern.auth.v1.auth_service_pb2 import LoginRequest, LoginResponse, RefreshRequest, RefreshResponse
from postern.auth.v1.auth_service_pb2_grpc import AuthServiceServicer, add_AuthServiceServicer_to_server
from postern.auth.v1.token_pair_pb2 import TokenPair
from postern.auth.v1.token_service_pb2 import (
    IssueServiceTokenResponse,
    WatchRevocationsRequest,
    WatchRevocationsResponse,
)
from postern.auth.v1.token_service_pb2_grpc import TokenServiceServicer, add_TokenServiceServicer_to_server

from postern_client import Caller, PosternError
from postern_client.errors import DETAILS_KEY

_Answer = TypeVar("_Answer")
ISSUER, AUDIENCE = "https://auth.example.com", "orders"


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Mint:
    """Signs whatever it is told."""

    def __init__(self, kid: str = "key-1", clock: Callable[[], float] = time.time) -> None:
        self.kid, self.clock, self._key = kid, clock, ec.generate_private_key(ec.SECP256R1())

    def jwk(self) -> dict[str, Any]:
        point = self._key.public_key().public_numbers()
        x, y = (b64(number.to_bytes(32, "big")) for number in (point.x, point.y))
        return {"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.kid, "x": x, "y": y}

    def jwks(self) -> dict[str, Any]:
        return {"keys": [self.jwk()]}

    def header(self) -> dict[str, Any]:
        return {"typ": "at+jwt", "alg": "ES256", "kid": self.kid}

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Those of a person. `...` leaves a claim out."""
        now = int(self.clock())
        claims = {
            "iss": ISSUER, "aud": AUDIENCE, "sub": str(uuid.uuid4()), "client_id": "postern", "exp": now + 900,
            "iat": now, "jti": str(uuid.uuid4()), "sid": str(uuid.uuid4()), "username": "ada",
            "subject_type": "user", "email": "ada@example.com", "email_verified": True, "roles": ["user"], "gen": 0,
        }  # fmt: skip
        return {name: value for name, value in {**claims, **changes}.items() if value is not ...}

    def service_claims(self, **changes: Any) -> dict[str, Any]:
        id = str(uuid.uuid4())
        service = {"sub": id, "client_id": id, "subject_type": "service", "username": "billing", "roles": []}
        return self.claims(**{"email": ..., "email_verified": ..., "gen": ..., **service, **changes})

    def token(self, **changes: Any) -> str:
        return self.sign(json.dumps(self.header()), json.dumps(self.claims(**changes)))

    def service_token(self, **changes: Any) -> str:
        return self.sign(json.dumps(self.header()), json.dumps(self.service_claims(**changes)))

    def sign(self, header: str, payload: str) -> str:
        message = f"{b64(header.encode())}.{b64(payload.encode())}"
        r, s = decode_dss_signature(self._key.sign(message.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{message}.{b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def reason_of(check: Callable[[], object]) -> str:
    """The reason for which it is refused."""
    with pytest.raises(PosternError) as refused:
        check()
    return refused.value.reason


def eventually(holds: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)


def timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


def claims_of(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


class FakePostern(AuthServiceServicer, TokenServiceServicer):
    """Rotates refresh tokens as Postern does, and loses answers when it is told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.lifetime = 900.0
        self.lose: list[PosternError] = []  #: the next answers that are lost, after the call was carried out
        self.fail: list[PosternError] = []  #: the next calls that fail before anything is done
        self.slow = 0.0
        self.sessions = 0
        self.current = ""  #: the refresh token that was given last
        self.replaced = ""  #: the one before, which may come again
        self.revoked = False
        self.cursors: list[str] = []
        self.tokens: list[str] = []
        self.streams: list[list[WatchRevocationsResponse | PosternError | float]] = []

    def Login(self, request: LoginRequest, context: grpc.ServicerContext) -> LoginResponse:
        self._begin("Login", context)
        self.sessions += 1
        self.revoked, self.current, self.replaced = False, f"refresh-{self.sessions}-0", ""
        return self._end(LoginResponse(tokens=self._pair()), context)

    def Refresh(self, request: RefreshRequest, context: grpc.ServicerContext) -> RefreshResponse:
        self._begin(f"Refresh {request.refresh_token}", context)
        if self.revoked or request.refresh_token not in (self.current, self.replaced):
            self.revoked = True
            refuse(context, PosternError(grpc.StatusCode.UNAUTHENTICATED, "REFRESH_TOKEN_INVALID", "no"))
        if request.refresh_token == self.current:
            head, _, generation = self.current.rpartition("-")
            self.current, self.replaced = f"{head}-{int(generation) + 1}", self.current
        return self._end(RefreshResponse(tokens=self._pair()), context)

    def IssueServiceToken(self, request: Any, context: Any) -> IssueServiceTokenResponse:
        self._begin("IssueServiceToken", context)
        pair = self._pair()
        answer = IssueServiceTokenResponse(
            access_token=pair.access_token, access_token_expire_time=pair.access_token_expire_time
        )
        return self._end(answer, context)

    def WatchRevocations(
        self, request: WatchRevocationsRequest, context: grpc.ServicerContext
    ) -> Iterator[WatchRevocationsResponse]:
        self.cursors.append(request.resume_cursor)
        self.tokens.append(str(dict(context.invocation_metadata())["authorization"]))
        for step in self.streams.pop(0) if self.streams else [60.0]:
            if isinstance(step, PosternError):
                refuse(context, step)
            elif isinstance(step, float):
                deadline = time.monotonic() + step
                while context.is_active() and time.monotonic() < deadline:
                    time.sleep(0.02)
            else:
                yield step

    def _begin(self, call: str, context: Any) -> None:
        self.calls.append(call)
        time.sleep(self.slow)
        if self.fail:
            refuse(context, self.fail.pop(0))

    def _end(self, answer: _Answer, context: Any) -> _Answer:
        if self.lose:
            refuse(context, self.lose.pop(0))
        return answer

    def _pair(self) -> TokenPair:
        expiry = timestamp(time.time() + self.lifetime)
        token = f"access-{len(self.calls)}"
        return TokenPair(access_token=token, access_token_expire_time=expiry, refresh_token=self.current)


def refuse(context: grpc.ServicerContext, error: PosternError) -> None:
    details = (DETAILS_KEY, error.status().SerializeToString())
    context.set_trailing_metadata((details,))
    context.abort(error.code, error.message)


@contextmanager
def serving(fake: FakePostern) -> Iterator[grpc.Channel]:
    server = grpc.server(futures.ThreadPoolExecutor(16))
    add_AuthServiceServicer_to_server(fake, server)
    add_TokenServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        server.stop(0).wait()


class Stage:
    """The real server, by the variables of `tests/libraries/stage`, which are required."""

    def __init__(self) -> None:
        self.grpc_addr = os.environ["POSTERN_GRPC_ADDR"]
        self.feed_addr = os.environ["POSTERN_FEED_ADDR"]
        self.issuer = os.environ["POSTERN_ISSUER"]
        self.audience = os.environ["POSTERN_AUDIENCE"]
        self.client_id = os.environ["POSTERN_CLIENT_ID"]
        self.client_secret = os.environ["POSTERN_CLIENT_SECRET"]
        self._url = os.environ["POSTERN_STAGE"]

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(self._url + path, data, {"content-type": "application/json"}, method="POST")
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.loads(response.read() or b"{}")
        return answer

    def account(self, role: str | None = None) -> dict[str, Any]:
        return self.post("/accounts" + (f"?role={role}" if role else ""))

    def log_out(self, account: dict[str, Any]) -> None:
        self.post("/logout", {"refreshToken": account["refreshToken"]})


def a_caller(**changes: Any) -> Caller:
    from datetime import datetime, timezone

    values = {
        "subject": "u1", "subject_type": "user", "client_id": "postern", "session_id": "s1", "token_id": "t1",
        "username": "ada", "email": "ada@example.com", "email_verified": True, "roles": ("user",),
        "expire_time": datetime.fromtimestamp(1_900_000_000, timezone.utc),
    }  # fmt: skip
    return Caller(**{**values, **changes})


class Counter:
    """Counts calls of many threads."""

    def __init__(self) -> None:
        self.value, self._lock = 0, threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.value += 1
