"""The audit log: the action, actor, account, session and origin of each security event.

It tests that each security event of a scripted day is recorded exactly once, that a refused or failed step records
nothing, that the audit is listed newest first and by its filters, and that it holds no address, password or token. Page
tokens are in `test_admin_lists`. Events of the command line are in `test_user_command`.
"""

import uuid
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from support.admin import Somebody, any_way, everything, only_admin, session_id
from support.client import Person
from support.expect import expect_error, failure_of
from support.mail import CHANGE, RESET, VERIFY
from support.wait import wait_until

UNKNOWN = "018bcfe5-6800-7000-8000-000000000000"
HERE = "127.0.0.1"
INVALID = ("INVALID_ARGUMENT", "INVALID_FIELD")


@pytest.fixture(scope="module")
def settings(mailbox):
    return {"mail_url": mailbox.url, "mail_limit_per_client": "0"}


@pytest.fixture
def admin(way, server) -> Somebody:
    return Somebody(way, server.engine, "admin")


@dataclass(frozen=True)
class Event:
    """An audit event without its id and its time."""

    action: str
    actor: str = ""
    user: str = ""
    session: str = ""
    ip: str = HERE
    detail: str = ""


def read(event: dict) -> Event:
    names = ("actorId", "userId", "sessionId", "clientIp", "detail")
    return Event(event["action"], *(event.get(name, "") for name in names))


def events(way, admin: Somebody, **filters) -> list[dict]:
    return everything(way, "ListAuditEvents", admin.credential, "events", page_size=200, **filters)


def actions(way, admin: Somebody, user_id: str) -> list[str]:
    """The actions that are recorded for an account, oldest first."""
    return [event["action"] for event in reversed(events(way, admin, user_id=user_id))]


# -- a scripted day ------------------------------------------------------------------------------------------------


class Day:
    """Runs every step that the audit log records, and collects the events that it should contain."""

    def __init__(self, way, mailbox, admin: Somebody):
        self.way, self.mailbox, self.admin = way, mailbox, admin
        self.person = Person()
        self.expected: list[Event] = []
        self.secrets: set[str] = set()
        self.id = way.sign_up(self.person)["id"]
        self.by_owner("sign_up")

    def by_owner(self, action: str, session: str = "") -> None:
        self.expected.append(Event(action, self.id, self.id, session))

    def by_admin(self, action: str, detail: str = "") -> None:
        self.expected.append(Event(action, self.admin.id, self.id, detail=detail))

    def login(self) -> dict:
        tokens = self.way.login(self.person)
        self.by_owner("login", session_id(tokens))
        self.secrets |= {tokens["accessToken"], tokens["refreshToken"]}
        return tokens

    def token(self, kind: str, email: str | None = None) -> str:
        token = self.mailbox.token(email or self.person.email, kind)
        self.secrets.add(token)
        return token

    def live(self) -> None:
        self.morning()
        self.noon()
        self.evening()

    def morning(self) -> None:
        """Logging in and out."""
        way = self.way
        way.expect_wrong(replace(self.person, password=Person().password))
        self.expected.append(Event("login_failed", user=self.id))
        way.expect_wrong(Person())
        self.expected.append(Event("login_failed"))
        way.ok("VerifyEmail", token=self.token(VERIFY))
        self.by_owner("email_verified")

        stolen = self.login()
        way.refresh(way.refresh(stolen))
        way.refused("Refresh", "UNAUTHENTICATED", "REFRESH_TOKEN_INVALID", refresh_token=stolen["refreshToken"])
        self.expected.append(Event("refresh_reused", user=self.id, session=session_id(stolen)))

        tokens = self.login()
        for _ in range(2):
            # The second logout ends nothing and records nothing.
            way.ok("Logout", refresh_token=tokens["refreshToken"])
        self.by_owner("logout", session_id(tokens))
        self.login()
        everywhere = self.login()
        way.ok("Logout", refresh_token=everywhere["refreshToken"], everywhere=True)
        self.by_owner("logout_everywhere", session_id(everywhere))

    def noon(self) -> None:
        """Changes of a user's own account."""
        way, tokens = self.way, self.login()
        new = Person()
        change = {"current_password": self.person.password, "new_password": new.password}
        tokens = way.ok("ChangePassword", credential=tokens["accessToken"], **change)["tokens"]
        self.person = replace(self.person, password=new.password)
        self.by_owner("password_changed", session_id(tokens))

        asked = {"credential": tokens["accessToken"], "new_email": new.email, "password": new.password}
        way.ok("RequestEmailChange", **asked)
        self.by_owner("email_change_requested")
        way.ok("ConfirmEmailChange", token=self.token(CHANGE, new.email))
        self.person = replace(self.person, email=new.email)
        self.by_owner("email_changed")
        named = {"new_username": Person().username, "password": new.password}
        way.ok("ChangeUsername", credential=tokens["accessToken"], **named)
        self.by_owner("username_changed")

        way.ok("RequestPasswordReset", email=self.person.email)
        reset = Person().password
        way.ok("ResetPassword", token=self.token(RESET), new_password=reset)
        self.person = replace(self.person, password=reset)
        self.by_owner("password_reset")

        mine, other = self.login(), self.login()
        way.ok("RevokeSession", credential=mine["accessToken"], session_id=session_id(other))
        self.by_owner("session_revoked", session_id(other))

    def evening(self) -> None:
        """Changes by an admin, and the deletion of the account."""
        call = {"credential": self.admin.credential, "user_id": self.id}
        self.way.ok("RevokeUserSessions", **call)
        self.by_admin("sessions_revoked")
        self.way.ok("SetUserRoles", roles=["writer", "admin"], **call)
        self.by_admin("roles_changed", "user -> admin user writer")
        self.way.ok("SetUserRoles", roles=[], **call)
        self.by_admin("roles_changed", "admin user writer -> user")
        self.way.ok("DisableUser", reason="Lost a wager", **call)
        self.by_admin("user_disabled", "Lost a wager")
        self.way.expect_wrong(self.person)
        self.expected.append(Event("login_failed", user=self.id))
        self.way.ok("EnableUser", **call)
        self.by_admin("user_enabled")
        tokens = self.login()
        wrong = {"credential": tokens["accessToken"], "password": Person().password}
        self.way.refused("DeleteAccount", "UNAUTHENTICATED", "INVALID_CREDENTIALS", **wrong)
        self.by_owner("login_failed")
        self.way.ok("DeleteAccount", credential=tokens["accessToken"], password=self.person.password)
        self.by_owner("user_deleted")


def test_a_scripted_day_is_in_the_audit_exactly_once(server, way, mailbox, admin):
    day, began = Day(way, mailbox, admin), datetime.now(UTC)
    first = day.person
    day.live()

    found = events(way, admin)
    # The list is newest first, so the events of this day come first.
    told = [read(event) for event in found[: len(day.expected)]][::-1]

    assert told == day.expected
    below = [event for event in found[len(day.expected) :] if event.get("userId") == day.id]
    assert not below
    for event in found[: len(day.expected)]:
        assert uuid.UUID(event["id"]).version == 7
        assert abs(datetime.fromisoformat(event["createTime"]) - began) < timedelta(minutes=2)
    rows = repr(server.engine.query("SELECT * FROM audit_events"))
    for person in (first, day.person):
        for said in (person.email, person.email.partition("@")[0], person.username, person.password, "example.com"):
            assert said not in rows
    assert not [secret for secret in day.secrets if secret in rows]


def test_a_day_by_the_account_and_by_the_action(way, mailbox, admin):
    day = Day(way, mailbox, admin)
    day.live()
    mine = [event for event in day.expected if event.user == day.id][::-1]
    assert [read(event) for event in events(way, admin, user_id=day.id)] == mine
    for action in {event.action for event in mine}:
        of_both = [read(event) for event in events(way, admin, user_id=day.id, action=action)]
        assert of_both == [event for event in mine if event.action == action]
        of_all = events(way, admin, action=action)
        assert {event["action"] for event in of_all} == {action}
        assert Counter(read(event) for event in of_all if event.get("userId") == day.id) == Counter(of_both)


# -- the list ------------------------------------------------------------------------------------------------------


def test_the_audit_is_listed_newest_first_and_each_event_once(way, admin):
    for _ in range(10):
        Somebody(way)
    for page_size in (1, 7, 200):
        user = {"action": "sign_up"} if page_size == 1 else {}
        listed = everything(way, "ListAuditEvents", admin.credential, "events", page_size=page_size, **user)
        ids = [event["id"] for event in listed]
        assert ids == sorted(set(ids), reverse=True)
        times = [event["createTime"] for event in listed]
        assert [moment[:19] for moment in times] == sorted((moment[:19] for moment in times), reverse=True)


def test_what_happens_meanwhile_is_on_no_later_page(way, admin):
    page = way.ok("ListAuditEvents", credential=admin.credential, page_size=2)
    newcomer = Somebody(way)
    rest = everything_after(way, admin, page["nextPageToken"])
    assert not [event for event in rest if event.get("userId") == newcomer.id]
    seen = [event["id"] for event in (*page["events"], *rest)]
    assert len(set(seen)) == len(seen)


def everything_after(way, admin: Somebody, page_token: str) -> list[dict]:
    found = []
    while page_token:
        page = way.ok("ListAuditEvents", credential=admin.credential, page_size=200, page_token=page_token)
        found += page["events"]
        page_token = page.get("nextPageToken", "")
    return found


def test_a_filter_that_is_malformed_is_an_invalid_field(way, admin):
    call = {"credential": admin.credential}
    for bad in ("nonsense", f"{UNKNOWN}0", "%"):
        way.refused("ListAuditEvents", *INVALID, {"user_id"}, user_id=bad, **call)
    for bad in ("LOGIN", "log", "login ", "%", "logged_in", "login,logout"):
        way.refused("ListAuditEvents", *INVALID, {"action"}, action=bad, **call)
    every = {"user_id", "action", "page_size"}
    way.refused("ListAuditEvents", *INVALID, every, user_id="x", action="x", page_size=-1, **call)


def test_an_account_that_never_was_has_no_events(way, admin):
    assert way.ok("ListAuditEvents", credential=admin.credential, user_id=UNKNOWN) == {
        "events": [],
        "nextPageToken": "",
    }


def test_nobody_but_an_admin_reads_the_audit_not_even_of_itself(way):
    somebody = Somebody(way)
    call = {"credential": somebody.credential, "user_id": somebody.id}
    way.refused("ListAuditEvents", "PERMISSION_DENIED", "ROLE_REQUIRED", **call)


# -- steps that change nothing -------------------------------------------------------------------------------------


def test_what_is_refused_or_changes_nothing_leaves_no_event(server, way, mailbox, admin):
    somebody, other = Somebody(way), Somebody(way)
    only_admin(server.engine, admin.id)
    call = {"credential": admin.credential, "user_id": somebody.id}
    way.ok("SetUserRoles", roles=["writer"], **call)
    way.ok("DisableUser", **{**call, "user_id": other.id})
    before = [event["id"] for event in events(way, admin)]

    mine, admins = {"credential": somebody.credential}, {"credential": admin.credential, "user_id": admin.id}
    taken = {"username": Person().username, "email": somebody.email, "password": Person().password}
    password = somebody.person.password
    way.refused("SignUp", "ALREADY_EXISTS", "EMAIL_TAKEN", **taken)
    way.refused("SignUp", *INVALID, {"password"}, **{**taken, "email": Person().email, "password": "password1"})
    way.refused("Login", *INVALID, {"password"}, email=somebody.email)
    way.refused("Refresh", "UNAUTHENTICATED", "REFRESH_TOKEN_INVALID", refresh_token="nonsense")
    way.refused("Logout", "UNAUTHENTICATED", "REFRESH_TOKEN_INVALID", refresh_token="nonsense")
    way.expect_bad_token("VerifyEmail", "A" * 64)
    way.expect_bad_token("ResetPassword", "A" * 64, new_password=Person().password)
    way.expect_bad_token("ConfirmEmailChange", "A" * 64)
    way.refused("ChangePassword", *INVALID, {"new_password"}, current_password=password, new_password="x", **mine)
    email = {"new_email": admin.email, "password": password}
    way.refused("RequestEmailChange", "ALREADY_EXISTS", "EMAIL_TAKEN", **email, **mine)
    way.refused("RevokeSession", "NOT_FOUND", "NOT_FOUND", session_id=session_id(admin.tokens), **mine)
    way.refused("DisableUser", "PERMISSION_DENIED", "ROLE_REQUIRED", **{**call, **mine})
    for rpc in ("SetUserRoles", "DisableUser", "DeleteUser"):
        way.refused(rpc, "FAILED_PRECONDITION", "LAST_ADMIN", **admins)
        way.refused(rpc, "NOT_FOUND", "NOT_FOUND", credential=admin.credential, user_id=UNKNOWN)
    way.ok("SetUserRoles", roles=["user", "writer"], **call)
    way.ok("EnableUser", **call)
    way.ok("DisableUser", **{**call, "user_id": other.id})
    way.ok("RequestPasswordReset", email=somebody.email)
    way.ok("ResendVerificationEmail", email=somebody.email)
    way.ok("ListSessions", **mine)
    way.refresh(somebody.tokens)

    assert [event["id"] for event in events(way, admin)] == before


# -- one transaction -----------------------------------------------------------------------------------------------

# Triggers that make the database reject a row, for each engine.
REFUSE = {
    "sqlite": ["CREATE TRIGGER refuse BEFORE {what} BEGIN SELECT RAISE(ABORT, 'refused'); END"],
    "postgres": [
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused'; END $$",
        "CREATE TRIGGER refuse BEFORE {what} FOR EACH ROW EXECUTE FUNCTION refuse()",
    ],
}
AT_COMMIT = (
    "CREATE CONSTRAINT TRIGGER refuse AFTER {what} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
)


def refuse(engine, what: str, at_commit: bool = False) -> None:
    """Makes the database reject an operation from now on, such as `INSERT ON audit_events`."""
    statements = REFUSE[engine.name]
    for statement in [statements[0], AT_COMMIT] if at_commit else statements:
        engine.execute(statement.replace("{what}", what))


def expect_broken(call) -> None:
    """Asserts that a step failed in the database, and that the caller sees no details of the error."""
    error = failure_of(call)
    assert error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE), error
    assert "refused" not in (error.details() or "")


def steps_of(way, admin: Somebody, somebody: Somebody) -> list:
    """Calls that each write an audit event."""
    call = {"credential": admin.credential, "user_id": somebody.id}
    mine = {"credential": somebody.credential}
    password = somebody.person.password
    change = {"current_password": password, "new_password": Person().password}
    session = session_id(somebody.tokens)
    return [
        lambda: way.sign_up(Person()),
        lambda: way.login(somebody.person),
        lambda: way.ok("ChangePassword", **change, **mine),
        lambda: way.ok("RevokeSession", session_id=session, **mine),
        lambda: way.ok("Logout", refresh_token=somebody.tokens["refreshToken"]),
        lambda: way.ok("Logout", refresh_token=somebody.tokens["refreshToken"], everywhere=True),
        lambda: way.ok("SetUserRoles", roles=["writer"], **call),
        lambda: way.ok("DisableUser", **call),
        lambda: way.ok("RevokeUserSessions", **call),
        lambda: way.ok("DeleteUser", **call),
        lambda: way.ok("DeleteAccount", password=password, **mine),
    ]


def state_of(engine) -> list:
    tables = ("users", "user_roles", "sessions", "audit_events", "revocations")
    return [sorted(map(repr, engine.query(f"SELECT * FROM {table}"))) for table in tables]


# SQLite's triggers are never deferred.
@pytest.mark.parametrize(
    ("engine", "at_commit"), [("sqlite", False), ("postgres", False), ("postgres", True)], indirect=["engine"]
)
def test_what_cannot_be_audited_does_not_happen(engine, start_server, at_commit):
    server = start_server(engine)
    with any_way("gRPC", server) as way:
        admin, somebody = Somebody(way, engine, "admin"), Somebody(way)
        refuse(engine, "INSERT ON audit_events", at_commit)
        before = state_of(engine)
        for step in steps_of(way, admin, somebody):
            expect_broken(step)
        assert state_of(engine) == before
        engine.execute("DROP TRIGGER refuse" + (" ON audit_events" if engine.name == "postgres" else ""))
        assert way.me(somebody.tokens), "the session is alive, because every step failed"
        assert way.ok("ListSessions", credential=somebody.credential)
        assert way.ok("ListUsers", credential=admin.credential)


@pytest.mark.parametrize(
    ("what", "steps"),
    [
        ("INSERT ON user_roles", (0, 6)),
        ("INSERT ON sessions", (1, 2)),
        ("INSERT ON revocations", (2, 3, 4, 5, 6, 7, 8, 9, 10)),
        ("UPDATE ON users", (2, 7)),
        ("DELETE ON users", (9, 10)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_happen_is_not_audited(engine, start_server, what, steps):
    server = start_server(engine)
    with any_way("gRPC", server) as way:
        admin, somebody = Somebody(way, engine, "admin"), Somebody(way)
        refuse(engine, what)
        before = state_of(engine)
        calls = steps_of(way, admin, somebody)
        for number in steps:
            expect_broken(calls[number])
        assert state_of(engine) == before


# -- retention -----------------------------------------------------------------------------------------------------


def test_the_audit_is_kept_for_as_long_as_is_configured(engine, start_server):
    server = start_server(engine, audit_retention="30d")
    with any_way("gRPC", server) as way:
        admin, old, young = Somebody(way, engine, "admin"), Somebody(way), Somebody(way)
        for somebody, days in ((old, 31), (young, 29)):
            then = engine.as_time(datetime.now(UTC) - timedelta(days=days))
            mine = engine.as_id(uuid.UUID(somebody.id))
            engine.execute("UPDATE audit_events SET create_time = ? WHERE user_id = ?", then, mine)
    server.restart()
    with any_way("gRPC", server) as way:
        wait_until("the old is forgotten", lambda: not actions(way, admin, old.id), pause=0.2)
        assert actions(way, admin, young.id) == ["sign_up", "login"]


def test_a_guess_that_is_throttled_is_no_event(engine, start_server):
    server = start_server(engine, login_max_failures=2)
    with any_way("gRPC", server) as way:
        admin, somebody = Somebody(way, engine, "admin"), Somebody(way)
        for _ in range(2):
            way.expect_wrong(replace(somebody.person, password=Person().password))
        for _ in range(5):
            exhausted = grpc.StatusCode.RESOURCE_EXHAUSTED
            expect_error(lambda: way.login(somebody.person), exhausted, "THROTTLED")
        assert actions(way, admin, somebody.id) == ["sign_up", "login", "login_failed", "login_failed"]
