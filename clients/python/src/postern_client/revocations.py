"""What the messages of `WatchRevocations` say, in memory, and what a token is worth by them.

This module takes messages and knows no network: `feed.py` brings them. It forgets what can no longer matter.
"""

import heapq
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any, Literal

from postern.auth.v1.token_service_pb2 import WatchRevocationsResponse

from .caller import Caller
from .errors import Reason, unauthenticated, unavailable

LEEWAY = 5.0  #: seconds by which an entry is kept longer, since tokens are accepted so long after their expiry

WhenUnknown = Literal["refuse", "accept"]


@dataclass(frozen=True)
class _Standing:
    roles: tuple[str, ...]
    disabled: bool
    until: float


class RevocationState:
    """The revocations that are remembered.

    `when_unknown` says what happens while the state is not complete: `"refuse"` every token with UNAVAILABLE, or
    `"accept"` what verifies offline and is not known to be revoked. It is complete while the last heartbeat spoke of a
    time at most `max_staleness` seconds ago. More than `most_entries` are not remembered: then the state is not
    complete until the tokens of those that were left out have expired. `clock` returns seconds since 1970.
    """

    def __init__(
        self,
        *,
        when_unknown: WhenUnknown,
        max_staleness: float = 30.0,
        most_entries: int = 1_000_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if when_unknown not in ("refuse", "accept"):
            raise ValueError(f'when_unknown must be "refuse" or "accept", not {when_unknown!r}')
        self._when_unknown, self._max_staleness, self._most, self._clock = (
            when_unknown, max_staleness, most_entries, clock,
        )  # fmt: skip
        self._ended: dict[str, float] = {}
        self._standings: dict[str, _Standing] = {}
        self._forgetting: list[tuple[float, str, dict[str, Any]]] = []
        self._lock = threading.Lock()
        self._left_out_until = float("-inf")
        # When everything had been sent by the clock of Postern, and when that was told by a clock that nobody can set.
        self._complete_time = self._told_at = float("-inf")

    def apply(self, message: WatchRevocationsResponse) -> None:
        """Handles a message. To handle one again changes nothing. What this version does not know is skipped."""
        until = message.forget_time.ToNanoseconds() / 1e9 + LEEWAY
        with self._lock:
            self._forget()
            match message.WhichOneof("event"):
                case "heartbeat":
                    self._complete_time = message.heartbeat.complete_time.ToNanoseconds() / 1e9
                    self._told_at = time.monotonic()
                case "session_ended":
                    id = message.session_ended.session_id
                    self._remember(self._ended, id, until, max(until, self._ended.get(id, until)))
                case "roles_changed":
                    changed, known = message.roles_changed, self._standings.get(message.roles_changed.user_id)
                    until = max(until, known.until) if known else until
                    standing = _Standing(tuple(changed.roles), changed.disabled, until)
                    self._remember(self._standings, changed.user_id, until, standing)

    def check(self, caller: Caller) -> Caller:
        """The caller with the roles that it has now. Raises SESSION_REVOKED, or UNAVAILABLE while that is not known."""
        never, now = float("-inf"), self._clock()
        if max(self._ended.get(caller.session_id, never), self._ended.get(caller.token_id, never)) > now:
            raise unauthenticated(Reason.SESSION_REVOKED)
        standing = self._standings.get(caller.subject)
        if standing is not None and standing.until <= now:
            standing = None
        if standing is not None and standing.disabled:
            raise unauthenticated(Reason.SESSION_REVOKED)
        if self._when_unknown == "refuse" and not self.is_complete():
            raise unavailable("revocations unknown")
        return caller if standing is None else replace(caller, roles=standing.roles)

    def is_complete(self) -> bool:
        """Whether everything that was revoked more than `max_staleness` ago is known."""
        now, most = self._clock(), self._max_staleness
        return (
            now - self._complete_time <= most
            and time.monotonic() - self._told_at <= most
            and now >= self._left_out_until
        )

    @property
    def complete_time(self) -> datetime | None:
        """Every revocation from before this time is known. `None` before the first heartbeat."""
        if self._complete_time == float("-inf"):
            return None
        return datetime.fromtimestamp(self._complete_time, timezone.utc)

    def __len__(self) -> int:
        """How many sessions, tokens and accounts are remembered."""
        return len(self._ended) + len(self._standings)

    def _remember(self, entries: dict[str, Any], id: str, until: float, entry: Any) -> None:
        if id not in entries and len(self) >= self._most:
            self._left_out_until = max(self._left_out_until, until)
        elif entries.get(id) != entry:
            entries[id] = entry
            heapq.heappush(self._forgetting, (until, id, entries))

    def _forget(self) -> None:
        now = self._clock()
        while self._forgetting and self._forgetting[0][0] <= now:
            _, id, entries = heapq.heappop(self._forgetting)
            entry = entries.get(id)
            if entry is not None and (entry if entries is self._ended else entry.until) <= now:
                del entries[id]
