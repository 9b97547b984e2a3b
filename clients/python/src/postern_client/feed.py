"""Follows `WatchRevocations` in a thread, by the two tables of `docs/guide.md`, and keeps a state complete."""

import asyncio
import contextlib
import logging
import threading
import time
from concurrent.futures import InvalidStateError, wait
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc
from postern.auth.v1.token_service_pb2 import WatchRevocationsRequest
from postern.auth.v1.token_service_pb2_grpc import TokenServiceStub

from ._waiting import Backoff, pending_future
from .credentials import TokenSource
from .errors import PosternError, Reason
from .revocations import RevocationState, WhenUnknown

_log = logging.getLogger("postern_client.feed")


@dataclass(frozen=True)
class FeedStatus:
    """What a feed knows now. `complete_time` is UTC; `last_error` is why the last stream ended."""

    is_complete: bool
    complete_time: datetime | None
    entries: int
    last_error: Exception | None


class RevocationFeed:
    """Keeps `state` complete until :meth:`close`. It can be used in a `with` statement.

    `source` is that of a service account. The options are those of :class:`RevocationState`: `when_unknown`, which has
    no default, `max_staleness` and others. A stream without a message for `max_silence` seconds is ended and resumed.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        source: TokenSource,
        *,
        when_unknown: WhenUnknown,
        max_silence: float = 10.0,
        **options: Any,
    ) -> None:
        #: For `Verifier(…, revocations=feed.state)`.
        self.state = RevocationState(when_unknown=when_unknown, **options)
        self._stub, self._source, self._max_silence = TokenServiceStub(channel), source, max_silence
        self._cursor, self._began_at, self._heard_at = "", 0.0, 0.0
        self._stream: Any = None
        self._pause, self._closed = Backoff(first=1.0, most=10.0), threading.Event()
        self._first_complete = pending_future()
        self._last_error: Exception | None = None
        works = (self._follow, self._end_silent_streams)
        self._threads = [threading.Thread(target=work, name="postern-client-feed", daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def wait_until_complete(self, timeout: float | None = None) -> None:
        """Waits until it is complete for the first time. Raises TimeoutError after so many seconds, or when closed."""
        wait([self._first_complete], timeout)
        self._ensure_was_complete()

    async def wait_until_complete_async(self, timeout: float | None = None) -> None:
        """The same for a coroutine."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(self._first_complete), timeout)
        self._ensure_was_complete()

    def _ensure_was_complete(self) -> None:
        if not self._first_complete.done() or not self._first_complete.result():
            raise TimeoutError(f"the revocations are not complete: {self._last_error or 'no heartbeat has come'}")

    def status(self) -> FeedStatus:
        """How things stand, for a health check or a metric."""
        state = self.state
        return FeedStatus(state.is_complete(), state.complete_time, len(state), self._last_error)

    def close(self) -> None:
        """Ends the stream. The state stays as it is, and is soon not complete any more."""
        self._closed.set()
        self._cancel()
        self._end_waiting(was_complete=False)

    def _end_waiting(self, *, was_complete: bool) -> None:
        with contextlib.suppress(InvalidStateError):  # it has ended already
            self._first_complete.set_result(was_complete)

    def __enter__(self) -> "RevocationFeed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _follow(self) -> None:
        while not self._closed.is_set():
            token, heard_before = "", self._heard_at
            try:
                token = self._source.token()
                self._read_stream(token)
                failure: Exception = PosternError(grpc.StatusCode.UNAVAILABLE, "", "the stream has ended")
            except grpc.RpcError as error:
                failure = PosternError.from_rpc(error)
            except Exception as error:
                failure = error
            if self._closed.is_set():
                return
            delay = self._delay(failure, token, has_heard=self._heard_at != heard_before)
            level = logging.WARNING if self._last_error is None else logging.DEBUG  # one line an outage
            _log.log(level, "the stream of revocations ended, and is resumed in %.1f s: %s", delay, failure)
            self._last_error = failure
            self._closed.wait(delay)

    def _read_stream(self, token: str) -> None:
        request, metadata = WatchRevocationsRequest(resume_cursor=self._cursor), (("authorization", f"Bearer {token}"),)
        stream = self._stub.WatchRevocations(request, metadata=metadata)
        self._began_at, self._stream = time.monotonic(), stream
        if self._closed.is_set():
            self._cancel()
        for message in stream:
            self.state.apply(message)
            self._cursor, self._heard_at = message.cursor, time.monotonic()
            if message.HasField("heartbeat") and self.state.is_complete():
                self._last_error = None
                self._pause.reset()
                self._end_waiting(was_complete=True)

    def _delay(self, failure: Exception, token: str, *, has_heard: bool) -> float:
        """What to do about the end of a stream, and after how many seconds to resume it."""
        reason, code = getattr(failure, "reason", ""), getattr(failure, "code", None)
        if code is grpc.StatusCode.OUT_OF_RANGE:
            self._cursor = ""
        if code is grpc.StatusCode.UNAUTHENTICATED and token:
            self._source.discard(token)
        # A stream that never began would not begin at once either: its clock or its database may be wrong.
        if has_heard and (code is grpc.StatusCode.OUT_OF_RANGE or reason == Reason.TOKEN_EXPIRED):
            return 0.0
        told = getattr(failure, "retry_delay", None)
        if told is None and code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            told = 1.0
        return self._pause.next(told)

    def _end_silent_streams(self) -> None:
        while not self._closed.wait(min(1.0, self._max_silence / 4)):
            stream = self._stream
            if stream is not None and time.monotonic() - max(self._heard_at, self._began_at) > self._max_silence:
                self._cancel()

    def _cancel(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()
