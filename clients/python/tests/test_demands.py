"""Every demand against every kind of caller, through each of the ways in: gRPC sync and asyncio, ASGI, FastAPI."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import fastapi
import grpc
import grpc.aio
import httpx
import pytest
from support import AUDIENCE, ISSUER, Mint, a_caller, claims_of, reason_of

from postern_client import (
    AsyncAuthInterceptor,
    AuthInterceptor,
    AuthMiddleware,
    Demand,
    KeySet,
    PosternError,
    RevocationState,
    Verifier,
    current_caller,
    require_caller,
)
from postern_client.demands import bearer_token
from postern_client.fastapi import CallerOf, Protect, demand

MINT = Mint()
TOKENS = {
    "person": MINT.token(sub="0192f0c4-0000-7000-8000-000000000001"),
    "unverified": MINT.token(email_verified=False),
    "admin": MINT.token(roles=["user", "admin"]),
    "service": MINT.service_token(),
    "admin service": MINT.service_token(roles=["admin"]),
    "expired": MINT.token(exp=int(time.time()) - 60),
    "forged": Mint().token(),
}
#: name -> the demand, and who is refused why. Nobody else is.
MISSING = {None: "TOKEN_MISSING", "expired": "TOKEN_EXPIRED", "forged": "TOKEN_INVALID"}
CASES: dict[str, tuple[Demand | None, dict[str | None, str]]] = {
    "Public": (Demand.public(), {}),
    "Authenticated": (Demand.authenticated(), MISSING),
    "User": (Demand.user(), {**MISSING, "service": "USER_REQUIRED", "admin service": "USER_REQUIRED"}),
    "Service": (
        Demand.service(),
        {**MISSING, "person": "SERVICE_REQUIRED", "unverified": "SERVICE_REQUIRED", "admin": "SERVICE_REQUIRED"},
    ),
    "Admin": (
        Demand.authenticated(role="admin"),
        {**MISSING, "person": "ROLE_REQUIRED", "unverified": "ROLE_REQUIRED", "service": "ROLE_REQUIRED"},
    ),
    "AdminUser": (
        Demand.user(role="admin", verified_email=True),
        {
            **MISSING,
            "person": "ROLE_REQUIRED",
            "unverified": "ROLE_REQUIRED",
            "service": "USER_REQUIRED",
            "admin service": "USER_REQUIRED",
        },
    ),
    "AdminService": (
        Demand.service(role="admin"),
        {
            **MISSING,
            "person": "SERVICE_REQUIRED",
            "unverified": "SERVICE_REQUIRED",
            "admin": "SERVICE_REQUIRED",
            "service": "ROLE_REQUIRED",
        },
    ),
    "Verified": (
        Demand.authenticated(verified_email=True),
        {
            **MISSING,
            "unverified": "EMAIL_NOT_VERIFIED",
            "service": "EMAIL_NOT_VERIFIED",
            "admin service": "EMAIL_NOT_VERIFIED",
        },
    ),
    "Undeclared": (None, dict.fromkeys((None, *TOKENS), "ROLE_REQUIRED")),
}
CALLERS: list[str | None] = [None, *TOKENS]
CODES = {"EXPIRED": 401, "MISSING": 401, "INVALID": 401, "REQUIRED": 403, "VERIFIED": 403}
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


@pytest.fixture
def verifier() -> Verifier:
    return Verifier(ISSUER, AUDIENCE, keys=KeySet(MINT.jwks))


def subject() -> str:
    caller = current_caller()
    return caller.subject if caller else "nobody"


def subject_of(who: str | None, name: str) -> str:
    if name == "Public" or who is None:
        return "nobody"
    return str(claims_of(TOKENS[who])["sub"])


def test_the_role_is_looked_at_before_the_address() -> None:
    demand = Demand.user(role="admin", verified_email=True)
    refusals = [
        demand.refusal(a_caller(subject_type="service", email_verified=None)),
        demand.refusal(a_caller(email_verified=False)),
        demand.refusal(a_caller(email_verified=False, roles=("admin",))),
    ]
    assert [refusal and refusal.reason for refusal in refusals] == [
        "USER_REQUIRED", "ROLE_REQUIRED", "EMAIL_NOT_VERIFIED",
    ]  # fmt: skip
    assert demand.refusal(a_caller(roles=("admin",))) is None


# ---------------------------------------------------------------- gRPC


def demands_of_methods() -> dict[str, Demand]:
    return {f"/test.{kind}/{name}": demand for kind in KINDS for name, (demand, _) in CASES.items() if demand}


def methods(behaviors: dict[str, Callable[..., Any]]) -> list[Any]:
    made = []
    for kind, behavior in behaviors.items():
        handler = getattr(grpc, f"{kind}_rpc_method_handler")(behavior)
        made.append(grpc.method_handlers_generic_handler(f"test.{kind}", dict.fromkeys(CASES, handler)))
    return made


def call(channel: grpc.Channel, kind: str, name: str, metadata: list[tuple[str, str]]) -> str:
    """Who was served. Raises PosternError."""
    stub = getattr(channel, kind)(f"/test.{kind}/{name}")
    request = b"" if kind.startswith("unary") else iter([b"", b""])
    try:
        answer = stub(request, metadata=metadata, timeout=10)
        return str((answer if kind.endswith("unary") else b"".join(answer)).decode())
    except grpc.RpcError as failure:
        raise PosternError.from_rpc(failure) from None


def bearer(who: str | None) -> list[tuple[str, str]]:
    return [] if who is None else [("authorization", f"Bearer {TOKENS[who]}")]


def assert_every_demand(channel: grpc.Channel) -> None:
    for kind in KINDS:
        for name, (_, refused) in CASES.items():
            for who in CALLERS:
                if who in refused:
                    assert reason_of(lambda: call(channel, kind, name, bearer(who))) == refused[who], (kind, name, who)  # noqa: B023
                else:
                    assert call(channel, kind, name, bearer(who)) == subject_of(who, name), (kind, name, who)
    good = TOKENS["person"]
    for scheme in ("bearer", "BEARER", "bEaReR", "Bearer  "):
        assert call(channel, "unary_unary", "User", [("authorization", f"{scheme} {good}")])
    for values, reason in {
        (f"Bearer {good}", f"Bearer {good}"): "TOKEN_INVALID",
        (f"Bearer {good}", "Basic YTpi"): "TOKEN_INVALID",
        ("Basic YTpi",): "TOKEN_MISSING",
        (good,): "TOKEN_MISSING",
        ("Bearer",): "TOKEN_INVALID",
        (f"Bearer {good},Bearer {good}",): "TOKEN_INVALID",
    }.items():
        metadata = [("authorization", value) for value in values]
        assert reason_of(lambda: call(channel, "unary_unary", "User", metadata)) == reason, values  # noqa: B023
    with pytest.raises(PosternError) as refused_call:
        call(channel, "unary_unary", "Admin", bearer("person"))
    assert refused_call.value.code is grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(PosternError) as no_method:
        call(channel, "unary_unary", "Nothing", bearer("person"))
    assert no_method.value.code is grpc.StatusCode.UNIMPLEMENTED


@contextmanager
def sync_server(verifier: Verifier) -> Iterator[grpc.Channel]:
    def unary(request: object, context: grpc.ServicerContext) -> bytes:
        if not isinstance(request, bytes):
            list(request)  # type: ignore[call-overload]
        return subject().encode()

    def stream(request: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield b""
        yield unary(request, context)

    server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=[AuthInterceptor(verifier, demands_of_methods())])
    server.add_generic_rpc_handlers(
        methods({"unary_unary": unary, "stream_unary": unary, "unary_stream": stream, "stream_stream": stream})
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        server.stop(0).wait()


def test_the_sync_interceptor_decides_every_demand(verifier: Verifier) -> None:
    with sync_server(verifier) as channel:
        assert_every_demand(channel)


def test_the_asyncio_interceptor_decides_every_demand(verifier: Verifier) -> None:
    async def unary(request: object, context: Any) -> bytes:
        if not isinstance(request, bytes):
            async for _ in request:  # type: ignore[attr-defined]
                pass
        return subject().encode()

    async def stream(request: object, context: Any) -> AsyncIterator[bytes]:
        yield b""
        yield await unary(request, context)

    async def serve() -> None:
        server = grpc.aio.server(interceptors=[AsyncAuthInterceptor(verifier, demands_of_methods())])
        server.add_generic_rpc_handlers(
            methods({"unary_unary": unary, "stream_unary": unary, "unary_stream": stream, "stream_stream": stream})
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()

        def calls() -> None:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                assert_every_demand(channel)

        await asyncio.to_thread(calls)
        await server.stop(0)

    asyncio.run(serve())


def test_without_keys_or_revocations_grpc_is_unavailable() -> None:
    state = RevocationState(when_unknown="refuse")
    with sync_server(Verifier(ISSUER, AUDIENCE, keys=KeySet(MINT.jwks), revocations=state)) as channel:
        with pytest.raises(PosternError) as refused:
            call(channel, "unary_unary", "User", bearer("person"))
        assert (refused.value.code, refused.value.message) == (grpc.StatusCode.UNAVAILABLE, "revocations unknown")
        assert refused.value.retry_delay == 1.0
        assert call(channel, "unary_unary", "Public", bearer("person")) == "nobody"


def test_slow_keys_do_not_keep_the_sync_server_from_other_calls() -> None:
    def slow() -> dict[str, Any]:
        time.sleep(0.5)
        return MINT.jwks()

    with sync_server(Verifier(ISSUER, AUDIENCE, keys=KeySet(slow))) as channel, futures.ThreadPoolExecutor() as threads:
        waiting = threads.submit(call, channel, "unary_unary", "User", bearer("person"))
        time.sleep(0.1)
        began = time.monotonic()
        assert call(channel, "unary_unary", "Public", []) == "nobody"
        assert time.monotonic() - began < 0.3
        assert waiting.result() == subject_of("person", "User")


# ---------------------------------------------------------------- HTTP


def asgi_app(verifier: Verifier) -> AuthMiddleware:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": subject().encode()})

    demands = {f"GET /{name}/{{id}}": demand for name, (demand, _) in CASES.items() if demand}
    return AuthMiddleware(app, verifier, {"GET /": Demand.public(), **demands})


def fastapi_app(verifier: Verifier) -> fastapi.FastAPI:
    protect = Protect(verifier)
    app = fastapi.FastAPI(
        dependencies=[fastapi.Depends(protect)], exception_handlers=protect.exception_handlers, openapi_url=None
    )
    for name, (wanted, _) in CASES.items():

        async def in_loop() -> fastapi.Response:
            return fastapi.Response(subject())

        def in_thread() -> fastapi.Response:
            return fastapi.Response(subject())

        async def with_parameter(caller: CallerOf) -> fastapi.Response:
            assert caller == require_caller()
            return fastapi.Response(caller.subject)

        endpoints: dict[str, Callable[..., Any]] = {
            "a": in_loop,
            "b": in_thread,
            **({} if name == "Public" else {"c": with_parameter}),
        }
        for id, endpoint in endpoints.items():
            app.get(f"/{name}/{id}")(demand(wanted)(endpoint) if wanted else endpoint)

    @app.get("/failing")
    @demand(Demand.public())
    async def failing() -> None:
        raise PosternError(grpc.StatusCode.UNAUTHENTICATED, "INVALID_CLIENT", "of a call of the endpoint")

    @app.get("/no-caller")
    @demand(Demand.public())
    async def no_caller(caller: CallerOf) -> None: ...

    return app


Get = Callable[..., httpx.Response]


@contextmanager
def client_of(app: Any) -> Iterator[Get]:
    async def request(path: str, values: tuple[str, ...], method: str) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://orders") as client:
            given = [(b"authorization", value.encode("latin-1")) for value in values]
            return await client.request(method, path, headers=given)

    def get(path: str, *values: str, method: str = "GET") -> httpx.Response:
        return asyncio.run(request(path, values, method))

    yield get


def assert_refused(response: httpx.Response, reason: str) -> None:
    status = CODES[reason.rpartition("_")[2]]
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == status
    assert error["status"] == {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}[status]
    info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason, "domain": "postern.auth.v1"}
    assert error["details"] == [{**info, "metadata": {}}]
    assert error["message"]
    challenge = response.headers["www-authenticate"]
    if reason == "TOKEN_MISSING":
        assert challenge == "Bearer"
    else:
        assert challenge.startswith(f'Bearer error="{"invalid_token" if status == 401 else "insufficient_scope"}"')


@pytest.mark.parametrize("kind", ["asgi", "fastapi"])
def test_http_decides_every_demand(verifier: Verifier, kind: str) -> None:
    app = asgi_app(verifier) if kind == "asgi" else fastapi_app(verifier)
    with client_of(app) as get:
        for name, (_, refused) in CASES.items():
            for who in CALLERS:
                values = [value for _, value in bearer(who)]
                for id in ("a", "b", "c"):
                    if (kind, name, id) == ("fastapi", "Public", "c"):
                        continue
                    response = get(f"/{name}/{id}", *values)
                    if who in refused:
                        assert_refused(response, refused[who])
                    else:
                        assert (response.status_code, response.text) == (200, subject_of(who, name)), (name, who)
        good = f"Bearer {TOKENS['person']}"
        assert get("/User/a", good.replace("Bearer", "bEARER")).status_code == 200
        assert_refused(get("/User/a", good, good), "TOKEN_INVALID")
        assert_refused(get("/User/a", "Basic YTpi"), "TOKEN_MISSING")
        assert_refused(get("/User/a", good, "Basic YTpi"), "TOKEN_INVALID")
        assert_refused(get("/User/a", "Bearer \xe9"), "TOKEN_INVALID")


def test_what_no_demand_fits_is_refused_by_the_middleware(verifier: Verifier) -> None:
    good = f"Bearer {TOKENS['admin']}"
    with client_of(asgi_app(verifier)) as get:
        assert get("/").text == "nobody"
        assert get("/User/a", good, method="HEAD").status_code == 200
        for path in ("/User", "/User/", "/User/a/b", "//User/a", "/user/a", "/User/a%2Fb", "/Nothing/a"):
            assert_refused(get(path, good), "ROLE_REQUIRED")
        assert_refused(get("/User/a", good, method="POST"), "ROLE_REQUIRED")
    for wrong in ("/orders", "get /orders", "GET orders", "GET  /orders"):
        with pytest.raises(ValueError, match="method and a path"):
            AuthMiddleware(asgi_app(verifier), verifier, {wrong: Demand.public()})


def test_http_is_unavailable_while_revocations_are_unknown() -> None:
    state = RevocationState(when_unknown="refuse")
    verifier = Verifier(ISSUER, AUDIENCE, keys=KeySet(MINT.jwks), revocations=state)
    for app in (asgi_app(verifier), fastapi_app(verifier)):
        with client_of(app) as get:
            response = get("/User/a", f"Bearer {TOKENS['person']}")
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert response.json()["error"]["message"] == "revocations unknown"
            assert "www-authenticate" not in response.headers
            assert response.json()["error"]["details"][1]["retryDelay"] == "1s"


def test_a_public_endpoint_has_no_caller_to_inject(verifier: Verifier) -> None:
    with client_of(fastapi_app(verifier)) as get, pytest.raises(LookupError, match="no caller"):
        get("/no-caller", f"Bearer {TOKENS['person']}")
    with pytest.raises(LookupError, match="no caller"):
        require_caller()


def test_an_error_of_the_endpoints_own_calls_is_no_refusal_of_its_caller(verifier: Verifier) -> None:
    with client_of(fastapi_app(verifier)) as get, pytest.raises(PosternError, match="of a call of the endpoint"):
        get("/failing")


def websocket(app: AuthMiddleware, path: str, who: str | None) -> list[Any]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", value.encode()) for _, value in bearer(who)]
    asyncio.run(app({"type": "websocket", "path": path, "headers": headers}, receive, send))
    return sent


def test_a_websocket_is_refused_before_it_is_accepted(verifier: Verifier) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})

    middleware = AuthMiddleware(app, verifier, {"WEBSOCKET /feed": Demand.user()})
    assert websocket(middleware, "/feed", "person") == [{"type": "websocket.accept"}]
    closed = {"type": "websocket.close", "code": 1008}
    assert websocket(middleware, "/feed", None) == [{**closed, "reason": "TOKEN_MISSING"}]
    assert websocket(middleware, "/other", "person") == [{**closed, "reason": "ROLE_REQUIRED"}]


def test_the_start_and_the_end_of_an_application_are_passed_on(verifier: Verifier) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    asyncio.run(AuthMiddleware(app, verifier, {})({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == [{"type": "lifespan"}]


def test_only_one_bearer_value_is_a_token() -> None:
    assert bearer_token(["bearer   a.b.c"]) == "a.b.c"
    assert bearer_token(["Bearer"]) == ""
    for values, reason in (([], "TOKEN_MISSING"), (["Basic x"], "TOKEN_MISSING"), (["Bearer x"] * 2, "TOKEN_INVALID")):
        assert reason_of(lambda: bearer_token(values)) == reason  # noqa: B023
