"""The format of an access token (RFC 9068), as strict as Postern's own check (`src/domain/token.rs`).

PyJWT verifies the signature. What it is lenient about is decided here, before and after: `typ`, other members of the
header, members that appear twice, padding, the types of the claims. Times are read here and compared elsewhere.
"""

import base64
import json
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple

import jwt

from .caller import Caller
from .errors import Reason, unauthenticated

MAX_TOKEN_BYTES = 8 * 1024
_LATEST_TIME = 253_370_764_799  # the end of the year 9998
_I64 = range(-(2**63), 2**63)
_TOKEN = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
_ID = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")
_ROLE = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_JWS = jwt.PyJWS(algorithms=["ES256", "EdDSA", "RS256"])


class Verified(NamedTuple):
    """What a token says whose signature verified. Times are NumericDates, in seconds."""

    caller: Caller
    kid: str
    issue_time: int
    expire_time: int


def read_kid(token: str) -> str:
    """The `kid` of a token of the right form, before its signature is verified. Raises TOKEN_INVALID."""
    match = _TOKEN.fullmatch(token)
    if match is None or not all(map(_is_canonical, match.groups())):
        raise unauthenticated(Reason.TOKEN_INVALID)
    pairs = _read_object(_decoded(match[1]))
    header = dict(pairs)
    kid, algorithm = header.get("kid"), header.get("alg")
    expected = {"typ": "at+jwt", "alg": algorithm, "kid": kid}
    if len(pairs) != 3 or header != expected or not isinstance(kid, str) or not isinstance(algorithm, str):
        raise unauthenticated(Reason.TOKEN_INVALID)
    return kid


def verify(token: str, kid: str, key: jwt.PyJWK, issuer: str, audience: str) -> Verified:
    """Verifies the signature and reads the claims. The header was read before. Raises TOKEN_INVALID.

    The algorithm is that of the key. The token does not choose it.
    """
    try:
        claims = _claims(_JWS.decode(token, key=key, algorithms=[key.algorithm_name]))
        if claims["iss"] != issuer or claims["aud"] != audience:
            raise ValueError
        expire_time, issue_time = (_typed(claims[name], int) for name in ("exp", "iat"))
        if not (expire_time in _I64 and issue_time in _I64 and _typed(claims.get("gen", 0), int) in _I64):
            raise ValueError
        return Verified(_caller(claims, expire_time), kid, issue_time, expire_time)
    except (jwt.PyJWTError, KeyError, ValueError):
        raise unauthenticated(Reason.TOKEN_INVALID) from None


def _caller(claims: Mapping[str, Any], expire_time: int) -> Caller:
    subject_type = claims.get("subject_type", "user")
    subject, session_id, client_id, token_id, username = (
        _text(claims[name]) for name in ("sub", "sid", "client_id", "jti", "username")
    )
    roles = [_text(role) for role in _typed(claims["roles"], list)]
    email, email_verified = claims.get("email"), claims.get("email_verified")
    if subject_type == "user":
        email, email_verified = _text(email), _typed(email_verified, bool)
    elif subject_type != "service" or (email, email_verified) != (None, None) or client_id != subject:
        raise ValueError
    ids = (subject, session_id) if subject_type == "user" else (subject, session_id, token_id)
    if not (all(map(_ID.fullmatch, ids)) and all(map(_ROLE.fullmatch, roles))):
        raise ValueError
    end = datetime.fromtimestamp(min(max(expire_time, 0), _LATEST_TIME), timezone.utc)
    return Caller(
        subject.lower(), subject_type, client_id, session_id.lower(), token_id, username,
        email, email_verified, tuple(roles), end,
    )  # fmt: skip


def _claims(payload: bytes) -> dict[str, Any]:
    pairs = _read_object(payload)
    claims = dict(pairs)
    if len(claims) != len(pairs):
        raise ValueError("a claim appears twice")
    return claims


def _read_object(text: bytes) -> tuple[tuple[str, Any], ...]:
    """The members of a JSON object, in order. Objects are tuples here, so that none passes for an array."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=tuple, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, tuple):
        raise unauthenticated(Reason.TOKEN_INVALID)
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _typed(value: Any, kind: type[Any]) -> Any:
    # Not isinstance: `true` is no number.
    if type(value) is not kind:
        raise ValueError
    return value


def _text(value: Any) -> str:
    text: str = _typed(value, str)
    text.encode()  # a lone surrogate is a ValueError
    return text


def _decoded(segment: str) -> bytes:
    return base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))


def _is_canonical(segment: str) -> bool:
    """Whether it is the one base64url text for its bytes: no padding, and no stray bits in the last character."""
    if len(segment) % 4 == 1:
        return False
    return base64.urlsafe_b64encode(_decoded(segment)).rstrip(b"=") == segment.encode()
