"""How many sessions an account may have, and the pages of the list of sessions, by gRPC and by REST.

It tests which sessions end when an account has too many, that logins at the same time stay within the limit, and that
the pages of ListSessions hold each session once. Other properties of the list are in `test_sessions`.
"""

import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from support import jose, load
from support.admin import Somebody, any_way, everything, pages, session_id
from support.client import Person
from support.engine import EPOCH, Engine
from support.transports import ByGrpc
from support.wait import wait_until

FEW, DEFAULT = 3, 100
# How many logins run at the same time. An account may have fewer attempts under way by default.
AT_ONCE = 12
MANY_ATTEMPTS = 1_000
# More sessions than the largest page holds.
CROWD = 230
INVALID = ("INVALID_ARGUMENT", "INVALID_FIELD")
ON_POSTGRES = pytest.mark.parametrize("engine", ["postgres"], indirect=True)
NO_LIMIT = pytest.mark.usefixtures("no_limit")


@pytest.fixture
def no_limit() -> None:
    """For tests in which an account has more sessions than `FEW`."""


@pytest.fixture
def most(request) -> int:
    """How many sessions an account may have. Without a limit, it is more than any test opens or inserts."""
    return 1_000 if "no_limit" in request.fixturenames else FEW


@pytest.fixture
def server(engine, start_server, most):
    return start_server(engine, max_sessions_per_user=most, login_max_failures=MANY_ATTEMPTS)


@pytest.fixture
def someone(way) -> Somebody:
    return Somebody(way)


def listed(way, tokens: dict, **fields) -> list[str]:
    """The ids of the sessions of the caller, over all pages."""
    sessions = everything(way, "ListSessions", tokens["accessToken"], "sessions", **fields)
    return [session["id"] for session in sessions]


def open_sessions(engine: Engine, user_id: str) -> int:
    statement = "SELECT count(*) FROM sessions WHERE user_id = ? AND revoke_time IS NULL"
    return engine.query(statement, engine.as_id(uuid.UUID(user_id)))[0][0]


def ended_for_the_limit(engine: Engine, user_id: str) -> int:
    """How many audit events say that a session of the account was ended because there were too many."""
    statement = "SELECT count(*) FROM audit_events WHERE user_id = ? AND action = 'session_revoked' AND detail = ?"
    return engine.query(statement, engine.as_id(uuid.UUID(user_id)), "too many sessions")[0][0]


def expect_alive(way, tokens: dict) -> dict:
    """Asserts that a session goes on, and returns its tokens after a refresh."""
    assert way.me(tokens)
    return way.refresh(tokens)


# -- which sessions end --------------------------------------------------------------------------------------------


def test_the_sessions_that_were_not_used_for_the_longest_time_end(way, someone):
    first, second, third = someone.tokens, way.login(someone.person), way.login(someone.person)
    # The first session is the oldest, but now it is not the one that was not used for the longest time.
    first = way.refresh(first)
    fourth = way.login(someone.person)
    fifth = way.login(someone.person)

    for tokens in (second, third):
        way.expect_dead(tokens)
    assert listed(way, fifth) == [session_id(tokens) for tokens in (fifth, fourth, first)]
    for tokens in (first, fourth, fifth):
        expect_alive(way, expect_alive(way, tokens))


def test_up_to_the_limit_no_session_ends(way, someone):
    logins = [someone.tokens, *(way.login(someone.person) for _ in range(FEW - 1))]
    for tokens in logins:
        assert len(listed(way, tokens)) == FEW
        expect_alive(way, tokens)


def test_a_limit_of_one_leaves_the_newest_login(engine, start_server):
    server = start_server(engine, max_sessions_per_user=1)
    with any_way("gRPC", server) as way:
        someone = Somebody(way)
        newest = way.login(someone.person)
        way.expect_dead(someone.tokens)
        assert listed(way, newest) == [session_id(newest)]
        expect_alive(way, newest)


def test_sessions_that_are_over_do_not_count(server, way, someone):
    over, expired = way.login(someone.person), way.login(someone.person)
    way.ok("Logout", refresh_token=over["refreshToken"])
    past = server.engine.as_time(datetime.now(UTC) - timedelta(seconds=1))
    row = server.engine.as_id(uuid.UUID(session_id(expired)))
    assert server.engine.execute("UPDATE sessions SET refresh_expire_time = ? WHERE id = ?", past, row) == 1

    newer = [way.login(someone.person) for _ in range(FEW - 1)]

    for tokens in (someone.tokens, *newer):
        expect_alive(way, tokens)
    assert ended_for_the_limit(server.engine, someone.id) == 0


def test_the_sessions_of_other_accounts_do_not_count(way, someone):
    others = [Somebody(way) for _ in range(FEW + 1)]
    for somebody in (someone, *others):
        expect_alive(way, somebody.tokens)


def test_each_session_that_ends_is_one_audit_event(server, way, someone):
    logins = [someone.tokens, *(way.login(someone.person) for _ in range(4))]
    admin = Somebody(way, server.engine, "admin")

    filters = {"user_id": someone.id, "action": "session_revoked"}
    events = everything(way, "ListAuditEvents", admin.credential, "events", **filters)

    assert [event["sessionId"] for event in events] == [session_id(tokens) for tokens in (logins[1], logins[0])]
    for event in events:
        assert event["detail"] == "too many sessions"
        assert (event["actorId"], event["userId"]) == (someone.id, someone.id)
        assert event["clientIp"] == "127.0.0.1"


def test_a_lower_limit_ends_the_surplus_at_the_next_login(engine, start_server):
    server = start_server(engine, max_sessions_per_user=100)
    with any_way("gRPC", server) as way:
        someone = Somebody(way)
        logins = [someone.tokens, *(way.login(someone.person) for _ in range(5))]
    server.restart(max_sessions_per_user=2)
    with any_way("gRPC", server) as way:
        newest = way.login(someone.person)
        for tokens in logins[:-1]:
            way.expect_dead(tokens)
        for tokens in (logins[-1], newest):
            expect_alive(way, tokens)
    assert ended_for_the_limit(engine, someone.id) == 5


@ON_POSTGRES
def test_another_server_refuses_the_tokens_of_a_session_that_was_one_too_many(engine, start_server):
    server, other = (start_server(engine, max_sessions_per_user=FEW) for _ in range(2))
    with any_way("gRPC", server) as way, any_way("gRPC", other) as elsewhere:
        someone = Somebody(way)
        assert elsewhere.me(someone.tokens)
        for _ in range(FEW):
            way.login(someone.person)
        wait_until_dead(elsewhere, someone.tokens)


def wait_until_dead(way, tokens: dict) -> None:
    def is_dead() -> bool:
        way.expect_dead(tokens)
        return True

    wait_until("the session has ended", is_dead)


def test_an_account_with_very_many_sessions_can_log_in_and_then_has_few(engine, start_server, size, capsys):
    server = start_server(engine)
    many = size(2_000, 20_000)
    with any_way("gRPC", server) as way:
        someone = Somebody(way)
        insert_copies(engine, someone.tokens, many)
        assert open_sessions(engine, someone.id) == many + 1

        begun = time.monotonic()
        try:
            newest = way.login(someone.person)
        finally:
            seconds, left = time.monotonic() - begun, open_sessions(engine, someone.id)
            with capsys.disabled():
                print(f"\n{engine.name}: {many} open sessions, after a login of {seconds:.2f} s {left}")

        wait_until("the surplus has ended", lambda: open_sessions(engine, someone.id) == DEFAULT)
        assert session_id(newest) in listed(way, newest)
        expect_alive(way, newest)


def insert_copies(engine: Engine, tokens: dict, count: int) -> None:
    """Opens this many sessions like this one, which was used most recently. Their tokens are unknown."""
    earlier = engine.as_time(datetime.now(UTC) - timedelta(hours=1))
    copied = (
        "user_id, create_time, end_time, generation, refresh_hash, refresh_issue_time, refresh_expire_time, client_ip"
    )
    new_id = {"postgres": "gen_random_uuid()", "sqlite": "randomblob(16)"}[engine.name]
    numbers = load.NUMBERS[engine.name].format(first=1, last=count, step=1)
    statement = (
        f"INSERT INTO sessions (id, last_refresh_time, {copied}) SELECT {new_id}, ?, {copied} FROM sessions, {numbers} "
        "WHERE id = ?"
    )
    assert engine.execute(statement, earlier, engine.as_id(uuid.UUID(session_id(tokens)))) == count


# -- logins at the same time ---------------------------------------------------------------------------------------


@pytest.fixture
def replicas(server, engine, start_server, most) -> list[ByGrpc]:
    """Calls to the server, and on PostgreSQL to a second one too."""
    servers = [server]
    if engine.name == "postgres":
        servers.append(start_server(engine, max_sessions_per_user=most, login_max_failures=MANY_ATTEMPTS))
    return [ByGrpc(server.client) for server in servers]


def log_in_at_once(replicas: list[ByGrpc], person: Person, meanwhile=lambda: None) -> list[dict]:
    """Logs the person in several times at the same time, over all servers, and returns the tokens of each login."""
    ready = threading.Barrier(AT_ONCE + 1)

    def login(number: int) -> dict:
        ready.wait()
        return replicas[number % len(replicas)].login(person)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        logins = [pool.submit(login, number) for number in range(AT_ONCE)]
        ready.wait()
        meanwhile()
        return [login.result() for login in logins]


def expect_exactly_few(engine: Engine, replicas: list[ByGrpc], user_id: str, logins: list[dict]) -> None:
    """Asserts that of these sessions as many go on as an account may have, and that the others have ended."""
    assert open_sessions(engine, user_id) == FEW
    assert ended_for_the_limit(engine, user_id) == len(logins) - FEW
    statement = "SELECT id FROM sessions WHERE user_id = ? AND revoke_time IS NULL"
    alive = {row[0] for row in engine.query(statement, engine.as_id(uuid.UUID(user_id)))}
    for tokens in logins:
        if engine.as_id(uuid.UUID(session_id(tokens))) in alive:
            expect_alive(replicas[0], tokens)
        else:
            for way in replicas:
                wait_until_dead(way, tokens)


def test_logins_at_the_same_time_leave_exactly_as_many_as_allowed(engine, replicas):
    for _ in range(5):
        someone = Somebody(replicas[0])
        logins = [someone.tokens, *log_in_at_once(replicas, someone.person)]
        expect_exactly_few(engine, replicas, someone.id, logins)


@ON_POSTGRES
def test_logins_that_waited_for_the_same_lock_leave_exactly_as_many_as_allowed(engine, cluster, replicas):
    person = Person()
    user_id = replicas[0].sign_up(person)["id"]
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = ? AND wait_event_type = 'Lock'"
    with cluster.connect(engine.database) as lock:
        # This is the lock that a step takes that ends sessions of the account.
        lock.execute("BEGIN")
        lock.execute("SELECT FROM users WHERE id = %s FOR NO KEY UPDATE", [uuid.UUID(user_id)])
        with ThreadPoolExecutor(1) as pool:
            logins = pool.submit(log_in_at_once, replicas, person)
            wait_until("logins wait", lambda: engine.query(waiting, engine.database)[0][0] > FEW)
            time.sleep(0.5)
            lock.execute("COMMIT")
            opened = logins.result()
    expect_exactly_few(engine, replicas, user_id, opened)


# -- pages ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def crowd(server, someone) -> list[str]:
    """The ids of the sessions of an account with very many, newest first. It has logged in once, which was the last."""
    mine = session_id(someone.tokens)
    opened = EPOCH + timedelta(seconds=jose.claims_of(someone.credential)["iat"])
    return [mine, *(insert_older(server.engine, mine, opened - timedelta(minutes=n)) for n in range(1, CROWD))]


def insert_older(engine: Engine, like: str, opened: datetime) -> str:
    """Inserts a session of the same account that was opened at this time, and returns its id."""
    # A UUIDv7 (RFC 9562): the time in milliseconds, the version and the variant.
    milliseconds = (opened - EPOCH) // timedelta(milliseconds=1)
    id = uuid.UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62)
    copied = "user_id, end_time, generation, refresh_hash, refresh_issue_time, refresh_expire_time, client_ip"
    statement = (
        f"INSERT INTO sessions (id, create_time, last_refresh_time, {copied}) SELECT ?, ?, ?, {copied} FROM sessions "
        "WHERE id = ?"
    )
    moment = engine.as_time(opened)
    assert engine.execute(statement, engine.as_id(id), moment, moment, engine.as_id(uuid.UUID(like))) == 1
    return str(id)


@NO_LIMIT
def test_the_pages_hold_each_session_once_newest_first(way, someone, crowd):
    for page_size in (0, 1, 7, 115, 200):
        assert listed(way, someone.tokens, page_size=page_size) == crowd, page_size


@NO_LIMIT
def test_a_page_has_50_sessions_where_nothing_is_said_and_never_more_than_200(way, someone, crowd):
    for asked, size in ((None, 50), (0, 50), (1, 1), (200, 200), (201, 200), (2**31 - 1, 200)):
        fields = {} if asked is None else {"page_size": asked}
        page = way.ok("ListSessions", credential=someone.credential, **fields)
        assert len(page["sessions"]) == size, asked
        assert page["nextPageToken"]


@NO_LIMIT
def test_the_last_page_says_so_also_if_it_is_full(way, someone, crowd):
    sizes = []
    for page in pages(way, "ListSessions", someone.credential, page_size=CROWD // 2):
        sizes.append(len(page["sessions"]))
    assert sizes == [CROWD // 2, CROWD // 2]
    assert page["nextPageToken"] == ""


@NO_LIMIT
def test_pages_go_on_although_sessions_end_and_are_opened_between_them(way, someone, crowd):
    # Each page but the first is asked for after the last session of the previous page has ended.
    seen = []
    for page in pages(way, "ListSessions", someone.credential, page_size=60):
        ids = [session["id"] for session in page["sessions"]]
        seen += ids
        if page["nextPageToken"]:
            way.ok("RevokeSession", credential=someone.credential, session_id=ids[-1])
            way.login(someone.person)
    assert seen == crowd
    assert len(listed(way, someone.tokens)) == CROWD


@NO_LIMIT
def test_a_page_token_is_good_for_each_session_of_the_account_and_at_any_page_size(way, someone, crowd):
    token = way.ok("ListSessions", credential=someone.credential, page_size=10)["nextPageToken"]
    other = way.login(someone.person)
    page = way.ok("ListSessions", credential=other["accessToken"], page_token=token, page_size=3)
    assert [session["id"] for session in page["sessions"]] == crowd[10:13]


@NO_LIMIT
def test_the_current_session_is_marked_on_whichever_page_it_is(way, someone):
    for _ in range(3):
        way.login(someone.person)
    found = list(pages(way, "ListSessions", someone.credential, page_size=1))
    assert [page["sessions"][0].get("current", False) for page in found] == [False, False, False, True]


@NO_LIMIT
def test_the_page_token_of_another_account_is_an_invalid_field(way, someone):
    others = Somebody(way)
    for somebody in (someone, others):
        way.login(somebody.person)
    token = way.ok("ListSessions", credential=others.credential, page_size=1)["nextPageToken"]
    assert way.ok("ListSessions", credential=others.credential, page_token=token)["sessions"]
    call = {"credential": someone.credential, "page_size": 1}
    way.refused("ListSessions", *INVALID, {"page_token"}, page_token=token, **call)


@NO_LIMIT
def test_a_page_token_that_was_not_given_out_is_an_invalid_field(server, way, someone):
    way.login(someone.person)
    admin = Somebody(way, server.engine, "admin")
    call = {"credential": admin.credential, "page_size": 1}
    way.login(admin.person)
    tokens = {rpc: way.ok(rpc, **call)["nextPageToken"] for rpc in ("ListSessions", "ListUsers", "ListAuditEvents")}
    token = tokens.pop("ListSessions")
    middle = len(token) // 2
    altered = f"{token[:middle]}{'A' if token[middle] != 'A' else 'B'}{token[middle + 1 :]}"
    bad = (altered, token[:-1], token[1:], f"{token}A", token + token, "nonsense", "é", "A" * 5_000, admin.id)
    for page_token in (*bad, session_id(admin.tokens), *tokens.values()):
        way.refused("ListSessions", *INVALID, {"page_token"}, page_token=page_token, **call)
    # The token of this list is good for no other list.
    for rpc in tokens:
        way.refused(rpc, *INVALID, {"page_token"}, page_token=token, **call)


def test_a_negative_page_size_is_an_invalid_field(way, someone):
    for page_size in (-1, -(2**31)):
        way.refused("ListSessions", *INVALID, {"page_size"}, credential=someone.credential, page_size=page_size)
