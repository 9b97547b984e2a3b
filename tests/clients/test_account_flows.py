"""The calls that users make about their own account, with valid input: verify, reset, change, by gRPC and by REST.

It tests what the RPCs of AccountService do, which sessions and tokens each one ends, and who gets a mail. The rules of
one-time tokens are in `test_mail_tokens`. Answers that must not differ are in `test_mail_enumeration`.
"""

import contextlib
from dataclasses import replace

import grpc
import pytest

from support import jose
from support.admin import Somebody, everything
from support.client import Person
from support.expect import expect_error, expect_unauthenticated
from support.mail import CHANGE, RESET, VERIFY
from support.outbox import settle

WEAK = "password1"


@pytest.fixture(scope="module")
def settings(mailbox):
    # For the server these tests are one client, which requests more mail in a minute than the limit allows.
    return {"mail_url": mailbox.url, "mail_limit_per_client": "0"}


class Someone:
    """A user with a session, and helpers that read the mails to this user."""

    def __init__(self, way, mailbox):
        self.way, self.mailbox = way, mailbox
        self.person = Person()
        self.user = way.sign_up(self.person)
        self.tokens = way.login(self.person)

    @property
    def email(self) -> str:
        return self.person.email

    def token(self, kind: str) -> str:
        return self.mailbox.token(self.email, kind)

    def ask_for_reset(self) -> str:
        """Requests a password reset and returns the token from the mail."""
        assert self.way.ok("RequestPasswordReset", email=self.email) == {}
        return self.token(RESET)

    def ask_for_change(self, new_email: str) -> str:
        """Requests a change of address and returns the token from the mail."""
        asked = self.way.ok(
            "RequestEmailChange",
            credential=self.tokens["accessToken"],
            new_email=new_email,
            password=self.person.password,
        )
        assert asked == {}
        return self.mailbox.token(new_email, CHANGE)


@pytest.fixture
def someone(way, mailbox):
    return Someone(way, mailbox)


def claims_verified(tokens: dict) -> bool:
    return jose.claims_of(tokens["accessToken"]).get("email_verified", False)


# -- verification -------------------------------------------------------------------------------------------------


def test_a_verified_address_is_in_the_account_at_once_and_in_access_tokens_from_the_next_on(way, someone):
    assert someone.user["emailVerified"] is False
    assert not claims_verified(someone.tokens)

    verified = way.ok("VerifyEmail", someone.tokens["accessToken"], token=someone.token(VERIFY))["user"]

    assert verified["emailVerified"] is True
    assert verified["updateTime"] > someone.user["updateTime"]
    assert {**verified, "emailVerified": False, "updateTime": ""} == {
        **someone.user,
        "emailVerified": False,
        "updateTime": "",
    }
    assert way.me(someone.tokens) == verified, "also with the access token from before the verification"
    assert claims_verified(way.refresh(someone.tokens))
    assert claims_verified(way.login(someone.person))


def test_verifying_with_a_session_ends_none_and_logs_nobody_in(way, someone):
    other = way.login(someone.person)
    reply = way.ok("VerifyEmail", other["accessToken"], token=someone.token(VERIFY))
    assert set(reply) == {"user"}
    for tokens in (someone.tokens, other):
        assert way.me(tokens)
        assert way.refresh(tokens)


def test_verifying_without_a_session_ends_what_another_person_may_have_opened(way, someone):
    reply = way.ok("VerifyEmail", token=someone.token(VERIFY))
    assert set(reply) == {"user"}
    way.refused("GetMe", "UNAUTHENTICATED", "SESSION_REVOKED", credential=someone.tokens["accessToken"])
    way.refused("Refresh", "UNAUTHENTICATED", "REFRESH_TOKEN_INVALID", refresh_token=someone.tokens["refreshToken"])
    assert way.me(way.login(someone.person))["emailVerified"]


def test_the_owner_of_an_address_gets_an_account_that_somebody_else_made_with_it(way, someone):
    """Somebody else signed up, logged in, and asked to move the account to an address of their own."""
    change = someone.ask_for_change(Person().email)

    way.ok("VerifyEmail", token=someone.token(VERIFY))

    way.refused("Refresh", "UNAUTHENTICATED", "REFRESH_TOKEN_INVALID", refresh_token=someone.tokens["refreshToken"])
    way.expect_bad_token("ConfirmEmailChange", change)
    way.expect_wrong(someone.person)
    owner = replace(someone.person, password=Person().password)
    way.ok("ResetPassword", token=someone.ask_for_reset(), new_password=owner.password)
    assert way.me(way.login(owner))["email"] == someone.email


def test_a_verification_can_be_mailed_again_and_the_newer_one_counts(way, someone):
    first = someone.token(VERIFY)
    assert way.ok("ResendVerificationEmail", email=someone.email.upper()) == {}
    second = someone.token(VERIFY)
    assert second != first
    way.expect_bad_token("VerifyEmail", first)
    assert way.ok("VerifyEmail", token=second)["user"]["emailVerified"]


def test_a_verified_address_is_not_mailed_again(server, mailbox, way, someone):
    way.ok("VerifyEmail", token=someone.token(VERIFY))
    way.ok("ResendVerificationEmail", email=someone.email)
    settle(server.engine)
    assert len(mailbox.mails(someone.email)) == 1


def test_where_verification_is_demanded_nobody_logs_in_before_it(engine, start_server, start_mailbox):
    mailbox = start_mailbox()
    server = start_server(engine, mail_url=mailbox.url, require_verified_email="true")
    client, person = server.client, Person()
    assert not client.sign_up(person).email_verified
    wrong = replace(person, password=Person().password)

    expect_error(lambda: client.login(person), grpc.StatusCode.FAILED_PRECONDITION, "EMAIL_NOT_VERIFIED")
    refused = expect_unauthenticated(lambda: client.login(wrong), "INVALID_CREDENTIALS")
    assert refused == expect_unauthenticated(lambda: client.login(Person()), "INVALID_CREDENTIALS")

    client.verify_email(mailbox.token(person.email, VERIFY))

    assert client.me(client.login(person).access_token).email_verified
    expect_unauthenticated(lambda: client.login(wrong), "INVALID_CREDENTIALS")


def test_where_verification_is_demanded_a_reset_counts_as_one(engine, start_server, start_mailbox):
    mailbox = start_mailbox()
    server = start_server(engine, mail_url=mailbox.url, require_verified_email="true")
    client, person = server.client, Person()
    client.sign_up(person)
    client.request_password_reset(person.email)
    again = replace(person, password=Person().password)

    client.reset_password(mailbox.token(person.email, RESET), again.password)

    assert client.me(client.login(again).access_token).email_verified, "a token from a mail proves the address"


# -- reset --------------------------------------------------------------------------------------------------------


def test_a_reset_makes_the_new_password_good_and_the_old_one_bad_and_tells_the_owner(way, mailbox, someone):
    someone.token(VERIFY)
    again = replace(someone.person, password=Person().password)

    reply = way.ok("ResetPassword", token=someone.ask_for_reset(), new_password=again.password)

    assert reply == {}, "a reset does not log in"
    way.expect_wrong(someone.person)
    assert way.login(again)
    notice = mailbox.notice(someone.email)
    assert notice.recipients == (someone.email,)


def test_a_reset_ends_every_session_and_opens_none(server, way, someone):
    others = [way.login(someone.person) for _ in range(3)]
    token = someone.ask_for_reset()
    bystander = server.client.newcomer()[1]
    [(before,)] = server.engine.query("SELECT count(*) FROM sessions")

    way.ok("ResetPassword", token=token, new_password=Person().password)

    for tokens in (someone.tokens, *others):
        way.expect_dead(tokens)
    assert server.engine.query("SELECT count(*) FROM sessions")[0][0] <= before
    assert server.client.me(bystander.access_token), "other users keep their sessions"


def test_a_reset_ends_a_pending_change_of_address(way, someone):
    new_email = Person().email
    change = someone.ask_for_change(new_email)
    again = replace(someone.person, password=Person().password)

    way.ok("ResetPassword", token=someone.ask_for_reset(), new_password=again.password)

    way.expect_bad_token("ConfirmEmailChange", change)
    assert way.me(way.login(again))["email"] == someone.email


def test_a_reset_ends_every_other_reset(way, someone):
    first, second = someone.ask_for_reset(), someone.ask_for_reset()
    way.ok("ResetPassword", token=second, new_password=Person().password)
    for token in (first, second):
        way.expect_bad_token("ResetPassword", token, new_password=Person().password)


def test_a_weak_new_password_is_refused_and_the_reset_stays_good(way, someone):
    token = someone.ask_for_reset()
    name = someone.email.partition("@")[0]
    for weak in (WEAK, "", "x" * 1025, name, someone.person.username):
        way.refused(
            "ResetPassword", "INVALID_ARGUMENT", "INVALID_FIELD", {"new_password"}, token=token, new_password=weak
        )
    assert way.login(someone.person), "the password has not changed"
    again = replace(someone.person, password=Person().password)
    way.ok("ResetPassword", token=token, new_password=again.password)
    assert way.login(again)


def test_a_weak_password_with_a_dead_token_tells_nothing_of_the_account(way, someone):
    token = someone.ask_for_reset()
    way.ok("ResetPassword", token=token, new_password=Person().password)
    # This password is weak only for this account. With a dead token, the error must not reveal the account.
    name = someone.email.partition("@")[0]
    way.expect_bad_token("ResetPassword", token, new_password=f"{name}1")


def test_a_disabled_account_gets_no_reset_and_the_one_that_it_has_lets_nobody_in(server, mailbox, way, someone):
    token = someone.ask_for_reset()
    server.engine.execute("UPDATE users SET disabled = true WHERE email = ?", someone.email)

    way.ok("RequestPasswordReset", email=someone.email)
    settle(server.engine)

    assert [mail.kind for mail in mailbox.mails(someone.email)].count(RESET) == 1
    again = replace(someone.person, password=Person().password)
    with contextlib.suppress(AssertionError, grpc.RpcError):
        way.ok("ResetPassword", token=token, new_password=again.password)
    way.expect_wrong(again)
    way.expect_wrong(someone.person)


# -- change of password -------------------------------------------------------------------------------------------


def change_password(way, someone, current: str, new: str) -> dict:
    return way.ok(
        "ChangePassword",
        credential=someone.tokens["accessToken"],
        current_password=current,
        new_password=new,
    )["tokens"]


def test_a_changed_password_leaves_one_fresh_session_and_tells_the_owner(way, mailbox, someone):
    someone.token(VERIFY)
    other = way.login(someone.person)
    again = replace(someone.person, password=Person().password)

    fresh = change_password(way, someone, someone.person.password, again.password)

    assert way.me(fresh)["email"] == someone.email
    assert way.refresh(fresh)
    for tokens in (someone.tokens, other):
        way.expect_dead(tokens)
    way.expect_wrong(someone.person)
    assert way.login(again)
    assert mailbox.notice(someone.email)


def test_a_changed_password_ends_resets_and_a_pending_change_of_address(way, someone):
    reset, change = someone.ask_for_reset(), someone.ask_for_change(Person().email)
    change_password(way, someone, someone.person.password, Person().password)
    way.expect_bad_token("ResetPassword", reset, new_password=Person().password)
    way.expect_bad_token("ConfirmEmailChange", change)


def test_a_wrong_current_password_changes_nothing(server, mailbox, way, someone):
    refused = {"credential": someone.tokens["accessToken"], "new_password": Person().password}
    for wrong in (Person().password, f"{someone.person.password}x"):
        way.refused("ChangePassword", "UNAUTHENTICATED", "INVALID_CREDENTIALS", **refused, current_password=wrong)
    assert way.me(someone.tokens), "the session still works"
    assert way.login(someone.person)
    settle(server.engine)
    assert len(mailbox.mails(someone.email)) == 1, "no notice is sent if nothing has changed"


def test_a_weak_new_password_is_named_and_changes_nothing(way, someone):
    call = {"credential": someone.tokens["accessToken"], "current_password": someone.person.password}
    for weak in (WEAK, "", "x" * 1025, someone.person.username, f"{someone.email.partition('@')[0]}1"):
        way.refused("ChangePassword", "INVALID_ARGUMENT", "INVALID_FIELD", {"new_password"}, **call, new_password=weak)
    assert way.me(someone.tokens)
    assert way.login(someone.person)


@pytest.mark.parametrize("rpc", ["ChangePassword", "RequestEmailChange", "ChangeUsername"])
def test_calls_about_an_account_need_its_access_token(way, someone, rpc):
    password = someone.person.password
    fields = {
        "ChangePassword": {"current_password": password, "new_password": Person().password},
        "RequestEmailChange": {"new_email": Person().email, "password": password},
        "ChangeUsername": {"new_username": Person().username, "password": password},
    }[rpc]
    way.refused(rpc, "UNAUTHENTICATED", "TOKEN_MISSING", **fields)
    way.refused(rpc, "UNAUTHENTICATED", "TOKEN_INVALID", credential=someone.tokens["refreshToken"], **fields)
    way.ok("Logout", refresh_token=someone.tokens["refreshToken"])
    way.refused(rpc, "UNAUTHENTICATED", "SESSION_REVOKED", credential=someone.tokens["accessToken"], **fields)


# -- change of address --------------------------------------------------------------------------------------------


def test_a_change_of_address_is_asked_for_confirmed_and_told(way, mailbox, someone):
    someone.token(VERIFY)
    moved = replace(someone.person, email=Person().email)

    token = someone.ask_for_change(moved.email)
    warning = mailbox.notice(someone.email)
    assert moved.email not in warning.message["Subject"]
    assert way.me(someone.tokens)["email"] == someone.email, "the address does not change before the confirmation"
    assert way.login(someone.person)

    user = way.ok("ConfirmEmailChange", token=token)["user"]

    assert (user["email"], user["emailVerified"]) == (moved.email, True)
    assert user["id"] == someone.user["id"]
    assert way.me(way.login(moved)) == user
    way.expect_wrong(someone.person)
    assert mailbox.notice(someone.email), "a notice goes to the previous address"
    assert [mail.kind for mail in mailbox.mails(moved.email)] == [CHANGE], "the new address gets no notice"


def test_a_new_address_is_kept_in_its_one_form(way, mailbox, someone):
    typed = Person().email.replace("@example.com", "@BÜCHER.example")
    stored = typed.lower().replace("bücher", "xn--bcher-kva")
    way.ok(
        "RequestEmailChange",
        credential=someone.tokens["accessToken"],
        new_email=typed.upper(),
        password=someone.person.password,
    )
    user = way.ok("ConfirmEmailChange", token=mailbox.token(stored, CHANGE))["user"]
    assert user["email"] == stored


def test_a_taken_address_is_told_at_the_request(server, mailbox, way, someone):
    owner = Someone(way, mailbox)
    way.ok("VerifyEmail", token=owner.token(VERIFY))
    taken = owner.email
    call = {"credential": someone.tokens["accessToken"], "password": someone.person.password}
    for spelling in (taken, taken.upper()):
        way.refused("RequestEmailChange", "ALREADY_EXISTS", "EMAIL_TAKEN", **call, new_email=spelling)
    settle(server.engine)
    assert [mail.kind for mail in mailbox.mails(taken)] == [VERIFY], "the owner of the address gets no other mail"


def test_an_address_that_was_verified_meanwhile_is_told_at_the_confirmation(server, mailbox, way, someone):
    quicker = Person()
    token = someone.ask_for_change(quicker.email)
    server.client.sign_up(quicker)
    server.client.verify_email(mailbox.token(quicker.email, VERIFY))

    way.refused("ConfirmEmailChange", "ALREADY_EXISTS", "EMAIL_TAKEN", token=token)

    assert way.me(someone.tokens)["email"] == someone.email
    assert server.client.login(quicker)


# -- an address that somebody else signed up with -------------------------------------------------------------------


def test_the_owner_of_an_address_gets_it_from_an_account_that_never_verified_it(server, mailbox, way, someone):
    squatter = Someone(way, mailbox)
    admin = Somebody(way, server.engine, "admin")
    reset = squatter.ask_for_reset()
    change = squatter.ask_for_change(Person().email)

    token = someone.ask_for_change(squatter.email)
    assert way.me(squatter.tokens)["email"] == squatter.email, "nothing has changed before the confirmation"
    user = way.ok("ConfirmEmailChange", token=token)["user"]

    assert (user["id"], user["email"], user["emailVerified"]) == (someone.user["id"], squatter.email, True)
    assert way.me(someone.tokens) == user
    # Nothing of the squatter is left: no session, no password, no token that was mailed.
    way.expect_dead(squatter.tokens)
    way.expect_wrong(squatter.person)
    way.expect_bad_token("VerifyEmail", squatter.token(VERIFY))
    way.expect_bad_token("ResetPassword", reset, new_password=Person().password)
    way.expect_bad_token("ConfirmEmailChange", change)
    assert way.login(replace(someone.person, email=squatter.email))
    gone = squatter.user["id"]
    way.refused("GetUser", "NOT_FOUND", "NOT_FOUND", credential=admin.credential, user_id=gone)
    [event] = [
        event
        for event in everything(way, "ListAuditEvents", admin.credential, "events", user_id=gone)
        if event["action"] == "user_deleted"
    ]
    assert event["actorId"] == someone.user["id"]
    assert event["detail"] == "another account has verified its address"
    assert way.sign_up(Person(username=squatter.person.username)), "its username is free"


def test_a_squatter_who_signs_up_after_the_request_does_not_stop_the_confirmation(way, mailbox, someone):
    squatted = Person()
    token = someone.ask_for_change(squatted.email)
    way.sign_up(squatted)
    tokens = way.login(squatted)
    assert way.ok("ConfirmEmailChange", token=token)["user"]["email"] == squatted.email
    way.expect_dead(tokens)


def test_nobody_takes_an_address_from_an_unverified_account_without_its_mails(server, mailbox, way, someone):
    """A stranger asks for the address of somebody who has just signed up. Only the mail decides."""
    victim = Someone(way, mailbox)
    token = someone.ask_for_change(victim.email)
    assert len(mailbox.mails(someone.email)) >= 1
    told = [mail.text + mail.html for mail in mailbox.mails(someone.email)]
    assert not any(token in text for text in told), "the stranger never sees the token"
    for guess in (token[:-1] + ("A" if token[-1] != "A" else "B"), "A" * 64, someone.token(VERIFY)):
        way.expect_bad_token("ConfirmEmailChange", guess)
    assert way.me(victim.tokens), "a request changes nothing"
    [mail] = [mail for mail in mailbox.mails(victim.email) if mail.kind == CHANGE]
    assert "would be deleted" in mail.text, "the victim is told what this link does"

    # Once the victim has verified the address, the link is worth nothing.
    verified = way.ok("VerifyEmail", victim.tokens["accessToken"], token=victim.token(VERIFY))["user"]
    way.refused("ConfirmEmailChange", "ALREADY_EXISTS", "EMAIL_TAKEN", token=token)
    assert way.me(victim.tokens) == verified
    assert way.me(someone.tokens)["email"] == someone.email


def test_what_an_operator_has_decided_about_an_account_is_not_undone_by_a_change_of_address(
    server, way, mailbox, someone
):
    admin, promoted, disabled = (Someone(way, mailbox) for _ in range(3))
    for holder, role in ((admin, "admin"), (promoted, "writer")):
        token = someone.ask_for_change(holder.email)
        given = "INSERT INTO user_roles (user_id, role) SELECT id, ? FROM users WHERE email = ?"
        server.engine.execute(given, role, holder.email)
        way.refused("ConfirmEmailChange", "ALREADY_EXISTS", "EMAIL_TAKEN", token=token)
        asked = {"new_email": holder.email, "password": someone.person.password}
        bearer = someone.tokens["accessToken"]
        way.refused("RequestEmailChange", "ALREADY_EXISTS", "EMAIL_TAKEN", credential=bearer, **asked)
        assert way.me(holder.tokens)
    token = someone.ask_for_change(disabled.email)
    server.engine.execute("UPDATE users SET disabled = true WHERE email = ?", disabled.email)
    way.refused("ConfirmEmailChange", "ALREADY_EXISTS", "EMAIL_TAKEN", token=token)
    assert server.engine.query("SELECT count(*) FROM users WHERE email = ?", disabled.email) == [(1,)]


def test_a_squatter_still_holds_an_address_against_sign_ups(way, someone):
    fields = {"username": Person().username, "email": someone.email, "password": Person().password}
    way.refused("SignUp", "ALREADY_EXISTS", "EMAIL_TAKEN", **fields)


# -- change of username ---------------------------------------------------------------------------------------------


def rename(way, someone, new: str) -> dict:
    fields = {"new_username": new, "password": someone.person.password}
    return way.ok("ChangeUsername", credential=someone.tokens["accessToken"], **fields)["user"]


def test_a_changed_username_is_in_the_account_at_once_and_in_access_tokens_from_the_next_on(way, someone):
    new = Person().username
    user = rename(way, someone, new)
    assert {**user, "updateTime": ""} == {**someone.user, "username": new, "updateTime": ""}
    assert user["updateTime"] > someone.user["updateTime"]
    assert way.me(someone.tokens) == user, "the session goes on"
    assert jose.claims_of(someone.tokens["accessToken"])["username"] == someone.person.username
    assert jose.claims_of(way.refresh(someone.tokens)["accessToken"])["username"] == new
    assert jose.claims_of(way.login(someone.person)["accessToken"])["username"] == new
    assert way.sign_up(Person(username=someone.person.username)), "the old one is free"
    fields = {"username": new.upper(), "email": Person().email, "password": Person().password}
    way.refused("SignUp", "ALREADY_EXISTS", "USERNAME_TAKEN", **fields)


def test_a_username_can_change_its_case_and_not_become_that_of_another_account(server, way, someone):
    other = server.client.newcomer()[0].username
    call = {"credential": someone.tokens["accessToken"], "password": someone.person.password}
    for taken in (other, other.upper()):
        way.refused("ChangeUsername", "ALREADY_EXISTS", "USERNAME_TAKEN", **call, new_username=taken)
    upper = someone.person.username.upper()
    assert rename(way, someone, upper)["username"] == upper
    invalid = ("INVALID_ARGUMENT", "INVALID_FIELD", {"new_username"})
    for wrong in (upper, "Admin", "a b", ".a", "x" * 65):
        way.refused("ChangeUsername", *invalid, **call, new_username=wrong)
    way.refused("ChangeUsername", "INVALID_ARGUMENT", "INVALID_FIELD", {"new_username", "password"},
                credential=call["credential"], new_username="root", password="")  # fmt: skip
    assert way.me(someone.tokens)["username"] == upper


def test_a_change_of_username_wants_the_password(way, someone):
    fields = {"credential": someone.tokens["accessToken"], "new_username": Person().username}
    way.refused("ChangeUsername", "UNAUTHENTICATED", "INVALID_CREDENTIALS", **fields, password=Person().password)
    assert way.me(someone.tokens) == someone.user


def test_the_owner_who_took_a_squatted_account_over_by_a_reset_gets_rid_of_its_username(way, someone):
    owner = replace(someone.person, password=Person().password)
    way.ok("ResetPassword", token=someone.ask_for_reset(), new_password=owner.password)
    someone.person, someone.tokens = owner, way.login(owner)
    new = Person().username
    assert rename(way, someone, new)["username"] == new


def test_the_current_address_is_refused_as_the_new_one(way, someone):
    call = {"credential": someone.tokens["accessToken"], "password": someone.person.password}
    for same in (someone.email, someone.email.upper()):
        way.refused("RequestEmailChange", "INVALID_ARGUMENT", "INVALID_FIELD", {"new_email"}, **call, new_email=same)


def test_a_change_of_address_wants_the_password_and_an_address(server, mailbox, way, someone):
    new_email = Person().email
    call = {"credential": someone.tokens["accessToken"]}
    wrong = {"new_email": new_email, "password": Person().password}
    way.refused("RequestEmailChange", "UNAUTHENTICATED", "INVALID_CREDENTIALS", **call, **wrong)
    missing = {"new_email", "password"}
    way.refused("RequestEmailChange", "INVALID_ARGUMENT", "INVALID_FIELD", missing, **call, new_email="", password="")
    bad = {"new_email": "nobody", "password": someone.person.password}
    way.refused("RequestEmailChange", "INVALID_ARGUMENT", "INVALID_FIELD", {"new_email"}, **call, **bad)
    settle(server.engine)
    assert not mailbox.mails(new_email)
    assert len(mailbox.mails(someone.email)) == 1, "no notice is sent"


def test_a_newer_change_of_address_replaces_the_one_before(way, someone):
    first, second = Person().email, Person().email
    old, new = someone.ask_for_change(first), someone.ask_for_change(second)
    way.expect_bad_token("ConfirmEmailChange", old)
    assert way.ok("ConfirmEmailChange", token=new)["user"]["email"] == second


def test_missing_fields_are_all_named_at_once(way, someone):
    for rpc, names in {
        "VerifyEmail": {"token"},
        "ResendVerificationEmail": {"email"},
        "RequestPasswordReset": {"email"},
        "ResetPassword": {"token", "new_password"},
        "ConfirmEmailChange": {"token"},
    }.items():
        way.refused(rpc, "INVALID_ARGUMENT", "INVALID_FIELD", names)
    bearer = someone.tokens["accessToken"]
    for rpc, names in {
        "ChangePassword": {"current_password", "new_password"},
        "RequestEmailChange": {"new_email", "password"},
        "ChangeUsername": {"new_username", "password"},
    }.items():
        way.refused(rpc, "INVALID_ARGUMENT", "INVALID_FIELD", names, credential=bearer)


@pytest.mark.parametrize("engine", ["postgres"], indirect=True)
def test_what_was_asked_of_one_replica_can_be_confirmed_at_another(engine, start_server, start_mailbox):
    mailbox = start_mailbox()
    one, two = (start_server(engine, mail_url=mailbox.url) for _ in range(2))
    person, tokens = one.client.newcomer()

    assert two.client.verify_email(mailbox.token(person.email, VERIFY)).email_verified
    one.client.request_password_reset(person.email)
    two.client.reset_password(mailbox.token(person.email, RESET), Person().password)

    expect_unauthenticated(lambda: one.client.refresh(tokens.refresh_token), "REFRESH_TOKEN_INVALID")
