"""ASGI middleware: the demand of each route, checked before anything of the body is read. It needs no framework."""

import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from ._waiting import run_async
from .caller import Caller, set_current_caller
from .demands import Demand, authorize
from .errors import PosternError, Reason
from .verifier import Verifier

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CALLER = "postern.caller"  #: where the scope of a request has its :class:`Caller`
_STATUSES = {
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.UNAVAILABLE: 503,
}


class AuthMiddleware:
    """Passes a request on if its caller meets the demand of its route.

    `demands` are by method and path, such as `"GET /orders/{id}"`. `{…}` stands for one segment. The first that fits
    counts, like the routes of Starlette. HEAD is treated as GET, and `WEBSOCKET` is the method of a WebSocket. A
    request that no demand fits is refused. Put middleware for CORS outside of this one: preflight requests have no
    token.
    """

    def __init__(self, app: App, verifier: Verifier, demands: Mapping[str, Demand]) -> None:
        self._app, self._verifier = app, verifier
        self._demands = [(_pattern(route), demand) for route, demand in demands.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        try:
            await admit(self._verifier, self._demand(scope), scope)
        except PosternError as refusal:
            await _refuse(refusal, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _demand(self, scope: Scope) -> Demand | None:
        method = "WEBSOCKET" if scope["type"] == "websocket" else scope["method"]
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        route = f"{'GET' if method == 'HEAD' else method} {path}"
        return next((demand for pattern, demand in self._demands if pattern.fullmatch(route)), None)


async def admit(verifier: Verifier, demand: Demand | None, scope: Scope) -> Caller | None:
    """Checks the caller of a request, and puts it into the scope. Raises :class:`PosternError`."""
    values = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"authorization"]
    caller = await run_async(authorize(verifier, demand, values))
    scope[CALLER] = caller
    set_current_caller(caller)
    return caller


def http_answer(refusal: PosternError) -> tuple[int, dict[str, str], bytes]:
    """The status, headers and body (AIP-193) of a refusal, as `docs/errors.md` shows them."""
    status, headers = _STATUSES.get(refusal.code, 500), {"content-type": "application/json"}
    if status == 401:
        has_token = refusal.reason != Reason.TOKEN_MISSING
        detail = f' error="invalid_token", error_description="{refusal.message}"' if has_token else ""
        headers["www-authenticate"] = f"Bearer{detail}"
    elif status == 403:
        headers["www-authenticate"] = f'Bearer error="insufficient_scope", error_description="{refusal.message}"'
    if refusal.retry_delay is not None:
        headers["retry-after"] = str(max(1, round(refusal.retry_delay)))
    details = MessageToDict(refusal.status(), always_print_fields_with_no_presence=True)["details"]
    error = {"code": status, "status": refusal.code.name, "message": refusal.message, "details": details}
    return status, headers, json.dumps({"error": error}).encode()


async def _refuse(refusal: PosternError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()  # websocket.connect; closing before it is accepted is an answer of 403
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.reason})
        return
    status, headers, body = http_answer(refusal)
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _pattern(route: str) -> re.Pattern[str]:
    if not re.fullmatch(r"[A-Z]+ /\S*", route):
        raise ValueError(f"{route!r} is not a method and a path, such as 'GET /orders/{{id}}'")
    parts = re.split(r"\{\w+\}", route)
    return re.compile("[^/]+".join(map(re.escape, parts)))
