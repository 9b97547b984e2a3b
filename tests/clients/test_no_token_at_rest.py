"""A copy of the database or of the log gives no access.

It searches them for secrets after every flow has run, also while mails wait for delivery. The `log:` transport, which
logs its mails on purpose, is not used here.
"""

import base64
import time
from dataclasses import replace

import pytest

from support import jose
from support.admin import Somebody, any_way
from support.client import Person
from support.mail import CHANGE, RESET, VERIFY, Behaviour
from support.outbox import id_of, row_of, settle, waiting
from support.services import INVALID_CLIENT, ServiceAccount, introspect
from support.wait import wait_until


class Secrets:
    """Every secret that gives access, by kind."""

    def __init__(self):
        self.passwords: set[str] = set()
        self.session_tokens: set[str] = set()
        self.mail_tokens: set[str] = set()
        self.client_secrets: set[str] = set()

    def person(self) -> Person:
        person = Person()
        self.passwords.add(person.password)
        return person

    def tokens(self, pair):
        self.session_tokens |= {pair.access_token, pair.refresh_token}
        return pair

    def mailed(self, token: str) -> str:
        self.mail_tokens.add(token)
        return token

    def forms(self) -> dict[str, list[bytes]]:
        """Each secret in every form in which it could be stored. None of them may be found."""
        forms = {f"password {password[:8]}…": [password.encode()] for password in self.passwords}
        for token in self.session_tokens:
            signature = token.rpartition(".")[2]
            forms[f"session token {token[:8]}…"] = [token.encode(), *encodings(jose.decode(signature))]
        for secret in self.client_secrets:
            # The prefix is the same for all.
            random = secret.removeprefix("postern_")
            forms[f"client secret {random[:8]}…"] = [random.encode(), *encodings(jose.decode(random))]
        for token in self.mail_tokens:
            # The first sixteen bytes are the id of the row, which is stored. The rest is the HMAC, which is secret.
            mac = jose.decode(token)[16:]
            assert len(mac) == 32
            forms[f"mail token {token[:8]}…"] = [token.encode(), token[22:].encode(), *encodings(mac)]
        return forms


def encodings(secret: bytes) -> list[bytes]:
    urlsafe = base64.urlsafe_b64encode(secret).rstrip(b"=")
    standard = base64.b64encode(secret).rstrip(b"=")
    return [secret, secret.hex().encode(), secret.hex().upper().encode(), urlsafe, standard]


@pytest.fixture
def secrets() -> Secrets:
    return Secrets()


def live_through_everything(server, mailbox, secrets: Secrets) -> list[str]:
    """Runs every flow, some of them only in part. Returns the live tokens of mails that are still in the outbox."""
    client = server.client

    def newcomer():
        person = secrets.person()
        client.sign_up(person)
        return person, secrets.tokens(client.login(person))

    def another(person: Person) -> Person:
        return replace(person, password=secrets.person().password)

    verified, tokens = newcomer()
    secrets.mailed(mailbox.token(verified.email, VERIFY))
    client.resend_verification(verified.email)
    client.verify_email(secrets.mailed(mailbox.token(verified.email, VERIFY)), tokens.access_token)
    secrets.tokens(client.refresh(tokens.refresh_token))

    with_services(server, secrets)

    reset, _ = newcomer()
    client.request_password_reset(reset.email)
    again = another(reset)
    client.reset_password(secrets.mailed(mailbox.token(reset.email, RESET)), again.password)
    secrets.tokens(client.login(again))

    changed, tokens = newcomer()
    again = another(changed)
    secrets.tokens(client.change_password(tokens.access_token, changed.password, again.password))

    moved, tokens = newcomer()
    new_email = Person().email
    client.request_email_change(tokens.access_token, new_email, moved.password)
    client.confirm_email_change(secrets.mailed(mailbox.token(new_email, CHANGE)))

    # These mails are delivered, and their tokens are never used.
    idle, tokens = newcomer()
    secrets.mailed(mailbox.token(idle.email, VERIFY))
    client.request_password_reset(idle.email)
    secrets.mailed(mailbox.token(idle.email, RESET))
    client.request_email_change(tokens.access_token, new_email := Person().email, idle.password)
    secrets.mailed(mailbox.token(new_email, CHANGE))
    settle(server.engine)

    # The mailbox rejects these mails, so they wait in the outbox.
    mailbox.behave(Behaviour(at_data="451 4.3.0 later"))
    waiter, tokens = newcomer()
    new_email = Person().email
    client.request_password_reset(waiter.email)
    client.request_email_change(tokens.access_token, new_email, waiter.password)

    def of_each_kind() -> bool:
        return {mail.kind for mail in mailbox.refused} >= {VERIFY, RESET, CHANGE}

    wait_until("one of each kind was refused", of_each_kind)
    for mail in mailbox.mails():
        if mail.kind:
            secrets.mailed(mail.token)
    return [secrets.mailed(mail.token) for mail in mailbox.refused if mail.kind]


def with_services(server, secrets: Secrets) -> None:
    """Runs the flows of service accounts, with live, deleted and expiring keys."""
    with any_way("gRPC", server) as way:
        admin = Somebody(way, server.engine, "admin")
        secrets.passwords.add(admin.person.password)
        secrets.session_tokens |= {admin.tokens["accessToken"], admin.tokens["refreshToken"]}
        service = ServiceAccount(way, admin, "reader")
        deleted, of_deleted = service.new_key(description="for a while")
        _, expiring = service.new_key(expire_time={"seconds": int(time.time()) + 600})
        secrets.client_secrets |= {service.secret, of_deleted, expiring}
        for secret in (service.secret, of_deleted, expiring):
            secrets.session_tokens.add(token := service.token(secret))
            assert introspect(way, token)["active"]
        service.delete_key(deleted)
        way.refused("IssueServiceToken", *INVALID_CLIENT, client_id=service.id, client_secret=of_deleted)


def test_neither_database_nor_log_holds_what_lets_anybody_in(engine, start_server, start_mailbox, secrets):
    mailbox = start_mailbox()
    server = start_server(engine, mail_url=mailbox.url)

    waiting_tokens = live_through_everything(server, mailbox, secrets)

    assert len(waiting(engine)) >= 3, "some mails are not delivered yet"
    backups = engine.backups()
    for name, backup in backups.items():
        found = [what for what, forms in secrets.forms().items() if any(form in backup for form in forms)]
        assert not found, f"{name} holds {found}"
    log = "\n".join(server.log).encode()
    found = [what for what, forms in secrets.forms().items() if any(form in log for form in forms)]
    assert not found, f"the log holds {found}"

    # The search works: it finds the ids of the tokens, which are stored.
    assert len(secrets.mail_tokens) >= 10
    assert len(secrets.client_secrets) == 3
    for token in waiting_tokens:
        assert row_of(engine, token), "the token is live"
        stored = [str(id_of(token)).encode(), id_of(token).bytes, id_of(token).hex.upper().encode()]
        assert any(form in backup for form in stored for backup in backups.values())
    mailbox.recover()
    verification = next(mail for mail in mailbox.refused if mail.kind == VERIFY)
    assert server.client.verify_email(verification.token).email_verified, "the token gives access"


def test_the_search_finds_a_secret_in_each_of_its_forms(engine, start_server, start_mailbox, secrets):
    mailbox = start_mailbox()
    server = start_server(engine, mail_url=mailbox.url)
    person = secrets.person()
    server.client.sign_up(person)
    token = secrets.mailed(mailbox.token(person.email, VERIFY))
    settle(engine)
    [(_, forms)] = [item for item in secrets.forms().items() if item[0].startswith("mail token")]

    for planted in (token, jose.decode(token)[16:].hex(), base64.b64encode(jose.decode(token)[16:]).decode()):
        engine.execute("UPDATE users SET password_hash = ? WHERE email = ?", planted, person.email)
        assert any(form in backup for form in forms for backup in engine.backups().values()), planted
