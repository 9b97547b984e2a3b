"""Two services that verify access tokens on their own, and keep the published keys exactly as long as allowed.

Neither fetches the keys when a token names one that it does not know: `Cache-Control` alone tells when to fetch them
to. They know nothing of Postern but the address of the keys, the issuer and the audience.
"""

import http.client
import json
import re
import time
from pathlib import Path

import jwt

from support.envoy import Envoy, listening

JWKS = "/.well-known/jwks.json"
ISSUER, AUDIENCE = "http://localhost:8080", "postern"
ALGORITHMS = ["ES256", "EdDSA", "RS256"]


def fetch_keys(address: str) -> tuple[dict, int]:
    """The published keys, and for how many seconds they may be kept."""
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", JWKS)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        [age] = re.findall(r"max-age=(\d+)", answer.getheader("cache-control"))
        return json.loads(body), int(age)
    finally:
        connection.close()


class WithPyJwt:
    """Verifies with PyJWT. One address of several replicas is asked in turn."""

    def __init__(self, addresses: list[str]):
        self._addresses = addresses
        self._keys: dict[str, jwt.PyJWK] = {}
        self._until = 0.0
        self.fetches = 0

    def refusal(self, token: str) -> str | None:
        """Why the token is refused; None if it is not."""
        if time.monotonic() >= self._until:
            asked_at = time.monotonic()
            document, age = fetch_keys(self._addresses[self.fetches % len(self._addresses)])
            self._keys = {key.key_id: key for key in jwt.PyJWKSet.from_dict(document).keys}
            self._until = asked_at + age
            self.fetches += 1
        key = self._keys.get(jwt.get_unverified_header(token)["kid"])
        if key is None:
            return "unknown kid"
        try:
            jwt.decode(token, key, algorithms=ALGORITHMS, audience=AUDIENCE, issuer=ISSUER)
        except jwt.PyJWTError as error:
            return repr(error)
        return None


class WithEnvoy(Envoy):
    """A real Envoy whose `jwt_authn` verifies, and answers itself what it lets through."""

    def start(self) -> "WithEnvoy":
        _, self.max_age = fetch_keys(self._upstream)
        self._run(json.dumps(configure(self._upstream, self.max_age)))
        self._connection = http.client.HTTPConnection(self.address, timeout=10)
        return self

    def refusal(self, token: str) -> str | None:
        """Why the token is refused; None if it is not."""
        self._connection.request("GET", "/", headers={"authorization": f"Bearer {token}"})
        answer = self._connection.getresponse()
        body = answer.read().decode()
        return None if answer.status == 200 else f"{answer.status} {body}"

    def close(self) -> None:
        if self.address:
            self._connection.close()
        super().close()


def start_envoy(upstream: str, directory: Path) -> WithEnvoy:
    directory.mkdir()
    return WithEnvoy(upstream, directory).start()


def configure(upstream: str, max_age: int) -> dict:
    """Envoy's configuration: one listener that answers 200 to every request with a good token."""
    provider = {
        "issuer": ISSUER,
        "audiences": [AUDIENCE],
        "remote_jwks": {
            "http_uri": {"uri": f"http://{upstream}{JWKS}", "cluster": "postern", "timeout": "5s"},
            "cache_duration": f"{max_age}s",
        },
    }
    authentication = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
        "providers": {"postern": provider},
        "rules": [{"match": {"prefix": "/"}, "requires": {"provider_name": "postern"}}],
    }
    route = {"match": {"prefix": "/"}, "direct_response": {"status": 200}}
    return listening("verified", "envoy.filters.http.jwt_authn", authentication, route, upstream)
