"""What admins can do with accounts, by gRPC and by REST, and what they cannot do.

It tests GetUser, SetUserRoles, DisableUser, EnableUser, RevokeUserSessions and DeleteUser: the effects of each, its
refusals, and that the last enabled admin stays. Lists are in `test_admin_lists`, who may call is in
`test_access_matrix`, other replicas are in `test_replicas`, the audit is in `test_audit`.
"""

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from google.protobuf import json_format

from support import contract, jose, pb
from support.admin import Somebody, enabled_admins, only_admin
from support.client import Person
from support.mail import RESET
from support.wait import wait_until

UNKNOWN = "018bcfe5-6800-7000-8000-000000000000"
OF_ONE_USER = ("GetUser", "SetUserRoles", "DisableUser", "EnableUser", "RevokeUserSessions", "DeleteUser")


@pytest.fixture(scope="module")
def settings(mailbox):
    return {"mail_url": mailbox.url, "mail_limit_per_client": "0"}


@pytest.fixture
def admin(way, server) -> Somebody:
    return Somebody(way, server.engine, "admin")


@pytest.fixture
def someone(way, server) -> Somebody:
    return Somebody(way, server.engine)


def get(way, admin: Somebody, user_id: str) -> dict:
    return way.ok("GetUser", credential=admin.credential, user_id=user_id)["user"]


def set_roles(way, admin: Somebody, user_id: str, *roles: str) -> dict:
    return way.ok("SetUserRoles", credential=admin.credential, user_id=user_id, roles=list(roles))["user"]


def disable(way, admin: Somebody, user_id: str) -> dict:
    return way.ok("DisableUser", credential=admin.credential, user_id=user_id)["user"]


def but_for_the_time(user: dict, **changes) -> dict:
    return {**user, "updateTime": "", **changes}


# -- which account -------------------------------------------------------------------------------------------------


def test_an_admin_sees_an_account_as_its_owner_does(way, admin, someone):
    assert get(way, admin, someone.id) == someone.user == way.me(someone.tokens)


@pytest.mark.parametrize("rpc", OF_ONE_USER)
def test_an_account_that_is_not_there_is_not_found(way, admin, someone, rpc):
    gone = Somebody(way).id
    way.ok("DeleteUser", credential=admin.credential, user_id=gone)
    # The id of a session is not the id of an account.
    session = jose.claims_of(someone.credential)["sid"]
    answers = {
        way.refused(rpc, "NOT_FOUND", "NOT_FOUND", credential=admin.credential, user_id=user_id).message
        for user_id in (UNKNOWN, str(uuid.uuid4()), gone, session)
    }
    assert len(answers) == 1, answers


@pytest.mark.parametrize("rpc", OF_ONE_USER)
def test_what_is_no_id_is_an_invalid_field(way, admin, rpc):
    for bad in ("nonsense", "1", f"{UNKNOWN}0", UNKNOWN[:-1], "me", "..", f"{UNKNOWN} ", "' OR 1=1 --", "ü"):
        way.refused(rpc, "INVALID_ARGUMENT", "INVALID_FIELD", {"user_id"}, credential=admin.credential, user_id=bad)


@pytest.mark.parametrize("way", ["gRPC"], indirect=True)
@pytest.mark.parametrize("rpc", OF_ONE_USER)
def test_no_id_at_all_is_an_invalid_field(way, admin, rpc):
    # Over REST, a call without an id has another path.
    way.refused(rpc, "INVALID_ARGUMENT", "INVALID_FIELD", {"user_id"}, credential=admin.credential)


# -- roles ---------------------------------------------------------------------------------------------------------


def test_roles_are_replaced_sorted_and_always_hold_user(way, admin, someone):
    changed = set_roles(way, admin, someone.id, "writer", "billing-read_2", "writer", "user")

    assert changed["roles"] == ["billing-read_2", "user", "writer"]
    assert changed["updateTime"] > someone.user["updateTime"]
    assert but_for_the_time(changed, roles=[]) == but_for_the_time(someone.user, roles=[])
    assert get(way, admin, someone.id) == changed == way.me(someone.tokens)
    assert set_roles(way, admin, someone.id, "reader")["roles"] == ["reader", "user"]
    assert set_roles(way, admin, someone.id)["roles"] == ["user"]


def test_roles_that_an_account_has_already_change_nothing(way, admin, someone):
    changed = set_roles(way, admin, someone.id, "writer")
    assert set_roles(way, admin, someone.id, "writer", "user") == changed, "not even the update time"


def test_what_is_no_role_is_an_invalid_field(way, admin, someone):
    call = {"credential": admin.credential, "user_id": someone.id}
    bad = ["", "Admin", "1st", "-a", "_a", "a b", "admin\n", "é", "a" * 65, "ａdmin", "admin\0", "*", "a,b"]
    for roles in (*([name] for name in bad), ["reader", "Admin"], [f"r{number}" for number in range(33)]):
        way.refused("SetUserRoles", "INVALID_ARGUMENT", "INVALID_FIELD", {"roles"}, roles=roles, **call)
    assert get(way, admin, someone.id) == someone.user
    longest = ["a" * 64, *(f"r{number:02}" for number in range(31))]
    assert set(set_roles(way, admin, someone.id, *longest)["roles"]) == {*longest, "user"}


def test_all_that_is_wrong_is_said_at_once(way, admin):
    call = {"credential": admin.credential, "user_id": "nonsense"}
    way.refused("SetUserRoles", "INVALID_ARGUMENT", "INVALID_FIELD", {"user_id", "roles"}, roles=["Admin"], **call)
    way.refused("DisableUser", "INVALID_ARGUMENT", "INVALID_FIELD", {"user_id", "reason"}, reason="x" * 501, **call)


def test_a_role_counts_from_the_next_call_on_with_the_token_of_before(way, admin, someone):
    call = {"credential": someone.credential, "user_id": admin.id}
    way.refused("GetUser", "PERMISSION_DENIED", "ROLE_REQUIRED", **call)
    for _ in range(3):
        set_roles(way, admin, someone.id, "admin")
        assert way.ok("GetUser", **call)
        set_roles(way, admin, someone.id)
        way.refused("GetUser", "PERMISSION_DENIED", "ROLE_REQUIRED", **call)
    assert way.me(someone.tokens), "losing a role ends no session"


def test_a_role_is_in_access_tokens_from_the_next_one_on(way, admin, someone):
    set_roles(way, admin, someone.id, "writer")
    fresh = way.refresh(someone.tokens)
    assert jose.claims_of(fresh["accessToken"])["roles"] == ["user", "writer"]
    set_roles(way, admin, someone.id)
    for tokens in (way.refresh(fresh), way.login(someone.person)):
        assert jose.claims_of(tokens["accessToken"])["roles"] == ["user"]


def test_a_demotion_lasts_over_refresh_and_login(way, server, someone, admin):
    other = Somebody(way, server.engine, "admin")
    set_roles(way, admin, other.id)
    for tokens in (other.tokens, way.refresh(other.tokens), way.login(other.person)):
        way.refused("ListUsers", "PERMISSION_DENIED", "ROLE_REQUIRED", credential=tokens["accessToken"])


# -- disable and enable --------------------------------------------------------------------------------------------


def test_a_disabled_account_is_shut_at_once(way, mailbox, admin, someone):
    other = way.login(someone.person)
    way.ok("RequestPasswordReset", email=someone.email)
    token = mailbox.token(someone.email, RESET)

    disabled = disable(way, admin, someone.id)

    assert disabled["disabled"] is True
    assert but_for_the_time(disabled, disabled=False) == but_for_the_time(someone.user, disabled=False)
    assert get(way, admin, someone.id) == disabled
    for tokens in (someone.tokens, other):
        way.expect_dead(tokens)
        way.refused("ListSessions", "UNAUTHENTICATED", "SESSION_REVOKED", credential=tokens["accessToken"])
    way.expect_wrong(someone.person)
    way.expect_bad_token("ResetPassword", token, new_password=Person().password)


def test_an_enabled_account_logs_in_again_and_what_was_ended_stays_so(way, mailbox, admin, someone):
    way.ok("RequestPasswordReset", email=someone.email)
    token = mailbox.token(someone.email, RESET)
    disable(way, admin, someone.id)

    enabled = way.ok("EnableUser", credential=admin.credential, user_id=someone.id)["user"]

    assert enabled["disabled"] is False
    way.expect_dead(someone.tokens)
    way.expect_bad_token("ResetPassword", token, new_password=Person().password)
    assert way.me(way.login(someone.person)) == enabled == get(way, admin, someone.id)


def test_disabling_and_enabling_twice_changes_nothing(way, admin, someone):
    disabled = disable(way, admin, someone.id)
    assert disable(way, admin, someone.id) == disabled, "not even the update time"
    enable = {"credential": admin.credential, "user_id": someone.id}
    enabled = way.ok("EnableUser", **enable)["user"]
    assert way.ok("EnableUser", **enable)["user"] == enabled


def test_a_reason_is_one_line_of_at_most_500_characters(way, admin, someone):
    call = {"credential": admin.credential, "user_id": someone.id}
    for bad in ("x" * 501, "one\ntwo", "a\0b", "\x1b[31m"):
        way.refused("DisableUser", "INVALID_ARGUMENT", "INVALID_FIELD", {"reason"}, reason=bad, **call)
    assert get(way, admin, someone.id) == someone.user
    way.ok("DisableUser", reason="é" * 500, **call)


# -- sessions and deletion -----------------------------------------------------------------------------------------


def test_revoked_sessions_are_counted_and_dead_and_the_account_is_as_it_was(way, admin, someone):
    others = [way.login(someone.person) for _ in range(2)]
    way.ok("Logout", refresh_token=others[0]["refreshToken"])
    call = {"credential": admin.credential, "user_id": someone.id}

    assert way.ok("RevokeUserSessions", **call) == {"revokedCount": 2}

    for tokens in (someone.tokens, *others):
        way.expect_dead(tokens)
    assert way.ok("RevokeUserSessions", **call) == {"revokedCount": 0}, "no session is left"
    assert way.me(way.login(someone.person)) == someone.user
    assert way.me(admin.tokens), "other users keep their sessions"


def test_a_session_that_has_expired_is_not_among_those_that_were_open(server, way, admin, someone):
    way.login(someone.person)
    session = uuid.UUID(jose.claims_of(someone.credential)["sid"])
    past = server.engine.as_time(datetime.now(UTC) - timedelta(minutes=1))
    expire = "UPDATE sessions SET refresh_expire_time = ? WHERE id = ?"
    assert server.engine.execute(expire, past, server.engine.as_id(session)) == 1
    assert way.ok("RevokeUserSessions", credential=admin.credential, user_id=someone.id) == {"revokedCount": 1}


def test_a_deleted_account_is_gone_and_its_address_makes_another(server, way, mailbox, admin, someone):
    way.ok("RequestPasswordReset", email=someone.email)
    token = mailbox.token(someone.email, RESET)

    assert way.ok("DeleteUser", credential=admin.credential, user_id=someone.id) == {}

    way.expect_dead(someone.tokens)
    way.expect_wrong(someone.person)
    way.expect_bad_token("ResetPassword", token, new_password=Person().password)
    again = way.sign_up(someone.person)
    assert again["id"] != someone.id
    way.expect_dead(someone.tokens)
    way.expect_bad_token("ResetPassword", token, new_password=Person().password)
    tokens = way.login(someone.person)
    assert way.me(tokens) == again == get(way, admin, again["id"])
    for table in ("sessions", "user_roles", "one_time_tokens", "mail_outbox"):
        left = f"SELECT count(*) FROM {table} WHERE user_id = ?"
        assert server.engine.query(left, server.engine.as_id(uuid.UUID(someone.id))) == [(0,)], table


# -- the last admin ------------------------------------------------------------------------------------------------


@pytest.fixture
def last_admin(server, admin) -> Somebody:
    only_admin(server.engine, admin.id)
    return admin


LOSSES = {"SetUserRoles": {"roles": ["writer"]}, "DisableUser": {"reason": "none"}, "DeleteUser": {}}


@pytest.mark.parametrize("rpc", LOSSES)
def test_the_last_admin_cannot_be_lost(server, way, last_admin, rpc):
    call = {"credential": last_admin.credential, "user_id": last_admin.id}
    way.refused(rpc, "FAILED_PRECONDITION", "LAST_ADMIN", **call, **LOSSES[rpc])
    assert get(way, last_admin, last_admin.id) == {**last_admin.user, "roles": ["admin", "user"]}
    assert way.refresh(last_admin.tokens)
    assert enabled_admins(server.engine) == 1


@pytest.mark.parametrize("rpc", LOSSES)
def test_an_admin_who_is_disabled_does_not_count(server, way, last_admin, rpc):
    other = Somebody(way, server.engine, "admin")
    disable(way, last_admin, other.id)
    call = {"credential": last_admin.credential, "user_id": last_admin.id}
    way.refused(rpc, "FAILED_PRECONDITION", "LAST_ADMIN", **call, **LOSSES[rpc])
    assert way.ok(rpc, credential=last_admin.credential, user_id=other.id, **LOSSES[rpc]) is not None


@pytest.mark.parametrize("rpc", LOSSES)
def test_one_of_two_admins_can_go(server, way, last_admin, rpc):
    other = Somebody(way, server.engine, "admin")
    call = {"credential": last_admin.credential, "user_id": last_admin.id}
    assert way.ok(rpc, **call, **LOSSES[rpc]) is not None
    assert enabled_admins(server.engine) == 1
    assert way.ok("GetUser", credential=other.credential, user_id=other.id)


def test_the_last_admin_may_gain_and_lose_other_roles_and_its_sessions(way, last_admin):
    assert set_roles(way, last_admin, last_admin.id, "admin", "writer")["roles"] == ["admin", "user", "writer"]
    assert set_roles(way, last_admin, last_admin.id, "admin")["roles"] == ["admin", "user"]
    assert way.ok("RevokeUserSessions", credential=last_admin.credential, user_id=last_admin.id)
    way.expect_dead(last_admin.tokens)
    assert way.login(last_admin.person)


# -- concurrent steps ----------------------------------------------------------------------------------------------


def make_it_wait(server, cluster, somebody: Somebody, call, *meanwhile: tuple[str, str]):
    """Makes a call that waits for a row lock, and makes changes in the transaction that holds it. PostgreSQL only."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = ? AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(1) as pool, cluster.connect(server.engine.database) as other:
        with other.transaction():
            other.execute("SELECT id FROM users WHERE id = %s FOR UPDATE", (somebody.id,))
            answer = pool.submit(call)
            wait_until("it waits", lambda: server.engine.query(waiting, server.engine.database)[0][0])
            for statement, user_id in meanwhile:
                other.execute(statement, (user_id,))
        return answer.result(15)


PROMOTE = "INSERT INTO user_roles (user_id, role) VALUES (%s, 'admin')"
DEMOTE = "DELETE FROM user_roles WHERE user_id = %s AND role = 'admin'"


@pytest.mark.parametrize("server", ["postgres"], indirect=True)
@pytest.mark.parametrize("way", ["gRPC"], indirect=True)
def test_a_demotion_that_waited_for_a_promotion_is_made(server, cluster, way, admin, someone):
    demotion = partial(set_roles, way, admin, someone.id)
    changed = make_it_wait(server, cluster, someone, demotion, (PROMOTE, someone.id))
    assert changed["roles"] == ["user"]
    assert get(way, admin, someone.id)["roles"] == ["user"], "the stored roles are those of the answer"


@pytest.mark.parametrize("server", ["postgres"], indirect=True)
@pytest.mark.parametrize("way", ["gRPC"], indirect=True)
@pytest.mark.parametrize("rpc", ["DisableUser", "DeleteUser"])
def test_a_user_who_became_the_last_admin_while_a_step_waited_stays_one(server, cluster, way, last_admin, someone, rpc):
    def step() -> None:
        call = {"credential": last_admin.credential, "user_id": someone.id}
        way.refused(rpc, "FAILED_PRECONDITION", "LAST_ADMIN", **call)

    make_it_wait(server, cluster, someone, step, (PROMOTE, someone.id), (DEMOTE, last_admin.id))
    assert enabled_admins(server.engine) == 1


# -- what admins do not get ----------------------------------------------------------------------------------------


def test_no_reply_to_an_admin_holds_a_password_or_its_hash(server, way, admin, someone):
    [(stored,)] = server.engine.query("SELECT password_hash FROM users WHERE email = ?", someone.email)
    call = {"credential": admin.credential, "user_id": someone.id}
    replies = [
        way.ok("ListUsers", credential=admin.credential, query=someone.email),
        way.ok("GetUser", **call),
        way.ok("SetUserRoles", roles=["writer"], **call),
        way.ok("DisableUser", reason="none", **call),
        way.ok("EnableUser", **call),
        way.ok("RevokeUserSessions", **call),
        way.ok("ListAuditEvents", **call),
        way.ok("DeleteUser", **call),
    ]
    about_people = [method for method in pb.service("AdminService").methods if "Service" not in method.name]
    assert len(replies) == len(about_people)
    said = json.dumps(replies)
    for secret in (stored, stored.rpartition("$")[2], "argon2", someone.person.password, someone.credential):
        assert secret not in said


def test_the_one_secret_that_an_admin_gets_is_that_of_a_new_service_key():
    names, secret = set(), set()
    for method in pb.service("AdminService").methods:
        for message in (method.input_type, method.output_type):
            for field in message.fields:
                inner = field.message_type.fields if field.message_type else []
                parts = {part.name for part in (field, *inner)}
                names |= parts
                secret |= {(message.name, name) for name in parts & contract.secret_names()}
    assert names
    assert secret == {("CreateServiceKeyResponse", "client_secret")}
    assert not [name for name in names if "password" in name or "hash" in name]


def test_the_reply_to_an_unknown_field_of_a_newer_client_is_the_same(server, someone, admin):
    # A newer client may send fields that the server does not know. The server must ignore them.
    newer = pb.SetUserRolesRequest(user_id=someone.id, roles=["writer"]).SerializeToString() + b"\xba\x3e\x05later"
    metadata = [("authorization", f"Bearer {admin.credential}")]
    reply = server.client.send_bytes("SetUserRoles", newer, metadata=metadata)
    user = json_format.MessageToDict(pb.SetUserRolesResponse.FromString(reply))["user"]
    assert user["roles"] == ["user", "writer"]
