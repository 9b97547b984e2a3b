"""Service accounts: their administration, the tokens that they get for a secret, and what ends those; introspection.

Who may call which RPC is tested in `test_access_matrix`, the log of a database and its dump in `test_no_token_at_rest`,
what a call costs the database in `test_statements`, and replicas in `test_replicas`. The store is tested in Rust.
"""

import re
import socket
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from support import forgeries, jose, pb
from support.admin import Somebody, any_way, everything
from support.expect import expect_error, expect_unauthenticated, failure_of, reason_of
from support.services import INVALID_CLIENT, ServiceAccount, introspect
from support.transports import ByGrpc
from support.wait import wait_until
from support.watch import connect, subject, until_caught_up, watch

NOBODY = "01890000-0000-7000-8000-000000000000"
INVALID = ("INVALID_ARGUMENT", "INVALID_FIELD")
NOT_FOUND = ("NOT_FOUND", "NOT_FOUND")
REVOKED = ("UNAUTHENTICATED", "SESSION_REVOKED")
SECRET = re.compile(r"postern_[\w-]{43}", re.ASCII)
DEAD = {
    "active": False, "subject": "", "subjectType": "SUBJECT_TYPE_UNSPECIFIED", "clientId": "", "sessionId": "",
    "username": "", "email": "", "emailVerified": False, "roles": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def settings():
    # These tests present many wrong secrets.
    return {"login_limit_per_client": "0"}


@pytest.fixture
def admin(way, server) -> Somebody:
    return Somebody(way, server.engine, "admin")


@pytest.fixture
def service(way, admin) -> ServiceAccount:
    return ServiceAccount(way, admin, "reader")


# -- administration ------------------------------------------------------------------------------------------------


def test_an_account_is_created_changed_listed_and_deleted(way, admin):
    name = f"s{uuid.uuid4().hex[:16]}"
    call = {"credential": admin.credential}
    account = way.ok("CreateServiceAccount", name=name, roles=["writer", "admin", "writer"], **call)["serviceAccount"]
    assert uuid.UUID(account["id"]).version == 7
    assert (account["name"], account["roles"], account["disabled"]) == (name, ["admin", "writer"], False)
    assert account["createTime"] == account["updateTime"]
    about = {**call, "service_account_id": account["id"]}
    assert way.ok("GetServiceAccount", **about)["serviceAccount"] == account

    for rpc, fields, changed in [
        ("SetServiceAccountRoles", {"roles": []}, {"roles": []}),
        ("DisableServiceAccount", {"reason": "a leak"}, {"disabled": True}),
        ("SetServiceAccountRoles", {"roles": ["reader"]}, {"roles": ["reader"]}),
        ("EnableServiceAccount", {}, {"disabled": False}),
        ("EnableServiceAccount", {}, {}),
    ]:
        answer = way.ok(rpc, **about, **fields)["serviceAccount"]
        assert {**account, **changed, "updateTime": answer["updateTime"]} == answer, rpc
        account = answer
    listed = everything(way, "ListServiceAccounts", admin.credential, "serviceAccounts", page_size=200)
    assert account in listed

    assert way.ok("DeleteServiceAccount", **about) == {}
    for rpc, fields in [
        ("GetServiceAccount", {}), ("SetServiceAccountRoles", {"roles": []}), ("DisableServiceAccount", {}),
        ("EnableServiceAccount", {}), ("DeleteServiceAccount", {}), ("CreateServiceKey", {}), ("ListServiceKeys", {}),
        ("DeleteServiceKey", {"key_id": NOBODY}),
    ]:  # fmt: skip
        way.refused(rpc, *NOT_FOUND, **about, **fields)


def test_accounts_are_listed_oldest_first_on_pages_without_gaps(way, admin):
    ids = [ServiceAccount(way, admin).id for _ in range(5)]
    for page_size in (1, 2, 200):
        listed = everything(way, "ListServiceAccounts", admin.credential, "serviceAccounts", page_size=page_size)
        assert [account["id"] for account in listed if account["id"] in ids] == ids
    page = way.ok("ListServiceAccounts", credential=admin.credential, page_size=1)
    # A page token is good for its own list.
    stray = {"credential": admin.credential, "page_token": page["nextPageToken"]}
    way.refused("ListUsers", *INVALID, {"page_token"}, **stray)


def test_no_two_accounts_have_the_same_name(way, admin, service):
    taken = {"credential": admin.credential, "name": service.name}
    way.refused("CreateServiceAccount", "ALREADY_EXISTS", "USERNAME_TAKEN", **taken)
    service.change("DeleteServiceAccount")
    assert way.ok("CreateServiceAccount", **taken)


def test_bad_fields_are_all_named_at_once(way, admin, service):
    call, about = {"credential": admin.credential}, {"credential": admin.credential, "service_account_id": service.id}
    for name in ("", "A", "-a", "a b", "é", "a" * 65, "a\n"):
        way.refused("CreateServiceAccount", *INVALID, {"name"}, name=name, **call)
    way.refused("CreateServiceAccount", *INVALID, {"name", "roles"}, name="A", roles=["No Role"], **call)
    bad = {"credential": admin.credential, "service_account_id": "nonsense"}
    way.refused("SetServiceAccountRoles", *INVALID, {"service_account_id", "roles"}, roles=["No Role"], **bad)
    way.refused("DisableServiceAccount", *INVALID, {"service_account_id", "reason"}, reason="x" * 501, **bad)
    way.refused("DeleteServiceKey", *INVALID, {"service_account_id", "key_id"}, **{**bad, "key_id": "nonsense"})
    for description in ("x" * 201, "a\nb", "a\x00"):
        way.refused("CreateServiceKey", *INVALID, {"description"}, description=description, **about)
    way.refused("CreateServiceKey", *INVALID, {"service_account_id", "description"}, description="\n", **bad)
    way.refused("IssueServiceToken", *INVALID, {"client_id", "client_secret"})
    long = {"client_id": service.id, "client_secret": "x" * 129}
    way.refused("IssueServiceToken", *INVALID, {"client_secret"}, **long)
    way.refused("IntrospectToken", *INVALID, {"token"})
    way.refused("RevokeToken", *INVALID, {"token"})


@pytest.mark.parametrize("way", ["gRPC"], indirect=True)
def test_a_time_of_expiry_is_in_the_future_and_a_valid_time(way, admin, service):
    about = {"credential": admin.credential, "service_account_id": service.id}
    for moment in ({"seconds": 1}, {"seconds": int(time.time()) - 5}, {"seconds": 10**14}, {"seconds": 1, "nanos": -1}):
        way.refused("CreateServiceKey", *INVALID, {"expire_time"}, expire_time=moment, **about)
    moment = {"seconds": int(time.time()) + 3600, "nanos": 123_456_789}
    key = way.ok("CreateServiceKey", expire_time=moment, **about)["key"]
    assert datetime.fromisoformat(key["expireTime"]).microsecond == 123_456


def test_an_account_has_20_keys_at_most(way, admin, service):
    for _ in range(19):
        service.new_key()
    about = {"credential": admin.credential, "service_account_id": service.id}
    way.refused("CreateServiceKey", *INVALID, {"service_account_id"}, **about)
    assert len(service.listed_keys()) == 20
    service.delete_key()
    service.new_key()


def test_a_key_is_listed_without_its_secret_and_with_the_hour_of_its_last_use(server, way, admin, service):
    named, other = service.new_key(description="in the vault, é")
    assert SECRET.fullmatch(service.secret)
    assert other != service.secret
    assert [(key["id"], key["description"]) for key in service.listed_keys()] == [
        (service.key["id"], ""), (named["id"], "in the vault, é"),
    ]  # fmt: skip
    assert not [key for key in service.listed_keys() if "lastUseTime" in key]
    assert not [key for key in service.listed_keys() if "expireTime" in key]

    def used() -> datetime:
        [key] = [key for key in service.listed_keys() if key["id"] == service.key["id"]]
        return datetime.fromisoformat(key["lastUseTime"])

    before = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    service.token()
    assert before <= used() <= datetime.now(UTC)
    assert (used().minute, used().second, used().microsecond) == (0, 0, 0)
    # An earlier hour is replaced by the next use, and the same one is left alone.
    engine = server.engine
    earlier = engine.as_time(before - timedelta(hours=5))
    of_key = engine.as_id(uuid.UUID(service.key["id"]))
    assert engine.execute("UPDATE service_keys SET last_use_time = ? WHERE id = ?", earlier, of_key) == 1
    service.token()
    assert used() >= before
    assert "lastUseTime" not in service.listed_keys()[1], "the other key was not used"


def test_a_service_with_the_role_admin_is_an_admin_and_the_audit_names_it(way, admin):
    service = ServiceAccount(way, admin, "admin")
    token = service.token()
    other = way.ok("CreateServiceAccount", credential=token, name=f"{service.name}-2")["serviceAccount"]
    call = {"credential": token, "user_id": other["id"]}
    [event] = way.ok("ListAuditEvents", **call)["events"]
    assert (event["action"], event["actorId"], event["userId"]) == ("service_created", service.id, other["id"])
    assert event["detail"] == other["name"]
    # It can also take itself away.
    way.ok("DeleteServiceAccount", credential=token, service_account_id=service.id)
    way.refused("ListUsers", *REVOKED, credential=token)


def test_the_audit_holds_each_step_once_and_no_secret(way, admin, service):
    named, _ = service.new_key()
    service.token()
    service.change("SetServiceAccountRoles", roles=["writer"])
    service.change("DisableServiceAccount", reason="a leak")
    service.change("EnableServiceAccount")
    service.delete_key(named)
    service.change("DeleteServiceAccount")
    events = everything(way, "ListAuditEvents", admin.credential, "events", user_id=service.id)[::-1]
    assert [(event["action"], event["detail"], event["sessionId"]) for event in events] == [
        ("service_created", service.name, ""),
        ("service_key_created", "", service.key["id"]),
        ("service_key_created", "", named["id"]),
        ("roles_changed", "reader -> writer", ""),
        ("service_disabled", "a leak", ""),
        ("service_enabled", "", ""),
        ("service_key_deleted", "", named["id"]),
        ("service_deleted", service.name, ""),
    ]
    assert {event["actorId"] for event in events} == {admin.id}


# -- tokens --------------------------------------------------------------------------------------------------------


def test_a_token_of_a_service_names_the_service_and_no_person(way, server, service):
    answer = way.ok("IssueServiceToken", client_id=service.id, client_secret=service.secret)
    assert set(answer) == {"accessToken", "accessTokenExpireTime", "tokenType"}
    assert answer["tokenType"] == "Bearer"
    header, claims = jose.header_of(answer["accessToken"]), jose.claims_of(answer["accessToken"])
    assert header["typ"] == "at+jwt"
    assert uuid.UUID(claims.pop("jti"))
    lifetime = claims["exp"] - claims.pop("iat")
    assert datetime.fromisoformat(answer["accessTokenExpireTime"]).timestamp() == claims.pop("exp")
    assert lifetime == 900
    assert claims == {
        "iss": "http://localhost:8080", "aud": "postern", "sub": service.id, "client_id": service.id,
        "sid": service.key["id"], "username": service.name, "subject_type": "service", "roles": ["reader"], "gen": 0,
    }  # fmt: skip


def test_a_token_does_not_outlive_its_key(way, admin, service):
    end = datetime.now(UTC) + timedelta(seconds=60)
    # By gRPC a time is a message, and by REST it is a text.
    by_grpc = isinstance(way, ByGrpc)
    key, secret = service.new_key(expire_time={"seconds": int(end.timestamp())} if by_grpc else end.isoformat())
    claims = jose.claims_of(service.token(secret))
    assert claims["sid"] == key["id"]
    assert claims["exp"] == int(datetime.fromisoformat(key["expireTime"]).timestamp())


def test_the_lifetime_of_a_services_token_is_a_setting_of_its_own(embedded, start_server):
    server = start_server(embedded, service_token_ttl="5m", access_token_ttl="1m")
    with any_way("gRPC", server) as way:
        service = ServiceAccount(way, Somebody(way, embedded, "admin"))
        claims = jose.claims_of(service.token())
        assert claims["exp"] - claims["iat"] == 300


def test_a_secret_is_replaced_without_a_gap(way, service):
    """Between any two steps a client with either secret gets tokens, and the tokens of the new key stay good."""
    old = service.token()
    new_key, new_secret = service.new_key()
    new = service.token(new_secret)
    for token in (old, new, service.token()):
        assert introspect(way, token)["active"]
    service.delete_key()
    assert introspect(way, old) == DEAD
    way.refused("IssueServiceToken", *INVALID_CLIENT, client_id=service.id, client_secret=service.secret)
    for token in (new, service.token(new_secret)):
        assert introspect(way, token)["sessionId"] == new_key["id"]


def test_one_token_is_revoked_and_the_others_of_its_key_are_not(way, admin, service):
    token, other = service.token(), service.token()
    for _ in range(2):
        way.ok("RevokeToken", token=token)
        assert introspect(way, token) == DEAD
    assert introspect(way, other)["active"]
    [event] = everything(way, "ListAuditEvents", admin.credential, "events", action="service_token_revoked")
    assert (event["userId"], event["actorId"], event["sessionId"]) == (
        service.id,
        service.id,
        jose.claims_of(token)["jti"],
    )


@pytest.mark.parametrize("way", ["gRPC"], indirect=True)
def test_a_revoked_token_is_told_by_its_id_and_ends_its_stream(way, server, service):
    token = service.token()
    with connect(server) as channel:
        by_others, stream = watch(channel, service.token()), watch(channel, token)
        for each in (by_others, stream):
            until_caught_up(each)
        way.ok("RevokeToken", token=token)
        told = next(message for message in by_others if message.WhichOneof("event") == "session_ended")
        assert subject(told) == jose.claims_of(token)["jti"]
        expect_unauthenticated(lambda: list(stream), "SESSION_REVOKED")


def test_either_token_of_a_person_ends_its_session(way, server):
    for kind in ("accessToken", "refreshToken"):
        person = Somebody(way, server.engine)
        for token in ("nonsense", f"{person.tokens[kind]}A"):
            way.ok("RevokeToken", token=token)
        assert way.ok("GetMe", credential=person.credential)
        for _ in range(2):
            way.ok("RevokeToken", token=person.tokens[kind])
            way.expect_dead(person.tokens)


@pytest.mark.parametrize("way", ["gRPC"], indirect=True)
@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_a_service_cannot_fill_the_memory_with_its_own_revocations(way, server, service):
    def revoke(token: str) -> str:
        try:
            server.client.call("RevokeToken", pb.RevokeTokenRequest(token=token))
        except grpc.RpcError as error:
            return reason_of(error)
        return "OK"

    tokens = [service.token() for _ in range(700)]
    with ThreadPoolExecutor(8) as pool:
        answers = Counter(pool.map(revoke, tokens))
    assert 600 <= answers["OK"] < 700, answers
    assert answers["OK"] + answers["THROTTLED"] == 700, answers
    way.ok("RevokeToken", token=Somebody(way, "sqlite").credential)
    assert introspect(way, service.token())["active"]


def test_what_ends_tokens_ends_them_at_once_and_only_those(way, admin):
    other = ServiceAccount(way, admin)
    bystander = other.token()
    ends = {
        "its key": lambda service: service.delete_key(),
        "disabling": lambda service: service.change("DisableServiceAccount"),
        "deletion": lambda service: service.change("DeleteServiceAccount"),
    }
    for what, end in ends.items():
        service = ServiceAccount(way, admin, "admin")
        token = service.token()
        assert way.ok("ListUsers", credential=token, page_size=1)
        end(service)
        way.refused("ListUsers", *REVOKED, credential=token)
        assert introspect(way, token) == DEAD, what
        way.refused("IssueServiceToken", *INVALID_CLIENT, client_id=service.id, client_secret=service.secret)
    assert introspect(way, bystander)["active"]
    other.change("DisableServiceAccount")
    other.change("EnableServiceAccount")
    assert introspect(way, other.token())["active"], "an enabled account gets tokens again"


def test_roles_of_a_service_count_from_the_moment_of_their_change(way, admin, service):
    token = service.token()
    way.refused("ListUsers", "PERMISSION_DENIED", "ROLE_REQUIRED", credential=token)
    service.change("SetServiceAccountRoles", roles=["admin"])
    assert way.ok("ListUsers", credential=token, page_size=1)
    assert introspect(way, token)["roles"] == ["admin"]
    service.change("SetServiceAccountRoles", roles=[])
    way.refused("ListUsers", "PERMISSION_DENIED", "ROLE_REQUIRED", credential=token)
    assert introspect(way, token)["roles"] == []


# -- refusals ------------------------------------------------------------------------------------------------------


def refused_credentials(way, admin, engine) -> dict[str, tuple[str, str]]:
    """Every kind of credentials that is refused: a client id and a secret."""
    names = ("good", "disabled", "deleted", "without keys", "deleted key", "expired")
    accounts = {name: ServiceAccount(way, admin) for name in names}
    accounts["disabled"].change("DisableServiceAccount")
    accounts["deleted"].change("DeleteServiceAccount")
    accounts["without keys"].delete_key()
    # It has another key, which is good.
    accounts["deleted key"].new_key()
    accounts["deleted key"].delete_key()
    of_key = engine.as_id(uuid.UUID(accounts["expired"].key["id"]))
    past = engine.as_time(datetime.now(UTC) - timedelta(seconds=1))
    assert engine.execute("UPDATE service_keys SET expire_time = ? WHERE id = ?", past, of_key) == 1
    good = accounts.pop("good")
    known = {name: (account.id, account.secret) for name, account in accounts.items()}
    return {
        **known,
        "unknown": (NOBODY, good.secret),
        "no id": ("nonsense", good.secret),
        "the name for the id": (good.name, good.secret),
        "wrong": (good.id, f"postern_{'A' * 43}"),
        "nonsense": (good.id, "x"),
        "another's": (good.id, accounts["disabled"].secret),
        "one letter more": (good.id, f"{good.secret}A"),
        "one letter less": (good.id, good.secret[:-1]),
        "the other case": (good.id, good.secret.swapcase()),
    }


def test_all_bad_credentials_get_the_same_bytes(server, way, admin):
    answers = {}
    for name, (client_id, secret) in refused_credentials(way, admin, server.engine).items():
        credentials = {"client_id": client_id, "client_secret": secret}
        answers[name] = way.refused("IssueServiceToken", *INVALID_CLIENT, **credentials).seen
    assert len(set(answers.values())) == 1, answers


def test_wrong_secrets_are_limited_per_client_and_lock_nobody_out(embedded, start_server):
    server = start_server(embedded, login_limit_per_client=3)
    with any_way("gRPC", server) as way:
        service = ServiceAccount(way, Somebody(way, embedded, "admin"))

        def guess():
            request = pb.IssueServiceTokenRequest(client_id=service.id, client_secret="wrong")
            return server.client.call("IssueServiceToken", request)

        reasons = [reason_of(failure_of(guess)) for _ in range(10)]
        assert reasons[-1] == "THROTTLED", reasons
        assert set(reasons) == {"INVALID_CLIENT", "THROTTLED"}
        assert reasons == sorted(reasons), "no guess is answered after the limit was reached"
        expect_error(guess, grpc.StatusCode.RESOURCE_EXHAUSTED, "THROTTLED")
        for _ in range(10):
            assert service.token(), "the right secret is not limited, and nothing is locked"


# -- introspection -------------------------------------------------------------------------------------------------


def test_introspection_tells_what_a_live_token_is_good_for(way, admin, service):
    token = service.token()
    claims, found = jose.claims_of(token), introspect(way, token)
    issued, expires = (datetime.fromisoformat(found.pop(name)).timestamp() for name in ("issueTime", "expireTime"))
    assert (issued, expires) == (claims["iat"], claims["exp"])
    assert found == {
        "active": True, "subject": service.id, "subjectType": "SUBJECT_TYPE_SERVICE", "clientId": service.id,
        "sessionId": service.key["id"], "username": service.name, "email": "", "emailVerified": False,
        "roles": ["reader"],
    }  # fmt: skip

    somebody = Somebody(way)
    claims, found = jose.claims_of(somebody.credential), introspect(way, somebody.credential)
    issued, expires = (datetime.fromisoformat(found.pop(name)).timestamp() for name in ("issueTime", "expireTime"))
    assert (issued, expires) == (claims["iat"], claims["exp"])
    assert found == {
        "active": True, "subject": somebody.id, "subjectType": "SUBJECT_TYPE_USER", "clientId": "postern",
        "sessionId": claims["sid"], "username": somebody.person.username, "email": somebody.email,
        "emailVerified": False, "roles": ["user"],
    }  # fmt: skip
    way.ok("SetUserRoles", credential=admin.credential, user_id=somebody.id, roles=["writer"])
    assert introspect(way, somebody.credential)["roles"] == ["user", "writer"], "the roles of this moment"


def test_a_dead_token_is_not_active_and_nothing_else(way, admin):
    ended, disabled, deleted = (Somebody(way) for _ in range(3))
    way.ok("Logout", refresh_token=ended.tokens["refreshToken"])
    way.ok("DisableUser", credential=admin.credential, user_id=disabled.id)
    way.ok("DeleteUser", credential=admin.credential, user_id=deleted.id)
    for somebody in (ended, disabled, deleted):
        assert introspect(way, somebody.credential) == DEAD
    assert introspect(way, Somebody(way).tokens["refreshToken"]) == DEAD, "a refresh token is no access token"


def test_an_expired_token_is_not_active(embedded, start_server):
    server = start_server(embedded, access_token_ttl="1s", service_token_ttl="1s")
    with any_way("gRPC", server) as way:
        admin = Somebody(way, embedded, "admin")
        tokens = [admin.credential, ServiceAccount(way, admin).token()]
        assert all(introspect(way, token)["active"] for token in tokens)
        for token in tokens:
            # Valid for one second, plus at most five seconds of leeway.
            wait_until("the token expires", lambda token=token: introspect(way, token) == DEAD, pause=0.2)


class Listener:
    """A server that a forged token names. It counts who connects."""

    def __enter__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def _accept(self) -> None:
        while True:
            try:
                self._socket.accept()[0].close()
            except OSError:
                return
            self.connections += 1

    def __exit__(self, *_):
        self._socket.close()


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
@pytest.mark.parametrize("way", ["gRPC"], indirect=True)
def test_every_forged_token_is_not_active_and_makes_the_server_ask_nobody(server, way, admin, service, jwks, capsys):
    tokens = {"person": Somebody(way).credential, "service": service.token()}
    seconds = []
    with Listener() as listener:
        for kind, token in tokens.items():
            for name, forged in forgeries.of(token, jwks, listener.url).items():
                began = time.perf_counter()
                found = introspect(way, forged)
                seconds.append(time.perf_counter() - began)
                assert found == DEAD, f"{kind}: {name}"
                expect_unauthenticated(lambda forged=forged: server.client.me(forged), "TOKEN_INVALID")
            assert introspect(way, token)["active"], "the real token is none of them"
        assert listener.connections == 0
    slowest, median = max(seconds), sorted(seconds)[len(seconds) // 2]
    with capsys.disabled():
        print(f"\n{len(seconds)} forged tokens: median {1000 * median:.2f} ms, slowest {1000 * slowest:.2f} ms")


def test_what_is_not_a_person_is_refused_by_public_rpcs_of_people_as_if_it_were_nobody(way, server, service):
    """A public RPC treats a service's token as no token: it gives the caller nothing."""
    token = service.token()
    way.refused("VerifyEmail", "INVALID_ARGUMENT", "ONE_TIME_TOKEN_INVALID", credential=token, token="A" * 64)
    way.refused("Refresh", "UNAUTHENTICATED", "REFRESH_TOKEN_INVALID", credential=token, refresh_token=token)
    way.refused("Logout", "UNAUTHENTICATED", "REFRESH_TOKEN_INVALID", credential=token, refresh_token=token)


# -- many tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_tokens_of_a_key_that_is_in_use_write_nothing_to_sqlite(server, size, capsys):
    """`test_statements` counts the same for PostgreSQL."""
    count = size(300, 3_000)
    with any_way("gRPC", server) as way, server.engine.version() as version:
        service = ServiceAccount(way, Somebody(way, server.engine, "admin"))
        service.token()
        settled, began = settled_version(version), time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            tokens = set(pool.map(lambda _: service.token(), range(count)))
        rate = count / (time.perf_counter() - began)
        assert len(tokens) == count
        assert version() == settled
        service.delete_key()
        assert version() != settled, "a write is seen"
    with capsys.disabled():
        print(f"\n{count} tokens of a service, {rate:.0f} a second")


def settled_version(version) -> int:
    """The number once the writes of the replica itself, such as the mails of sign-ups, are over."""
    seen = [version(), -1]

    def is_settled() -> bool:
        seen.append(version())
        return len(set(seen[-5:])) == 1

    wait_until("nothing is written", is_settled, pause=0.3)
    return seen[-1]
