"""Every row of the contract's table of codes that concerns the RPCs of AuthService: exact code, reason and fields.

It tests the refusals of well-formed calls, and that answers which must not be distinguishable are the same bytes.
Malformed input is in `test_bad_input`, forged tokens are in `test_forgeries`, an unavailable database is in
`test_outage`, AccountService is in `test_account_flows`.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc

from support import pb
from support.admin import command
from support.client import Client, Person
from support.expect import expect_error, expect_invalid, expect_unauthenticated, failure_of, judge, reason_of
from support.wait import wait_until

# Hashes that take long enough on any machine for calls to wait in the queue.
SLOW_HASHES = {"argon2_memory_kib": 65536, "argon2_iterations": 6, "hash_threads": 1}


def login_with(client: Client, email: str, password: str):
    return client.call("Login", pb.LoginRequest(email=email, password=password))


def test_missing_fields_are_all_named_at_once(client):
    expect_invalid(lambda: client.call("SignUp", pb.SignUpRequest()), "username", "email", "password")
    expect_invalid(lambda: client.call("Login", pb.LoginRequest()), "email", "password")
    expect_invalid(lambda: client.call("Refresh", pb.RefreshRequest()), "refresh_token")
    expect_invalid(lambda: client.call("Logout", pb.LogoutRequest(everywhere=True)), "refresh_token")
    expect_invalid(lambda: client.call("IntrospectToken", pb.IntrospectTokenRequest()), "token")
    expect_invalid(lambda: client.call("RevokeToken", pb.RevokeTokenRequest()), "token")
    expect_invalid(
        lambda: client.call("IssueServiceToken", pb.IssueServiceTokenRequest()), "client_id", "client_secret"
    )


def test_a_weak_password_is_an_invalid_field(client):
    expect_invalid(lambda: client.sign_up(Person(password="password1")), "password")


def test_a_taken_email_says_so(client):
    person, _ = client.newcomer()
    again = Person(email=person.email)
    expect_error(lambda: client.sign_up(again), grpc.StatusCode.ALREADY_EXISTS, "EMAIL_TAKEN")


def test_a_taken_username_says_so(client):
    person, _ = client.newcomer()
    again = Person(username=person.username)
    expect_error(lambda: client.sign_up(again), grpc.StatusCode.ALREADY_EXISTS, "USERNAME_TAKEN")


def test_a_reserved_username_is_an_invalid_field_in_any_case_and_beside_other_fields(client):
    for name in ("admin", "Administrator", "ROOT", "system", "me", "support", "postern", "no-reply"):
        expect_invalid(lambda name=name: client.sign_up(Person(username=name)), "username")
    expect_invalid(lambda: client.sign_up(Person(username="admin", password="password1")), "username", "password")
    near = Person(username=f"admin.{Person().username}")
    assert client.sign_up(near).username == near.username


def test_the_reserved_usernames_are_a_setting(embedded, start_server, binary):
    server = start_server(embedded, reserved_usernames=" Billing, the-team ")
    for name in ("billing", "THE-TEAM"):
        expect_invalid(lambda name=name: server.client.sign_up(Person(username=name)), "username")
    assert server.client.sign_up(Person(username="admin")).username == "admin"
    tokens = server.client.newcomer()[1]

    server.restart(reserved_usernames="")
    assert server.client.sign_up(Person(username="billing")).username == "billing"

    # An account keeps its name, whatever is reserved later.
    me = server.client.me(tokens.access_token)
    server.restart(reserved_usernames=me.username)
    assert server.client.me(tokens.access_token) == me
    refused = command(binary, embedded, "user", "list", reserved_usernames="admin,no reply")
    assert refused.returncode != 0
    assert "no reply" in refused.stderr


def test_the_same_sign_up_again_is_taken_and_leaves_the_first_account_alone(client):
    person, tokens = client.newcomer()
    thief = replace(person, password=Person().password)

    error = failure_of(lambda: client.sign_up(thief))

    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert reason_of(error) in {"EMAIL_TAKEN", "USERNAME_TAKEN"}
    assert client.login(person)
    expect_unauthenticated(lambda: client.login(thief), "INVALID_CREDENTIALS")


def test_unknown_wrong_and_disabled_logins_get_the_same_bytes(server):
    client = server.client
    person, _ = client.newcomer()
    disabled, _ = client.newcomer()
    assert server.engine.execute("UPDATE users SET disabled = true WHERE email = ?", disabled.email) == 1

    answers = {
        "unknown": expect_unauthenticated(lambda: client.login(Person()), "INVALID_CREDENTIALS"),
        "wrong": expect_unauthenticated(
            lambda: login_with(client, person.email, Person().password), "INVALID_CREDENTIALS"
        ),
        "disabled": expect_unauthenticated(lambda: client.login(disabled), "INVALID_CREDENTIALS"),
        "disabled and wrong": expect_unauthenticated(
            lambda: login_with(client, disabled.email, Person().password), "INVALID_CREDENTIALS"
        ),
    }

    # An answer holds the code, the message, the bytes of the details and the names of the metadata.
    assert len(set(answers.values())) == 1, answers


def test_a_disabled_user_can_neither_refresh_nor_ask_who_they_are(server):
    client = server.client
    person, tokens = client.newcomer()
    server.engine.execute("UPDATE users SET disabled = true WHERE email = ?", person.email)

    expect_unauthenticated(lambda: client.refresh(tokens.refresh_token), "REFRESH_TOKEN_INVALID")
    expect_unauthenticated(lambda: client.me(tokens.access_token), "SESSION_REVOKED")


def test_a_deleted_users_tokens_are_dead(server):
    client = server.client
    person, tokens = client.newcomer()
    server.engine.execute("DELETE FROM sessions WHERE user_id IN (SELECT id FROM users WHERE email = ?)", person.email)
    assert server.engine.execute("DELETE FROM users WHERE email = ?", person.email) == 1

    expect_unauthenticated(lambda: client.me(tokens.access_token), "SESSION_REVOKED")
    expect_unauthenticated(lambda: client.refresh(tokens.refresh_token), "REFRESH_TOKEN_INVALID")
    expect_unauthenticated(lambda: client.login(person), "INVALID_CREDENTIALS")


def test_a_re_registered_email_is_a_new_account_and_the_old_tokens_stay_dead(server):
    client = server.client
    person, tokens = client.newcomer()
    old_id = client.me(tokens.access_token).id
    server.engine.execute("DELETE FROM sessions WHERE user_id IN (SELECT id FROM users WHERE email = ?)", person.email)
    server.engine.execute("DELETE FROM users WHERE email = ?", person.email)

    assert client.sign_up(person).id != old_id

    expect_unauthenticated(lambda: client.me(tokens.access_token), "SESSION_REVOKED")
    expect_unauthenticated(lambda: client.refresh(tokens.refresh_token), "REFRESH_TOKEN_INVALID")


def test_no_token_where_one_is_needed_is_token_missing(client):
    expect_unauthenticated(lambda: client.call("GetMe", pb.GetMeRequest()), "TOKEN_MISSING")


def test_a_token_that_is_none_is_token_invalid(client):
    expect_unauthenticated(lambda: client.me("not-a-token"), "TOKEN_INVALID")


def test_another_authorization_scheme_is_no_way_in(client):
    _, tokens = client.newcomer()
    for value in ("Basic YTpi", tokens.access_token, f"Token {tokens.access_token}"):
        metadata = [("authorization", value)]
        error = failure_of(lambda metadata=metadata: client.call("GetMe", pb.GetMeRequest(), metadata=metadata))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert reason_of(error) in {"TOKEN_MISSING", "TOKEN_INVALID"}


def test_an_access_token_past_its_expiry_is_token_expired_and_blocks_neither_refresh_nor_logout(embedded, start_server):
    server = start_server(embedded, access_token_ttl="2s")
    client = server.client
    _, tokens = client.newcomer()

    # The token is valid for two seconds, plus at most five seconds of leeway.
    wait_until(
        "the access token expires",
        lambda: reason_of(failure_of(lambda: client.me(tokens.access_token))) == "TOKEN_EXPIRED",
        pause=0.2,
    )
    expect_unauthenticated(lambda: client.me(tokens.access_token), "TOKEN_EXPIRED")

    stale = [("authorization", f"Bearer {tokens.access_token}")]
    fresh = client.call("Refresh", pb.RefreshRequest(refresh_token=tokens.refresh_token), metadata=stale).tokens
    assert client.me(fresh.access_token)
    client.call("Logout", pb.LogoutRequest(refresh_token=fresh.refresh_token), metadata=stale)
    expect_unauthenticated(lambda: client.refresh(fresh.refresh_token), "REFRESH_TOKEN_INVALID")


def test_every_dead_refresh_token_gets_the_same_bytes(client):
    _, ended = client.newcomer()
    client.logout(ended.refresh_token)
    _, stolen = client.newcomer()
    client.refresh(client.refresh(stolen.refresh_token).refresh_token)

    answers = {
        expect_unauthenticated(lambda token=token: client.refresh(token), "REFRESH_TOKEN_INVALID")
        for token in (ended.refresh_token, stolen.refresh_token, "nonsense", "a.b.c")
    }

    assert len(answers) == 1, answers


def test_an_unverified_address_is_told_apart_only_with_the_right_password(engine, start_server):
    server = start_server(engine, require_verified_email="true")
    person = Person()
    server.client.sign_up(person)

    expect_error(lambda: server.client.login(person), grpc.StatusCode.FAILED_PRECONDITION, "EMAIL_NOT_VERIFIED")
    wrong = expect_unauthenticated(
        lambda: server.client.login(replace(person, password="x" * 30)), "INVALID_CREDENTIALS"
    )
    unknown = expect_unauthenticated(lambda: server.client.login(Person()), "INVALID_CREDENTIALS")
    assert wrong == unknown
    [(sessions,)] = engine.query("SELECT count(*) FROM sessions")
    assert sessions == 0

    engine.execute("UPDATE users SET email_verified = true WHERE email = ?", person.email)
    tokens = server.client.login(person)
    assert server.client.me(tokens.access_token).email_verified


def test_a_full_hash_queue_is_overloaded_and_says_when_to_come_back(embedded, start_server):
    server = start_server(embedded, **SLOW_HASHES, hash_queue=1)
    client = server.client

    def attempt(_):
        error = failure_of(lambda: client.login(Person()))
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            assert reason_of(error) == "INVALID_CREDENTIALS", error.details()
            return "hashed"
        judge(error, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        return "overloaded"

    with ThreadPoolExecutor(12) as pool:
        outcomes = list(pool.map(attempt, range(12)))

    assert outcomes.count("hashed") >= 1, outcomes
    assert outcomes.count("overloaded") >= 1, outcomes
    expect_unauthenticated(lambda: client.login(Person()), "INVALID_CREDENTIALS")


def test_calls_that_need_no_hash_are_answered_while_the_hash_queue_is_full(embedded, start_server):
    server = start_server(embedded, **SLOW_HASHES, hash_queue=8)
    _, tokens = server.client.newcomer()

    with ThreadPoolExecutor(8) as pool:
        logins = [pool.submit(failure_of, lambda: server.client.login(Person())) for _ in range(8)]
        overtaken = 0
        while not all(login.done() for login in logins):
            assert server.client.me(tokens.access_token)
            tokens = server.client.refresh(tokens.refresh_token)
            overtaken += not all(login.done() for login in logins)

    assert overtaken, "cheap calls are answered before logins that were made earlier"
