"""gRPC server interceptors, sync and asyncio: the demand of each method, by its full name (`/package.Service/Method`).

Health checks and reflection are methods like others: declare them, or they are refused.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio

from ._waiting import Steps, run, run_async
from .caller import Caller, set_current_caller
from .demands import Demand, authorize
from .errors import DETAILS_KEY, PosternError
from .verifier import Verifier

_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class _Demands:
    def __init__(self, verifier: Verifier, demands: Mapping[str, Demand]) -> None:
        self._verifier, self._demands = verifier, dict(demands)

    def _steps(self, details: Any) -> Steps[Caller | None]:
        values = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        texts = [value if isinstance(value, str) else value.decode("latin-1") for value in values]
        return authorize(self._verifier, self._demands.get(details.method), texts)


class AuthInterceptor(_Demands, grpc.ServerInterceptor):  # type: ignore[type-arg]
    """For `grpc.server(…, interceptors=[AuthInterceptor(verifier, demands)])`."""

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        kind = _kind_of(handler)
        serve = getattr(handler, kind)

        # In the thread of the call: this method runs in the one that accepts calls, which must not wait for keys.
        def authorized(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                set_current_caller(run(self._steps(handler_call_details)))
            except PosternError as refusal:
                context.set_trailing_metadata(_trailers(refusal))
                context.abort(refusal.code, refusal.message)
            return serve(request, context)

        return _handler(kind, handler, authorized)


class AsyncAuthInterceptor(_Demands, grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """For `grpc.aio.server(interceptors=[AsyncAuthInterceptor(verifier, demands)])`.

    A method that is not a coroutine is run in a thread, where `current_caller` finds nothing.
    """

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        try:
            set_current_caller(await run_async(self._steps(handler_call_details)))
        except PosternError as error:
            refusal = error
        else:
            return handler

        async def refuse(_: Any, context: Any) -> None:
            await context.abort(refusal.code, refusal.message, _trailers(refusal))

        return _handler(_kind_of(handler), handler, refuse)


def _kind_of(handler: Any) -> str:
    return next(kind for kind in _KINDS if getattr(handler, kind) is not None)


def _handler(kind: str, like: Any, behavior: Callable[[Any, Any], Any]) -> Any:
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(behavior, like.request_deserializer, like.response_serializer)


def _trailers(refusal: PosternError) -> tuple[tuple[str, bytes]]:
    return ((DETAILS_KEY, refusal.status().SerializeToString()),)
