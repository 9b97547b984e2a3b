"""Mail in the database: the mails that are not sent yet, and the tokens in mails.

It looks at two tables, as an operator would: `mail_outbox` and `one_time_tokens`.
"""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from support import jose
from support.mail import DELIVERY_DEADLINE
from support.wait import wait_until


@dataclass(frozen=True)
class Waiting:
    """A mail that is not sent yet, or that was given up."""

    kind: str
    recipient: str
    attempts: int
    dead: bool


def waiting(engine) -> list[Waiting]:
    rows = engine.query("SELECT kind, recipient, attempts, dead_time FROM mail_outbox")
    return [Waiting(kind, recipient, attempts, dead is not None) for kind, recipient, attempts, dead in rows]


def outbox_is_empty(engine) -> bool:
    """Whether every mail was sent or dropped. A mail that has not arrived by then never will."""
    left = [mail for mail in waiting(engine) if not mail.dead]
    assert not left, left
    return True


def lapse_claims(engine) -> None:
    """Makes every claimed mail due again at once, as if its claim had expired."""
    engine.execute("UPDATE mail_outbox SET next_attempt_time = ?", engine.as_time(datetime.now(UTC)))


def settle(engine, deadline: float = DELIVERY_DEADLINE) -> None:
    """Waits until no mail is left to send."""
    wait_until("the outbox is empty", lambda: outbox_is_empty(engine), deadline)


@dataclass(frozen=True)
class TokenRow:
    """The stored data of a token."""

    purpose: str
    email: str
    lifetime: timedelta


def row_of(engine, token: str) -> TokenRow | None:
    rows = engine.query(
        "SELECT purpose, email, create_time, expire_time FROM one_time_tokens WHERE id = ?", engine.as_id(id_of(token))
    )
    if not rows:
        return None
    [(purpose, address, created, expires)] = rows
    return TokenRow(purpose, address, engine.to_time(expires) - engine.to_time(created))


def set_expiry(engine, token: str, from_now: timedelta) -> None:
    """Sets the expiry of a token relative to now; it may be in the past. The server uses this machine's clock."""
    moment = engine.as_time(datetime.now(UTC) + from_now)
    statement = "UPDATE one_time_tokens SET expire_time = ? WHERE id = ?"
    assert engine.execute(statement, moment, engine.as_id(id_of(token))) == 1, "there is no such token"


def id_of(token: str) -> uuid.UUID:
    """A token is 64 characters of base64url: its id, and an HMAC."""
    return uuid.UUID(bytes=jose.decode(token)[:16])
