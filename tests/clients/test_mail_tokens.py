"""One-time tokens: their purpose, single use and lifetime, and that all invalid ones get the same answer.

It tests each promise about tokens under "Mail" in security.md. What the RPCs do with a valid token is in
`test_account_flows`. That no token is stored is in `test_no_token_at_rest`.
"""

import base64
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from urllib.parse import quote, urlsplit

import grpc
import pytest

from support import jose, pb
from support.client import Client, Person
from support.expect import expect_error, expect_invalid, expect_unauthenticated, reason_of
from support.http import Rest
from support.mail import CHANGE, RESET, VERIFY, Behaviour
from support.outbox import id_of, row_of, set_expiry, settle
from support.wait import wait_until

# Each kind of token: the page of its link, and the RPC that takes it.
KINDS = {VERIFY: "VerifyEmail", RESET: "ResetPassword", CHANGE: "ConfirmEmailChange"}
PURPOSES = {VERIFY: "verify_email", RESET: "reset_password", CHANGE: "change_email"}
LIFETIMES = {VERIFY: timedelta(hours=24), RESET: timedelta(minutes=30), CHANGE: timedelta(hours=24)}


@pytest.fixture(scope="module")
def settings(mailbox):
    # The hash queue has room for fifty concurrent resets, on any machine.
    return {"mail_url": mailbox.url, "mail_limit_per_client": "0", "hash_queue": "200"}


class Owner:
    """A user with a session who gets mail of every kind."""

    def __init__(self, server, mailbox):
        self.client, self.engine, self.mailbox = server.client, server.engine, mailbox
        self.person, self.tokens = self.client.newcomer()
        self.new_email = Person().email

    def token(self, kind: str) -> str:
        """Requests a mail now and returns the live token."""
        match kind:
            case "verify-email":
                self.client.resend_verification(self.person.email)
            case "reset-password":
                self.client.request_password_reset(self.person.email)
            case _:
                self.client.request_email_change(self.tokens.access_token, self.new_email, self.person.password)
        to = self.new_email if kind == CHANGE else self.person.email
        if kind == VERIFY:
            # The mail of the sign-up may arrive before or after this one, or may have been dropped from the outbox.
            settle(self.engine)
            mailed = [mail.token for mail in self.mailbox.mails(to) if mail.kind == VERIFY]
            [live] = [token for token in mailed if row_of(self.engine, token)]
            return live
        return self.mailbox.token(to, kind)


@pytest.fixture
def owner(server, mailbox):
    return Owner(server, mailbox)


def use(client: Client, rpc: str, token: str, password: str | None = None):
    fields = {"token": token}
    if rpc == "ResetPassword":
        fields["new_password"] = password or Person().password
    return client.call(rpc, getattr(pb, f"{rpc}Request")(**fields))


def refuse(client: Client, rpc: str, token: str):
    """Asserts that an RPC refuses a token, and returns everything that the caller sees."""
    wanted = grpc.StatusCode.INVALID_ARGUMENT
    return expect_error(lambda: use(client, rpc, token), wanted, "ONE_TIME_TOKEN_INVALID")


def bent(token: str, position: int) -> str:
    """The same token with one character of its alphabet changed."""
    return f"{token[:position]}{'B' if token[position] == 'A' else 'A'}{token[position + 1 :]}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_good_once(client, owner, kind):
    token = owner.token(kind)
    use(client, KINDS[kind], token)
    for _ in range(2):
        refuse(client, KINDS[kind], token)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_good_for_its_purpose_alone(client, owner, kind):
    token = owner.token(kind)
    for rpc in set(KINDS.values()) - {KINDS[kind]}:
        refuse(client, rpc, token)
    expect_unauthenticated(lambda: client.me(token), "TOKEN_INVALID")
    expect_unauthenticated(lambda: client.refresh(token), "REFRESH_TOKEN_INVALID")
    expect_unauthenticated(lambda: client.logout(token), "REFRESH_TOKEN_INVALID")
    assert use(client, KINDS[kind], token), "the refused calls did not use it up"


@pytest.mark.parametrize("rpc", KINDS.values())
def test_no_token_of_a_session_is_one_of_a_mail(client, owner, rpc):
    for token in (owner.tokens.access_token, owner.tokens.refresh_token):
        refuse(client, rpc, token)
    assert client.me(owner.tokens.access_token)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_lives_as_long_as_promised_and_no_longer(server, client, owner, kind):
    token = owner.token(kind)
    row = row_of(server.engine, token)
    assert (row.purpose, row.lifetime) == (PURPOSES[kind], LIFETIMES[kind])

    set_expiry(server.engine, token, timedelta(milliseconds=-1))
    refuse(client, KINDS[kind], token)
    set_expiry(server.engine, token, timedelta(seconds=60))
    assert use(client, KINDS[kind], token), "it was refused only because it had expired"


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_token_ends_the_one_before(client, owner, kind):
    first, second = owner.token(kind), owner.token(kind)
    assert first != second
    refuse(client, KINDS[kind], first)
    assert use(client, KINDS[kind], second)
    refuse(client, KINDS[kind], first)


def test_what_was_mailed_before_a_restart_is_good_after_it_and_what_has_expired_is_cleared_away(
    engine, start_server, start_mailbox
):
    mailbox = start_mailbox()
    server = start_server(engine, mail_url=mailbox.url)
    owner, late = Owner(server, mailbox), Owner(server, mailbox)
    expired = late.token(RESET)
    tokens = {kind: owner.token(kind) for kind in (VERIFY, RESET)}
    set_expiry(engine, expired, timedelta(hours=-1))

    server.restart()
    wait_until("it has cleared up, as it does when it starts", lambda: not row_of(engine, expired))

    for kind in (VERIFY, RESET):
        assert use(server.client, KINDS[kind], tokens[kind])
    refuse(server.client, "ResetPassword", expired)


def test_tokens_of_one_kind_end_none_of_another(client, owner):
    tokens = {kind: owner.token(kind) for kind in (VERIFY, CHANGE, RESET)}
    # In this order, and with a session, no token ends another. A completed reset or change of address would end other
    # tokens.
    client.verify_email(tokens[VERIFY], owner.tokens.access_token)
    assert row_of(owner.engine, tokens[RESET])
    assert use(client, "ConfirmEmailChange", tokens[CHANGE])


@pytest.mark.parametrize("kind", KINDS)
def test_an_altered_token_is_refused(client, owner, kind):
    token = owner.token(kind)
    decoded = jose.decode(token)
    others = [
        *(bent(token, position) for position in range(len(token))),
        *(token[:length] for length in (1, 22, 32, 63)),
        *(token[start:] for start in (1, 21, 32)),
        *(f"{token}{more}" for more in ("=", "==", "A", "AAAA", ".", " ", "\n", "\t", "/", "#", "&x=1", "\u200b")),
        *(f"{less}{token}" for less in (" ", "\n", "Bearer ", "token=", "\ufeff")),
        token.swapcase(),
        token * 2,
        quote(token[:-1]) + f"%{ord(token[-1]):02x}",
        base64.b16encode(decoded).decode(),
        base64.b32encode(decoded).decode(),
        base64.urlsafe_b64encode(decoded[:16]).decode(),
        base64.urlsafe_b64encode(decoded[:16] + bytes(32)).decode(),
        base64.urlsafe_b64encode(bytes(16) + decoded[16:]).decode(),
        base64.urlsafe_b64encode(decoded[:47]).decode().rstrip("="),
        token.replace("-", "+").replace("_", "/") if set("-_") & set(token) else f"+{token[1:]}",
        secrets.token_urlsafe(48),
        "A" * 64,
        "_" * 64,
        "x",
        "a.b.c",
        "ｔｏｋｅｎ",
        "' OR 1=1 --",
        "\U0001f9a6" * 64,
        "x" * 8192,
    ]

    refused = {refuse(client, KINDS[kind], other) for other in others}

    assert len(refused) == 1, refused
    assert use(client, KINDS[kind], token), "the refused calls did not use it up"


@pytest.mark.parametrize("kind", KINDS)
def test_every_bad_token_is_refused_with_the_same_bytes(server, client, mailbox, way, owner, kind):
    rpc, reset = KINDS[kind], {"new_password": Person().password} if kind == RESET else {}
    superseded, expired = owner.token(kind), owner.token(kind)
    set_expiry(server.engine, expired, timedelta(hours=-1))
    stranger = Owner(server, mailbox)
    other_kind, used = stranger.token(RESET if kind != RESET else VERIFY), stranger.token(kind)
    use(client, rpc, used)
    swapped = jose.encode(jose.decode(other_kind)[:16] + jose.decode(used)[16:])

    bad = [superseded, expired, used, other_kind, swapped, secrets.token_urlsafe(48), "nonsense"]
    refusals = {way.expect_bad_token(rpc, token, **reset).seen for token in bad}

    assert len(refusals) == 1, refusals


@pytest.mark.parametrize("kind", KINDS)
def test_of_fifty_uses_at_once_exactly_one_succeeds(server, client, owner, kind):
    token, rpc = owner.token(kind), KINDS[kind]
    passwords = [Person().password for _ in range(50)]
    connections = [server.new_client() for _ in range(5)]

    def outcome(number: int) -> str:
        try:
            use(connections[number % 5], rpc, token, passwords[number])
        except grpc.RpcError as error:
            return reason_of(error)
        return "done"

    with ThreadPoolExecutor(50) as pool:
        outcomes = list(pool.map(outcome, range(50)))
    for connection in connections:
        connection.close()

    assert outcomes.count("done") == 1, outcomes
    assert outcomes.count("ONE_TIME_TOKEN_INVALID") == 49, outcomes
    if kind == RESET:
        winner = passwords[outcomes.index("done")]
        assert client.login(replace(owner.person, password=winner)), "the new password is that of the successful call"


@pytest.mark.parametrize("kind", [VERIFY, RESET])
def test_a_token_is_no_good_for_an_address_it_was_not_mailed_to(server, client, owner, kind):
    token = owner.token(kind)
    moved = Person().email
    assert server.engine.execute("UPDATE users SET email = ? WHERE email = ?", moved, owner.person.email) == 1

    refuse(client, KINDS[kind], token)

    [(verified,)] = server.engine.query("SELECT email_verified FROM users WHERE email = ?", moved)
    assert not verified


def test_a_change_of_address_ends_what_was_mailed_to_the_one_before(client, owner):
    tokens = {kind: owner.token(kind) for kind in (VERIFY, RESET, CHANGE)}
    use(client, "ConfirmEmailChange", tokens[CHANGE])
    for kind in (VERIFY, RESET):
        refuse(client, KINDS[kind], tokens[kind])


def test_an_account_that_was_made_anew_is_not_verified_by_the_mail_of_before(server, client, owner):
    tokens = {kind: owner.token(kind) for kind in (VERIFY, RESET)}
    email = owner.person.email
    server.engine.execute("DELETE FROM sessions WHERE user_id IN (SELECT id FROM users WHERE email = ?)", email)
    assert server.engine.execute("DELETE FROM users WHERE email = ?", email) == 1
    client.sign_up(replace(Person(), email=email))

    for kind, token in tokens.items():
        refuse(client, KINDS[kind], token)

    [(verified,)] = server.engine.query("SELECT email_verified FROM users WHERE email = ?", email)
    assert not verified


@pytest.mark.parametrize("column", ["user_id", "email", "purpose"])
def test_who_writes_to_the_database_cannot_turn_a_token_into_another(server, client, mailbox, owner, column):
    token = owner.token(VERIFY)
    victim, _ = client.newcomer()
    mailbox.token(victim.email, VERIFY)
    engine = server.engine
    [(victim_id,)] = engine.query("SELECT id FROM users WHERE email = ?", victim.email)
    engine.execute("DELETE FROM one_time_tokens WHERE user_id = ?", victim_id)
    forged = {"user_id": victim_id, "email": victim.email, "purpose": "reset_password"}[column]

    changed = engine.execute(
        f"UPDATE one_time_tokens SET {column} = ? WHERE id = ?", forged, engine.as_id(id_of(token))
    )

    assert changed == 1
    for rpc in KINDS.values():
        refuse(client, rpc, token)


@pytest.mark.parametrize("kind", KINDS)
def test_opening_a_link_does_not_use_its_token_up(server, client, mailbox, owner, kind):
    rest = Rest(server)
    token = owner.token(kind)
    [link] = {mail.link for mail in mailbox.mails() if mail.kind == kind and mail.token == token}
    path = urlsplit(link).path + "?" + urlsplit(link).query
    before = server.engine.query("SELECT * FROM one_time_tokens WHERE id = ?", server.engine.as_id(id_of(token)))

    for method in ("GET", "HEAD", "GET", "OPTIONS") * 5:
        assert rest.call(method, path).status in ((200,) if method != "OPTIONS" else (200, 204, 405))

    after = server.engine.query("SELECT * FROM one_time_tokens WHERE id = ?", server.engine.as_id(id_of(token)))
    assert after == before
    assert use(client, KINDS[kind], token)


def test_a_mail_that_was_held_up_carries_nothing_that_is_good_after_the_password_was_changed(
    embedded, start_server, start_mailbox
):
    mailbox = start_mailbox()
    server = start_server(embedded, mail_url=mailbox.url)
    client = server.client
    person, tokens = client.newcomer()
    mailbox.token(person.email, VERIFY)
    new_email = Person().email
    mailbox.behave(Behaviour(at_data="451 4.3.0 later", towards=frozenset({person.email, new_email})))
    client.request_password_reset(person.email)
    client.request_email_change(tokens.access_token, new_email, person.password)

    client.change_password(tokens.access_token, person.password, Person().password)
    mailbox.recover()
    settle(embedded, 40)

    late = [mail for mail in mailbox.mails() if mail.kind in (RESET, CHANGE)]
    for mail in late:
        refuse(client, KINDS[mail.kind], mail.token)


# -- addresses ----------------------------------------------------------------------------------------------------


def test_mail_goes_to_the_stored_address_however_it_was_asked_for(server, client, mailbox):
    name = secrets.token_hex(8)
    person = Person(email=f"{name}@xn--bcher-kva.example")
    client.sign_up(person)
    mailbox.token(person.email, VERIFY)
    spellings = [
        f"{name.upper()}@XN--BCHER-KVA.EXAMPLE",
        f"{name}@bücher.example",
        f"{name.upper()}@BÜCHER.Example",
        f"{name}@bu\u0308cher.example",
    ]

    for spelling in spellings:
        client.request_password_reset(spelling)
        mail = mailbox.take(person.email, RESET)
        assert mail.recipients == (person.email,)
        assert [address.addr_spec for address in mail.message["To"].addresses] == [person.email]


def test_a_look_alike_of_an_address_gets_no_mail_and_causes_none(server, client, mailbox):
    name = f"ian{secrets.token_hex(6)}"
    person = Person(email=f"{name}@example.com")
    client.sign_up(person)
    mailbox.token(person.email, VERIFY)
    settle(server.engine)
    before = len(mailbox.mails())
    # Cyrillic е, dotless ı, a dotted capital İ, a long ſ, a hyphen, a digit for a letter, another top-level domain.
    domains = ["еxample.com", "example.cоm", "exampIe.com.", "examp1e.com", "exampl-e.com", "example.co", "éxample.com"]
    parts = [
        f"{name}+reset",
        f"{name}.",
        f".{name}",
        f'"{name}"',
        name.replace("i", "ı"),
        f"{name}\u200b",
        f"ｉ{name[1:]}",
    ]
    parts += [name.replace("i", "İ"), name.replace("a", "а")]

    look_alikes = [f"{name}@{domain}" for domain in domains] + [f"{part}@example.com" for part in parts]
    look_alikes += [f"{person.email},eve@example.com", f"<{person.email}>", f"Ian <{person.email}>"]
    for address in look_alikes:
        for ask in (client.request_password_reset, client.resend_verification):
            try:
                ask(address)
            except grpc.RpcError as error:
                assert reason_of(error) == "INVALID_FIELD", (address, error)

    settle(server.engine)
    arrived = [str(mail) for mail in mailbox.mails()[before:]]
    assert not arrived, arrived


@pytest.mark.parametrize(
    "character", ["\r", "\n", "\r\n", "\0", "\t", "\x7f", "\u2028", "\x85", "%0d%0a"], ids=ascii
)  # fmt: skip
def test_an_address_that_would_write_into_a_mail_is_refused(server, client, owner, character):
    name, _, domain = owner.person.email.partition("@")
    settle(server.engine)
    bearer = owner.tokens.access_token
    addresses = [f"{name}{character}Bcc: eve@{domain}", f"{name}@{domain}{character}Bcc: eve@example.net"]
    if not character.isspace():
        # White space around an address is dropped.
        addresses += [f"{owner.person.email}{character}", f"{character}{owner.person.email}"]
    for address in addresses:
        if character == "%0d%0a" and " " not in address:
            continue  # this is a valid address
        expect_invalid(lambda address=address: client.request_password_reset(address), "email")
        expect_invalid(lambda address=address: client.resend_verification(address), "email")
        change = {"new_email": address, "password": owner.person.password}
        request = pb.RequestEmailChangeRequest(**change)
        expect_invalid(lambda request=request: client.call("RequestEmailChange", request, token=bearer), "new_email")
    assert server.engine.query("SELECT count(*) FROM mail_outbox") == [(0,)]


@pytest.mark.parametrize("email", ["", "nobody", "a@b@c", "josé@example.com", "a" * 250 + "@example.com"], ids=ascii)
def test_an_invalid_address_is_refused_for_every_caller(client, owner, email):
    expect_invalid(lambda: client.request_password_reset(email), "email")
    expect_invalid(lambda: client.resend_verification(email), "email")
    bearer, password = owner.tokens.access_token, owner.person.password
    expect_invalid(lambda: client.request_email_change(bearer, email, password), "new_email")
