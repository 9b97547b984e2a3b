import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from postern.auth.v1.token_service_pb2 import WatchRevocationsResponse
from support import FakePostern, Stage, a_caller, eventually, reason_of
from test_revocations import ended, heartbeat

from postern_client import PosternError, RevocationFeed, TokenSource, Verifier, open_channel


def at(cursor: str, message: WatchRevocationsResponse) -> WatchRevocationsResponse:
    message.cursor = cursor
    return message


def beat(cursor: str) -> WatchRevocationsResponse:
    return at(cursor, heartbeat(time.time()))


def error(code: grpc.StatusCode, reason: str = "", retry_delay: float | None = None) -> PosternError:
    return PosternError(code, reason, "as the test wants it", retry_delay=retry_delay)


@pytest.fixture
def follow(fake: FakePostern, channel: grpc.Channel) -> Iterator[Callable[..., RevocationFeed]]:
    feeds = []

    def start(**options: float) -> RevocationFeed:
        source = TokenSource.from_service_account(channel, "id", "secret")
        feeds.append(RevocationFeed(channel, source, when_unknown="refuse", **options))
        return feeds[-1]

    yield start
    for feed in feeds:
        feed.close()


Follow = Callable[..., RevocationFeed]


def test_it_is_complete_after_the_first_heartbeat(fake: FakePostern, follow: Follow) -> None:
    fake.streams = [[at("1", ended("s1", time.time() + 60)), 0.3, beat("2"), 60.0]]
    feed = follow()
    with pytest.raises(TimeoutError, match="not complete"):
        feed.wait_until_complete(0.05)
    with pytest.raises(TimeoutError, match="not complete"):
        asyncio.run(feed.wait_until_complete_async(0.05))
    assert not feed.status().is_complete
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(feed.wait_until_complete, 10)
        asyncio.run(feed.wait_until_complete_async(10))
        waiting.result()
    status = feed.status()
    assert (status.is_complete, status.entries, status.last_error) == (True, 1, None)
    assert reason_of(lambda: feed.state.check(a_caller())) == "SESSION_REVOKED"
    assert fake.tokens == ["Bearer access-1"]


def test_after_unavailable_it_resumes_with_the_last_cursor_when_it_is_told(fake: FakePostern, follow: Follow) -> None:
    fake.streams = [
        [beat("1"), beat("2"), error(grpc.StatusCode.UNAVAILABLE, retry_delay=0.2)],
        [error(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", retry_delay=0.2)],
        [beat("3"), 60.0],
    ]
    began = time.monotonic()
    feed = follow()
    eventually(lambda: fake.cursors == ["", "2", "2"])
    assert 0.4 <= time.monotonic() - began < 2
    eventually(lambda: feed.status().last_error is None)


def test_after_unavailable_without_a_delay_it_waits_a_second(fake: FakePostern, follow: Follow) -> None:
    fake.streams = [[beat("1"), error(grpc.StatusCode.UNAVAILABLE)], [beat("2"), 60.0]]
    began = time.monotonic()
    feed = follow()
    eventually(lambda: fake.cursors == ["", "1"])
    assert 1 <= time.monotonic() - began < 3
    assert feed.status().is_complete


def test_after_its_token_has_expired_it_resumes_at_once_with_another(fake: FakePostern, follow: Follow) -> None:
    expired = error(grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED")
    fake.streams = [[beat("1"), expired], [beat("2"), expired], [beat("3"), 60.0]]
    began = time.monotonic()
    follow()
    eventually(lambda: fake.cursors == ["", "1", "2"])
    assert time.monotonic() - began < 1
    assert fake.tokens == ["Bearer access-1", "Bearer access-2", "Bearer access-3"]


def test_a_token_that_never_began_a_stream_does_not_cause_a_flood(fake: FakePostern, follow: Follow) -> None:
    fake.streams = [[error(grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED")] for _ in range(9)]
    follow()
    time.sleep(1.5)
    assert len(fake.cursors) <= 2


def test_after_an_expired_cursor_it_begins_without_one_and_keeps_what_it_knows(
    fake: FakePostern, follow: Follow
) -> None:
    fake.streams = [
        [at("1", ended("s1", time.time() + 60)), beat("2"), error(grpc.StatusCode.OUT_OF_RANGE, "CURSOR_EXPIRED")],
        [beat("3"), 60.0],
    ]
    feed = follow()
    eventually(lambda: fake.cursors == ["", ""])
    assert reason_of(lambda: feed.state.check(a_caller())) == "SESSION_REVOKED"


def test_when_its_account_is_gone_it_keeps_trying_slowly(fake: FakePostern, follow: Follow) -> None:
    fake.streams = [[beat("1"), error(grpc.StatusCode.UNAUTHENTICATED, "SESSION_REVOKED")]]
    fake.fail = []
    feed = follow()
    feed.wait_until_complete(10)
    fake.fail = [error(grpc.StatusCode.UNAUTHENTICATED, "INVALID_CLIENT") for _ in range(9)]
    eventually(lambda: str(feed.status().last_error).startswith("UNAUTHENTICATED (INVALID_CLIENT)"))
    time.sleep(1)
    assert len(fake.calls) <= 3


def test_a_silent_stream_is_ended_and_resumed(fake: FakePostern, follow: Follow) -> None:
    fake.streams = [[beat("1"), 60.0], [beat("2"), 60.0]]
    follow(max_silence=0.5)
    eventually(lambda: fake.cursors == ["", "1"])


def test_a_stream_that_never_says_anything_is_ended_too(fake: FakePostern, follow: Follow) -> None:
    fake.streams = [[60.0], [beat("1"), 60.0]]
    follow(max_silence=0.5).wait_until_complete(10)
    assert fake.cursors == ["", ""]


def test_close_ends_the_stream(fake: FakePostern, channel: grpc.Channel) -> None:
    fake.streams = [[beat("1"), 60.0]]
    source = TokenSource.from_service_account(channel, "id", "secret")
    with RevocationFeed(channel, source, when_unknown="accept") as feed:
        feed.wait_until_complete(10)
        threads = list(feed._threads)
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert len(fake.cursors) == 1


def test_close_ends_the_waiting_of_others(fake: FakePostern, follow: Follow) -> None:
    feed = follow()
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(feed.wait_until_complete)
        time.sleep(0.2)
        feed.close()
        with pytest.raises(TimeoutError, match="not complete"):
            waiting.result(5)


def real_verifier(stage: Stage, feed: RevocationFeed) -> Verifier:
    return Verifier(stage.issuer, stage.audience, revocations=feed.state)


def test_a_person_who_logs_out_of_the_real_server_is_refused_within_a_second(stage: Stage) -> None:
    with open_channel(stage.grpc_addr, None) as channel:
        source = TokenSource.from_service_account(channel, stage.client_id, stage.client_secret)
        with RevocationFeed(channel, source, when_unknown="refuse") as feed:
            feed.wait_until_complete(10)
            verifier, account, other = real_verifier(stage, feed), stage.account(), stage.account()
            assert verifier.verify(account["accessToken"]).subject == account["id"]
            stage.log_out(account)
            eventually(lambda: is_revoked(verifier, account["accessToken"]), 1)
            assert verifier.verify(other["accessToken"])
            stage.post(f"/disable?id={other['id']}")
            eventually(lambda: is_revoked(verifier, other["accessToken"]), 1)


def is_revoked(verifier: Verifier, token: str) -> bool:
    try:
        verifier.verify(token)
    except PosternError as refusal:
        return refusal.reason == "SESSION_REVOKED"
    return False


def test_the_choice_counts_while_the_real_feed_is_cut_and_nothing_is_missed(stage: Stage) -> None:
    with open_channel(stage.feed_addr, None) as channel, open_channel(stage.grpc_addr, None) as direct:
        source = TokenSource.from_service_account(direct, stage.client_id, stage.client_secret)
        refusing = RevocationFeed(channel, source, when_unknown="refuse", max_staleness=6)
        accepting = RevocationFeed(channel, source, when_unknown="accept", max_staleness=6)
        with refusing, accepting:
            for feed in (refusing, accepting):
                feed.wait_until_complete(10)
            refuses, accepts = real_verifier(stage, refusing), real_verifier(stage, accepting)
            token = stage.account()["accessToken"]
            assert refuses.verify(token) == accepts.verify(token)
            try:
                stage.post("/feed/cut")
                eventually(lambda: not refusing.status().is_complete, 10)
                eventually(lambda: not accepting.status().is_complete, 10)
                assert reason_of(lambda: refuses.verify(token)) == "STORE_UNAVAILABLE"
                assert accepts.verify(token)
                gone = stage.account()
                stage.log_out(gone)
                assert accepts.verify(gone["accessToken"])
            finally:
                stage.post("/feed/restore")
            eventually(lambda: refusing.status().is_complete and accepting.status().is_complete, 12)
            for verifier in (refuses, accepts):
                assert verifier.verify(token)
                assert reason_of(lambda: verifier.verify(gone["accessToken"])) == "SESSION_REVOKED"  # noqa: B023
