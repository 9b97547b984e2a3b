"""Delivered mail: its contents, its transport, and its links, which depend only on the configuration.

It tests the form of a mail and the four transports. What the token in it does is in `test_account_flows`. SMTP servers
that fail are in `test_mail_faults`.
"""

import base64
import html
import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from support import http2, pb
from support.client import Client, Person, service_of
from support.expect import expect_invalid
from support.http import address_of, raw
from support.mail import CHANGE, DELIVERY_DEADLINE, RESET, TOKEN, VERIFY, Mail, make_tls, parse
from support.outbox import waiting
from support.wait import wait_until

PUBLIC_URL = "http://localhost:8080"
LOOPBACK = "127.0.0.1"
# A password with characters that have a meaning in URLs and headers.
MAIL_PASSWORD = 'Qu"iet:98@otter/ä %41'


def signed_up(server) -> Person:
    person = Person()
    server.client.sign_up(person)
    return person


def expect_well_formed(mail: Mail, person: Person) -> None:
    """Asserts what RFC 5322, RFC 2045 and all mail clients require."""
    message = mail.message
    assert not message.defects, message.defects
    for part in message.walk():
        assert not part.defects, part.defects
    for name in ("From", "To", "Subject", "Date", "Message-ID", "MIME-Version"):
        assert len(message.get_all(name, [])) == 1, f"{name} of {message.items()}"
    assert [address.addr_spec for address in message["To"].addresses] == [person.email]
    assert "Cc" not in message
    assert "Bcc" not in message
    assert abs(parsedate_to_datetime(message["Date"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert re.fullmatch(r"<[^\s<>@]+@[^\s<>@]+>", message["Message-ID"])
    assert message["MIME-Version"].strip() == "1.0"
    assert message["Subject"].strip()

    assert message.get_content_type() == "multipart/alternative"
    text, alternative = message.iter_parts()
    assert [text.get_content_type(), alternative.get_content_type()] == ["text/plain", "text/html"]
    assert text.get_content_charset() == alternative.get_content_charset() == "utf-8"
    head = mail.content.partition(b"\r\n\r\n")[0]
    assert head.isascii(), "headers are ASCII, also for other scripts (RFC 2047)"
    assert b"\n" not in mail.content.replace(b"\r\n", b""), "lines end in CRLF"


def hrefs(mail: Mail) -> list[str]:
    return [html.unescape(link) for link in re.findall(r'href="([^"]+)"', mail.html)]


def test_a_sign_up_mails_a_well_formed_verification_mail(engine, start_server, start_mailbox):
    mailbox = start_mailbox()
    server = start_server(engine, mail_url=mailbox.url)
    person = signed_up(server)

    mail = mailbox.take(person.email, VERIFY)

    expect_well_formed(mail, person)
    assert mail.recipients == (person.email,)
    assert mail.author == ("Postern", "no-reply@localhost")
    assert mail.sender == "no-reply@localhost"
    assert mail.link.startswith(f"{PUBLIC_URL}/verify-email?token=")
    assert mail.link in hrefs(mail), "both parts have the same link"
    assert server.client.verify_email(mail.token).email_verified
    assert len(mailbox.mails()) == 1, "exactly one mail arrives"


def test_every_mail_has_an_id_of_its_own(embedded, start_server, start_mailbox):
    mailbox = start_mailbox()
    server = start_server(embedded, mail_url=mailbox.url)
    mails = [mailbox.take(signed_up(server).email, VERIFY) for _ in range(3)]
    assert len({mail.message["Message-ID"] for mail in mails}) == 3
    assert len({mail.token for mail in mails}) == 3


def test_no_header_or_name_in_a_mail_holds_its_token(embedded, start_server, start_mailbox):
    mailbox = start_mailbox()
    server = start_server(embedded, mail_url=mailbox.url)
    mail = mailbox.take(signed_up(server).email, VERIFY)
    head = mail.content.partition(b"\r\n\r\n")[0].decode()
    for part in (mail.token, mail.token[-43:]):
        assert part not in head, "headers end up in logs"


@pytest.mark.parametrize(
    "name",
    ["Müller, Söhne & Co.", "Café Otter \U0001f9a6", "日本の郵便", 'The "Otters"', "Grüße " * 10 + "!"],
    ids=ascii,
)
def test_a_name_in_any_script_arrives_as_it_was_configured(embedded, start_server, start_mailbox, name):
    mailbox = start_mailbox()
    quoted = name.replace('"', '\\"')
    server = start_server(
        embedded, mail_url=mailbox.url, mail_from=f'"{quoted}" <post@mail.example.com>', service_name=name
    )
    person = signed_up(server)

    mail = mailbox.take(person.email, VERIFY)

    expect_well_formed(mail, person)
    assert mail.author == (name, "post@mail.example.com")
    assert mail.sender == "post@mail.example.com"
    said = " ".join(f"{mail.message['Subject']} {mail.text}".split())
    assert " ".join(name.split()) in said, "a mail names the service that sends it"


def test_the_sender_is_the_service_by_name_at_the_host_of_the_public_url(embedded, start_server, start_mailbox):
    mailbox = start_mailbox()
    server = start_server(
        embedded, mail_url=mailbox.url, service_name="Grüne Otter", public_url="https://auth.example.com/base"
    )

    mail = mailbox.take(signed_up(server).email, VERIFY)

    assert mail.author == ("Grüne Otter", "no-reply@auth.example.com")
    assert mail.link == f"https://auth.example.com/base/verify-email?token={mail.token}"


def test_a_name_that_looks_like_html_is_text_in_the_html_part(embedded, start_server, start_mailbox):
    mailbox = start_mailbox()
    name = "<b>Otters</b> & <img src=x>"
    server = start_server(embedded, mail_url=mailbox.url, service_name=name, mail_from="post@example.com")

    mail = mailbox.take(signed_up(server).email, VERIFY)

    assert "<b>Otters" not in mail.html
    assert "<img src=x" not in mail.html
    assert name in html.unescape(mail.html)
    assert name in mail.text, "the text part is not escaped"


@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
def test_a_mail_goes_encrypted_to_a_server_whose_certificate_holds(
    embedded, start_server, start_mailbox, tmp_path, monkeypatch, scheme
):
    tls = make_tls(tmp_path, LOOPBACK)
    mailbox = start_mailbox(**{"starttls" if scheme == "smtp" else "implicit_tls": tls})
    monkeypatch.setenv("SSL_CERT_FILE", tls.ca_file)
    server = start_server(embedded, mail_url=f"{mailbox.url}?tls=required" if scheme == "smtp" else mailbox.url)

    mail = mailbox.take(signed_up(server).email, VERIFY)

    assert mail.encrypted


def expect_kept_back(server, mailbox) -> None:
    """Asserts that mails stay in the outbox, and that the SMTP server has received nothing about them."""
    person = signed_up(server)
    wait_until(
        "it was tried", lambda: [mail for mail in waiting(server.engine) if mail.attempts >= 2], DELIVERY_DEADLINE
    )
    [kept] = waiting(server.engine)
    assert (kept.kind, kept.recipient, kept.dead) == ("verify_email", person.email, False)
    assert not mailbox.attempts, "no recipient was named"
    assert not mailbox.mails()


def test_a_demand_for_tls_keeps_mail_from_a_server_without_it_until_it_has_it(
    embedded, start_server, start_mailbox, tmp_path, monkeypatch
):
    tls = make_tls(tmp_path, LOOPBACK)
    mailbox = start_mailbox()
    monkeypatch.setenv("SSL_CERT_FILE", tls.ca_file)
    server = start_server(embedded, mail_url=f"{mailbox.url}?tls=required")

    expect_kept_back(server, mailbox)

    [kept] = waiting(embedded)
    mailbox.offer_starttls(tls)
    assert mailbox.take(kept.recipient, VERIFY).encrypted


@pytest.mark.parametrize("scheme", ["smtp", "smtps"])
@pytest.mark.parametrize("fault", ["of an unknown CA", "for another name"])
def test_a_certificate_that_does_not_hold_keeps_mail_back(
    embedded, start_server, start_mailbox, tmp_path, monkeypatch, scheme, fault
):
    tls = make_tls(tmp_path, LOOPBACK if fault == "of an unknown CA" else "mail.example.com")
    known = make_tls(tmp_path, "ca.example.com") if fault == "of an unknown CA" else tls
    mailbox = start_mailbox(**{"starttls" if scheme == "smtp" else "implicit_tls": tls})
    monkeypatch.setenv("SSL_CERT_FILE", known.ca_file)
    server = start_server(embedded, mail_url=f"{mailbox.url}?tls=required" if scheme == "smtp" else mailbox.url)

    expect_kept_back(server, mailbox)


@pytest.mark.parametrize("place", ["in the URL", "in the URL's file", "in a file of its own"])
def test_a_mail_server_that_wants_a_password_gets_it(
    embedded, start_server, start_mailbox, tmp_path, monkeypatch, place
):
    tls = make_tls(tmp_path, LOOPBACK)
    mailbox = start_mailbox(implicit_tls=tls, credentials=("postern@example.com", MAIL_PASSWORD))
    monkeypatch.setenv("SSL_CERT_FILE", tls.ca_file)
    user, password = quote("postern@example.com", safe=""), quote(MAIL_PASSWORD, safe="")
    with_password = f"smtps://{user}:{password}@{mailbox.address}"
    file = tmp_path / "secret"
    # Editors add a newline at the end of a file.
    file.write_text(f"{MAIL_PASSWORD if place == 'in a file of its own' else with_password}\n")
    file.chmod(0o600)
    settings = {
        "in the URL": {"mail_url": with_password},
        "in the URL's file": {"mail_url_file": file},
        "in a file of its own": {"mail_url": f"smtps://{user}@{mailbox.address}", "mail_password_file": file},
    }

    server = start_server(embedded, **settings[place])
    server.secrets |= {MAIL_PASSWORD, password, base64.b64encode(MAIL_PASSWORD.encode()).decode()}

    assert mailbox.take(signed_up(server).email, VERIFY)


def test_a_wrong_mail_password_keeps_mail_back_and_is_not_logged(
    embedded, start_server, start_mailbox, tmp_path, monkeypatch
):
    tls = make_tls(tmp_path, LOOPBACK)
    mailbox = start_mailbox(implicit_tls=tls, credentials=("postern", "another-password-918273"))
    monkeypatch.setenv("SSL_CERT_FILE", tls.ca_file)
    wrong = "a-wrong-password-918273645546"
    server = start_server(embedded, mail_url=f"smtps://postern:{wrong}@{mailbox.address}")
    # `close` searches the log for these.
    server.secrets |= {wrong, base64.b64encode(f"\0postern\0{wrong}".encode()).decode()}

    expect_kept_back(server, mailbox)


def test_the_file_transport_leaves_a_whole_mail_for_each(embedded, start_server, tmp_path):
    directory = tmp_path / "mails"
    directory.mkdir()
    server = start_server(embedded, mail_url=f"file:{directory}")
    people = [signed_up(server) for _ in range(3)]

    files = wait_until("three mails", lambda: found if len(found := list(directory.glob("*.eml"))) == 3 else None, 10)

    contents = {file.read_bytes() for file in files}
    mails = {str(parse(content)["To"]): content for content in contents}
    assert {person.email for person in people} == {address.strip("<>") for address in mails}
    for person in people:
        content = next(content for address, content in mails.items() if person.email in address)
        mail = Mail("", (person.email,), parse(content), content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
        expect_well_formed(mail, person)
        assert server.client.verify_email(mail.token).email == person.email


def test_the_default_transport_writes_the_link_into_the_log(embedded, start_server):
    server = start_server(embedded)
    # Only this transport logs tokens. So this client records its secrets apart from those that the log must not hold.
    client = Client(server.address, set())
    person = Person()
    client.sign_up(person)

    def logged() -> str | None:
        lines = [line for line in server.log if f"{PUBLIC_URL}/verify-email?token=" in line and person.email in line]
        return lines[-1] if lines else None

    line = wait_until("the link is in the log", logged, DELIVERY_DEADLINE)
    assert json.loads(line), "the line is JSON, like all lines of the log"
    [token] = set(TOKEN.findall(line))
    assert client.verify_email(token).email_verified
    client.close()


# Headers with which a client or a proxy could claim another host for the service.
EVIL = {
    "forwarded": "host=evil.example.net;proto=https;for=203.0.113.9",
    "x-forwarded-host": "evil.example.net",
    "x-forwarded-proto": "gopher",
    "x-forwarded-port": "4444",
    "x-forwarded-prefix": "/evil",
    "x-forwarded-server": "evil.example.net",
    "x-forwarded-for": "203.0.113.9",
    "x-host": "evil.example.net",
    "x-original-url": "//evil.example.net/",
    "x-rewrite-url": "//evil.example.net/",
    "origin": "https://evil.example.net",
    "referer": "https://evil.example.net/",
}


def over_rest(server, path: str, body: dict, target: str = "") -> None:
    content = json.dumps(body)
    head = [f"POST {target}{path} HTTP/1.1", "host: evil.example.net", "content-type: application/json"]
    head += [f"{name}: {value}" for name, value in EVIL.items()]
    head += [f"content-length: {len(content)}", "connection: close", "", content]
    reply = raw(address_of(server, "http_addr"), "\r\n".join(head).encode())
    assert reply.received.startswith(b"HTTP/1.1 200 "), reply


def over_grpc(server, rpc: str, body: dict) -> None:
    message = getattr(pb, f"{rpc}Request")(**body).SerializeToString()
    headers = {":authority": "evil.example.net", **EVIL}
    answer = http2.post(server.address, f"/{service_of(rpc)}/{rpc}", message, headers)
    assert answer.grpc_status == 0, answer


def test_nothing_that_a_client_says_about_the_host_changes_a_link(embedded, start_server, start_mailbox):
    mailbox = start_mailbox()
    server = start_server(embedded, mail_url=mailbox.url)

    for call in (
        lambda path, _, body: over_rest(server, path, body),
        lambda path, _, body: over_rest(server, path, body, target="http://evil.example.net"),
        lambda _, rpc, body: over_grpc(server, rpc, body),
    ):
        person = Person()
        body = {"username": person.username, "email": person.email, "password": person.password}
        call("/v1/auth/signup", "SignUp", body)
        mail = mailbox.take(person.email, VERIFY)
        assert mail.link == f"{PUBLIC_URL}/verify-email?token={mail.token}"
        call("/v1/password/forgot", "RequestPasswordReset", {"email": person.email})
        mail = mailbox.take(person.email, RESET)
        assert mail.link == f"{PUBLIC_URL}/reset-password?token={mail.token}"

    for mail in mailbox.mails():
        assert b"evil" not in mail.content
        assert "evil" not in mail.text + mail.html


STRANGE_NAMES = ("www.evil.example.com", "evil.example.com", "http-evil.com")
# What a mail program could make a link of: stricter than any of them.
LINK_LIKE = re.compile(r"://|\w\.\w|\S@\S", re.ASCII)


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_nothing_that_a_stranger_chose_reads_as_a_link_in_any_kind_of_mail(embedded, start_server, start_mailbox, name):
    """The stranger signs up with the address of the victim, whose provider ignores what stands after the plus."""
    mailbox = start_mailbox()
    server = start_server(embedded, mail_url=mailbox.url, mail_limit_per_client="0", conceal_existing_accounts="true")
    client = server.client
    victim = f"victim+www.evil.com/a?b=c{Person().username}@example.com"
    new = f"www.evil.com/login?{Person().username}@evil.example.com"
    stranger = Person(username=name, email=victim)
    expect_invalid(lambda: client.sign_up(replace(stranger, username="user@evil.com")), "username")
    client.sign_up(stranger)
    mails = {"verify": mailbox.take(victim, VERIFY)}
    client.sign_up(Person(email=victim))
    mails["account exists"] = mailbox.notice(victim)
    client.request_password_reset(victim)
    mails["reset"] = mailbox.take(victim, RESET)
    tokens = client.login(stranger)
    password = Person().password
    tokens = client.change_password(tokens.access_token, stranger.password, password)
    mails["password changed"] = mailbox.notice(victim)
    client.request_email_change(tokens.access_token, new, password)
    mails["change requested"] = mailbox.notice(victim)
    mails["confirm change"] = mailbox.take(new, CHANGE)
    client.confirm_email_change(mails["confirm change"].token)
    mails["changed"] = mailbox.notice(victim)

    assert len(mails) == 7, "every kind"
    for kind, mail in mails.items():
        link = mail.link if mail.kind else "no link"
        assert set(hrefs(mail)) <= {link}, kind
        shown = html.unescape(re.sub(r"<head>.*</head>|<[^>]*>", " ", mail.html, flags=re.DOTALL))
        for part in (mail.message["Subject"], mail.text.replace(link, ""), shown.replace(link, "")):
            assert not LINK_LIKE.search(part), (kind, part)
            assert name not in part, (kind, part)


def test_links_lead_to_another_front_end_where_that_is_configured(embedded, start_server, start_mailbox):
    mailbox = start_mailbox()
    server = start_server(
        embedded,
        mail_url=mailbox.url,
        mail_from="post@example.com",
        verify_email_url="https://app.example.com/verify-email#/confirm/{token}/now",
        reset_password_url="https://app.example.com/reset-password?lang=de",
        confirm_email_change_url="https://app.example.com:8443/confirm-email-change?t={token}&lang=de",
    )
    person, tokens = server.client.newcomer()
    other = Person().email

    verify = mailbox.take(person.email, "verify-email")
    assert verify.link == f"https://app.example.com/verify-email#/confirm/{verify.token}/now"
    assert verify.link in hrefs(verify)

    server.client.request_password_reset(person.email)
    reset = mailbox.take(person.email, "reset-password")
    assert parse_qs(urlsplit(reset.link).query) == {"lang": ["de"], "token": [reset.token]}
    assert reset.link.startswith("https://app.example.com/reset-password?lang=de")

    server.client.request_email_change(tokens.access_token, other, person.password)
    change = mailbox.take(other, "confirm-email-change")
    assert change.link == f"https://app.example.com:8443/confirm-email-change?t={change.token}&lang=de"
    assert change.link in hrefs(change)
