"""A user's own sessions, and the deletion of one's own account, by gRPC and by REST.

It tests ListSessions, RevokeSession and DeleteAccount. Other ways in which sessions end are in `test_journey`,
`test_account_flows` and `test_admin`. The address of a session behind a proxy is in `test_throttling`.
"""

import json
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from support.admin import AnyByRest, Somebody, enabled_admins, only_admin, session_id
from support.client import Person
from support.http import Rest
from support.mail import CHANGE, RESET, VERIFY
from support.outbox import settle

UNKNOWN = "018bcfe5-6800-7000-8000-000000000000"
NOT_THERE = ("NOT_FOUND", "NOT_FOUND")
FIELDS = {"id", "createTime", "lastRefreshTime", "expireTime", "clientIp", "userAgent", "current"}


@pytest.fixture(scope="module")
def settings(mailbox):
    return {"mail_url": mailbox.url, "mail_limit_per_client": "0"}


@pytest.fixture
def someone(way) -> Somebody:
    return Somebody(way)


def sessions(way, tokens: dict) -> list[dict]:
    return way.ok("ListSessions", credential=tokens["accessToken"]).get("sessions", [])


def ids(way, tokens: dict) -> list[str]:
    return [session["id"] for session in sessions(way, tokens)]


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def is_about(text: str, expected: datetime) -> bool:
    return abs(moment(text) - expected) < timedelta(minutes=1)


# -- the list ------------------------------------------------------------------------------------------------------


def test_sessions_are_listed_newest_first_and_the_callers_own_is_the_current_one(way, someone):
    logins = [someone.tokens, *(way.login(someone.person) for _ in range(2))]
    newest_first = [session_id(tokens) for tokens in reversed(logins)]
    for tokens in logins:
        listed = sessions(way, tokens)
        assert [session["id"] for session in listed] == newest_first
        assert [session["id"] for session in listed if session.get("current")] == [session_id(tokens)]


def test_a_session_tells_where_and_when_it_was_opened_and_nothing_secret(way, someone):
    [session] = sessions(way, someone.tokens)
    now = datetime.now(UTC)
    assert set(session) <= FIELDS
    assert session["clientIp"] == "127.0.0.1"
    assert is_about(session["createTime"], now)
    assert is_about(session["lastRefreshTime"], now)
    assert is_about(session["expireTime"], now + timedelta(days=7))
    assert session["expireTime"] == someone.tokens["refreshTokenExpireTime"]
    for secret in someone.tokens.values():
        assert secret == session["expireTime"] or secret not in json.dumps(session)


@pytest.mark.parametrize("way", ["gRPC"], indirect=True)
def test_a_session_tells_what_opened_it(server, someone, way):
    [session] = sessions(way, someone.tokens)
    assert session["userAgent"].startswith("grpc-python/")
    assert user_agent_of(server, "Otter/1.0 (river; en)") == "Otter/1.0 (river; en)"
    assert user_agent_of(server, None) == ""
    assert user_agent_of(server, "x" * 1_000) == "x" * 256


def user_agent_of(server, said: str | None) -> str:
    """The user agent that is stored for a session opened over REST."""
    rest, person = Rest(server), Person()
    rest.sign_up(person)
    login = {"email": person.email, "password": person.password}
    headers = {"user-agent": said} if said else {}
    tokens = rest.post("/v1/auth/login", login, headers=headers).ok()["tokens"]
    [session] = sessions(AnyByRest(rest), tokens)
    return session["userAgent"]


def test_a_refresh_is_told_and_makes_no_other_session(server, way, someone):
    [before] = sessions(way, someone.tokens)
    past = server.engine.as_time(datetime.now(UTC) - timedelta(hours=1))
    mine = server.engine.as_id(uuid.UUID(before["id"]))
    server.engine.execute("UPDATE sessions SET create_time = ?, last_refresh_time = ? WHERE id = ?", past, past, mine)
    [aged] = sessions(way, someone.tokens)

    fresh = way.refresh(someone.tokens)

    [after] = sessions(way, fresh)
    assert (after["id"], after["createTime"]) == (aged["id"], aged["createTime"])
    assert is_about(after["lastRefreshTime"], datetime.now(UTC))
    assert moment(after["lastRefreshTime"]) - moment(aged["lastRefreshTime"]) > timedelta(minutes=59)
    assert after["expireTime"] == fresh["refreshTokenExpireTime"]
    assert after["current"] is True


def test_sessions_that_are_over_are_not_listed(server, way, someone):
    ended, expired = way.login(someone.person), way.login(someone.person)
    way.ok("Logout", refresh_token=ended["refreshToken"])
    past = server.engine.as_time(datetime.now(UTC) - timedelta(seconds=1))
    row = server.engine.as_id(uuid.UUID(session_id(expired)))
    assert server.engine.execute("UPDATE sessions SET refresh_expire_time = ? WHERE id = ?", past, row) == 1
    assert ids(way, someone.tokens) == [session_id(someone.tokens)]


def test_nobody_sees_the_sessions_of_others(way, someone):
    assert not set(ids(way, someone.tokens)) & set(ids(way, Somebody(way).tokens))


# -- ending one ----------------------------------------------------------------------------------------------------


def revoke(way, tokens: dict, session: str) -> None:
    assert way.ok("RevokeSession", credential=tokens["accessToken"], session_id=session) == {}


def test_an_ended_session_is_dead_and_the_others_go_on(way, someone):
    other, third = way.login(someone.person), way.login(someone.person)
    revoke(way, someone.tokens, session_id(other))
    way.expect_dead(other)
    for tokens in (someone.tokens, third):
        assert way.me(tokens)
        assert ids(way, tokens) == [session_id(third), session_id(someone.tokens)]
        assert way.refresh(tokens)


def test_the_session_of_the_call_can_be_ended_too(way, someone):
    revoke(way, someone.tokens, session_id(someone.tokens))
    way.expect_dead(someone.tokens)
    assert way.login(someone.person)


def test_a_session_that_is_over_or_anothers_or_none_is_not_found(server, way, someone):
    over, expired, anothers = way.login(someone.person), way.login(someone.person), Somebody(way)
    revoke(way, someone.tokens, session_id(over))
    past = server.engine.as_time(datetime.now(UTC) - timedelta(seconds=1))
    row = server.engine.as_id(uuid.UUID(session_id(expired)))
    server.engine.execute("UPDATE sessions SET refresh_expire_time = ? WHERE id = ?", past, row)

    tried = [session_id(over), session_id(expired), session_id(anothers.tokens), someone.id, UNKNOWN]
    answers = {
        way.refused("RevokeSession", *NOT_THERE, credential=someone.credential, session_id=session).message
        for session in tried
    }

    assert len(answers) == 1, answers
    assert way.me(anothers.tokens), "the session of the other user still works"
    assert way.refresh(anothers.tokens)


def test_an_admin_ends_the_sessions_of_others_by_another_call(server, way, someone):
    admin = Somebody(way, server.engine, "admin")
    session = session_id(someone.tokens)
    way.refused("RevokeSession", *NOT_THERE, credential=admin.credential, session_id=session)
    assert way.me(someone.tokens)


def test_what_is_no_id_is_an_invalid_field(way, someone):
    for bad in ("nonsense", f"{UNKNOWN}0", "..", "*"):
        call = {"credential": someone.credential, "session_id": bad}
        way.refused("RevokeSession", "INVALID_ARGUMENT", "INVALID_FIELD", {"session_id"}, **call)


# -- deleting the account ------------------------------------------------------------------------------------------


def delete_account(way, somebody: Somebody) -> None:
    password = somebody.person.password
    assert way.ok("DeleteAccount", credential=somebody.credential, password=password) == {}


def test_who_does_not_know_the_password_deletes_nothing(way, someone):
    call = {"credential": someone.credential}
    for wrong in (Person().password, f"{someone.person.password}x", someone.person.password.upper()):
        way.refused("DeleteAccount", "UNAUTHENTICATED", "INVALID_CREDENTIALS", password=wrong, **call)
    for bad in ("", "x" * 1025):
        way.refused("DeleteAccount", "INVALID_ARGUMENT", "INVALID_FIELD", {"password"}, password=bad, **call)
    assert way.me(someone.tokens) == someone.user
    assert way.login(someone.person)


def test_a_deleted_account_is_dead_and_so_is_everything_that_was_its(server, way, mailbox, someone):
    other, new_email = way.login(someone.person), Person().email
    verify = mailbox.token(someone.email, VERIFY)
    way.ok("RequestPasswordReset", email=someone.email)
    password = someone.person.password
    way.ok("RequestEmailChange", credential=someone.credential, new_email=new_email, password=password)
    reset, change = mailbox.token(someone.email, RESET), mailbox.token(new_email, CHANGE)

    delete_account(way, someone)

    for tokens in (someone.tokens, other):
        way.expect_dead(tokens)
        way.refused("ListSessions", "UNAUTHENTICATED", "SESSION_REVOKED", credential=tokens["accessToken"])
        way.refused("Logout", "UNAUTHENTICATED", "REFRESH_TOKEN_INVALID", refresh_token=tokens["refreshToken"])
    way.expect_wrong(someone.person)
    way.expect_bad_token("VerifyEmail", verify)
    way.expect_bad_token("ResetPassword", reset, new_password=Person().password)
    way.expect_bad_token("ConfirmEmailChange", change)
    way.refused("DeleteAccount", "UNAUTHENTICATED", "SESSION_REVOKED", credential=someone.credential, password=password)
    settle(server.engine)
    before = len(mailbox.mails(someone.email))
    way.ok("RequestPasswordReset", email=someone.email)
    settle(server.engine)
    assert len(mailbox.mails(someone.email)) == before, "a deleted account gets no mail"


def test_the_names_of_a_deleted_account_are_free_and_make_another(way, someone):
    delete_account(way, someone)
    again = replace(someone.person, password=Person().password)
    made = way.sign_up(again)
    assert made["id"] != someone.id
    way.expect_dead(someone.tokens)
    way.expect_wrong(someone.person)
    assert way.me(way.login(again)) == made


def test_the_audit_of_a_deleted_account_keeps_its_id_and_no_name(server, way, mailbox, someone):
    way.expect_wrong(replace(someone.person, password=Person().password))
    way.ok("RequestPasswordReset", email=someone.email)
    way.ok("ResetPassword", token=mailbox.token(someone.email, RESET), new_password=someone.person.password)
    someone.tokens = way.login(someone.person)
    delete_account(way, someone)

    admin = Somebody(way, server.engine, "admin")
    events = way.ok("ListAuditEvents", credential=admin.credential, user_id=someone.id)["events"]

    assert events[0]["action"] == "user_deleted"
    assert (events[0]["actorId"], events[0]["userId"]) == (someone.id, someone.id)
    rows = [repr(row) for row in server.engine.query("SELECT * FROM audit_events")]
    name, _, domain = someone.email.partition("@")
    for said in (someone.email, name, domain, someone.person.username, someone.person.password):
        assert not [row for row in rows if said in row]


def test_nothing_of_a_deleted_account_is_left_but_its_id(server, way, someone):
    delete_account(way, someone)
    settle(server.engine)
    # The mail limit of an address stays for an hour, even if no account has the address.
    tables = set(server.engine.tables()) - {"mail_limits"}
    left = [repr(row) for table in tables for row in server.engine.query(f'SELECT * FROM "{table}"')]
    for said in (someone.email, someone.person.username):
        assert not [row for row in left if said in row]


def test_the_last_admin_cannot_delete_itself_until_there_is_another(server, way):
    admin = Somebody(way, server.engine, "admin")
    only_admin(server.engine, admin.id)
    call = {"credential": admin.credential, "password": admin.person.password}

    way.refused("DeleteAccount", "FAILED_PRECONDITION", "LAST_ADMIN", **call)
    assert way.me(admin.tokens)
    assert way.refresh(admin.tokens)
    wrong = {**call, "password": Person().password}
    way.refused("DeleteAccount", "UNAUTHENTICATED", "INVALID_CREDENTIALS", **wrong)

    Somebody(way, server.engine, "admin")
    assert way.ok("DeleteAccount", **call) == {}
    assert enabled_admins(server.engine) == 1
