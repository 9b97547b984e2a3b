"""What a fault sees: the cluster, the clients, and ways to wait, to measure and to clean up."""

import secrets
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psycopg

from faults import verdict
from faults.calls import Answer, Caller
from faults.cluster import Cluster, Replica, http
from faults.load import Admin, Client, Load, Probe
from faults.processes import now
from faults.verdict import Loss
from support import pb
from support.mail import Mailbox
from support.wait import wait_until

CLIENTS, PROBES_IN_A_ROW = 8, 10
HEALING_DEADLINE = 90
IDLE = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'postern' AND state LIKE 'idle in transaction%'"

RESTORED = "SELECT count(*) FROM audit_events WHERE action = 'refresh_after_restore'"


@dataclass
class Outcome:
    """One row of the table."""

    name: str
    tried: int = 0
    acknowledged: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    heal: float | None = None
    notes: list[str] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.losses and not self.complaints


class Scene:
    """A cluster under load."""

    def __init__(self, cluster: Cluster, mailbox: Mailbox, binary: Path, previous: Path | None, seconds: float):
        self.cluster, self.mailbox = cluster, mailbox
        self.binary, self.previous, self.seconds = binary, previous, seconds
        self.everywhere = [Caller(replica.address) for replica in cluster.replicas]
        self.patient = Caller(*(replica.address for replica in cluster.replicas), patient=True)
        self._ledgers = cluster.directory / "ledgers"
        self._ledgers.mkdir()
        self.admin = make_admin(cluster.replicas[0])
        self.probes = [
            Probe(self._ledgers / f"probe-{number}", [caller], self.admin)
            for number, caller in enumerate(self.everywhere)
        ]
        clients = [self.new_client(number) for number in range(CLIENTS)]
        self.workers: list[Client] = clients
        # Those that a fault has made for itself.
        self.extras: list[Client] = []
        self.load = Load([*clients, *self.probes])
        self._afterwards: list[Callable[[], object]] = []
        self._restored = 0
        self.outcome = Outcome("")

    def new_client(self, home: int = 0) -> Client:
        number = len(list(self._ledgers.iterdir()))
        return Client(self._ledgers / f"client-{number}", self.everywhere, self.admin, home % len(self.everywhere))

    # -- for faults ------------------------------------------------------------------------------------------------

    @property
    def replicas(self) -> list[Replica]:
        return self.cluster.replicas

    def afterwards(self, action: Callable[[], object]) -> None:
        """Does this when the clients rest, in any case."""
        self._afterwards.append(action)

    def go_on(self, share: float = 0.25) -> None:
        """Lets the clients go on for a share of the time of a fault."""
        time.sleep(share * self.seconds)

    def healed(self, since: float) -> float:
        """Waits until every replica answers again, and notes how long that took from then on."""

        def all_answer() -> bool:
            successes = [probe.successes(since) for probe in self.probes]
            assert min(successes) >= PROBES_IN_A_ROW, f"successes in a row at each replica: {successes}"
            return True

        wait_until("every replica answers again", all_answer, HEALING_DEADLINE)
        heal = max(probe.healed(since) for probe in self.probes)
        self.outcome.heal = max(self.outcome.heal or 0, heal)
        return heal

    def note(self, text: str) -> None:
        self.outcome.notes.append(text)

    def stays_fast(self, seconds: float) -> None:
        """For so long, asks each replica for what needs no database, and notes the longest answer."""
        token = next(iter(self.workers[0].state.live_sessions().values())).access
        longest, end = 0.0, now() + seconds
        while now() < end:
            for replica, caller in zip(self.replicas, self.everywhere, strict=True):
                for ask in (
                    lambda replica=replica: http(replica.http, "/.well-known/jwks.json")[0] == 200,
                    lambda replica=replica: http(replica.ops, "/livez")[0] == 200,
                    lambda caller=caller: _introspects(caller, token),
                ):
                    started = now()
                    assert ask(), f"replica {replica.name} does not answer what needs no database"
                    longest = max(longest, now() - started)
            time.sleep(0.1)
        self.note(f"JWKS, liveness and token checks took {1000 * longest:.0f} ms at most")

    # -- one fault -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The first people sign up, before any fault."""
        self.admin.login(self.patient)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda client: client.settle_in(), [*self.workers, *self.probes]))
        self.load.start()

    def play(self, fault) -> Outcome:
        """Injects one fault while the clients call, and checks afterwards what they were told."""
        outcome = self.outcome = Outcome(fault.name)
        self.cluster.settle()
        self.admin.login(self.patient)
        everybody = [*self.workers, *self.probes]
        for client in everybody:
            client.fault = fault.name
        for client in self.workers:
            client.callers = [self.patient] if fault.spotless else self.everywhere
        for probe in self.probes:
            probe.make_sessions(probe.STOCK)
            probe.seen.clear()
        began = now()
        self.load.resume()
        try:
            self.go_on()
            fault.inject(self)
            time.sleep(max(0.25 * self.seconds, began + self.seconds - now()))
            if not fault.spotless:
                self._is_well_at_the_end()
        except AssertionError as error:
            outcome.complaints.append(str(error))
        finally:
            self._come_to_rest(outcome)
        outcome.losses += verdict.check([*everybody, *self.extras], self.everywhere, self.patient, fault.name)
        outcome.losses += self._carried_on(fault.name)
        self._add_up(fault, outcome)
        return outcome

    def _is_well_at_the_end(self) -> None:
        since = now()
        wait_until(
            "every replica answers at the end",
            lambda: min(probe.successes(since) for probe in self.probes) >= PROBES_IN_A_ROW,
            HEALING_DEADLINE,
        )

    def _come_to_rest(self, outcome: Outcome) -> None:
        """Lets everything run again, also what the fault has left behind when it failed."""
        self.load.pause()
        steps = [*reversed(self._afterwards), self.cluster.settle]
        steps += [replica.start for replica in self.replicas if replica.daemon.pid is None]
        steps += [partial(wait_until, f"replica {it.name} is ready", it.is_ready) for it in self.replicas]
        steps.append(partial(wait_until, "no connection rests in a transaction", self._none_in_transaction))
        self._afterwards.clear()
        for step in steps:
            try:
                step()
            except AssertionError as error:
                outcome.complaints.append(str(error))

    def _none_in_transaction(self) -> bool:
        try:
            return self.cluster.leader().query(IDLE) == [(0,)]
        except psycopg.Error as error:
            raise AssertionError(str(error)) from None

    def _carried_on(self, during: str) -> list[Loss]:
        """Sessions that live only because Postern believes a token of a later generation: a commit was lost."""
        ((count,),) = self.cluster.leader().query(RESTORED, "postern")
        new, self._restored = count - self._restored, count
        return [Loss(during, f"{new} refresh tokens were later than what the database knew")] if new else []

    def _add_up(self, fault, outcome: Outcome) -> None:
        # The calls of probes are not counted: they insist on a replica that is known to be away.
        self.count([*self.workers, *self.extras])
        for probe in self.probes:
            outcome.complaints += probe.violations
            probe.violations = []
        if fault.spotless and outcome.failed:
            outcome.complaints.append(f"no call should have failed: {outcome.failed}")
        if fault.heals_within is not None and (outcome.heal is None or outcome.heal > fault.heals_within):
            outcome.complaints.append(f"healed after {outcome.heal} s instead of {fault.heals_within} s")

    def count(self, clients: list[Client]) -> None:
        """Adds the calls that clients made during this fault."""
        outcome = self.outcome
        for client in clients:
            outcome.tried += client.state.tried[outcome.name]
            outcome.acknowledged += client.state.acknowledged[outcome.name]
            outcome.failed.update(Counter(outcome.failed) + client.state.failed[outcome.name])
            outcome.complaints += client.violations
            client.violations = []

    # -- the end ---------------------------------------------------------------------------------------------------

    def last_verdict(self) -> list[Loss]:
        """Checks everything that was acknowledged during all faults, and every mail."""
        everybody = [*self.workers, *self.probes, *self.extras]
        return [*verdict.check(everybody, self.everywhere, self.patient, None), *verdict.mails(everybody, self.mailbox)]

    def panics(self) -> list[str]:
        """The lines of the logs of Postern that tell of a bug."""
        found = []
        for replica in self.replicas:
            lines = replica.daemon.log.read_text(errors="replace").splitlines()
            found += [f"{replica.name}: {line}" for line in lines if "panicked at" in line]
        return found

    def counted(self) -> tuple[int, int]:
        """All operations that were tried and acknowledged, those of probes and of the verdict too."""
        states = [client.state for client in [*self.workers, *self.probes, *self.extras]]
        return sum(state.tried.total() for state in states), sum(state.acknowledged.total() for state in states)

    def close(self) -> None:
        self.load.stop()
        for caller in [*self.everywhere, self.patient]:
            caller.close()


def _introspects(caller: Caller, token: str) -> bool:
    answer, reply, _ = caller.call("IntrospectToken", pb.IntrospectTokenRequest(token=token))
    return answer is Answer.DONE and reply.active


def make_admin(replica: Replica) -> Admin:
    """The first admin, made on the command line."""
    email, password = "chief@example.com", f"Quiet-{secrets.token_hex(8)}-otter"
    command = ["user", "create", "--username", "chief", "--email", email, "--role", "admin"]
    made = replica.run(*command, input=password)
    assert made.returncode == 0, f"the admin was not made: {made.stderr}"
    return Admin(email, password)
