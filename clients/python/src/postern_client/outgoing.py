"""Client interceptors that put the token into the `authorization` metadata of each call, on any kind of channel.

A call that has `authorization` already keeps it. A call without a token to be had raises the error of the source.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import grpc
import grpc.aio

from .credentials import TokenSource


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: Any
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


def _has_authorization(metadata: Any) -> bool:
    return any(key.lower() == "authorization" for key, _ in metadata)


class BearerInterceptor(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """For `grpc.intercept_channel(channel, BearerInterceptor(source))`."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source

    def _intercept(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = list(details.metadata or ())
        if not _has_authorization(metadata):
            metadata.append(("authorization", f"Bearer {self._source.token()}"))
        names = ("credentials", "wait_for_ready", "compression")
        rest = [getattr(details, name, None) for name in names]
        return continuation(_CallDetails(details.method, details.timeout, metadata, *rest), request)

    intercept_unary_unary: Any = _intercept
    intercept_unary_stream: Any = _intercept
    intercept_stream_unary: Any = _intercept
    intercept_stream_stream: Any = _intercept


class _Async:
    def __init__(self, source: TokenSource) -> None:
        self._source = source

    async def _intercept(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        if not _has_authorization(metadata):
            metadata.add("authorization", f"Bearer {await self._source.token_async()}")
        changed = grpc.aio.ClientCallDetails(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
        )
        return await continuation(changed, request)


class _UnaryUnary(_Async, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    intercept_unary_unary: Any = _Async._intercept


class _UnaryStream(_Async, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    intercept_unary_stream: Any = _Async._intercept


class _StreamUnary(_Async, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[type-arg]
    intercept_stream_unary: Any = _Async._intercept


class _StreamStream(_Async, grpc.aio.StreamStreamClientInterceptor):  # type: ignore[type-arg]
    intercept_stream_stream: Any = _Async._intercept


def bearer_interceptors(source: TokenSource) -> list[Any]:
    """For `grpc.aio.secure_channel(address, credentials, interceptors=bearer_interceptors(source))`.

    They are four, because asyncio channels take one interceptor for each kind of call.
    """
    return [kind(source) for kind in (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)]
