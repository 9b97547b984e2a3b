import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from postern.auth.v1.auth_service_pb2 import GetMeRequest
from postern.auth.v1.auth_service_pb2_grpc import AuthServiceStub
from support import FakePostern, Stage, eventually

from postern_client import (
    BearerInterceptor,
    MemoryStore,
    PosternError,
    TokenSource,
    bearer_interceptors,
    open_channel,
)

UNAVAILABLE = PosternError(grpc.StatusCode.UNAVAILABLE, "", "lost")
LATE = PosternError(grpc.StatusCode.DEADLINE_EXCEEDED, "", "lost")


class LaterClock:
    """The machine's clock, and so many seconds later."""

    def __init__(self) -> None:
        self.later = 0.0

    def __call__(self) -> float:
        return time.time() + self.later


def test_one_call_serves_all_who_wait(fake: FakePostern, channel: grpc.Channel) -> None:
    fake.slow = 0.3
    source = TokenSource.from_service_account(channel, "id", "secret")

    async def many() -> list[str]:
        return await asyncio.gather(*(source.token_async() for _ in range(200)))

    with ThreadPoolExecutor(51) as threads:
        coroutines = threads.submit(asyncio.run, many())
        tokens = [threads.submit(source.token) for _ in range(50)]
        assert {token.result() for token in tokens} | set(coroutines.result()) == {"access-1"}
    assert source.token() == "access-1"
    assert fake.calls == ["IssueServiceToken"]


def test_a_caller_who_gives_up_does_not_cancel_the_renewal(fake: FakePostern, channel: grpc.Channel) -> None:
    fake.slow = 0.3
    source = TokenSource.from_service_account(channel, "id", "secret")

    async def impatient() -> str:
        waiting = asyncio.create_task(source.token_async())
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(source.token_async(), 0.05)
        return await waiting

    assert asyncio.run(impatient()) == "access-1"
    assert fake.calls == ["IssueServiceToken"]


@pytest.mark.parametrize(("lifetime", "early"), [(900.0, 60.0), (250.0, 50.0)])
def test_it_is_renewed_ahead_of_time_and_nobody_waits(
    fake: FakePostern, channel: grpc.Channel, lifetime: float, early: float
) -> None:
    clock, fake.lifetime = LaterClock(), lifetime
    source = TokenSource.from_service_account(channel, "id", "secret", clock=clock)
    assert source.token() == "access-1"
    clock.later = lifetime - early - 2
    assert source.token() == "access-1"
    time.sleep(0.2)
    assert len(fake.calls) == 1
    clock.later, fake.slow = lifetime - early + 1, 0.3
    began = time.monotonic()
    assert [source.token() for _ in range(100)] == ["access-1"] * 100
    assert time.monotonic() - began < 0.2
    eventually(lambda: source.token() == "access-2")
    assert len(fake.calls) == 2


def test_an_expired_token_is_not_handed_out(fake: FakePostern, channel: grpc.Channel) -> None:
    clock = LaterClock()
    source = TokenSource.from_service_account(channel, "id", "secret", clock=clock)
    source.token()
    clock.later = 901
    assert source.token() == "access-2"


def test_while_the_old_token_is_valid_a_renewal_that_fails_hands_it_out(
    fake: FakePostern, channel: grpc.Channel
) -> None:
    clock = LaterClock()
    source = TokenSource.from_service_account(channel, "id", "secret", clock=clock, patience=0.5)
    source.token()
    fake.fail = [PosternError(grpc.StatusCode.INTERNAL, "", "a bug")] * 9
    clock.later = 850
    for _ in range(10):
        assert source.token() == "access-1"
    eventually(lambda: len(fake.calls) == 2)
    clock.later = 896  # so little is left that callers wait, until the renewal has failed
    time.sleep(1.6)
    assert source.token() == "access-1"
    eventually(lambda: len(fake.calls) == 3)
    clock.later = 901
    with pytest.raises(PosternError, match="a bug"):
        source.token()
    assert len(fake.calls) == 3, "there is a pause after a failure"


def test_a_lost_answer_is_asked_for_again_with_the_same_refresh_token(fake: FakePostern, channel: grpc.Channel) -> None:
    clock, store = LaterClock(), MemoryStore()
    source = TokenSource.from_password(channel, "ada@example.com", "secret", store=store, clock=clock)
    source.token()
    assert store.load() == "refresh-1-0"
    fake.lose = [UNAVAILABLE, LATE, UNAVAILABLE]
    clock.later = 901
    source.token()
    assert fake.calls == ["Login", *["Refresh refresh-1-0"] * 4]
    assert store.load() == "refresh-1-1"
    assert not fake.revoked


def test_answers_that_stay_lost_are_no_logout(fake: FakePostern, channel: grpc.Channel) -> None:
    fake.current = "refresh-7-0"
    source = TokenSource.from_refresh_token(channel, "refresh-7-0", patience=0.3)
    fake.lose = [UNAVAILABLE] * 9
    with pytest.raises(PosternError) as failed:
        source.token()
    assert failed.value.code is grpc.StatusCode.UNAVAILABLE
    fake.lose = []
    eventually(lambda: succeeds(source))
    assert set(fake.calls) == {"Refresh refresh-7-0"}
    assert not fake.revoked


def test_answers_that_stay_lost_do_not_open_another_session(fake: FakePostern, channel: grpc.Channel) -> None:
    clock = LaterClock()
    source = TokenSource.from_password(channel, "ada@example.com", "secret", clock=clock, patience=0.3)
    source.token()
    fake.lose, clock.later = [UNAVAILABLE] * 9, 901
    with pytest.raises(PosternError, match="lost"):
        source.token()
    assert set(fake.calls) == {"Login", "Refresh refresh-1-0"}
    assert fake.calls.count("Login") == 1


def test_whoever_waits_is_handed_the_old_token_before_it_expires(fake: FakePostern, channel: grpc.Channel) -> None:
    clock = LaterClock()
    source = TokenSource.from_service_account(channel, "id", "secret", clock=clock)
    source.token()
    fake.fail, clock.later = [UNAVAILABLE] * 99, 898
    assert source.token() == "access-1"
    assert len(fake.calls) > 2


def test_a_renewal_that_has_just_ended_is_not_begun_again(
    fake: FakePostern, channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TokenSource.from_service_account(channel, "id", "secret")
    begin = source._flight.run

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.undo()
        source.token()
        return begin(*arguments)

    monkeypatch.setattr(source._flight, "run", overtaken)
    assert source.token() == "access-1"
    assert fake.calls == ["IssueServiceToken"]


def succeeds(source: TokenSource) -> bool:
    try:
        source.token()
    except PosternError:
        return False
    return True


def test_a_delay_that_the_server_tells_is_kept(fake: FakePostern, channel: grpc.Channel) -> None:
    fake.fail = [PosternError(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", "later", retry_delay=0.7)]
    source, began = TokenSource.from_service_account(channel, "id", "secret"), time.monotonic()
    source.token()
    assert 0.7 <= time.monotonic() - began < 2


def test_a_session_that_has_ended_is_told(fake: FakePostern, channel: grpc.Channel) -> None:
    source = TokenSource.from_refresh_token(channel, "refresh-of-yesterday")
    for _ in range(3):
        with pytest.raises(PosternError) as refused:
            source.token()
        assert refused.value.reason == "REFRESH_TOKEN_INVALID"
    assert len(fake.calls) == 1, "there is a pause after a failure"
    with pytest.raises(PosternError) as refused:
        TokenSource.from_refresh_token(channel, MemoryStore()).token()
    assert refused.value.reason == "REFRESH_TOKEN_INVALID"


def test_with_a_password_it_logs_in_again(fake: FakePostern, channel: grpc.Channel) -> None:
    clock = LaterClock()
    source = TokenSource.from_password(channel, "ada@example.com", "secret", clock=clock)
    source.token()
    fake.revoked = True
    clock.later = 901
    source.token()
    assert fake.calls == ["Login", "Refresh refresh-1-0", "Login"]


class FileStore:
    """The refresh token in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.broken = path, False

    def load(self) -> str | None:
        return self.path.read_text() if self.path.exists() else None

    def save(self, refresh_token: str) -> None:
        if self.broken:
            raise OSError("the disk is full")
        self.path.write_text(refresh_token)


def test_the_new_refresh_token_is_stored_before_the_access_token_is_handed_out(
    fake: FakePostern, channel: grpc.Channel, tmp_path: Path
) -> None:
    store = FileStore(tmp_path / "token")
    TokenSource.from_password(channel, "ada@example.com", "secret", store=store).token()
    # The next process goes on with the session.
    source = TokenSource.from_password(channel, "ada@example.com", "secret", store=store)
    store.broken = True
    with pytest.raises(OSError, match="full"):
        source.token()
    store.broken = False
    eventually(lambda: succeeds_with_store(source))
    assert set(fake.calls) == {"Login", "Refresh refresh-1-0"}
    assert (store.load(), fake.revoked) == ("refresh-1-1", False)


def succeeds_with_store(source: TokenSource) -> bool:
    try:
        return bool(source.token())
    except OSError:
        return False


def test_a_token_that_was_refused_is_not_handed_out_again(fake: FakePostern, channel: grpc.Channel) -> None:
    source = TokenSource.from_service_account(channel, "id", "secret")
    token = source.token()
    source.discard("another")
    assert source.token() == token
    source.discard(token)
    assert source.token() == "access-2"


def test_neither_tokens_nor_secrets_are_printed(fake: FakePostern, channel: grpc.Channel) -> None:
    source = TokenSource.from_service_account(channel, "id", "secret")
    token = source.token()
    assert source._held is not None
    for printed in (repr(source), repr(source._held), str(source.__dict__)):
        assert token not in printed
        assert "secret" not in printed


def test_a_source_that_asks_itself_fails_rather_than_hangs(channel: grpc.Channel) -> None:
    sources: list[TokenSource] = []

    class Itself(BearerInterceptor):
        def __init__(self) -> None: ...

        @property
        def _source(self) -> TokenSource:  # type: ignore[override]
            return sources[0]

    sources.append(TokenSource.from_service_account(grpc.intercept_channel(channel, Itself()), "id", "secret"))
    with pytest.raises(RuntimeError, match="wait for itself"):
        sources[0].token()


class LosesAnswers(grpc.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """Drops answers after the server has carried the call out."""

    def __init__(self) -> None:
        self.lose = 0
        self.requests: list[Any] = []

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        self.requests.append(request)
        answer = continuation(client_call_details, request)
        if self.lose:
            self.lose -= 1
            answer.result()
            return Lost()
        return answer


class Lost(grpc.RpcError):
    def result(self) -> None:
        raise self

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE


def test_after_lost_answers_the_person_is_still_logged_in_at_the_real_server(stage: Stage) -> None:
    account, clock, loses = stage.account(), LaterClock(), LosesAnswers()
    with open_channel(stage.grpc_addr, None) as plain:
        channel = grpc.intercept_channel(plain, loses)
        source = TokenSource.from_refresh_token(channel, account["refreshToken"], clock=clock)
        for _ in range(2):
            loses.lose, loses.requests = 2, []
            token = source.token()
            assert len({request.refresh_token for request in loses.requests}) == 1
            assert len(loses.requests) == 3
            assert name_of(plain, token) == account["username"]
            clock.later += 1000
        assert name_of(plain, source.token()) == account["username"]


def name_of(channel: grpc.Channel, token: str) -> str:
    metadata = (("authorization", f"Bearer {token}"),)
    return AuthServiceStub(channel).GetMe(GetMeRequest(), metadata=metadata).user.username


def test_a_person_who_was_logged_out_of_the_real_server_logs_in_again(stage: Stage) -> None:
    account, clock, store = stage.account(), LaterClock(), MemoryStore()
    with open_channel(stage.grpc_addr, None) as channel:
        source = TokenSource.from_password(channel, account["email"], account["password"], store=store, clock=clock)
        source.token()
        stage.post("/logout", {"refreshToken": store.load()})
        clock.later = 1000
        assert name_of(channel, source.token()) == account["username"]


def test_both_interceptors_put_the_token_into_calls_to_the_real_server(stage: Stage) -> None:
    account = stage.account()
    with open_channel(stage.grpc_addr, None) as plain:
        source = TokenSource.from_refresh_token(plain, account["refreshToken"])
        stub = AuthServiceStub(grpc.intercept_channel(plain, BearerInterceptor(source)))
        assert stub.GetMe(GetMeRequest()).user.id == account["id"]
        with pytest.raises(grpc.RpcError) as refused:
            stub.GetMe(GetMeRequest(), metadata=(("authorization", "Bearer x"),))
        assert PosternError.from_rpc(refused.value).reason == "TOKEN_INVALID"

        async def by_asyncio() -> str:
            async with grpc.aio.insecure_channel(stage.grpc_addr, interceptors=bearer_interceptors(source)) as channel:
                stub = AuthServiceStub(channel)
                user_id = (await stub.GetMe(GetMeRequest())).user.id
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.GetMe(GetMeRequest(), metadata=(("authorization", "Bearer x"),))
                assert PosternError.from_rpc(refused.value).reason == "TOKEN_INVALID"
                return user_id

        assert asyncio.run(by_asyncio()) == account["id"]


def self_signed() -> tuple[bytes, bytes]:
    """A private key and a certificate for `localhost`, as PEM."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem, certificate.public_bytes(Encoding.PEM)


def test_call_credentials_work_on_tls_and_do_not_block(fake: FakePostern, channel: grpc.Channel) -> None:
    fake.slow = 0.2
    source = TokenSource.from_service_account(channel, "id", "secret")
    seen: list[str] = []

    def echo(request: bytes, context: grpc.ServicerContext) -> bytes:
        seen.append(str(dict(context.invocation_metadata())["authorization"]))
        return request

    key, certificate = self_signed()
    server = grpc.server(ThreadPoolExecutor(4))
    handler = grpc.method_handlers_generic_handler("test.Echo", {"Say": grpc.unary_unary_rpc_method_handler(echo)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(certificate), source.call_credentials()
    )
    try:
        with open_channel(f"localhost:{port}", credentials) as secure:
            say = secure.unary_unary("/test.Echo/Say", None, None)
            assert [say(b"x", timeout=10) for _ in range(3)] == [b"x"] * 3
            source.discard(source.token())
            fake.fail = [PosternError(grpc.StatusCode.UNAUTHENTICATED, "INVALID_CLIENT", "no")]
            with pytest.raises(grpc.RpcError) as refused:
                say(b"x", timeout=10)
            assert "INVALID_CLIENT" in str(refused.value)

        async def by_asyncio() -> bytes:
            async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as secure:
                return bytes(await secure.unary_unary("/test.Echo/Say", None, None)(b"y", timeout=10))

        time.sleep(1.6)
        assert asyncio.run(by_asyncio()) == b"y"
    finally:
        server.stop(0).wait()
    assert seen == ["Bearer access-1"] * 3 + ["Bearer access-3"]
