"""The rotation of refresh tokens: one successor per token, a window for retries, and the detection of theft.

It tests what a client can observe of it. A token whose answer was lost is in `test_lost_answers`. What a logout ends is in `test_journey`, forged refresh tokens are in
`test_forgeries`.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from support.expect import expect_unauthenticated
from support.wait import wait_until


def expect_dead(client, tokens) -> None:
    """Asserts that neither token of the pair is accepted."""
    expect_unauthenticated(lambda: client.refresh(tokens.refresh_token), "REFRESH_TOKEN_INVALID")
    expect_unauthenticated(lambda: client.me(tokens.access_token), "SESSION_REVOKED")


def test_a_retry_within_the_window_mints_the_same_child_byte_for_byte(client):
    _, parent = client.newcomer()

    child = client.refresh(parent.refresh_token)
    again = client.refresh(parent.refresh_token)

    assert again.refresh_token == child.refresh_token
    assert again.refresh_token_expire_time == child.refresh_token_expire_time
    assert client.me(again.access_token) == client.me(child.access_token)
    assert client.refresh(child.refresh_token).refresh_token != child.refresh_token, "the child can be refreshed"


def test_a_retry_is_the_same_child_after_a_restart_too(engine, start_server):
    server = start_server(engine, refresh_retry_window="60s")
    _, parent = server.client.newcomer()
    child = server.client.refresh(parent.refresh_token)

    server.restart()

    assert server.client.refresh(parent.refresh_token).refresh_token == child.refresh_token


def test_every_refresh_yields_a_token_never_seen_before(client):
    _, tokens = client.newcomer()
    seen = [tokens.refresh_token]
    for _ in range(5):
        seen.append(client.refresh(seen[-1]).refresh_token)
    assert len(set(seen)) == 6


def test_an_older_generation_is_theft_and_kills_the_session_for_everyone(client):
    person, first = client.newcomer()
    other_session = client.login(person)
    second = client.refresh(first.refresh_token)
    third = client.refresh(second.refresh_token)

    expect_unauthenticated(lambda: client.refresh(first.refresh_token), "REFRESH_TOKEN_INVALID")

    for tokens in (third, second, first):
        expect_dead(client, tokens)
    assert client.refresh(other_session.refresh_token), "only the stolen session ends"
    assert client.me(other_session.access_token)


def test_three_quick_rotations_and_then_the_first_token_are_theft(client):
    # All of this usually happens within one second, so comparing the `iat` of tokens would not detect the theft.
    _, first = client.newcomer()
    tokens = first
    for _ in range(3):
        tokens = client.refresh(tokens.refresh_token)

    expect_unauthenticated(lambda: client.refresh(first.refresh_token), "REFRESH_TOKEN_INVALID")

    expect_dead(client, tokens)


def test_with_a_zero_retry_window_a_second_use_is_theft(engine, start_server):
    server = start_server(engine, refresh_retry_window="0s")
    _, parent = server.client.newcomer()
    child = server.client.refresh(parent.refresh_token)

    expect_unauthenticated(lambda: server.client.refresh(parent.refresh_token), "REFRESH_TOKEN_INVALID")

    expect_dead(server.client, child)


def test_after_the_retry_window_a_second_use_is_theft(engine, start_server):
    server = start_server(engine, refresh_retry_window="1s", refresh_lost_answer_window="0s")
    _, parent = server.client.newcomer()
    child = server.client.refresh(parent.refresh_token)

    # Retries change nothing, so repeated calls do not extend the window.
    wait_until(
        "the window closes",
        lambda: expect_unauthenticated(lambda: server.client.refresh(parent.refresh_token), "REFRESH_TOKEN_INVALID"),
        pause=0.2,
    )

    expect_dead(server.client, child)


def test_a_refresh_token_past_its_lifetime_is_invalid(engine, start_server):
    # The retry window is long, so that only the lifetime ends the token.
    server = start_server(engine, access_token_ttl="1s", refresh_token_ttl="1s", refresh_retry_window="60s")
    person, unused = server.client.newcomer()
    polled = server.client.login(person)

    # The first poll rotates the token. The later ones are retries, until the token itself has expired.
    wait_until(
        "the refresh token expires",
        lambda: expect_unauthenticated(lambda: server.client.refresh(polled.refresh_token), "REFRESH_TOKEN_INVALID"),
        pause=0.2,
    )

    expect_unauthenticated(lambda: server.client.refresh(unused.refresh_token), "REFRESH_TOKEN_INVALID")
    assert server.client.login(person), "the account is not affected"


def test_concurrent_refreshes_of_one_token_yield_one_child(server):
    _, parent = server.client.newcomer()

    with ThreadPoolExecutor(16) as pool:
        children = list(pool.map(lambda _: server.client.refresh(parent.refresh_token), range(16)))

    assert len({child.refresh_token for child in children}) == 1
    assert server.client.refresh(children[0].refresh_token)


@pytest.mark.parametrize("engine", ["postgres"], indirect=True)
def test_64_concurrent_refreshes_over_3_replicas_yield_one_child(engine, start_server):
    # The longest retry window, so that a late call on a slow machine does not count as theft.
    replicas = [start_server(engine, refresh_retry_window="60s") for _ in range(3)]
    _, parent = replicas[0].client.newcomer()
    clients = [replica.client for replica in replicas]

    with ThreadPoolExecutor(64) as pool:
        children = list(pool.map(lambda number: clients[number % 3].refresh(parent.refresh_token), range(64)))

    assert len(children) == 64
    assert len({child.refresh_token for child in children}) == 1
    for client in clients:
        assert client.me(children[0].access_token)
    grandchildren = {client.refresh(children[0].refresh_token).refresh_token for client in clients}
    assert len(grandchildren) == 1
    [(sessions,)] = engine.query("SELECT count(*) FROM sessions")
    assert sessions == 1
