"""Random sequences of logins, revocations, wrong clocks, restores and restarts: nothing revoked is accepted.

A sequence is drawn from a seed, which is printed; `POSTERN_TEST_SEED` makes that sequence the first one. A model knows
what the database must hold. PostgreSQL has three replicas, each with a clock of its own, and SQLite has one server.
"""

import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import grpc
import pytest

from support.admin import Somebody, session_id
from support.client import Person
from support.engine import Engine, Postgres, Sqlite
from support.expect import reason_of
from support.faketime import RIGHT, ClockedServer, find_library
from support.outbox import settle
from support.transports import ByGrpc
from support.wait import wait_until
from test_restore import PostgresBackup, SqliteBackup
from test_throttling import retry_after

STEPS, ACCOUNTS = 25, 5
# How often each kind of step is drawn. `reinstate` enables an account and makes it an admin again, so that there is
# always somebody from whom something can be taken.
KINDS = {"login": 3, "refresh": 3, "logout": 4, "demote": 3, "disable": 3, "reinstate": 2, "guess": 3, "clock": 5}
KINDS |= {"dump": 2, "restore": 3, "restart": 3}
DAY = 24 * 60 * 60
# How many sequences run before one wait until the longest access token has expired, which all of them need.
AT_ONCE = 3
# The lifetime of access tokens, and the leeway for clocks, in seconds.
TTL, LEEWAY = 2, 5
# In seconds. Half of the revocations must be known everywhere within PROMISE, because other tests run on the same
# machine. DEADLINE is shorter than TTL and LEEWAY together: a token that has expired is refused anyway.
PROMISE, DEADLINE = 1.0, 4.0
# The longest pause after wrong passwords in seconds.
LONGEST_PAUSE = 15 * 60
REFUSED = {"SESSION_REVOKED", "ROLE_REQUIRED", "TOKEN_INVALID", "TOKEN_EXPIRED"}
# A call that is refused like this is made again: a restore closes connections, and the log of revocations is read anew.
LATER = {"STORE_UNAVAILABLE", "UNAVAILABLE", "OVERLOADED"}


@dataclass(frozen=True)
class Step:
    """A step, drawn before the sequence starts. `pick` chooses one of what there is when its turn comes."""

    kind: str
    replica: int
    pick: float
    clock: int
    guesses: int

    def __str__(self) -> str:
        more = {"clock": f" {self.clock:+d} s", "guess": f" {self.guesses} times"}
        return f"{self.kind}{more.get(self.kind, '')} at {self.replica}"

    def one_of(self, choices: list):
        return choices[int(self.pick * len(choices))] if choices else None


def draw(seed: int, replicas: int) -> list[Step]:
    """The steps of a sequence. A clock is put right or made wrong by up to ten days, often by as much as another."""
    chance, steps = random.Random(seed), []
    for _ in range(STEPS):
        [kind] = chance.choices(list(KINDS), list(KINDS.values()))
        replica, pick = chance.randrange(replicas), chance.random()
        clock = chance.choice([0, 0, chance.randint(-10 * DAY, 10 * DAY), 10 * DAY, DAY, -10 * DAY])
        steps.append(Step(kind, replica, pick, clock, guesses=chance.choice([2, 10, 13])))
    return steps


@dataclass
class State:
    """What the database must hold: whether each session has ended, and who is an admin or disabled."""

    ended: dict[str, bool] = field(default_factory=dict)
    admins: frozenset[str] = frozenset()
    disabled: frozenset[str] = frozenset()


@dataclass
class Session:
    """A session as its client knows it, with the newest tokens."""

    owner: Somebody
    tokens: dict
    # Whether a clock that was wrong set an expiry of its refresh tokens.
    is_doubtful: bool


@dataclass(frozen=True)
class Handed:
    """An access token that was handed out."""

    token: str
    session: str
    owner: str


def call(server: ClockedServer, rpc: str, **fields) -> tuple[str, dict | float]:
    """Makes a call. Returns OK and the reply, or the reason of a refusal and the seconds that it asks to wait."""
    try:
        return "OK", ByGrpc(server.client).ok(rpc, **fields)
    except grpc.RpcError as error:
        reason = reason_of(error) or error.code().name
        return reason, retry_after(error) if reason == "THROTTLED" else 0.0


def answer(server: ClockedServer, rpc: str, **fields) -> tuple[str, dict | float]:
    """The same, but it waits while the server cannot answer."""

    def settled():
        outcome = call(server, rpc, **fields)
        return None if outcome[0] in LATER else outcome

    return wait_until(f"{rpc} is answered", settled)


class Sequence:
    """Carries out steps, compares what the replicas do with the model, and collects what is wrong."""

    def __init__(self, engine: Engine, servers: list[ClockedServer], new_backup: Callable):
        self.servers, self._new_backup = servers, new_backup
        self.complaints: list[str] = []
        # How long it took until revocations were known everywhere.
        self.waits: list[float] = []
        self.did: list[str] = []
        self.state = State()
        self.sessions: dict[str, Session] = {}
        self._handed: list[Handed] = []
        # Access tokens that were minted in a time that a restore has undone.
        self._undone: set[str] = set()
        self._guessed: set[str] = set()
        self._clocks, self._changed = [0] * len(servers), [0.0] * len(servers)
        self._boss, *people = (Somebody(ByGrpc(servers[0].client), engine, "admin") for _ in range(1 + ACCOUNTS))
        self.people = {somebody.id: somebody for somebody in people}
        self.state.admins = frozenset(self.people)
        for somebody in people:
            self._keep(somebody, somebody.tokens, 0)
        settle(engine)
        self._dumps: list = []
        self._dump()

    def run(self, steps: list[Step]) -> None:
        for step in steps:
            self.did.append(str(step))
            getattr(self, f"_{step.kind}")(step)
        self.did.append("everything is right again")
        for server in self.servers:
            server.set_clock(RIGHT)
        self._clocks = [0] * len(self.servers)

    # -- steps -----------------------------------------------------------------------------------------------------

    def _login(self, step: Step) -> None:
        self._log_in(self.people[step.one_of(list(self.people))], step.replica)

    def _refresh(self, step: Step) -> None:
        if sid := step.one_of(self._open()):
            self._refresh_at(step.replica, sid)

    def _logout(self, step: Step) -> None:
        if sid := step.one_of(self._open()):
            self._refresh_at(step.replica, sid)
            token = self.sessions[sid].tokens["refreshToken"]
            outcome, _ = answer(self.servers[step.replica], "Logout", refresh_token=token)
            assert outcome == "OK", outcome
            self.state.ended[sid] = True
            self._expect_refused("a logged-out", lambda handed: handed.session == sid)

    def _demote(self, step: Step) -> None:
        if id := step.one_of(sorted(self.state.admins - self.state.disabled)):
            self._log_in(self.people[id], (step.replica + 1) % len(self.servers))
            self._order(step, "SetUserRoles", id, roles=[])
            self.state.admins -= {id}
            self._expect_refused("a demoted", lambda handed: handed.owner == id, "ListUsers")

    def _disable(self, step: Step) -> None:
        if id := step.one_of(sorted(set(self.people) - self.state.disabled)):
            self._log_in(self.people[id], (step.replica + 1) % len(self.servers))
            self._order(step, "DisableUser", id)
            self.state.disabled |= {id}
            ended = {sid for sid in self.state.ended if self.sessions[sid].owner.id == id}
            self.state.ended.update(dict.fromkeys(ended, True))
            for rpc in ("ListSessions", "ListUsers"):
                # Also the tokens of sessions that a restore has undone, which the database does not know.
                self._expect_refused("a disabled", lambda handed: handed.owner == id, rpc)

    def _reinstate(self, step: Step) -> None:
        if id := step.one_of(sorted(set(self.people) - self.state.admins | self.state.disabled)):
            self._order(step, "EnableUser", id)
            self._order(step, "SetUserRoles", id, roles=["admin"])
            self.state.disabled -= {id}
            self.state.admins |= {id}

    def _guess(self, step: Step) -> None:
        somebody = self.people[step.one_of(list(self.people))]
        self._guessed.add(somebody.id)
        for _ in range(step.guesses):
            outcome, _ = self._try(somebody, Person().password, step.replica, "INVALID_CREDENTIALS")
            if outcome == "THROTTLED":
                break

    def _clock(self, step: Step) -> None:
        self.servers[step.replica].set_clock(f"{step.clock:+d}")
        self._clocks[step.replica], self._changed[step.replica] = step.clock, time.monotonic()
        self._expect_nothing_back()

    def _dump(self, _: Step | None = None) -> None:
        backup = self._new_backup(self.servers[0])
        backup.save()
        self._dumps.append((backup, deepcopy(self.state), len(self._handed), len(self.did)))

    def _restore(self, step: Step) -> None:
        backup, state, handed, number = step.one_of(self._dumps)
        self.did[-1] += f" of the dump of step {number}"
        backup.restore()
        self.state = deepcopy(state)
        self._undone.update(later.token for later in self._handed[handed:])
        self._expect_nothing_back()

    def _restart(self, step: Step) -> None:
        server = self.servers[step.replica]
        end = server.kill if step.pick < 0.5 else server.stop
        end()
        server.start()
        self._expect_nothing_back()

    # -- calls -----------------------------------------------------------------------------------------------------

    def _open(self) -> list[str]:
        return [sid for sid, ended in self.state.ended.items() if not ended]

    def _is_right(self, replica: int) -> bool:
        """Whether the clock of a replica has been right for a while."""
        return self._clocks[replica] == 0 and time.monotonic() - self._changed[replica] > LEEWAY

    def _keep(self, owner: Somebody, tokens: dict, replica: int) -> dict:
        sid = session_id(tokens)
        is_doubtful = not self._is_right(replica) or sid in self.sessions and self.sessions[sid].is_doubtful
        self.sessions[sid] = Session(owner, tokens, is_doubtful)
        self.state.ended.setdefault(sid, False)
        self._handed.append(Handed(tokens["accessToken"], sid, owner.id))
        return tokens

    def _try(self, somebody: Somebody, password: str, replica: int, wanted: str) -> tuple[str, dict | float]:
        """Tries a password. Who was guessed at may have to wait, but not for long."""
        outcome, reply = answer(self.servers[replica], "Login", email=somebody.email, password=password)
        if outcome not in (wanted, "THROTTLED"):
            self._complain(f"Login at {replica}: {outcome} instead of {wanted}")
        elif outcome == "THROTTLED" and (somebody.id not in self._guessed or reply > LONGEST_PAUSE):
            guesses = "wrong guesses" if somebody.id in self._guessed else "no wrong guess"
            self._complain(f"Login at {replica} is refused for {reply:.0f} s after {guesses}")
        return outcome, reply

    def _log_in(self, somebody: Somebody, replica: int) -> dict | None:
        """Logs in with the right password, and returns the tokens if there are any."""
        wanted = "INVALID_CREDENTIALS" if somebody.id in self.state.disabled else "OK"
        outcome, reply = self._try(somebody, somebody.person.password, replica, wanted)
        return self._keep(somebody, reply["tokens"], replica) if outcome == "OK" else None

    def _refresh_at(self, replica: int, sid: str) -> dict | None:
        """Refreshes an open session. That may fail at a replica whose clock is wrong, and with a token from there."""
        session = self.sessions[sid]
        outcome, reply = answer(self.servers[replica], "Refresh", refresh_token=session.tokens["refreshToken"])
        if outcome == "OK":
            return self._keep(session.owner, reply["tokens"], replica)
        if not session.is_doubtful and self._is_right(replica):
            self._complain(f"Refresh of an open session at {replica}: {outcome}")
        return None

    def _order(self, step: Step, rpc: str, id: str, **fields) -> None:
        """Lets the boss do something. The same replica mints the access token, because its clock may be wrong."""
        server, boss = self.servers[step.replica], self._boss.person

        def done() -> bool:
            _, reply = answer(server, "Login", email=boss.email, password=boss.password)
            outcome, _ = call(server, rpc, credential=reply["tokens"]["accessToken"], user_id=id, **fields)
            assert outcome == "OK", outcome
            return True

        wait_until(f"{rpc} is done", done)

    # -- checks ----------------------------------------------------------------------------------------------------

    def _complain(self, what: str) -> None:
        self.complaints.append(f"step {len(self.did)}: {what}")

    def _expect_refused(self, whose: str, which: Callable[[Handed], bool], rpc: str = "ListSessions") -> None:
        """Asserts that every replica soon refuses a call with these access tokens."""
        chosen = [handed for handed in self._handed if which(handed)]
        left = {(handed, replica): "" for handed in chosen for replica in range(len(self.servers))}
        since = time.monotonic()

        def none_left() -> bool:
            for handed, replica in list(left):
                left[handed, replica], _ = call(self.servers[replica], rpc, credential=handed.token)
                if left[handed, replica] in REFUSED:
                    del left[handed, replica]
            return not left

        try:
            wait_until("refused", none_left, DEADLINE, pause=0.02)
        except AssertionError:
            for (handed, replica), outcome in left.items():
                number = self._handed.index(handed)
                self._complain(f"{whose} access token (number {number}): {rpc} at {replica} answers {outcome}")
        self.waits.append(time.monotonic() - since)

    def _expect_nothing_back(self) -> None:
        """Asserts that nothing revoked is accepted again. A time that was undone does not count."""

        def known(handed: Handed) -> bool:
            return handed.token not in self._undone and handed.session in self.state.ended

        self._expect_refused("a revoked", lambda handed: known(handed) and self.state.ended[handed.session])
        not_admin = set(self.people) - self.state.admins
        self._expect_refused("a demoted", lambda handed: known(handed) and handed.owner in not_admin, "ListUsers")

    def check_at_the_end(self) -> None:
        """Asserts what must hold when the longest access token has expired."""
        for ended, whose in ((True, "a revoked"), (None, "an undone"), (False, "an expired")):
            self._expect_refused(whose, lambda handed, ended=ended: self.state.ended.get(handed.session) is ended)
        for turn, (sid, session) in enumerate(list(self.sessions.items())):
            replica = turn % len(self.servers)
            if not self.state.ended.get(sid, True):
                self._check_power(session.owner, self._refresh_at(replica, sid))
                continue
            outcome, _ = answer(self.servers[replica], "Refresh", refresh_token=session.tokens["refreshToken"])
            if outcome != "REFRESH_TOKEN_INVALID":
                self._complain(f"Refresh of a session that has ended, at {replica}: {outcome}")
        for somebody in self.people.values():
            for replica in range(len(self.servers)):
                self._check_power(somebody, self._log_in(somebody, replica))

    def _check_power(self, somebody: Somebody, tokens: dict | None) -> None:
        """Asserts that new tokens give nobody the power of an admin who is none."""
        if tokens and somebody.id not in self.state.admins:
            self._expect_refused("a demoted", lambda handed: handed.token == tokens["accessToken"], "ListUsers")


@pytest.fixture
def start_sequence(request, binary, tmp_path_factory, left_out) -> Callable[[str, ExitStack], Sequence]:
    """Starts replicas on an empty database, and closes them with this `ExitStack`."""
    library = find_library() or left_out("everything with wrong clocks: install libfaketime")
    new_directory = partial(tmp_path_factory.mktemp, "clocked")

    def new_backup(server: ClockedServer):
        copy = new_directory() / "backup"
        if server.engine.name == "sqlite":
            return SqliteBackup(server, copy)
        return PostgresBackup(server, copy, request.getfixturevalue("postgres_binaries"))

    def start(name: str, closing: ExitStack) -> Sequence:
        is_embedded, settings = name == "sqlite", {"access_token_ttl": f"{TTL}s", "lame_duck": "0s"}
        engine = Sqlite(new_directory() / "data") if is_embedded else Postgres(request.getfixturevalue("cluster"))
        closing.callback(engine.close)
        clocked = partial(ClockedServer, binary, engine, library=library, clock=RIGHT, **settings)
        servers = [clocked(directory=new_directory()) for _ in range(1 if is_embedded else 3)]
        for server in servers:
            closing.callback(server.close)
            server.start()
        return Sequence(engine, servers, new_backup)

    return start


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["postgres", "sqlite"])
def test_in_any_order_nothing_revoked_is_accepted_and_nobody_is_locked_out(name, start_sequence, size, capsys):
    first = int(os.environ.get("POSTERN_TEST_SEED") or random.SystemRandom().randrange(1_000_000))
    seeds, complaints, waits = range(first, first + size(1, 30)), [], []
    with capsys.disabled():
        print(f"\n{name}: POSTERN_TEST_SEED={first}, {len(seeds)} sequences", flush=True)
    for batch in (seeds[start : start + AT_ONCE] for start in range(0, len(seeds), AT_ONCE)):
        with ExitStack() as closing:
            sequences = {}
            for seed in batch:
                sequences[seed] = sequence = start_sequence(name, closing)
                sequence.run(draw(seed, len(sequence.servers)))
            time.sleep(TTL + LEEWAY + 1)
            for seed, sequence in sequences.items():
                sequence.check_at_the_end()
                waits += sequence.waits
                if sequence.complaints:
                    steps = (f"  {number}. {step}" for number, step in enumerate(sequence.did, 1))
                    complaints += [f"\nPOSTERN_TEST_SEED={seed}", *sequence.complaints, *steps]
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)
    assert sorted(waits)[len(waits) // 2] < PROMISE, f"the longest took {max(waits):.1f} s"
