"""Reads the ledgers, and asks Postern whether everything that was acknowledged is there.

Every acknowledged sign-up logs in, every acknowledged logout is dead on every replica, every acknowledged refresh is
live or rotated, every acknowledged change of roles holds, and every mail was sent.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from faults.calls import Answer, Caller
from faults.ledger import Account, Session
from faults.load import OLD, Client
from faults.processes import now
from support.mail import Mailbox

DEAD = "REFRESH_TOKEN_INVALID"
# How long a question is repeated while it gets no answer, and how long a revocation may take to be known everywhere.
PATIENCE, REVOCATION = 300, 10
# Few at a time: many of the questions are logins, which cost a hash each.
QUESTIONS = 3
# A replica that was killed with a mail leaves it to the others after 40 s; other tries are at most as far apart.
MAIL_PATIENCE = 180


@dataclass(frozen=True)
class Loss:
    """Something that was acknowledged during a fault and is not there."""

    during: str
    what: str


def check(clients: list[Client], everywhere: list[Caller], patient: Caller, during: str | None) -> list[Loss]:
    """Checks what the clients were told during one fault, or during all."""

    def one(client: Client) -> list[Loss]:
        usual, client.callers, client.verifying = client.callers, [patient], True
        try:
            return list(_Check(client, everywhere, during).losses())
        finally:
            client.callers, client.verifying = usual, False

    with ThreadPoolExecutor(QUESTIONS) as pool:
        return [loss for losses in pool.map(one, clients) for loss in losses]


class _Check:
    def __init__(self, client: Client, everywhere: list[Caller], during: str | None):
        self._client, self._everywhere, self._during = client, everywhere, during

    def losses(self):
        told, known = self._client.ledger.replay(), self._client.state
        same = told.accounts == known.accounts and told.sessions == known.sessions
        assert same, "the ledger says something else than its client"
        self._client.ledger.settle()
        accounts = [(key, account) for key, account in told.accounts.items() if self._concerns(account.acknowledged)]
        sessions = [(key, session) for key, session in told.sessions.items() if self._concerns(session.during)]
        roles = [(key, account) for key, account in told.accounts.items() if self._concerns(account.roles_during)]
        for key, session in sessions:
            yield from self._session(key, session)
        for key, account in roles:
            yield from self._roles(key, account)
        for key, account in accounts:
            yield from self._account(key, account)
        doubtful = [key for key, account in told.accounts.items() if account.doubtful and not account.acknowledged]
        for key in doubtful if self._during is None else ():
            yield from self._doubtful_account(key)

    def _concerns(self, during: str | None) -> bool:
        return bool(during) and self._during in (None, during)

    def _account(self, key: str, account: Account):
        answer, reason = _insist(lambda: self._client.login(key))
        if answer is not Answer.DONE:
            yield Loss(account.acknowledged, f"{account.email} was signed up and cannot log in: {reason}")

    def _doubtful_account(self, key: str):
        """An account whose sign-up got no answer: it is there as a whole, or not at all."""
        answer, reason = _insist(lambda: self._client.login(key))
        if answer is not Answer.DONE and reason != "INVALID_CREDENTIALS":
            yield Loss("", f"a sign-up without an answer: its login is answered {reason}")

    def _session(self, key: str, session: Session):
        answer, reason = _insist(lambda: self._client.refresh(key))
        if session.ended:
            if reason != DEAD:
                yield Loss(session.during, f"session {key} was ended, and its refresh is answered {reason or 'OK'}")
            yield from self._access_is_dead(key, session)
        elif answer is not Answer.DONE and not (session.doubtful and reason == DEAD):
            yield Loss(session.during, f"session {key} was opened or refreshed, and its refresh is answered {reason}")

    def _access_is_dead(self, key: str, session: Session):
        if now() - session.born > OLD:
            return
        end = now() + REVOCATION
        for caller in self._everywhere:
            self._client.callers = [caller]
            reason = None
            while reason != "SESSION_REVOKED" and now() < end:
                _, reason = _insist(lambda: self._client.look(key))
            if reason != "SESSION_REVOKED":
                yield Loss(
                    session.during, f"session {key} was ended, and its access token is answered {reason or 'OK'}"
                )

    def _roles(self, key: str, account: Account):
        end = now() + PATIENCE
        while (found := self._client.roles_of(key)) not in (possible := [{role} - {""} for role in account.roles]):
            if found & {"UNAVAILABLE", "STORE_UNAVAILABLE", "DEADLINE_EXCEEDED"} and now() < end:
                time.sleep(0.5)
                continue
            yield Loss(
                account.roles_during, f"{account.email} has the roles {found}, and should have one of {possible}"
            )
            return


def mails(clients: list[Client], mailbox: Mailbox) -> list[Loss]:
    """Waits for the mail of every sign-up that was acknowledged."""
    wanted = {
        account.email: account.acknowledged
        for client in clients
        for account in client.ledger.replay().accounts.values()
        if account.acknowledged
    }
    end = now() + MAIL_PATIENCE
    while True:
        got = {address for mail in mailbox.mails() for address in mail.recipients}
        missing = wanted.keys() - got
        if not missing or now() > end:
            return [Loss(wanted[email], f"no mail was sent to {email}") for email in missing]
        time.sleep(0.5)


def _insist(ask: Callable[[], tuple[Answer, str]]) -> tuple[Answer, str]:
    """Repeats a call until it gets an answer."""
    end = now() + PATIENCE
    while True:
        answer, reason = ask()
        if answer not in (Answer.DOUBT, Answer.SILENCE, Answer.REFUSED) or now() > end:
            return answer, reason
