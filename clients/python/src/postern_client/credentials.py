"""The access token for outgoing calls: where it comes from, and when it is renewed.

What `docs/guide.md` says of refresh tokens is carried out here. An answer that was lost is asked for again with the
same refresh token, and never taken for a logout.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
from postern.auth.v1.auth_service_pb2 import LoginRequest, RefreshRequest
from postern.auth.v1.auth_service_pb2_grpc import AuthServiceStub
from postern.auth.v1.token_pair_pb2 import TokenPair
from postern.auth.v1.token_service_pb2 import IssueServiceTokenRequest
from postern.auth.v1.token_service_pb2_grpc import TokenServiceStub

from ._waiting import Backoff, SingleFlight, Steps, run, run_async
from .errors import PosternError, Reason, unauthenticated

_log = logging.getLogger("postern_client.credentials")
_CALL_TIMEOUT = 10.0
_REPEATED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | None, options: Sequence[tuple[str, Any]] = ()
) -> grpc.Channel:
    """A channel to Postern at `host:port`. `credentials=None` is plaintext.

    It notices a dead connection within 15 s and connects again within 5 s, where gRPC's defaults are minutes.
    """
    defaults = {
        "grpc.keepalive_time_ms": 10_000,
        "grpc.keepalive_timeout_ms": 5_000,
        "grpc.http2.max_pings_without_data": 0,
        "grpc.initial_reconnect_backoff_ms": 500,
        "grpc.min_reconnect_backoff_ms": 500,
        "grpc.max_reconnect_backoff_ms": 5_000,
    }
    merged = list({**defaults, **dict(options)}.items())
    if credentials is None:
        return grpc.insecure_channel(address, merged)
    return grpc.secure_channel(address, credentials, merged)


class RefreshTokenStore(Protocol):
    """Where the refresh token of a session is kept. Both may block; what they raise fails the renewal."""

    def load(self) -> str | None:
        """The newest refresh token. `None`: there is none yet."""

    def save(self, refresh_token: str) -> None:
        """Keeps the refresh token that replaces the one before. Returns when it would survive a crash."""


class MemoryStore:
    """Keeps the refresh token as long as the process lives."""

    def __init__(self, refresh_token: str | None = None) -> None:
        self._refresh_token = refresh_token

    def load(self) -> str | None:
        return self._refresh_token

    def save(self, refresh_token: str) -> None:
        self._refresh_token = refresh_token


@dataclass(frozen=True)
class AccessToken:
    """An access token, and when it expires, in seconds since 1970."""

    value: str = field(repr=False)
    expire_time: float


class _Grant(Protocol):
    """Gets an access token. `repeat` makes a call, and makes it again while its answer is lost."""

    def __call__(self, repeat: Callable[[Any, Any], Any]) -> AccessToken: ...


class TokenSource:
    """An access token that is renewed before it expires, for any number of threads and coroutines.

    Make one with :meth:`from_password`, :meth:`from_refresh_token` or :meth:`from_service_account`. One renewal is in
    flight, whoever waits for it. It begins when a fifth of the lifetime is left, at most 60 s. The old token is handed
    out meanwhile, and as long as it is valid if the renewal fails. A renewal repeats calls whose answer was lost, for
    up to `patience` seconds. `clock` returns seconds since 1970.
    """

    def __init__(self, grant: _Grant, *, patience: float = 30.0, clock: Callable[[], float] = time.time) -> None:
        self._grant, self._patience, self._clock = grant, patience, clock
        self._held: AccessToken | None = None
        self._renew_time = self._wait_time = 0.0
        self._flight: SingleFlight[AccessToken | Exception] = SingleFlight(self._renew)
        self._pause, self._resume_time = Backoff(first=1.0, most=5.0), float("-inf")
        self._failure: Exception = unauthenticated(Reason.TOKEN_EXPIRED)

    @classmethod
    def from_service_account(
        cls, channel: grpc.Channel, client_id: str, client_secret: str, **options: Any
    ) -> "TokenSource":
        """The tokens of a service account."""
        issue = TokenServiceStub(channel).IssueServiceToken
        request = IssueServiceTokenRequest(client_id=client_id, client_secret=client_secret)

        def grant(repeat: Callable[[Any, Any], Any]) -> AccessToken:
            answer = repeat(issue, request)
            return AccessToken(answer.access_token, _seconds(answer.access_token_expire_time))

        return cls(grant, **options)

    @classmethod
    def from_refresh_token(
        cls, channel: grpc.Channel, refresh_token: "str | RefreshTokenStore", **options: Any
    ) -> "TokenSource":
        """The tokens of a session that exists. When it has ended, asking raises REFRESH_TOKEN_INVALID."""
        store = MemoryStore(refresh_token) if isinstance(refresh_token, str) else refresh_token
        return cls(_Session(channel, store, None), **options)

    @classmethod
    def from_password(
        cls, channel: grpc.Channel, email: str, password: str, *, store: RefreshTokenStore | None = None, **options: Any
    ) -> "TokenSource":
        """The tokens of a person. Goes on with the session in `store`, and logs in if there is none or it has ended."""
        login = LoginRequest(email=email, password=password)
        return cls(_Session(channel, store or MemoryStore(), login), **options)

    def token(self) -> str:
        """An access token that is valid now. Raises :class:`PosternError`, or what the store raises."""
        return run(self.steps())

    async def token_async(self) -> str:
        """The same for a coroutine. Cancelling it does not cancel the renewal."""
        return await run_async(self.steps())

    def discard(self, token: str) -> None:
        """Says that this token was refused: the next caller gets another one."""
        if self._held is not None and self._held.value == token:
            self._held = None

    def call_credentials(self) -> grpc.CallCredentials:
        """The token as gRPC call credentials. On plaintext channels gRPC refuses them: use the interceptor there."""
        return grpc.metadata_call_credentials(_Plugin(self), "postern")

    def steps(self) -> Steps[str]:
        """The rules, for :func:`token` and :func:`token_async`."""
        while True:
            held, now = self._held, self._clock()
            if held is not None and now < self._renew_time:
                return held.value
            # `held` is looked at again under the lock of the flight: one that ended just now has replaced it.
            pending = self._flight.run(lambda held=held: self._held is held and self._may_try())  # type: ignore[misc]
            if held is not None and now < self._wait_time:
                return held.value
            if pending is not None:
                yield pending
                outcome = pending.result()
            elif self._held is held:
                outcome = self._failure
            else:
                continue
            if isinstance(outcome, AccessToken):
                return outcome.value
            if held is not None and self._clock() < held.expire_time:
                return held.value
            raise outcome.with_traceback(None)

    def _may_try(self) -> bool:
        return time.monotonic() >= self._resume_time

    def _renew(self) -> AccessToken | Exception:
        began = self._clock()
        try:
            held = self._grant(self._repeat)
        except Exception as failure:
            _log.warning("no new access token: %s", failure)
            self._failure = failure
            self._resume_time = time.monotonic() + self._pause.next(getattr(failure, "retry_delay", None))
            return failure
        lifetime = held.expire_time - began
        self._renew_time = held.expire_time - min(lifetime / 5, 60.0)
        self._wait_time = held.expire_time - min(lifetime / 10, 10.0)
        self._held = held
        self._pause.reset()
        return held

    def _repeat(self, call: Any, request: Any) -> Any:
        """Makes the call until its answer arrives. The server carries out the same request once."""
        patience, held = self._patience, self._held
        if held is not None and (left := held.expire_time - self._clock()) > 0:
            patience = min(patience, left * 0.9)  # whoever waits is handed the old token before it expires
        deadline, backoff = time.monotonic() + patience, Backoff(first=0.2, most=5.0)
        while True:
            try:
                return call(request, timeout=min(_CALL_TIMEOUT, max(deadline - time.monotonic(), 0.1)))
            except grpc.RpcError as failure:
                error = PosternError.from_rpc(failure)
                delay = backoff.next(error.retry_delay)
                may_repeat = error.code in _REPEATED or error.reason == Reason.OVERLOADED
                if not may_repeat or time.monotonic() + delay > deadline:
                    raise error from failure
                time.sleep(delay)


class _Session:
    """The tokens of a login. The newest refresh token is in the store before its access token is used."""

    def __init__(self, channel: grpc.Channel, store: RefreshTokenStore, login: LoginRequest | None) -> None:
        self._stub, self._store, self._login = AuthServiceStub(channel), store, login

    def __call__(self, repeat: Callable[[Any, Any], Any]) -> AccessToken:
        presented = self._store.load()
        if presented is not None:
            try:
                return self._keep(repeat(self._stub.Refresh, RefreshRequest(refresh_token=presented)).tokens)
            except PosternError as error:
                if error.reason != Reason.REFRESH_TOKEN_INVALID or self._login is None:
                    raise
                _log.warning("the session has ended; logging in again")
        if self._login is None:
            raise unauthenticated(Reason.REFRESH_TOKEN_INVALID)
        return self._keep(repeat(self._stub.Login, self._login).tokens)

    def _keep(self, tokens: TokenPair) -> AccessToken:
        self._store.save(tokens.refresh_token)
        return AccessToken(tokens.access_token, _seconds(tokens.access_token_expire_time))


class _Plugin(grpc.AuthMetadataPlugin):
    def __init__(self, source: TokenSource) -> None:
        self._source = source

    def __call__(self, _: Any, callback: grpc.AuthMetadataPluginCallback) -> None:
        steps = self._source.steps()

        # gRPC calls this in a thread that must not wait.
        def proceed(_: Any = None) -> None:
            try:
                next(steps).add_done_callback(proceed)
            except StopIteration as end:
                callback((("authorization", f"Bearer {end.value}"),), None)
            except Exception as error:
                callback((), error)

        proceed()


def _seconds(time: Any) -> float:
    return float(time.seconds + time.nanos / 1e9)
