"""Decodes and builds JWTs without a JWT library, as an attacker does.

It signs with any function that it is given, and it verifies nothing. The tests verify tokens with PyJWT.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

Sign = Callable[[bytes], bytes]


def encode(data: bytes) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    """The reverse of `encode`."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def header_of(token: str) -> dict:
    return json.loads(decode(token.split(".")[0]))


def claims_of(token: str) -> dict:
    return json.loads(decode(token.split(".")[1]))


def forge(header: dict | str, claims: dict, sign: Sign) -> str:
    """A compact JWS. A header given as text is used as it is written."""
    written = header if isinstance(header, str) else json.dumps(header)
    signed = f"{encode(written.encode())}.{encode(json.dumps(claims).encode())}"
    return f"{signed}.{encode(sign(signed.encode()))}"


def with_header(token: str, **changes) -> str:
    """The same claims and signature under another header; `None` removes a member."""
    header = {key: value for key, value in {**header_of(token), **changes}.items() if value is not None}
    _, claims, signature = token.split(".")
    return f"{encode(json.dumps(header).encode())}.{claims}.{signature}"


def unsigned(_: bytes) -> bytes:
    return b""


def hs256(secret: bytes) -> Sign:
    return lambda data: hmac.digest(secret, data, "sha256")


def es256(key: ec.EllipticCurvePrivateKey) -> Sign:
    """RFC 7518 §3.4: r and s, 32 bytes each."""

    def sign(data: bytes) -> bytes:
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    return sign


def jwk_of(key: ec.EllipticCurvePublicKey) -> dict:
    numbers = key.public_numbers()
    return {
        "kty": "EC",
        "crv": "P-256",
        "x": encode(numbers.x.to_bytes(32, "big")),
        "y": encode(numbers.y.to_bytes(32, "big")),
    }


def thumbprint(jwk: dict) -> str:
    """RFC 7638 for an EC key: SHA-256 over its required members, sorted, without spaces."""
    required = {name: jwk[name] for name in ("crv", "kty", "x", "y")}
    canonical = json.dumps(required, sort_keys=True, separators=(",", ":"))
    return encode(hashlib.sha256(canonical.encode()).digest())
