"""What each client intended and what it was told, in a file, and what follows from it.

A line is written before a call and another one after it. The verdict reads the file, and knows nothing else about the
client. An account or a session belongs to one client, whose calls follow each other, so the order of the lines in a
file is the order of events.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from faults.calls import Answer
from faults.processes import now


VERIFICATION = "verification"
_STEPS = {
    "SignUp": "sign_up",
    "Login": "login",
    "Refresh": "refresh",
    "Logout": "logout",
    "SetUserRoles": "set_user_roles",
    "GetMe": "get_me",
}


@dataclass
class Account:
    username: str
    email: str
    password: str
    # Whether somebody was told that it exists, and the fault that was being injected then.
    acknowledged: str | None = None
    doubtful: bool = False
    id: str | None = None
    # The roles that it may have beside `user`. More than one after a change whose outcome is unknown.
    roles: set[str] = field(default_factory=lambda: {""})
    roles_during: str = ""
    # A change of roles got no answer and may still come.
    roles_pending: bool = False


@dataclass
class Session:
    account: str
    refresh: str
    access: str
    born: float
    # The fault during which it was opened, refreshed or ended last.
    during: str
    ended: bool = False
    # A logout failed and may have been done.
    doubtful: bool = False
    # A refresh got no answer and may still come. Its client does not use the session before that is settled: a refresh
    # that arrives after two later ones would rightly look like a theft.
    pending: bool = False


class State:
    """What a client was told so far."""

    def __init__(self):
        self.accounts: dict[str, Account] = {}
        self.sessions: dict[str, Session] = {}
        self.tried: Counter = Counter()
        self.acknowledged: Counter = Counter()
        self.failed: dict[str, Counter] = defaultdict(Counter)

    def apply(self, intent: dict, outcome: dict) -> None:
        fault, answer = intent["counted_as"], Answer(outcome["answer"])
        done = answer is Answer.DONE
        self.tried[fault] += 1
        self.acknowledged[fault] += done
        if not done:
            self.failed[fault][outcome["reason"]] += 1
        getattr(self, f"_{_STEPS[intent['rpc']]}")(intent, outcome, answer, done)

    def _sign_up(self, intent, outcome, answer, done) -> None:
        account = self.accounts.setdefault(
            intent["account"], Account(intent["username"], intent["email"], intent["password"])
        )
        if done or (account.doubtful and outcome["reason"] in ("EMAIL_TAKEN", "USERNAME_TAKEN")):
            account.acknowledged = account.acknowledged or intent["fault"]
            account.id = outcome.get("id") or account.id
        account.doubtful = account.doubtful or answer in (Answer.DOUBT, Answer.SILENCE)

    def _login(self, intent, outcome, answer, done) -> None:
        if done:
            self.accounts[intent["account"]].id = outcome["id"]
            self.sessions[intent["session"]] = Session(
                intent["account"], outcome["refresh"], outcome["access"], outcome["at"], intent["fault"]
            )

    def _refresh(self, intent, outcome, answer, done) -> None:
        session = self.sessions[intent["session"]]
        if done:
            session.refresh, session.access, session.born = outcome["refresh"], outcome["access"], outcome["at"]
            session.during, session.pending = intent["fault"], False
        session.pending = session.pending or answer is Answer.SILENCE

    def _logout(self, intent, outcome, answer, done) -> None:
        session = self.sessions[intent["session"]]
        if done:
            session.ended, session.during = True, intent["fault"]
        session.doubtful = session.doubtful or answer in (Answer.DOUBT, Answer.SILENCE)

    def _set_user_roles(self, intent, outcome, answer, done) -> None:
        account = self.accounts[intent["account"]]
        account.roles_during = intent["fault"]
        if done:
            # What is under way may still come after this change.
            account.roles = {intent["role"], *(account.roles if account.roles_pending else ())}
        elif answer in (Answer.DOUBT, Answer.SILENCE):
            account.roles.add(intent["role"])
            account.roles_pending = account.roles_pending or answer is Answer.SILENCE

    def _get_me(self, intent, outcome, answer, done) -> None:
        """Changes nothing."""

    def live_sessions(self) -> dict[str, Session]:
        return {key: session for key, session in self.sessions.items() if not session.ended and not session.doubtful}


class Ledger:
    """The file of one client."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("w", buffering=1)
        self._numbers = 0
        self.state = State()
        # What the verdict has read of the file.
        self._read_to, self._read = 0, State()
        self._open_intents: dict[int, dict] = {}

    def begin(self, fault: str, rpc: str, verifying: bool = False, **what) -> dict:
        """Writes what is about to be called. Calls of the verdict count as `verification`."""
        self._numbers += 1
        counted_as = VERIFICATION if verifying else fault
        intent = {"n": self._numbers, "at": now(), "fault": fault, "counted_as": counted_as, "rpc": rpc, **what}
        self._file.write(json.dumps(intent) + "\n")
        return intent

    def end(self, intent: dict, answer: Answer, reason: str = "", **result) -> None:
        """Writes what came of it."""
        outcome = {"of": intent["n"], "at": now(), "answer": answer.value, "reason": reason, **result}
        self._file.write(json.dumps(outcome) + "\n")
        self.state.apply(intent, outcome)

    def replay(self) -> State:
        """The state that follows from what the file says."""
        with self._path.open() as file:
            file.seek(self._read_to)
            while line := file.readline():
                record = json.loads(line)
                if "of" in record:
                    self._read.apply(self._open_intents.pop(record["of"]), record)
                else:
                    self._open_intents[record["n"]] = record
            self._read_to = file.tell()
        assert not self._open_intents, f"{self._path.name}: calls without an outcome: {self._open_intents}"
        return self._read

    def settle(self) -> None:
        """Nothing is under way any more: what got no answer was done by now, or never will be."""
        for state in (self.state, self._read):
            for session in state.sessions.values():
                session.pending = False
            for account in state.accounts.values():
                account.roles_pending = False
