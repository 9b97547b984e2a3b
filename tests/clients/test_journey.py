"""The main use of Postern: sign up, log in, get one's own account, refresh, log out.

It tests what the RPCs of AuthService answer to valid calls, what a logout ends and what it does not end, and that
accounts survive a restart. The rotation of refresh tokens is in `test_refresh`.
"""

import random
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from support import metrics, pb
from support.client import ACCOUNT_SERVICE, ADMIN_SERVICE, SERVICE, TOKEN_SERVICE, Person
from support.expect import expect_error, expect_unauthenticated, failure_of, reason_of
from support.http import Rest
from support.timing import expect_alike
from support.wait import wait_until


def is_about(stamp, expected: datetime) -> bool:
    return abs(stamp.ToDatetime(tzinfo=UTC) - expected) < timedelta(minutes=1)


def is_uuid7(text: str) -> bool:
    return str(uuid.UUID(text)) == text and uuid.UUID(text).version == 7


def test_a_person_signs_up_logs_in_refreshes_and_logs_out(client):
    person = Person()

    made = client.sign_up(person)
    tokens = client.login(person)
    assert client.me(tokens.access_token) == made

    fresh = client.refresh(tokens.refresh_token)
    assert fresh.refresh_token != tokens.refresh_token
    assert client.me(fresh.access_token) == made
    assert client.me(tokens.access_token) == made, "a refresh does not end the older access token"

    client.logout(fresh.refresh_token)
    expect_unauthenticated(lambda: client.me(fresh.access_token), "SESSION_REVOKED")
    expect_unauthenticated(lambda: client.me(tokens.access_token), "SESSION_REVOKED")
    expect_unauthenticated(lambda: client.refresh(fresh.refresh_token), "REFRESH_TOKEN_INVALID")


def test_a_new_account_is_what_the_contract_says(client):
    person = Person()

    user = client.sign_up(person)

    assert is_uuid7(user.id), user.id
    assert (user.username, user.email) == (person.username, person.email)
    assert list(user.roles) == ["user"]
    assert not user.email_verified
    assert not user.disabled
    now = datetime.now(UTC)
    assert is_about(user.create_time, now)
    assert user.update_time == user.create_time


def test_a_login_answers_a_bearer_pair_with_its_lifetimes_and_the_user(client):
    person = Person()
    made = client.sign_up(person)

    reply = client.call("Login", pb.LoginRequest(email=person.email, password=person.password))

    now = datetime.now(UTC)
    assert reply.user == made
    assert reply.tokens.token_type == "Bearer"
    assert is_about(reply.tokens.access_token_expire_time, now + timedelta(minutes=15))
    assert is_about(reply.tokens.refresh_token_expire_time, now + timedelta(days=7))


def test_every_login_opens_a_session_of_its_own(client):
    person, first = client.newcomer()
    second = client.login(person)
    assert first.refresh_token != second.refresh_token

    client.logout(first.refresh_token)

    expect_unauthenticated(lambda: client.me(first.access_token), "SESSION_REVOKED")
    assert client.me(second.access_token).email == person.email
    assert client.refresh(second.refresh_token).access_token


def test_logging_out_twice_is_ok(client):
    _, tokens = client.newcomer()

    client.logout(tokens.refresh_token)
    client.logout(tokens.refresh_token)

    expect_unauthenticated(lambda: client.refresh(tokens.refresh_token), "REFRESH_TOKEN_INVALID")


def test_logging_out_everywhere_ends_every_session_of_the_user_and_nobody_elses(client):
    person, first = client.newcomer()
    second = client.login(person)
    _, bystander = client.newcomer()

    client.logout(first.refresh_token, everywhere=True)

    for ended in (first, second):
        expect_unauthenticated(lambda tokens=ended: client.me(tokens.access_token), "SESSION_REVOKED")
        expect_unauthenticated(lambda tokens=ended: client.refresh(tokens.refresh_token), "REFRESH_TOKEN_INVALID")
    assert client.me(bystander.access_token)
    assert client.refresh(bystander.refresh_token)


def test_a_person_logs_in_again_after_logging_out_everywhere(client):
    person, tokens = client.newcomer()
    client.logout(tokens.refresh_token, everywhere=True)

    again = client.login(person)

    assert client.me(again.access_token).email == person.email
    assert client.refresh(again.refresh_token)


def test_an_ended_session_cannot_log_out_everywhere(client):
    person, tokens = client.newcomer()
    living = client.login(person)
    client.logout(tokens.refresh_token)

    expect_unauthenticated(lambda: client.logout(tokens.refresh_token, everywhere=True), "REFRESH_TOKEN_INVALID")

    assert client.me(living.access_token)


def test_an_older_refresh_token_of_a_session_still_logs_it_out(client):
    _, tokens = client.newcomer()
    fresh = client.refresh(tokens.refresh_token)

    client.logout(tokens.refresh_token)

    expect_unauthenticated(lambda: client.refresh(fresh.refresh_token), "REFRESH_TOKEN_INVALID")
    expect_unauthenticated(lambda: client.me(fresh.access_token), "SESSION_REVOKED")


def test_accounts_and_sessions_survive_a_restart(engine, start_server):
    server = start_server(engine)
    person, tokens = server.client.newcomer()
    made = server.client.me(tokens.access_token)
    ended = server.client.login(person)
    server.client.logout(ended.refresh_token)

    server.restart()

    assert server.client.me(tokens.access_token) == made, "the signing key is kept"
    assert server.client.refresh(tokens.refresh_token)
    assert server.client.login(person)
    expect_unauthenticated(lambda: server.client.me(ended.access_token), "SESSION_REVOKED")
    expect_unauthenticated(lambda: server.client.refresh(ended.refresh_token), "REFRESH_TOKEN_INVALID")


def test_a_server_on_default_settings_hashes_as_promised_and_stores_no_secret(engine, start_server):
    server = start_server(engine, argon2_memory_kib=None, argon2_iterations=None)
    person, tokens = server.client.newcomer()
    fresh = server.client.refresh(tokens.refresh_token)

    [(stored,)] = engine.query("SELECT password_hash FROM users WHERE email = ?", person.email)
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$"), stored

    everything = engine.dump()
    assert person.email in everything, "the dump contains the stored data"
    for secret in (person.password, tokens.access_token, tokens.refresh_token, fresh.refresh_token):
        assert secret not in everything


def test_a_login_rehashes_a_password_that_was_hashed_with_older_parameters(engine, start_server):
    server = start_server(engine)
    person, _ = server.client.newcomer()
    server.restart(argon2_memory_kib=2048, argon2_iterations=2)

    assert server.client.login(person)

    [(stored,)] = engine.query("SELECT password_hash FROM users WHERE email = ?", person.email)
    assert "m=2048,t=2,p=1" in stored, stored
    assert server.client.login(person)


@pytest.mark.parametrize("before, now", [(3, 1), (1, 3)], ids=["cheaper now", "dearer now"])
def test_a_hash_with_older_parameters_does_not_tell_by_time_that_there_is_an_account(
    embedded, start_server, size, before, now
):
    parameters = {"argon2_memory_kib": 19_456, "login_max_failures": 1000}
    server = start_server(embedded, argon2_iterations=before, **parameters)
    person, _ = server.client.newcomer()
    server.restart(argon2_iterations=now, **parameters)
    # The server learns at its start which parameters stored passwords have.
    ops = Rest(server, "ops_addr")
    wait_until(
        "it knows",
        lambda: metrics.read(ops.get("/metrics").body.decode()).value("postern_housekeeping_total", outcome="done"),
    )
    wrong = {True: replace(person, password="a wrong password"), False: Person()}

    def measure() -> tuple[list[float], list[float]]:
        taken: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(size(15, 200)):
            for is_known in random.sample([True, False], 2):
                begun = time.perf_counter()
                expect_unauthenticated(lambda who=wrong[is_known]: server.client.login(who), "INVALID_CREDENTIALS")
                taken[is_known].append(time.perf_counter() - begun)
        return taken[True], taken[False]

    expect_alike(measure, size(0.15, 0.05))


@pytest.mark.parametrize("engine", ["postgres"], indirect=True)
def test_replicas_on_one_database_share_accounts_tokens_and_revocations(engine, start_server):
    one, two = start_server(engine), start_server(engine)
    person, tokens = one.client.newcomer()

    assert two.client.me(tokens.access_token).email == person.email
    fresh = two.client.refresh(tokens.refresh_token)
    assert one.client.me(fresh.access_token).email == person.email

    two.client.logout(fresh.refresh_token)
    expect_unauthenticated(lambda: one.client.refresh(fresh.refresh_token), "REFRESH_TOKEN_INVALID")
    # A revocation reaches every replica within a second. The longer deadline is for a busy machine.
    wait_until(
        "the other replica refuses the access token",
        lambda: expect_unauthenticated(lambda: one.client.me(fresh.access_token), "SESSION_REVOKED"),
    )


@pytest.mark.parametrize("taken", ["email", "username"])
def test_of_simultaneous_sign_ups_of_one_name_exactly_one_succeeds(client, taken):
    wanted = Person()

    def attempt(number: int):
        # Every second attempt writes the name in capitals, which is the same name.
        written = getattr(wanted, taken).upper() if number % 2 else getattr(wanted, taken)
        client.sign_up(Person(**{taken: written}))

    def outcome(number: int):
        try:
            attempt(number)
        except grpc.RpcError as error:
            return error.code(), reason_of(error)
        return "made"

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(outcome, range(16)))

    refused = (grpc.StatusCode.ALREADY_EXISTS, f"{taken.upper()}_TAKEN")
    assert outcomes.count("made") == 1, outcomes
    assert outcomes.count(refused) == 15, outcomes


def test_refreshing_while_logging_out_leaves_nothing_alive(client):
    for _ in range(10):
        _, tokens = client.newcomer()
        with ThreadPoolExecutor(5) as pool:
            races = [pool.submit(client.refresh, tokens.refresh_token) for _ in range(4)]
            pool.submit(client.logout, tokens.refresh_token).result()

        # Whichever call was first, no token of the session works after the acknowledged logout.
        survivors = [tokens, *(race.result() for race in races if race.exception() is None)]
        for survivor in survivors:
            expect_unauthenticated(lambda token=survivor.refresh_token: client.refresh(token), "REFRESH_TOKEN_INVALID")
            expect_unauthenticated(lambda token=survivor.access_token: client.me(token), "SESSION_REVOKED")


def test_unknown_fields_and_metadata_are_ignored(client):
    person = Person()
    request = pb.SignUpRequest(username=person.username, email=person.email, password=person.password)
    # Field 999 with a string, as a newer client might send it.
    newer = request.SerializeToString() + b"\xba\x3e\x05later"

    client.send_bytes("SignUp", newer, metadata=[("x-request-id", "r-1"), ("x-unheard-of", "v"), ("blob-bin", b"\0")])

    assert client.login(person)


def test_an_unknown_method_is_unimplemented(client):
    for method in ("Nothing", "getme", "Login2", "/postern.auth.v1.NoService/Login", "/nowhere.Service/Call"):
        expect_error(lambda method=method: client.send_bytes(method, b""), grpc.StatusCode.UNIMPLEMENTED)


def test_every_rpc_declares_who_may_call_it():
    declared = {}
    services = [pb.service(name) for name in ("AuthService", "AccountService", "AdminService", "TokenService")]
    for method in (method for service in services for method in service.methods):
        options = {option.name: value for option, value in method.GetOptions().ListFields()}
        declared[method.name] = options.get("access")

    public, authenticated, admin, service = 1, 2, 3, 4
    assert declared == {
        "SignUp": public,
        "Login": public,
        "Refresh": public,
        "Logout": public,
        "GetMe": authenticated,
        "VerifyEmail": public,
        "ResendVerificationEmail": public,
        "RequestPasswordReset": public,
        "ResetPassword": public,
        "ChangePassword": authenticated,
        "RequestEmailChange": authenticated,
        "ChangeUsername": authenticated,
        "ConfirmEmailChange": public,
        "ListSessions": authenticated,
        "RevokeSession": authenticated,
        "DeleteAccount": authenticated,
        "ListUsers": admin,
        "GetUser": admin,
        "SetUserRoles": admin,
        "DisableUser": admin,
        "EnableUser": admin,
        "RevokeUserSessions": admin,
        "DeleteUser": admin,
        "ListAuditEvents": admin,
        "CreateServiceAccount": admin,
        "ListServiceAccounts": admin,
        "GetServiceAccount": admin,
        "SetServiceAccountRoles": admin,
        "DisableServiceAccount": admin,
        "EnableServiceAccount": admin,
        "DeleteServiceAccount": admin,
        "CreateServiceKey": admin,
        "ListServiceKeys": admin,
        "DeleteServiceKey": admin,
        "IntrospectToken": public,
        "IssueServiceToken": public,
        "RevokeToken": public,
        "WatchRevocations": service,
    }


def test_health_is_serving_for_the_server_and_each_service(client):
    assert client.health("") == "SERVING"
    for service in (SERVICE, ACCOUNT_SERVICE, ADMIN_SERVICE, TOKEN_SERVICE):
        assert client.health(service) == "SERVING"
    assert failure_of(lambda: client.health("no.such.Service")).code() is grpc.StatusCode.NOT_FOUND
