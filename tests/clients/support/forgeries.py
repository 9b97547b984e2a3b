"""Forged, changed and truncated access tokens, made from a valid one. Every one of them must be refused everywhere.

Like an attacker, it does not have the signing key.
"""

import json
import time
import uuid

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from support import jose
from support.keys import key_of

# Where tokens say that their keys are. Nobody may go there.
ELSEWHERE = "http://127.0.0.1:9"

CHANGED_HEADERS = [
    {"kid": "unknown"},
    {"kid": None},
    {"crit": ["exp"]},
    {"crit": []},
    {"b64": False, "crit": ["b64"]},
    {"b64": False},
    {"b64": True},
    {"zip": "DEF"},
    {"enc": "A128GCM"},
    {"typ": "JWT"},
    {"typ": "rt+jwt"},
    {"typ": None},
    {"alg": "ES384"},
    {"alg": "HS256"},
    {"alg": None},
]


def of(token: str, jwks: list[dict], elsewhere: str = ELSEWHERE) -> dict[str, str]:
    """All of them, by a name that says what is wrong."""
    changed = {f"header {json.dumps(change)}": jose.with_header(token, **change) for change in CHANGED_HEADERS}
    return {
        **without_signature(token),
        **by_public_key(token, jwks),
        **by_another_key(token, elsewhere),
        **changed,
        **tampered(token),
        **truncated(token),
        **with_another_signature(token),
        **spelled_otherwise(token),
        **oversize(token),
    }


def without_signature(token: str) -> dict[str, str]:
    claims, forged = jose.claims_of(token), {}
    for alg in ("none", "None", "NONE", "nOnE", ""):
        unsigned = jose.forge({**jose.header_of(token), "alg": alg}, claims, jose.unsigned)
        forged[f"alg {alg!r}"] = unsigned
        forged[f"alg {alg!r}, no last dot"] = unsigned.rstrip(".")
        forged[f"alg {alg!r}, our signature"] = jose.with_header(token, alg=alg)
    return forged


def public_secrets(jwk: dict) -> dict[str, bytes]:
    """What everybody knows of a public key, as a secret for HMAC."""
    public = jwt.PyJWK(jwk).key
    encoding, form = serialization.Encoding, serialization.PublicFormat
    point = public.public_bytes(encoding.X962, form.UncompressedPoint)
    pem = public.public_bytes(encoding.PEM, form.SubjectPublicKeyInfo)
    return {
        "PEM": pem,
        "PEM without its last newline": pem.rstrip(),
        "DER": public.public_bytes(encoding.DER, form.SubjectPublicKeyInfo),
        "x and y": point[1:],
        "uncompressed point": point,
        "compressed point": public.public_bytes(encoding.X962, form.CompressedPoint),
        "JWK": json.dumps(jwk).encode(),
        "kid": jwk["kid"].encode(),
        "empty": b"",
    }


def by_public_key(token: str, jwks: list[dict]) -> dict[str, str]:
    jwk, claims = key_of(token, jwks), jose.claims_of(token)
    header = {"typ": "at+jwt", "alg": "HS256", "kid": jwk["kid"]}
    secrets = public_secrets(jwk).items()
    return {f"HS256 with the public key: {name}": jose.forge(header, claims, jose.hs256(key)) for name, key in secrets}


def by_another_key(token: str, elsewhere: str = ELSEWHERE) -> dict[str, str]:
    stranger = ec.generate_private_key(ec.SECP256R1())
    own_jwk = jose.jwk_of(stranger.public_key())
    header, claims = jose.header_of(token), jose.claims_of(token)
    without_kid = {name: value for name, value in header.items() if name != "kid"}
    doubled = json.dumps(header)[:-1] + f', "kid": "{jose.thumbprint(own_jwk)}"}}'
    headers = {
        "our kid": header,
        "its own kid": {**header, "kid": jose.thumbprint(own_jwk)},
        "unknown kid": {**header, "kid": "unknown"},
        "a kid that is a path": {**header, "kid": "../../dev/null"},
        "a kid that is SQL": {**header, "kid": "' OR '1'='1"},
        "a kid that is a number": {**header, "kid": 1},
        "no kid": without_kid,
        "kid twice": doubled,
        "its own key in jwk": {**header, "jwk": own_jwk},
        "its own key in jwk, no kid": {**without_kid, "jwk": own_jwk},
        "a jku": {**header, "jku": f"{elsewhere}/jwks.json"},
        "an x5u": {**header, "x5u": f"{elsewhere}/x"},
        "an x5c": {**header, "x5c": ["AAAA"]},
        "not even an object": "[]",
        "not even JSON": "{",
    }
    sign = jose.es256(stranger)
    forged = {f"another key: {name}": jose.forge(header, claims, sign) for name, header in headers.items()}
    id_token = {**claims, "aud": "some-client", "nonce": "n"}
    forged["an ID token"] = jose.forge({"typ": "JWT", "alg": "ES256", "kid": header["kid"]}, id_token, sign)
    return forged


def tampered(token: str) -> dict[str, str]:
    header, _, signature = token.split(".")
    claims = jose.claims_of(token)
    changes = [
        {"roles": ["admin", "user"]},
        {"sub": str(uuid.uuid4())},
        {"exp": int(time.time()) + 10**6},
        {"exp": 1},
        {"aud": "other"},
        {"iss": "http://elsewhere"},
        # A service that would be a person, and a person who would be a service.
        {"subject_type": "user", "email": "ada@example.com", "email_verified": True, "client_id": "postern"},
        {"subject_type": "service", "email": None, "email_verified": None},
        {"subject_type": None},
        {},
    ]
    # Encoding the claims again, with other spaces, already makes a text other than the signed one. `None` leaves a claim out.
    given = [{name: value for name, value in {**claims, **change}.items() if value is not None} for change in changes]
    encoded = [
        (change, jose.encode(json.dumps(claims, indent=1).encode()))
        for change, claims in zip(changes, given, strict=True)
    ]
    return {f"tampered: {change}": f"{header}.{payload}.{signature}" for change, payload in encoded}


def truncated(token: str) -> dict[str, str]:
    lengths = {*range(1, len(token), 7), len(token) - 1}
    return {f"the first {length} characters": token[:length] for length in sorted(lengths)}


def with_another_signature(token: str) -> dict[str, str]:
    forged = {}
    for position in range(token.rindex(".") + 1, len(token), 5):
        other = "A" if token[position] != "A" else "B"
        forged[f"another character {position}"] = token[:position] + other + token[position + 1 :]
    return forged


def spelled_otherwise(token: str) -> dict[str, str]:
    header, payload, signature = token.split(".")
    return {
        "padding after the signature": f"{token}==",
        "padding after the header": f"{header}=.{payload}.{signature}",
        "one segment more": f"{token}.",
        "two segments more": f"{token}.{signature}.{signature}",
        "one segment less": f"{header}.{payload}",
        "empty segments": "..",
        "an empty header": f".{payload}.{signature}",
        "an empty payload": f"{header}..{signature}",
        "an empty signature": f"{header}.{payload}.",
        "trailing bits in the signature": _with_trailing_bits(token),
        "a space within": f"{header}. {payload}.{signature}",
        "a space before the dot": f"{header} .{payload}.{signature}",
        "the standard alphabet": f"{header}.{payload}.{signature[:-1]}+",
        "a percent sign": token.replace(".", "%2E"),
        "quotation marks": f'"{token}"',
        "twice": f"{token},{token}",
    }


def oversize(token: str) -> dict[str, str]:
    header, payload, signature = token.split(".")
    return {
        "a long payload": f"{header}.{payload}{'A' * 9 * 1024}.{signature}",
        "a long text": "A" * 9 * 1024,
    }


def _with_trailing_bits(token: str) -> str:
    """A token that a lenient decoder reads as the same bytes: its last character has four unused bits."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    position = alphabet.index(token[-1])
    assert position % 16 == 0, "the last four bits of a valid signature are zero"
    changed = token[:-1] + alphabet[position + 1]
    assert jose.decode(changed.split(".")[2]) == jose.decode(token.split(".")[2])
    return changed
