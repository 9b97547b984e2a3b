"""When two emails, usernames or passwords are the same, and when they only look alike.

It tests case, white space, normalisation and look-alikes, and what an error says about an email. Malformed input is in
`test_bad_input`.
"""

import secrets
import unicodedata
from dataclasses import replace

import grpc
import pytest

from support.client import Person
from support.expect import expect_error, expect_invalid, expect_unauthenticated, judge
from support.mail import CHANGE, RESET, VERIFY
from support.rows import check_all

TAKEN = grpc.StatusCode.ALREADY_EXISTS

# What people type, and the words of the error that help them.
WRONG_EMAILS = {
    "ada lovelace@example.com": "space",
    "ada.example.com": "must contain an @",
    "ada@@example.com": "only one @",
    "@example.com": "a name before the @",
    "mailto:ada@example.com": "must not contain : before the @",
    "<ada@example.com>": "must not contain < before the @",
    "ada.@example.com": "dot",
    "josé@example.com": "without accents",
    "ada@": "needs a domain",
    "ada@example": "a whole domain name",
    "ada@example,com": "only letters, digits, hyphens and dots",
    "ada@example.com.": "dot",
    "ada@[127.0.0.1]": "not an IP address",
}


@pytest.fixture(scope="module")
def settings(mailbox):
    return {"mail_url": mailbox.url, "mail_limit_per_client": "0"}


def word() -> str:
    return f"w{secrets.token_hex(6)}"


def test_an_email_in_another_case_is_the_same_account(client):
    name = word()
    person = Person(email=f"{name}@Example.COM")

    assert client.sign_up(person).email == f"{name}@example.com", "the canonical form"

    for written in (f"{name.upper()}@EXAMPLE.COM", f"{name.capitalize()}@example.com"):
        expect_error(lambda written=written: client.sign_up(Person(email=written)), TAKEN, "EMAIL_TAKEN")
        assert client.login(replace(person, email=written))


def test_white_space_around_an_email_is_dropped_in_every_rpc(way, mailbox):
    """A form of the browser drops it, and so does a form of most frameworks; what is pasted often has some."""
    email, moved = Person().email, Person().email
    spaced = [f" {email} ", f"\t{email}\r\n", f"\u00a0{email}\u3000"]
    person = Person(email=spaced[0])
    assert way.sign_up(person)["email"] == email
    tokens = way.login(person)
    for typed in spaced:
        assert way.login(replace(person, email=typed))
        again = {"username": Person().username, "email": typed, "password": person.password}
        way.refused("SignUp", "ALREADY_EXISTS", "EMAIL_TAKEN", **again)
        way.ok("ResendVerificationEmail", email=typed)
        mailbox.token(email, VERIFY)
        way.ok("RequestPasswordReset", email=typed)
        mailbox.token(email, RESET)
    bearer = {"credential": tokens["accessToken"], "password": person.password}
    for typed in spaced:
        way.refused("RequestEmailChange", "INVALID_ARGUMENT", "INVALID_FIELD", {"new_email"}, **bearer, new_email=typed)
    way.ok("RequestEmailChange", **bearer, new_email=f" {moved}\n")
    assert way.ok("ConfirmEmailChange", token=mailbox.token(moved, CHANGE))["user"]["email"] == moved


def test_the_error_of_an_email_names_what_was_typed_wrongly(way):
    def check(row) -> None:
        typed, named = row
        fields = {"email": typed, "password": Person().password}
        refused = way.refused("Login", "INVALID_ARGUMENT", "INVALID_FIELD", {"email"}, **fields)
        assert named in refused.message

    check_all(WRONG_EMAILS.items(), check)


def test_a_username_in_another_case_is_the_same_username(client):
    person = Person(username=f"Ada.{word()}")

    assert client.sign_up(person).username == person.username, "shown as it was written"

    for written in (person.username.upper(), person.username.lower()):
        expect_error(lambda written=written: client.sign_up(Person(username=written)), TAKEN, "USERNAME_TAKEN")


def test_an_international_domain_is_one_account_however_it_is_written(client):
    name = word()
    person = Person(email=f"{name}@bücher.example")

    assert client.sign_up(person).email == f"{name}@xn--bcher-kva.example"

    for written in (
        f"{name}@xn--bcher-kva.example",
        f"{name}@BÜCHER.example",
        f"{name}@{unicodedata.normalize('NFD', 'bücher')}.example",
    ):
        expect_error(lambda written=written: client.sign_up(Person(email=written)), TAKEN, "EMAIL_TAKEN")
        assert client.login(replace(person, email=written))


def test_a_domain_that_only_looks_alike_is_a_different_account(client):
    name = word()
    person = Person(email=f"{name}@apple.example")
    # The first letter is Cyrillic.
    look_alike = Person(email=f"{name}@аpple.example")
    first = client.sign_up(person)
    expect_unauthenticated(lambda: client.login(replace(person, email=look_alike.email)), "INVALID_CREDENTIALS")

    second = client.sign_up(look_alike)

    assert second.id != first.id
    assert second.email.startswith(f"{name}@xn--"), "shown in a form that differs visibly from the other"
    assert client.me(client.login(person).access_token).id == first.id
    assert client.me(client.login(look_alike).access_token).id == second.id


@pytest.mark.parametrize("hidden", ["\u200b", "\u00ad", "\uff45", "\u2024"], ids=ascii)
def test_a_domain_with_a_hidden_or_odd_character_is_refused_or_shown_in_plain_ascii(client, hidden):
    try:
        user = client.sign_up(Person(email=f"{word()}@ex{hidden}ample.{word()}.com"))
    except grpc.RpcError as error:
        judge(error, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", fields={"email"})
    else:
        assert user.email.isascii()
        assert user.email.isprintable()


def test_a_local_part_that_only_looks_alike_is_refused(client):
    name = word()
    client.sign_up(Person(email=f"a{name}@example.com"))
    expect_invalid(lambda: client.sign_up(Person(email=f"а{name}@example.com")), "email")


def test_dots_and_plus_tags_in_a_local_part_are_part_of_the_name(client):
    name = word()
    emails = [f"{name}.x@example.com", f"{name}x@example.com", f"{name}.x+tag@example.com"]
    assert [client.sign_up(Person(email=email)).email for email in emails] == emails


@pytest.mark.parametrize(("made", "typed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_password_logs_in_alike_in_either_unicode_form(client, made, typed):
    password = f"Zürich-{secrets.token_hex(6)}-Ålesund-é"
    person = Person(password=unicodedata.normalize(made, password))
    client.sign_up(person)
    assert client.login(replace(person, password=unicodedata.normalize(typed, password)))


@pytest.mark.parametrize(
    ("password", "other"),
    [
        ("Fjord-ﬁ-9317-otter", "Fjord-fi-9317-otter"),
        ("Fjord-fi-9317-otter", "Fjord-ﬁ-9317-otter"),
        ("Fjord-fi-9317-otter", "fjord-fi-9317-otter"),
        ("Fjord-fi-9317-otter", "Fjord-fi-9317-otter "),
        ("Fjord-fi-9317-otter", "Fjord-fi-9317-otte"),
        ("Fjord-a-9317-otter", "Fjord-а-9317-otter"),
        ("Fjord-é-9317-otter", "Fjord-e-9317-otter"),
    ],
    ids=ascii,
)
def test_a_password_that_only_resembles_the_right_one_is_wrong(client, password, other):
    person = Person(password=password)
    client.sign_up(person)
    expect_unauthenticated(lambda: client.login(replace(person, password=other)), "INVALID_CREDENTIALS")
    assert client.login(person)


def test_a_password_of_1024_bytes_is_used_whole(client):
    person = Person(password=secrets.token_hex(512))
    client.sign_up(person)

    assert client.login(person)
    # The password is not truncated: one with another last byte is wrong.
    last = "0" if person.password[-1] != "0" else "1"
    changed = replace(person, password=person.password[:-1] + last)
    expect_unauthenticated(lambda: client.login(changed), "INVALID_CREDENTIALS")


def test_a_passphrase_with_spaces_and_any_script_is_accepted(client):
    for password in (
        "purple  otter sings 47 hymns",
        " leading and trailing 8172 ",
        "лыжи-оркестр-гвоздь-71",
        "猫が屋根の上で踊る夜",
    ):
        person = Person(password=password)
        client.sign_up(person)
        assert client.login(person)


def test_the_minimum_length_is_counted_in_code_points_and_configurable(embedded, start_server):
    server = start_server(embedded, password_min_length=15)
    expect_invalid(lambda: server.client.sign_up(Person(password="vK9-otter-Zq4!")), "password")
    assert server.client.sign_up(Person(password="vK9-otter-Zq4!x"))
