"""The check of an access token: what `_jwt.py` says of its form, the keys, the clock, and what was revoked."""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from . import _jwt
from ._waiting import Steps, run, run_async
from .caller import Caller
from .errors import Reason, unauthenticated
from .keys import KeySet

LEEWAY = 5  #: seconds that the clock of Postern may be ahead or behind


class RevocationCheck(Protocol):
    """What knows which tokens were revoked: a :class:`~postern_client.revocations.RevocationState`."""

    def check(self, caller: Caller) -> Caller:
        """The caller with the roles that it has now. Raises SESSION_REVOKED, or UNAVAILABLE if that is not known."""


class Verifier:
    """Checks access tokens offline, as Postern itself does.

    `issuer` and `audience` are compared exactly. `keys` are by default those at `<issuer>/.well-known/jwks.json`.
    Without `revocations`, a token is accepted until it expires. `clock` returns seconds since 1970. The last
    `cache_size` tokens that verified are remembered, by their SHA-256: their expiry, key and revocation are still
    looked at each time.
    """

    def __init__(
        self,
        issuer: str,
        audience: str,
        *,
        keys: KeySet | None = None,
        revocations: RevocationCheck | None = None,
        clock: Callable[[], float] = time.time,
        cache_size: int = 10_000,
    ) -> None:
        self._issuer, self._audience, self._revocations, self._clock = issuer, audience, revocations, clock
        self._keys = keys or KeySet.at(issuer.rstrip("/") + "/.well-known/jwks.json")
        self._cache: OrderedDict[bytes, _jwt.Verified] = OrderedDict()
        self._cache_size, self._lock = cache_size, threading.Lock()

    def verify(self, token: str) -> Caller:
        """Who presents this token. Blocks only while keys are fetched that are not known yet.

        Raises :class:`PosternError`: UNAUTHENTICATED with TOKEN_INVALID, TOKEN_EXPIRED or SESSION_REVOKED, or
        UNAVAILABLE if there are no keys or the revocations are not known.
        """
        return run(self.steps(token))

    async def verify_async(self, token: str) -> Caller:
        """The same for a coroutine."""
        return await run_async(self.steps(token))

    def steps(self, token: str) -> Steps[Caller]:
        """The check itself, for :func:`verify`, :func:`verify_async` and the demands."""
        if len(token) > _jwt.MAX_TOKEN_BYTES:
            raise unauthenticated(Reason.TOKEN_INVALID)
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        verified = self._remembered(digest)
        if verified is None or not self._keys.knows(verified.kid):
            kid = _jwt.read_kid(token)
            key = yield from self._keys.find(kid)
            verified = _jwt.verify(token, kid, key, self._issuer, self._audience)
            self._remember(digest, verified)
        now = int(self._clock())
        if now >= verified.expire_time + LEEWAY:
            raise unauthenticated(Reason.TOKEN_EXPIRED)
        # A clock was wrong, and this token would outlive what revokes it.
        if verified.issue_time > now + LEEWAY:
            raise unauthenticated(Reason.TOKEN_INVALID)
        return verified.caller if self._revocations is None else self._revocations.check(verified.caller)

    def _remembered(self, digest: bytes) -> _jwt.Verified | None:
        with self._lock:
            verified = self._cache.get(digest)
            if verified is not None:
                self._cache.move_to_end(digest)
            return verified

    def _remember(self, digest: bytes, verified: _jwt.Verified) -> None:
        with self._lock:
            self._cache[digest] = verified
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
