"""FastAPI: a dependency of the whole application, and a demand on each endpoint. Needs `postern-client[fastapi]`.

    protect = Protect(verifier)
    app = FastAPI(dependencies=[Depends(protect)], exception_handlers=protect.exception_handlers)

    @app.get("/orders")
    @demand(Demand.user())
    async def orders(caller: CallerOf) -> ...

An endpoint without `@demand` is refused to everybody. The pages that FastAPI itself adds (`/docs`, `/openapi.json`)
and mounted applications have no dependencies: turn them off, or use :class:`~postern_client.asgi.AuthMiddleware`,
which also decides before the body is read.
"""

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request, Response
from starlette.requests import HTTPConnection

from .asgi import CALLER, admit, http_answer
from .caller import Caller
from .demands import Demand
from .errors import PosternError
from .verifier import Verifier

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])
_DEMAND = "__postern_demand__"


def demand(wanted: Demand) -> Callable[[_Endpoint], _Endpoint]:
    """Declares what an endpoint demands. It stands below the decorator of the route."""

    def declare(endpoint: _Endpoint) -> _Endpoint:
        setattr(endpoint, _DEMAND, wanted)
        return endpoint

    return declare


class Protect:
    """The dependency that checks the caller of each request against the demand of its endpoint."""

    def __init__(self, verifier: Verifier) -> None:
        self._verifier = verifier

    async def __call__(self, connection: HTTPConnection) -> None:
        try:
            await admit(self._verifier, getattr(connection.scope.get("endpoint"), _DEMAND, None), connection.scope)
        except PosternError as refusal:
            raise Refused(refusal) from None

    @property
    def exception_handlers(self) -> dict[int | type[Exception], Any]:
        """What answers a refusal with 401, 403 or 503."""
        return {Refused: _answer}


class Refused(Exception):
    """The caller of a request is refused. An error of a call that the endpoint itself makes is not this."""

    def __init__(self, error: PosternError) -> None:
        super().__init__(error)
        self.error = error


async def _answer(_: Request, refused: Refused) -> Response:
    status, headers, body = http_answer(refused.error)
    return Response(body, status, headers)


async def _caller(connection: HTTPConnection) -> Caller:
    caller: Caller | None = connection.scope.get(CALLER)
    if caller is None:
        raise LookupError("no caller: the endpoint is public, or the application does not depend on Protect")
    return caller


#: The caller as a parameter of an endpoint.
CallerOf = Annotated[Caller, Depends(_caller)]
