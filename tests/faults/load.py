"""The clients: they call all the time while a fault is injected, and each keeps a ledger.

Most calls are cheap. A sign-up or a login computes a hash with production's parameters, which costs as much as dozens
of the others.
"""

import random
import secrets
import threading
import time
import uuid
from pathlib import Path

import grpc

from faults.calls import Answer, Caller, judged
from faults.ledger import Account, Ledger, Session
from faults.processes import now
from support import pb

# How often each is chosen.
MIX = {"refresh": 550, "look": 370, "change_roles": 64, "open": 10, "sign_up": 6}
SESSIONS = 6
# Access tokens are valid for 15 minutes.
OLD = 600
ROLES = ("", "editor", "auditor", "translator")
PAUSE_AFTER_FAILURE = 0.1


class Admin:
    """The admin who changes roles. All clients share the access token, which a login renews before each fault."""

    def __init__(self, email: str, password: str):
        self._email, self._password = email, password
        self.token = ""

    def login(self, caller: Caller) -> None:
        answer, reply, reason = caller.call("Login", pb.LoginRequest(email=self._email, password=self._password))
        assert answer is Answer.DONE, f"the admin cannot log in: {reason}"
        self.token = reply.tokens.access_token


class Client:
    """One client: its ledger, and the calls that it enters there. It calls one replica until that fails it."""

    def __init__(self, path: Path, callers: list[Caller], admin: Admin, home: int = 0):
        self.ledger = Ledger(path)
        self.callers, self.admin, self._home = callers, admin, home
        self._where, self._returns = home, 0.0
        self.fault, self.verifying = "before", False
        self.random = random.Random(secrets.randbits(64))
        # Calls that were answered with an error that no fault explains.
        self.violations: list[str] = []

    @property
    def state(self):
        return self.ledger.state

    # -- calls -----------------------------------------------------------------------------------------------------

    def sign_up(self, account_key: str | None = None) -> bool:
        """Signs up a new person, or again one whose sign-up is in doubt."""
        known = self.state.accounts.get(account_key)
        account_key = account_key or uuid.uuid4().hex[:12]
        account = known or Account(
            f"u{account_key}", f"{account_key}@example.com", f"Quiet-{secrets.token_hex(8)}-otter"
        )
        person = {"username": account.username, "email": account.email, "password": account.password}
        answer, _, reason = self._entered(
            "SignUp", pb.SignUpRequest(**person), lambda reply: {"id": reply.user.id}, account=account_key, **person
        )
        taken = reason in ("EMAIL_TAKEN", "USERNAME_TAKEN")
        self._expect(answer, reason, "SignUp", taken and known is not None and known.doubtful)
        return answer is Answer.DONE

    def login(self, account_key: str, timeout: float | None = None) -> tuple[Answer, str]:
        account = self.state.accounts[account_key]
        request = pb.LoginRequest(email=account.email, password=account.password)
        answer, _, reason = self._entered(
            "Login",
            request,
            lambda reply: {**_tokens(reply), "id": reply.user.id},
            timeout=timeout,
            account=account_key,
            session=uuid.uuid4().hex[:12],
        )
        return answer, reason

    def refresh(self, session_key: str, timeout: float | None = None) -> tuple[Answer, str]:
        request = pb.RefreshRequest(refresh_token=self.state.sessions[session_key].refresh)
        answer, _, reason = self._entered("Refresh", request, _tokens, timeout=timeout, session=session_key)
        return answer, reason

    def look(self, session_key: str) -> tuple[Answer, str]:
        token = self.state.sessions[session_key].access
        answer, _, reason = self._entered("GetMe", pb.GetMeRequest(), token=token, session=session_key)
        return answer, reason

    def logout(self, session_key: str) -> tuple[Answer, str]:
        request = pb.LogoutRequest(refresh_token=self.state.sessions[session_key].refresh)
        answer, _, reason = self._entered("Logout", request, session=session_key)
        return answer, reason

    def change_roles(self, account_key: str, role: str) -> tuple[Answer, str]:
        request = pb.SetUserRolesRequest(user_id=self.state.accounts[account_key].id, roles=[role] if role else [])
        answer, _, reason = self._entered(
            "SetUserRoles", request, token=self.admin.token, account=account_key, role=role
        )
        return answer, reason

    def roles_of(self, account_key: str) -> set[str]:
        """The roles beside `user`. The call changes nothing and is in no ledger."""
        request = pb.GetUserRequest(user_id=self.state.accounts[account_key].id)
        answer, reply, reason = self._caller().call("GetUser", request, self.admin.token)
        return set(reply.user.roles) - {"user"} if answer is Answer.DONE else {reason}

    def vanish(self, rpc: str, after: float) -> None:
        """Begins a sign-up or a change of roles, and goes away after so many seconds."""
        token = None
        if rpc == "SignUp":
            key = uuid.uuid4().hex[:12]
            person = {"username": f"u{key}", "email": f"{key}@example.com", "password": f"Quiet-{key}-otter"}
            request, what = pb.SignUpRequest(**person), {"account": key, **person}
        else:
            key = self.random.choice([key for key, account in self.state.accounts.items() if account.id])
            role = self.random.choice(ROLES)
            request = pb.SetUserRolesRequest(user_id=self.state.accounts[key].id, roles=[role] if role else [])
            token, what = self.admin.token, {"account": key, "role": role}
        intent = self.ledger.begin(self.fault, rpc, **what)
        call = self._caller().begin(rpc, request, token)
        time.sleep(after)
        call.cancel()
        try:
            reply = call.result()
            result = {"id": reply.user.id} if rpc == "SignUp" else {}
            self.ledger.end(intent, Answer.DONE, **result)
        except grpc.FutureCancelledError:
            self.ledger.end(intent, Answer.SILENCE, "CANCELLED")
        except grpc.RpcError as error:
            answer, _, reason = judged(error)
            self.ledger.end(intent, answer, reason)

    def _entered(self, rpc: str, request, result=None, token: str | None = None, timeout=None, **what):
        """Calls, and enters the intention and the outcome."""
        caller = self._caller()
        intent = self.ledger.begin(self.fault, rpc, self.verifying, **what)
        answer, reply, reason = caller.call(rpc, request, token, timeout)
        self.ledger.end(intent, answer, reason, **(result(reply) if result and reply is not None else {}))
        if answer in (Answer.DOUBT, Answer.SILENCE):
            # The next replica, for a while.
            self._where, self._returns = self._where + 1, now() + 1
            time.sleep(PAUSE_AFTER_FAILURE * (0.5 + self.random.random()))
        elif answer is Answer.REFUSED:
            time.sleep(PAUSE_AFTER_FAILURE)
        return answer, reply, reason

    def _caller(self) -> Caller:
        if self._where != self._home and now() > self._returns:
            self._where = self._home
        return self.callers[self._where % len(self.callers)]

    def _role_to_change(self) -> tuple[str, str]:
        accounts = self.state.accounts
        keys = [key for key, account in accounts.items() if account.id and not account.roles_pending]
        return self.random.choice(keys), self.random.choice(ROLES)

    def _expect(self, answer: Answer, reason: str, rpc: str, otherwise: bool = False) -> None:
        """Notes an answer that no fault explains."""
        if answer is Answer.ERROR and not otherwise:
            self.violations.append(f"{self.fault}: {rpc} was answered {reason}")

    # -- what it does all the time ---------------------------------------------------------------------------------

    def settle_in(self) -> None:
        """Signs up a few people, and logs them in."""
        for _ in range(2):
            assert self.sign_up(), "a sign-up failed before any fault"
        self.make_sessions(SESSIONS)

    def make_sessions(self, count: int) -> None:
        while len(self.state.live_sessions()) < count:
            account = self.random.choice([key for key, account in self.state.accounts.items() if account.acknowledged])
            self.login(account)

    def step(self) -> None:
        """One call of the mix."""
        doubtful = [
            key for key, account in self.state.accounts.items() if account.doubtful and not account.acknowledged
        ]
        usable = {key: session for key, session in self.state.live_sessions().items() if not session.pending}
        what = self.random.choices(list(MIX), MIX.values())[0]
        if what == "sign_up":
            self.sign_up(doubtful[-1] if doubtful else None)
        elif what == "open" or not usable:
            self._open_and_close(usable)
        elif what == "change_roles":
            self._expect(*self.change_roles(*self._role_to_change()), "SetUserRoles")
        else:
            key = self.random.choice(list(usable))
            young = now() - usable[key].born < OLD
            # A live session that is told to be dead is a logout that nobody asked for.
            if what == "look" and young:
                self._expect(*self.look(key), "GetMe")
            else:
                self._expect(*self.refresh(key), "Refresh")

    def _open_and_close(self, usable: dict[str, Session]) -> None:
        """A login; and where there are enough sessions, the oldest ends."""
        account = self.random.choice([key for key, account in self.state.accounts.items() if account.acknowledged])
        self._expect(*self.login(account), "Login")
        if len(usable) >= SESSIONS:
            self._expect(*self.logout(next(iter(usable))), "Logout")


class Probe(Client):
    """Refreshes at one replica ten times a second, and notes when that works."""

    PAUSE, TIMEOUT, STOCK = 0.1, 2, 6

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen: list[tuple[float, float, bool]] = []

    def settle_in(self) -> None:
        assert self.sign_up(), "a sign-up failed before any fault"
        self.make_sessions(self.STOCK)

    def step(self) -> None:
        # A session whose refresh got no answer is left alone, and the next one takes its place.
        usable = [key for key, session in self.state.live_sessions().items() if not session.pending]
        started = now()
        if usable:
            answer, reason = self.refresh(usable[0], self.TIMEOUT)
        else:
            answer, reason = self.login(next(iter(self.state.accounts)), self.TIMEOUT)
        self._expect(answer, reason, "the call of a probe")
        self.seen.append((started, now(), answer is Answer.DONE))
        time.sleep(self.PAUSE)

    def successes(self, since: float) -> int:
        """How many calls in a row have succeeded lately, of those that began since then."""
        count = 0
        for started, _, good in reversed(self.seen):
            if started < since or not good:
                break
            count += 1
        return count

    def healed(self, since: float) -> float:
        """How many seconds after then the first call ended from which on all succeeded."""
        after = [probe for probe in self.seen if probe[0] >= since]
        last_failure = max((index for index, (*_, good) in enumerate(after) if not good), default=-1)
        return after[last_failure + 1][1] - since


class Load:
    """Clients in threads of their own, which all pause between faults."""

    def __init__(self, clients: list[Client]):
        self.clients = clients
        self._go, self._end = threading.Event(), threading.Event()
        self._idle = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._work, args=(client,), daemon=True) for client in clients]
        self._crashes: list[BaseException] = []

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def resume(self) -> None:
        self._go.set()

    def pause(self) -> None:
        """Waits until no call is under way."""
        self._go.clear()
        for _ in self.clients:
            assert self._idle.acquire(timeout=90), "a client does not come to its end"
        if self._crashes:
            raise self._crashes[0]

    def stop(self) -> None:
        self._end.set()
        self._go.set()

    def _work(self, client: Client) -> None:
        while True:
            self._go.wait()
            if self._end.is_set():
                return
            try:
                while self._go.is_set():
                    client.step()
            except BaseException as crash:
                self._crashes.append(crash)
            self._idle.release()
            # Until the others are idle too, and the next fault begins.
            while self._go.is_set() and not self._end.is_set():
                time.sleep(0.01)


def _tokens(reply) -> dict[str, str]:
    return {"refresh": reply.tokens.refresh_token, "access": reply.tokens.access_token}
