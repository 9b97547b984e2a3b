"""Clocks that are ahead for a while, with libfaketime: nothing revoked comes back, and nobody is locked out for long.

It tests access tokens and revocations, pauses after wrong passwords, and mail. PostgreSQL's own clock is always right.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from support import jose
from support.admin import Somebody, any_way, session_id
from support.client import Person
from support.engine import EPOCH
from support.expect import expect_unauthenticated
from support.faketime import RIGHT, ClockedServer, wait_for_housekeeping
from support.http import Rest
from support.mail import CHANGE, RESET, VERIFY, Behaviour, Mail, Mailbox
from support.outbox import settle, waiting
from support.refusal import expect_refusal
from support.rows import check_all
from support.transports import Transport
from support.wait import wait_until

ON_POSTGRES = pytest.mark.parametrize("engine", ["postgres"], indirect=True)
# On PostgreSQL the clock of the database counts, which is right here.
ON_SQLITE = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
# How many wrong passwords are allowed, and the longest pause after that in seconds.
MOST, LONGEST_PAUSE = 10, 15 * 60


# -- access tokens -------------------------------------------------------------------------------------------------


def ended(way: Transport, boss: Somebody, how: str, whom: Somebody) -> None:
    """Ends what an account's token is good for."""
    match how:
        case "Logout":
            way.ok("Logout", refresh_token=whom.tokens["refreshToken"])
        case "SetUserRoles":
            way.ok("SetUserRoles", credential=boss.credential, user_id=whom.id, roles=[])
        case _:
            way.ok(how, credential=boss.credential, user_id=whom.id)


def expect_ended(way: Transport, how: str, whom: Somebody) -> None:
    """Asserts that the token is refused for what was ended."""
    if how == "SetUserRoles":
        way.refused("ListUsers", "PERMISSION_DENIED", "ROLE_REQUIRED", credential=whom.credential)
    else:
        way.refused("ListSessions", "UNAUTHENTICATED", "SESSION_REVOKED", credential=whom.credential)


def kept_until(engine, whom: Somebody) -> datetime:
    """Until when the log keeps what ends the account's token."""
    ids = [engine.as_id(uuid.UUID(id)) for id in (session_id(whom.tokens), whom.id)]
    rows = engine.query("SELECT forget_time FROM revocations WHERE session_id = ? OR user_id = ?", *ids)
    assert rows, "the log does not have it"
    return max(engine.to_time(forget_time) for [forget_time] in rows)


def expect_kept(engine, whom: Somebody) -> None:
    """Asserts that the log keeps what ends the account's token until the token has expired."""
    expiry = EPOCH + timedelta(seconds=jose.claims_of(whom.credential)["exp"])
    kept = kept_until(engine, whom)
    assert kept >= expiry, f"kept until {kept}, but the token expires at {expiry}"


@ON_SQLITE
def test_a_token_from_the_future_is_refused_and_its_session_goes_on(engine, start_with_clock):
    server = start_with_clock(engine, "+1d")
    with any_way("gRPC", server) as way:
        somebody = Somebody(way, engine, "admin")
        assert way.ok("ListUsers", credential=somebody.credential, page_size=1)

        server.set_clock(RIGHT)

        for rpc in ("ListUsers", "ListSessions", "GetMe"):
            way.refused(rpc, "UNAUTHENTICATED", "TOKEN_INVALID", credential=somebody.credential)
        assert way.me(way.refresh(somebody.tokens))


@ON_POSTGRES
def test_a_replica_that_is_ahead_mints_tokens_by_the_clock_of_the_database(engine, start_server, start_with_clock):
    ahead, right = start_with_clock(engine, "+1d"), start_server(engine)
    _, tokens = ahead.client.newcomer()
    assert right.client.me(tokens.access_token)
    assert abs(jose.claims_of(tokens.access_token)["iat"] - time.time()) < 60


def test_what_ends_a_token_from_the_future_is_kept_until_the_token_has_expired(engine, start_with_clock):
    # The token lives for the default of 15 minutes, so that it is still valid when the test looks at it "a day later".
    server = start_with_clock(engine, "+1d")
    with any_way("gRPC", server) as way:
        hows = ["DisableUser", "SetUserRoles", "DeleteUser", "Logout"]
        people = [(how, Somebody(way, engine, "admin")) for how in hows]
        # The newest token of this session is not the one that expires last.
        refreshed = Somebody(way, engine, "admin")
        server.set_clock(RIGHT)
        way.refresh(refreshed.tokens)
        people.append(("DisableUser", refreshed))

        boss = Somebody(way, engine, "admin")
        for how, whom in people:
            ended(way, boss, how, whom)
        check_all(people, lambda row: expect_kept(engine, row[1]))

    # The clock reaches the time that the tokens are from. A start reads the log anew, and deletes what has expired.
    server.set_clock("+1d")
    server.restart()
    wait_for_housekeeping(server)
    with any_way("gRPC", server) as way:
        check_all(people, lambda row: expect_ended(way, *row))


@ON_POSTGRES
def test_what_ends_a_token_that_a_retry_got_from_a_replica_ahead_is_kept_too(engine, start_server, start_with_clock):
    right = start_server(engine, refresh_retry_window="60s")
    ahead = start_with_clock(engine, "+1d", refresh_retry_window="60s")
    with any_way("gRPC", right) as way, any_way("gRPC", ahead) as other:
        boss, somebody = Somebody(way, engine, "admin"), Somebody(way)
        first = somebody.tokens
        way.refresh(first)
        # The answer got lost, and the client asks for it again. The refresh token is the same, the access token is not.
        somebody.tokens = other.refresh(first)
        ended(way, boss, "DisableUser", somebody)
        expect_kept(engine, somebody)


@ON_POSTGRES
def test_a_replica_that_is_a_day_ahead_deletes_no_revocation_that_others_need(engine, start_server, start_with_clock):
    right = start_server(engine)
    with any_way("gRPC", right) as way:
        boss = Somebody(way, engine, "admin")
        people = [(how, Somebody(way, engine, "admin")) for how in ("Logout", "DisableUser", "SetUserRoles")]
        for how, whom in people:
            ended(way, boss, how, whom)

        wait_for_housekeeping(start_with_clock(engine, "+1d"))

        check_all(people, lambda row: expect_kept(engine, row[1]))
        check_all(people, lambda row: expect_ended(way, *row))
    # This one knows only what the log has kept.
    with any_way("gRPC", start_server(engine)) as way:
        check_all(people, lambda row: expect_ended(way, *row))


# -- pauses after wrong passwords ----------------------------------------------------------------------------------


def asked_to_wait(server, person: Person) -> int:
    """For how many seconds a login is refused; zero if it is accepted."""
    answer = Rest(server).post("/v1/auth/login", {"email": person.email, "password": person.password})
    if answer.status == 200:
        return 0
    expect_refusal(answer, 429, "THROTTLED")
    return int(answer.header("retry-after"))


def guess(server, person: Person) -> None:
    """Tries a wrong password, which must be verified."""
    expect_unauthenticated(
        lambda: server.client.login(replace(person, password=Person().password)), "INVALID_CREDENTIALS"
    )


@pytest.fixture(params=["while-it-runs", "by-a-restart"])
def put_right(request) -> Callable[[ClockedServer], None]:
    """Corrects the clock of a server."""

    def correct(server: ClockedServer) -> None:
        server.set_clock(RIGHT)
        if request.param == "by-a-restart":
            server.restart()

    return correct


def test_wrong_guesses_at_a_wrong_time_cause_no_pause_longer_than_15_minutes(embedded, start_with_clock, put_right):
    server = start_with_clock(embedded, RIGHT)
    person, _ = server.client.newcomer()
    server.set_clock("+10d")
    for _ in range(MOST):
        guess(server, person)
    assert 0 < asked_to_wait(server, person) <= 30

    put_right(server)

    assert asked_to_wait(server, person) <= LONGEST_PAUSE
    # The pause is not only said to be shorter: it ends.
    server.set_clock(f"+{LONGEST_PAUSE + 60}")
    assert asked_to_wait(server, person) == 0


def test_attempts_that_a_killed_server_left_at_a_wrong_time_lock_nobody_out(embedded, start_with_clock):
    server = start_with_clock(embedded, "+10d")
    person, _ = server.client.newcomer()
    guess(server, person)
    server.kill()
    # What is left if the server is killed while it verifies passwords.
    then = embedded.as_time(datetime.now(UTC) + timedelta(days=10, seconds=40))
    statement = "UPDATE login_attempts SET failures = 0, under_way = ?, under_way_until = ?, forget_time = ?"
    assert embedded.execute(statement, MOST, then, then) == 1

    # Such attempts are forgotten within a minute, so after the longest pause all of them are over. Until then, a call
    # may be refused.
    server.set_clock(RIGHT)
    server.start()
    Rest(server).post("/v1/auth/login", {"email": person.email, "password": person.password})
    server.set_clock(f"+{LONGEST_PAUSE + 60}")

    assert server.client.login(person)


# -- mail ----------------------------------------------------------------------------------------------------------


class Owner:
    """The owner of an account who asks for mails."""

    def __init__(self, server: ClockedServer, mailbox: Mailbox):
        self._server, self._mailbox = server, mailbox
        self.person, _ = server.client.newcomer()
        self.new_email = Person().email
        mailbox.token(self.person.email, VERIFY)

    def ask(self, kind: str) -> None:
        client, person = self._server.client, self.person
        if kind == VERIFY:
            client.resend_verification(person.email)
        elif kind == RESET:
            client.request_password_reset(person.email)
        else:
            # An access token from before the clock was changed is not valid now.
            tokens = client.login(person)
            client.request_email_change(tokens.access_token, self.new_email, person.password)

    def mails(self, kind: str) -> list[Mail]:
        to = self.new_email if kind == CHANGE else self.person.email
        return [mail for mail in self._mailbox.mails(to) if mail.kind == kind]

    def token_asked_for_now(self, kind: str) -> str:
        """Asks for one more mail, which must be delivered, and returns its token."""
        before = len(self.mails(kind))
        self.ask(kind)
        mails = wait_until(f"a mail of the kind {kind}", lambda: self.mails(kind)[before:])
        return mails[0].token

    def use(self, kind: str, token: str) -> None:
        """Uses a token, which must work."""
        client = self._server.client
        if kind == VERIFY:
            assert client.verify_email(token).email_verified
        elif kind == RESET:
            again = replace(self.person, password=Person().password)
            client.reset_password(token, again.password)
            self.person = again
            assert client.login(again)
        else:
            assert client.confirm_email_change(token).email == self.new_email


@pytest.fixture
def mailbox(start_mailbox) -> Mailbox:
    return start_mailbox()


@pytest.fixture
def server(engine, mailbox, start_with_clock) -> ClockedServer:
    return start_with_clock(engine, RIGHT, mail_url=mailbox.url, mail_limit_per_client="0")


@pytest.mark.parametrize("kind", [VERIFY, RESET, CHANGE])
def test_a_mail_asked_for_at_a_wrong_time_holds_up_no_later_one(server, mailbox, kind):
    owner = Owner(server, mailbox)
    server.set_clock("+2d")
    early = owner.token_asked_for_now(kind)
    settle(server.engine)

    server.set_clock(RIGHT)

    late = owner.token_asked_for_now(kind)
    assert late != early
    owner.use(kind, late)


@ON_SQLITE
def test_mails_up_to_the_limit_at_a_wrong_time_do_not_withhold_a_reset_now(server, mailbox):
    owner = Owner(server, mailbox)
    server.set_clock("+2d")
    # More of each than any limit allows.
    for kind in (VERIFY, RESET):
        for _ in range(12):
            owner.ask(kind)
    settle(server.engine)
    assert 1 <= len(owner.mails(RESET)) < 12, "the limit was reached"

    server.set_clock(RIGHT)

    owner.use(RESET, owner.token_asked_for_now(RESET))


def test_a_mail_that_failed_at_a_wrong_time_is_sent_soon(server, mailbox):
    owner = Owner(server, mailbox)
    server.set_clock("+2d")
    mailbox.behave(Behaviour(at_data="451 4.3.0 later"))
    owner.ask(RESET)
    wait_until("it failed", lambda: mailbox.refused)
    server.stop()
    assert len(waiting(server.engine)) == 1

    server.set_clock(RIGHT)
    mailbox.recover()
    server.start()
    # The longest ordinary pause between two attempts is 15 minutes.
    server.set_clock("+16m")

    # A claim that the stop has cut off lapses after 40 s, by the clock of PostgreSQL.
    owner.use(RESET, mailbox.token(owner.person.email, RESET, deadline=100))


@ON_POSTGRES
def test_a_replica_that_is_two_days_ahead_ends_no_token_of_a_mail(engine, mailbox, start_server, start_with_clock):
    right = start_server(engine, mail_url=mailbox.url)
    people = [right.client.newcomer()[0] for _ in range(2)]
    for person in people:
        right.client.request_password_reset(person.email)
    tokens = [(mailbox.token(person.email, VERIFY), mailbox.token(person.email, RESET)) for person in people]
    settle(engine)

    wait_for_housekeeping(start_with_clock(engine, "+2d", mail_url=mailbox.url))

    for person, (verification, reset) in zip(people, tokens, strict=True):
        assert right.client.verify_email(verification).email_verified
        again = replace(person, password=Person().password)
        right.client.reset_password(reset, again.password)
        assert right.client.login(again)
