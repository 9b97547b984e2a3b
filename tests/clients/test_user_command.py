"""`postern user`: how the first admin is created, and what an operator can do directly on the database.

It tests the commands on both engines, that no password is ever an argument or shown, and that a running server
notices a change. The same steps over the network are in `test_admin`.
"""

import re
import subprocess
import time
import uuid
from dataclasses import replace
from urllib.parse import urlsplit

import grpc
import pytest

from support import jose
from support.admin import Somebody, any_way, command, everything
from support.client import Person
from support.environment import own_environment
from support.mail import VERIFY
from support.operators import Operator
from support.server import CHEAP_HASHES
from support.terminal import at_a_terminal
from support.wait import wait_until

TOKEN = re.compile(r"[\w-]{64}", re.ASCII)


class UserOperator(Operator):
    """An operator of `postern user`."""

    def __init__(self, binary, engine):
        super().__init__(binary, engine, "user", ("users", "user_roles", "sessions", "one_time_tokens", "audit_events"))

    def create(self, person: Person, *roles: str) -> list[str]:
        """Creates an account and returns the fields of the printed line."""
        named = ["--username", person.username, "--email", person.email]
        more = [part for role in roles for part in ("--role", role)]
        [line] = self.done("create", *named, *more, stdin=f"{person.password}\n").splitlines()
        return line.split("\t")


@pytest.fixture
def operator(binary, engine) -> UserOperator:
    return UserOperator(binary, engine)


@pytest.fixture
def way(engine, start_server, operator):
    """Calls to a server that runs while the commands are given."""
    with any_way("gRPC", start_server(engine)) as way:
        yield way


# -- create --------------------------------------------------------------------------------------------------------


def test_the_first_admin_is_made_before_any_server_runs(operator, engine, start_server):
    person = Person()
    id, username, email, roles, state = operator.create(person, "admin", "writer")
    assert (username, email, roles, state) == (person.username, person.email, "admin,user,writer", "verified")

    with any_way("REST", start_server(engine)) as way:
        tokens = way.login(person)
        assert way.me(tokens)["id"] == id
        assert uuid.UUID(id).version == 7
        assert jose.claims_of(tokens["accessToken"])["roles"] == ["admin", "user", "writer"]
        assert way.ok("GetUser", credential=tokens["accessToken"], user_id=id)["user"]["roles"] == [
            "admin", "user", "writer",
        ]  # fmt: skip


def test_white_space_around_an_address_is_dropped_by_every_command_that_takes_one(operator):
    person = Person()
    assert operator.create(replace(person, email=f" {person.email}\n"))[2] == person.email
    spaced = ("--email", f"\t{person.email} ")
    assert operator.done("set-roles", *spaced, "--role", "writer").split("\t")[3] == "user,writer"
    assert TOKEN.search(operator.done("reset-password-link", *spaced))
    assert operator.done("disable", *spaced).split("\t")[4].strip() == "disabled"
    assert person.email in operator.done("list", "--query", f" {person.email} ")


def test_an_account_is_made_while_a_server_runs_and_its_owner_is_mailed(operator, engine, start_server, start_mailbox):
    mailbox, person = start_mailbox(), Person()
    with any_way("gRPC", start_server(engine, mail_url=mailbox.url)) as way:
        named = ["--username", person.username, "--email", person.email]
        [line] = operator.done("create", *named, "--unverified", stdin=f"{person.password}\n").splitlines()
        assert line.endswith("\tunverified")
        assert way.me(way.login(person))["roles"] == ["user"]
        assert way.ok("VerifyEmail", token=mailbox.token(person.email, VERIFY))["user"]["emailVerified"]


def test_an_operator_may_give_an_account_a_reserved_username(operator, way):
    person = Person(username="Admin")
    assert operator.create(person)[1] == "Admin"
    assert way.me(way.login(person))["username"] == "Admin"
    fields = {"username": "admin", "email": Person().email, "password": person.password}
    way.refused("SignUp", "INVALID_ARGUMENT", "INVALID_FIELD", {"username"}, **fields)


def test_the_first_admin_can_log_in_where_addresses_must_be_verified_and_no_mail_is_sent(
    binary, embedded, start_server
):
    required = {"require_verified_email": "true"}
    admin, other = Person(), Person()

    def create(person: Person, *more: str) -> subprocess.CompletedProcess:
        named = ["user", "create", "--username", person.username, "--email", person.email, *more]
        return command(binary, embedded, *named, stdin=person.password, **required)

    assert create(admin, "--role", "admin").stdout.endswith("\tverified\n")
    assert embedded.query("SELECT count(*) FROM mail_outbox") == [(0,)]
    told = create(other, "--unverified")
    assert told.stdout.endswith("\tunverified\n")
    assert "reset-password-link" in told.stderr, "the way out is named"
    details = embedded.query("SELECT detail FROM audit_events WHERE action = 'sign_up' ORDER BY id")
    assert details == [("an operator vouches for the address",), (None,)]

    with any_way("gRPC", start_server(embedded, **required)) as way:
        assert way.login(admin)
        way.refused("Login", "FAILED_PRECONDITION", "EMAIL_NOT_VERIFIED", email=other.email, password=other.password)
        link = command(binary, embedded, "user", "reset-password-link", "--email", other.email, **required).stdout
        again = replace(other, password=Person().password)
        way.ok("ResetPassword", token=TOKEN.findall(link)[0], new_password=again.password)
        assert way.login(again)


def test_the_line_that_tells_of_an_account_has_no_password_and_the_database_has_its_hash(operator, engine):
    person = Person()
    named = ["--username", person.username, "--email", person.email]
    ended = operator.run("create", *named, stdin=f"{person.password}\n")
    assert person.password not in ended.stdout + ended.stderr
    everything_stored = engine.dump()
    assert person.email in everything_stored
    assert person.password not in everything_stored


@pytest.mark.parametrize("ending", ["\n", "\r\n", "", "\nmore\n"], ids=["LF", "CRLF", "none", "another line"])
def test_the_password_is_the_first_line_of_the_input(operator, engine, start_server, ending):
    person = Person()
    operator.done("create", "--username", person.username, "--email", person.email, stdin=person.password + ending)
    with any_way("gRPC", start_server(engine)) as way:
        assert way.login(person)


def test_a_password_is_no_argument_and_no_variable(operator, binary, engine):
    operator.create(Person())
    person = Person()
    named = ["--username", person.username, "--email", person.email]
    for wrong in (["--password", person.password], [f"--password={person.password}"], ["-p", person.password]):
        assert "unexpected argument" in operator.refused("create", *named, *wrong)
    for help_of in (["user", "create", "--help"], ["user", "--help"]):
        shown = command(binary, engine, *help_of).stdout
        assert "--password " not in shown.replace("--password-", "")
    ended = command(binary, engine, "user", "create", *named, stdin="x\n", password=person.password)
    assert ended.returncode != 0
    assert "POSTERN_PASSWORD" in ended.stderr
    assert person.password not in ended.stderr


def test_nobody_who_lists_processes_sees_the_password(binary, engine, operator):
    person = Person()
    arguments = [binary, "user", "create", "--username", person.username, "--email", person.email]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(arguments, env=environment(engine), text=True, **pipes)
    try:
        # The command now waits for its input. Its arguments and its environment do not change any more.
        time.sleep(0.3)
        assert process.poll() is None
        for name in ("cmdline", "environ"):
            with open(f"/proc/{process.pid}/{name}", "rb") as file:
                assert person.password.encode() not in file.read()
        out, said = process.communicate(f"{person.password}\n", timeout=30)
        assert process.returncode == 0, said
        assert person.email in out
    finally:
        if process.poll() is None:
            process.kill()


def environment(engine) -> dict[str, str]:
    return own_environment(log_format="json", **CHEAP_HASHES, **engine.settings())


@pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
def test_at_a_terminal_the_password_is_asked_for_twice_and_not_shown(binary, engine, operator, start_server):
    person = Person()
    arguments = ["user", "create", "--username", person.username, "--email", person.email]
    code, seen = at_a_terminal(binary, environment(engine), arguments, [person.password, person.password])
    assert code == 0, seen
    assert person.password not in seen
    with any_way("gRPC", start_server(engine)) as way:
        assert way.login(person)

    other = Person()
    arguments = ["user", "create", "--username", other.username, "--email", other.email]
    code, seen = at_a_terminal(binary, environment(engine), arguments, [other.password, person.password])
    assert code != 0
    assert "not the same" in seen
    assert other.email not in engine.emails()


def test_what_a_sign_up_refuses_is_refused_and_says_why(operator, engine):
    person = Person()
    operator.create(person)
    named = {"--username": Person().username, "--email": Person().email}
    password = Person().password

    def create(stdin: str = password, roles=(), **changes: str) -> str:
        given = {**named, **{f"--{name}": value for name, value in changes.items()}}
        more = [part for role in roles for part in ("--role", role)]
        return operator.refused("create", *(part for pair in given.items() for part in pair), *more, stdin=f"{stdin}\n")

    for weak in ("password1", "short", "", named["--email"], f"{named['--username']}1", "x" * 1025, "é" * 513):
        said = create(weak)
        assert "password" in said, said
        assert len(weak) < 8 or weak in named.values() or weak not in said
    assert "email" in create(email="nobody")
    assert "username" in create(username="a b")
    assert "roles" in create(roles=["Admin"])
    assert "email" in create(email=person.email.upper())
    assert "username" in create(username=person.username.upper())


def test_of_a_new_account_the_audit_names_no_actor(operator, engine):
    id, *_ = operator.create(Person(), "admin")
    mine = engine.as_id(uuid.UUID(id))
    rows = engine.query("SELECT action, actor_id, client_ip FROM audit_events WHERE user_id = ? ORDER BY id", mine)
    assert [action for action, *_ in rows] == ["sign_up", "roles_changed"]
    assert {(actor, ip) for _, actor, ip in rows} == {(None, None)}, "both are empty for the command line"


# -- list ----------------------------------------------------------------------------------------------------------


def test_accounts_are_listed_one_a_line_and_searched(operator, engine):
    people = [Person() for _ in range(3)]
    roles = [("admin",), (), ("writer",)]
    made = [operator.create(person, *named) for person, named in zip(people, roles, strict=True)]
    operator.done("disable", "--email", people[2].email)
    made[2][-1] = "disabled"

    lines = [line.split("\t") for line in operator.done("list").splitlines()]

    assert lines == made, "oldest first"
    for query in (people[1].email, people[1].username.upper()):
        assert operator.done("list", "--query", query).splitlines() == ["\t".join(made[1])]
    assert operator.done("list", "--query", "%") == ""
    assert "query" in operator.refused("list", "--query", "x" * 255)


# -- what a running server notices ---------------------------------------------------------------------------------


def wait_for(what: str, probe) -> None:
    """Waits until `probe` is true. The promised time is one second; a busy machine may take longer."""
    wait_until(what, probe, pause=0.01)


def is_refused(way, rpc: str, code: str, reason: str, credential: str, **fields) -> bool:
    way.refused(rpc, code, reason, credential=credential, **fields)
    return True


def is_answered(way, rpc: str, credential: str, **fields) -> bool:
    try:
        return way.ok(rpc, credential=credential, **fields) is not None
    except grpc.RpcError:
        return False


def test_roles_that_are_set_are_noticed(operator, engine, way):
    admin, somebody = Somebody(way, engine, "admin"), Somebody(way)
    whose = ["--email", somebody.email.upper()]

    [line] = operator.done("set-roles", *whose, "--role", "admin", "--role", "writer").splitlines()
    bearer = somebody.credential
    wait_for("the new admin is let in", lambda: is_answered(way, "ListUsers", bearer))
    assert line.split("\t")[3] == "admin,user,writer"
    assert way.me(somebody.tokens)["roles"] == ["admin", "user", "writer"]

    [line] = operator.done("set-roles", *whose).splitlines()
    role_required = ("PERMISSION_DENIED", "ROLE_REQUIRED")
    wait_for("it is none any more", lambda: is_refused(way, "ListUsers", *role_required, bearer))
    assert line.split("\t")[3] == "user"
    told = everything(way, "ListAuditEvents", admin.credential, "events", user_id=somebody.id, action="roles_changed")
    assert [(event["actorId"], event["clientIp"]) for event in told] == [("", "")] * 2


def test_an_account_that_is_disabled_is_shut(operator, engine, way):
    admin, somebody = Somebody(way, engine, "admin"), Somebody(way)
    [line] = operator.done("disable", "--email", somebody.email, "--reason", "Lost a wager").splitlines()
    revoked = ("UNAUTHENTICATED", "SESSION_REVOKED")
    wait_for("it is shut", lambda: is_refused(way, "ListSessions", *revoked, somebody.credential))
    assert line.split("\t")[-1] == "disabled"
    way.expect_dead(somebody.tokens)
    way.expect_wrong(somebody.person)
    told_of = {"user_id": somebody.id, "action": "user_disabled"}
    [told] = everything(way, "ListAuditEvents", admin.credential, "events", **told_of)
    assert (told["detail"], told["actorId"], told["clientIp"]) == ("Lost a wager", "", "")
    operator.done("disable", "--email", somebody.email)


def test_an_account_that_is_enabled_again_can_log_in_and_one_that_is_deleted_is_gone(operator, engine, way):
    admin, somebody = Somebody(way, engine, "admin"), Somebody(way)
    whose = ["--email", somebody.email]
    operator.done("disable", *whose)
    way.expect_wrong(somebody.person)
    [line] = operator.done("enable", *whose).splitlines()
    assert line.split("\t")[-1] == "unverified"
    tokens = way.login(somebody.person)

    [line] = operator.done("delete", *whose).splitlines()
    assert line.split("\t")[-1] == "deleted"
    revoked = ("UNAUTHENTICATED", "SESSION_REVOKED")
    wait_for("it is gone", lambda: is_refused(way, "ListSessions", *revoked, tokens["accessToken"]))
    way.expect_wrong(somebody.person)
    assert somebody.email not in engine.emails()
    for action in ("user_enabled", "user_deleted"):
        told = everything(way, "ListAuditEvents", admin.credential, "events", user_id=somebody.id, action=action)
        assert [(event["actorId"], event["clientIp"]) for event in told] == [("", "")], action


def test_the_last_admin_stays(operator, engine):
    person = Person()
    operator.create(person, "admin")
    whose = ["--email", person.email]
    for steps in (
        ["set-roles", *whose],
        ["set-roles", *whose, "--role", "writer"],
        ["disable", *whose],
        ["delete", *whose],
    ):
        assert "last enabled admin" in operator.refused(*steps)
    operator.done("set-roles", *whose, "--role", "admin", "--role", "writer")
    operator.create(Person(), "admin")
    operator.done("disable", *whose)


@pytest.mark.parametrize(
    "steps", [["set-roles"], ["disable"], ["enable"], ["delete"], ["reset-password-link"]], ids=lambda steps: steps[0]
)
def test_an_unknown_account_is_reported_as_unknown(operator, steps):
    operator.create(Person())
    assert "no such user" in operator.refused(*steps, "--email", Person().email)
    assert "email" in operator.refused(*steps, "--email", "nobody")


def test_an_invalid_role_or_reason_is_refused(operator):
    person = Person()
    operator.create(person)
    whose = ["--email", person.email]
    for role in ("Admin", "", "a b", "a,b"):
        assert "roles" in operator.refused("set-roles", *whose, "--role", role)
    for reason in ("x" * 501, "one\ntwo"):
        assert "reason" in operator.refused("disable", *whose, "--reason", reason)


# -- the link ------------------------------------------------------------------------------------------------------


def link_for(operator: Operator, email: str) -> tuple[str, str]:
    """The link that is printed, and the token in it."""
    [link] = operator.done("reset-password-link", "--email", email).splitlines()
    [token] = TOKEN.findall(link)
    return link, token


def test_a_link_resets_the_password_once(operator, way):
    somebody = Somebody(way)
    link, token = link_for(operator, somebody.email.upper())
    parts = urlsplit(link)
    assert (parts.scheme, parts.netloc, parts.path) == ("http", "localhost:8080", "/reset-password")
    assert way.me(somebody.tokens), "printing a link changes nothing"
    assert way.login(somebody.person)

    again = replace(somebody.person, password=Person().password)
    way.ok("ResetPassword", token=token, new_password=again.password)

    assert way.login(again)
    way.expect_dead(somebody.tokens)
    way.expect_wrong(somebody.person)
    way.expect_bad_token("ResetPassword", token, new_password=Person().password)


def test_a_newer_link_ends_the_one_before(operator, way):
    somebody = Somebody(way)
    (_, first), (_, second) = (link_for(operator, somebody.email) for _ in range(2))
    way.expect_bad_token("ResetPassword", first, new_password=Person().password)
    way.ok("ResetPassword", token=second, new_password=Person().password)


def test_a_link_leads_to_where_the_configuration_says(binary, engine, operator):
    person = Person()
    operator.create(person)
    whose = ["user", "reset-password-link", "--email", person.email]
    printed = command(binary, engine, *whose, public_url="https://id.example.com/auth").stdout
    assert printed.startswith("https://id.example.com/auth/reset-password")
    page = "https://app.example.com/new?t={token}"
    assert command(binary, engine, *whose, reset_password_url=page).stdout.startswith("https://app.example.com/new?t=")


def test_an_account_that_is_disabled_gets_no_link(operator, engine):
    person = Person()
    operator.create(person)
    operator.done("disable", "--email", person.email)
    assert "no such enabled user" in operator.refused("reset-password-link", "--email", person.email)
    assert engine.query("SELECT count(*) FROM one_time_tokens WHERE purpose = 'reset_password'") == [(0,)]


def test_a_link_is_in_the_audit_and_its_token_nowhere(operator, engine):
    person = Person()
    id, *_ = operator.create(person)
    _, token = link_for(operator, person.email)
    assert token not in engine.dump()
    statement = "SELECT action, actor_id, client_ip FROM audit_events WHERE user_id = ? ORDER BY id DESC"
    assert engine.query(statement, engine.as_id(uuid.UUID(id)))[0] == ("reset_link_issued", None, None)
