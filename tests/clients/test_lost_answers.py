"""A lost answer never logs anybody out: a used refresh token yields its successor again until that was seen in use.

Time passes by making the last rotation older in the database, whose clock decides. What a race and an old token do is in
`test_refresh`.
"""

import random
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from support import jose, metrics
from support.expect import expect_unauthenticated
from support.http import Rest
from support.wait import wait_until
from test_refresh import expect_dead

SECOND, HOUR = timedelta(seconds=1), timedelta(hours=1)


def session_of(tokens) -> uuid.UUID:
    return uuid.UUID(jose.claims_of(tokens.access_token)["sid"])


def let_pass(engine, tokens, passed: timedelta) -> None:
    """Makes the last rotation of a session older."""
    id = engine.as_id(session_of(tokens))
    [(then,)] = engine.query("SELECT last_refresh_time FROM sessions WHERE id = ?", id)
    earlier = engine.as_time(engine.to_time(then) - passed)
    assert engine.execute("UPDATE sessions SET last_refresh_time = ? WHERE id = ?", earlier, id) == 1


def seen_generation(engine, tokens) -> int:
    [(generation,)] = engine.query(
        "SELECT seen_generation FROM sessions WHERE id = ?", engine.as_id(session_of(tokens))
    )
    return generation


def expect_same(tokens, child) -> None:
    assert tokens.refresh_token == child.refresh_token, "byte for byte"
    assert tokens.refresh_token_expire_time == child.refresh_token_expire_time


def expect_theft(client, presented, child) -> None:
    """Asserts that a refresh with this token is refused, and that it ends the session."""
    expect_unauthenticated(lambda: client.refresh(presented.refresh_token), "REFRESH_TOKEN_INVALID")
    expect_dead(client, child)


def used_once(client):
    """The pair of tokens of a new session that was refreshed, and whose access token has come back."""
    _, parent = client.newcomer()
    child = client.refresh(parent.refresh_token)
    assert client.me(child.access_token)
    return child


@pytest.fixture
def family(server):
    """A session that was refreshed once: its used refresh token, and the pair that replaced it."""
    _, parent = server.client.newcomer()
    return parent, server.client.refresh(parent.refresh_token)


@pytest.mark.parametrize("passed", [12 * SECOND, HOUR, 23 * HOUR], ids=["12 s", "1 h", "23 h"])
def test_an_answer_that_nobody_has_used_is_given_again(server, family, passed):
    parent, child = family
    let_pass(server.engine, child, passed)

    for _ in range(3):
        expect_same(server.client.refresh(parent.refresh_token), child)

    id = server.engine.as_id(session_of(child))
    assert server.engine.query("SELECT generation FROM sessions WHERE id = ?", id) == [(1,)], "one live generation"
    grandchild = server.client.refresh(child.refresh_token)
    assert server.client.me(grandchild.access_token)
    expect_theft(server.client, parent, grandchild)


def test_an_answer_is_not_given_again_after_a_day(server, family):
    parent, child = family
    let_pass(server.engine, child, 24 * HOUR + SECOND)
    expect_theft(server.client, parent, child)


def test_a_phone_that_wakes_up_after_23_hours_goes_on(embedded, start_with_clock):
    # Here the clock of the machine really moves. With SQLite it is the clock that decides.
    server = start_with_clock(embedded, "+0")
    _, parent = server.client.newcomer()
    child = server.client.refresh(parent.refresh_token)
    server.set_clock("+23h")
    expect_same(server.client.refresh(parent.refresh_token), child)
    server.set_clock("+25h")
    expect_unauthenticated(lambda: server.client.refresh(parent.refresh_token), "REFRESH_TOKEN_INVALID")


def test_an_answer_whose_access_token_came_back_is_given_again_in_a_race_only(server, family):
    parent, child = family
    assert server.client.me(child.access_token)
    expect_same(server.client.refresh(parent.refresh_token), child)

    let_pass(server.engine, child, 11 * SECOND)

    expect_theft(server.client, parent, child)


def test_the_access_token_of_a_repeated_answer_counts_too(server, family):
    parent, child = family
    let_pass(server.engine, child, HOUR)
    again = server.client.refresh(parent.refresh_token)
    assert again.access_token != child.access_token
    assert server.client.me(again.access_token)
    expect_theft(server.client, parent, child)


@pytest.mark.parametrize("path", ["/v1/me", "/v1/me/sessions"])
def test_any_call_with_the_access_token_counts(server, family, path):
    parent, child = family
    answer = Rest(server).get(path, token=child.access_token)
    assert answer.status == 200, answer
    let_pass(server.engine, child, 11 * SECOND)
    expect_theft(server.client, parent, child)


def test_a_use_of_an_older_access_token_does_not_count(server, family):
    first, parent = family
    child = server.client.refresh(parent.refresh_token)
    for tokens in (first, parent):
        assert server.client.me(tokens.access_token)
    let_pass(server.engine, child, HOUR)
    expect_same(server.client.refresh(parent.refresh_token), child)


def test_without_a_window_for_lost_answers_a_retry_is_theft_after_the_retry_window(engine, start_server):
    client = start_server(engine, refresh_lost_answer_window="0s").client
    _, parent = client.newcomer()
    child = client.refresh(parent.refresh_token)
    expect_same(client.refresh(parent.refresh_token), child)
    let_pass(engine, child, 11 * SECOND)
    expect_theft(client, parent, child)


def test_without_a_retry_window_a_lost_answer_is_given_again_if_that_is_set(engine, start_server):
    client = start_server(engine, refresh_retry_window="0s", refresh_lost_answer_window="1h").client
    _, parent = client.newcomer()
    child = client.refresh(parent.refresh_token)
    expect_same(client.refresh(parent.refresh_token), child)
    assert client.me(child.access_token)
    expect_theft(client, parent, child)


@pytest.mark.parametrize("engine", ["postgres"], indirect=True)
def test_every_replica_knows_within_two_seconds_what_one_has_seen(engine, start_server):
    replicas = [start_server(engine).client for _ in range(3)]
    _, parent = replicas[0].newcomer()
    child = replicas[1].refresh(parent.refresh_token)
    let_pass(engine, child, HOUR)
    expect_same(replicas[2].refresh(parent.refresh_token), child)

    assert replicas[0].me(child.access_token)
    seen_at = time.monotonic()
    wait_until("the generation is written", lambda: seen_generation(engine, child) == 1, pause=0.05)
    assert time.monotonic() - seen_at < 2 + 3, "two seconds are promised; a busy machine may need some more"

    expect_theft(replicas[2], parent, child)


def test_a_thief_and_an_owner_in_turn_are_noticed_within_one_generation(engine, start_server):
    replicas = [start_server(engine).client for _ in range(2 if engine.name == "postgres" else 1)]
    owner, thief = replicas[0], replicas[-1]
    _, stolen = owner.newcomer()
    mine = owner.refresh(stolen.refresh_token)
    assert owner.me(mine.access_token)
    wait_until("the generation is written", lambda: seen_generation(engine, mine) == 1)
    let_pass(engine, mine, 11 * SECOND)
    expect_theft(thief, stolen, mine)


def test_a_clean_stop_writes_what_was_seen(engine, start_server):
    server = start_server(engine)
    child = used_once(server.client)
    server.restart()
    assert seen_generation(engine, child) == 1


def test_a_server_that_is_killed_ends_no_session(engine, start_server):
    server = start_server(engine)
    child = used_once(server.client)
    server.kill()
    server.start()
    # It has forgotten at most a second of what it saw, in favour of the owner.
    assert server.client.refresh(child.refresh_token)


def test_what_was_seen_is_written_once(engine, start_server):
    server = start_server(engine)
    _, parent = server.client.newcomer()
    child = server.client.refresh(parent.refresh_token)

    def written() -> float:
        text = Rest(server, "ops_addr").get("/metrics").body.decode()
        return metrics.read(text).value("postern_seen_generations_total", outcome="written")

    for _ in range(50):
        server.client.me(child.access_token)
    wait_until("the generation is written", lambda: seen_generation(engine, child) == 1)
    for _ in range(50):
        server.client.me(child.access_token)
    time.sleep(1.5)
    assert written() == 1


class Phone:
    """A client that obeys the contract: it keeps a refresh token before it uses the access token beside it."""

    def __init__(self, number: int, client):
        self.chance = random.Random(number)
        self.person, self.kept = client.newcomer()
        self.rotations, self.lost = 0, 0

    def refresh(self, client, ledger: Counter) -> None:
        """Refreshes once. One of five answers is lost, but not a third one in a row, which would be 24 hours later."""
        answer = client.refresh(self.kept.refresh_token)
        if self.chance.random() < 0.2 and self.lost < 2:
            self.lost += 1
            ledger["lost"] += 1
            return
        self.lost = 0
        ledger["received"] += 1
        if self.chance.random() < 0.5:
            ledger["used"] += 1
            client.me(answer.access_token)
        self.rotations += 1
        self.kept = answer


@pytest.mark.timeout(900)
def test_no_lost_answer_loses_a_session_and_none_forks(engine, start_server, size):
    """Between two refreshes of a client, up to 12 hours pass: whether an answer was lost or not."""
    phones, rounds = size(60, 10_000), 5
    server = start_server(engine, login_limit_per_client=1_000_000, sign_up_limit_per_client=1_000_000)
    clients = [server.new_client() for _ in range(4)]
    ledger = Counter()
    earlier = {
        "sqlite": "UPDATE sessions SET last_refresh_time = last_refresh_time - abs(random() % 43200) * 1000000",
        "postgres": "UPDATE sessions SET last_refresh_time = last_refresh_time - random() * interval '12 hours'",
    }[engine.name]
    with ThreadPoolExecutor(len(clients)) as pool:
        people = list(pool.map(lambda number: Phone(number, clients[number % 4]), range(phones)))
        for _ in range(rounds):
            list(pool.map(lambda phone: phone.refresh(clients[phone.chance.randrange(4)], ledger), people))
            assert engine.execute(earlier) == phones
    for phone in people:
        let_pass(engine, phone.kept, timedelta())
        assert clients[0].refresh(phone.kept.refresh_token)
    for client in clients:
        client.close()
    print(f"{phones} sessions: {dict(ledger)}")
    assert ledger["lost"] > phones / 2
    assert engine.query("SELECT count(*), count(revoke_time) FROM sessions") == [(phones, 0)], "none ended, none is new"
    # Each generation was given to one client, and is either the one that it has kept or its successor.
    live = dict(engine.query("SELECT id, generation FROM sessions"))
    for phone in people:
        assert live[engine.as_id(session_of(phone.kept))] >= phone.rotations
