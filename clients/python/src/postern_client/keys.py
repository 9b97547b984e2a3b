"""Postern's public keys: fetched when they are needed, and kept while they cannot be.

A `kid` that is not known causes a fetch, one for all who ask meanwhile, and at most one per cooldown. Known keys are
fetched again in the background when they are old. What a fetch finds replaces what was known, so a key that is no
longer published is no longer known. A fetch that fails changes nothing, but counts for the cooldown.
"""

import contextlib
import json
import logging
import time
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

import jwt

from ._waiting import SingleFlight, Steps
from .errors import Reason, unauthenticated, unavailable

_log = logging.getLogger("postern_client.keys")
_MOST_BYTES = 1024 * 1024
_FETCH_TIMEOUT = 5.0


class KeySet:
    """The keys by `kid`.

    `fetch` returns a JWK Set (RFC 7517) or raises. `cooldown` and `max_age` are in seconds of `clock`, which never goes
    back.
    """

    def __init__(
        self,
        fetch: Callable[[], Mapping[str, Any]],
        *,
        cooldown: float = 10.0,
        max_age: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch, self._cooldown, self._max_age, self._clock = fetch, cooldown, max_age, clock
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at = self._tried_at = float("-inf")
        self._flight = SingleFlight(self._refresh)

    @classmethod
    def at(cls, url: str, **options: Any) -> "KeySet":
        """The keys at this URL, by default `<issuer>/.well-known/jwks.json`. Redirects are not followed."""
        _ensure_http(url)
        return cls(lambda: _get_json(url), **options)

    def knows(self, kid: str) -> bool:
        """Whether there is such a key now. Old keys are fetched again meanwhile."""
        if self._clock() - self._fetched_at >= self._max_age and self._keys:
            self._flight.run(self._is_warm)
        return kid in self._keys

    def find(self, kid: str) -> Steps[jwt.PyJWK]:
        """The key. Raises TOKEN_INVALID if there is none, and UNAVAILABLE if that cannot be known."""
        if not self.knows(kid):
            pending = self._flight.run(self._is_warm)
            if pending is not None:
                yield pending
        key = self._keys.get(kid)
        if key is not None:
            return key
        if self._fetched_at < self._tried_at:
            raise unavailable("the public keys of Postern cannot be fetched")
        raise unauthenticated(Reason.TOKEN_INVALID)

    def _is_warm(self) -> bool:
        return self._clock() - self._tried_at >= self._cooldown

    def _refresh(self) -> None:
        try:
            keys = _read(self._fetch())
        except Exception as error:
            _log.warning("the public keys of Postern cannot be fetched: %s", error)
            self._tried_at = self._clock()
        else:
            self._keys = keys
            self._fetched_at = self._tried_at = self._clock()


# The only algorithm that a kind of key is for: (kty, crv).
_ALGORITHMS = {("EC", "P-256"): "ES256", ("OKP", "Ed25519"): "EdDSA", ("RSA", None): "RS256"}


def discover_jwks_url(issuer: str) -> str:
    """Asks `<issuer>/.well-known/openid-configuration` where the keys are. Raises OSError or ValueError."""
    url = issuer.rstrip("/") + "/.well-known/openid-configuration"
    _ensure_http(url)
    document = _get_json(url)
    if document.get("issuer") != issuer or not isinstance(document.get("jwks_uri"), str):
        raise ValueError(f"{url} is not the configuration of {issuer}")
    return str(document["jwks_uri"])


def _read(document: Mapping[str, Any]) -> dict[str, jwt.PyJWK]:
    """The keys for signatures of an algorithm that Postern has. Others are skipped."""
    keys = {}
    for jwk in document["keys"]:
        algorithm = _ALGORITHMS.get((jwk.get("kty"), jwk.get("crv")))
        is_ours = jwk.get("use", "sig") == "sig" and jwk.get("alg", algorithm) == algorithm
        if algorithm is not None and is_ours and isinstance(jwk.get("kid"), str):
            with contextlib.suppress(jwt.PyJWTError):
                keys[jwk["kid"]] = jwt.PyJWK(jwk, algorithm=algorithm)
    if not keys:
        raise ValueError("there is no key that Postern could sign with")
    return keys


def _ensure_http(url: str) -> None:
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"{url!r} is not an https or http URL")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A redirect is an error: it could lead from https to http."""


_opener = urllib.request.build_opener(_NoRedirects)


def _get_json(url: str) -> Mapping[str, Any]:
    request = urllib.request.Request(url, headers={"accept": "application/json"})
    with _opener.open(request, timeout=_FETCH_TIMEOUT) as response:
        document = json.loads(response.read(_MOST_BYTES))
    if not isinstance(document, dict):
        raise ValueError(f"{url} is not a JSON object")
    return document
