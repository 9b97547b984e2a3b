"""Tokens that an attacker can make from a real one without the signing key: every attack that needs no valid signature.

The tests in Rust (`tests/api/access_tokens.rs`, `tests/api/service_tokens.rs`) make those that need one.
"""

import json
import secrets

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from support import jose
from support.keys import key_of

# Changes of the claims. The first ones make a person of a service, and a service of a person.
CLAIMS = (
    {"subject_type": "user"},
    {"subject_type": "user", "email": "ada@example.com", "email_verified": True, "client_id": "postern"},
    {"subject_type": "service"},
    {"subject_type": "service", "email": None, "email_verified": None},
    {"subject_type": None},
    {"roles": ["admin"]},
    {"exp": 32_503_680_000},
    {"aud": ["postern"]},
    {"iss": "https://elsewhere.example.com"},
)
HEADERS = (
    {"kid": "unknown"}, {"kid": None}, {"crit": ["exp"]}, {"crit": []}, {"b64": False, "crit": ["b64"]}, {"b64": True},
    {"zip": "DEF"}, {"enc": "A128GCM"}, {"typ": "JWT"}, {"typ": "rt+jwt"}, {"typ": None}, {"alg": "ES384"},
    {"alg": "HS256"}, {"alg": "none"}, {"alg": None},
)  # fmt: skip


def forgeries(token: str, keys: list[dict], url: str = "http://127.0.0.1:9/jwks.json") -> dict[str, str]:
    """Forged tokens by name. `url` is where a server would fetch a key if it trusted the token."""
    stranger = ec.generate_private_key(ec.SECP256R1())
    own, published = jose.jwk_of(stranger.public_key()), key_of(token, keys)
    header, claims = jose.header_of(token), jose.claims_of(token)
    public = jwt.PyJWK(published).key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    first, payload, signature = token.split(".")
    found = {
        "alg none": jose.forge({**header, "alg": "none"}, claims, jose.unsigned),
        "alg nOnE": jose.forge({**header, "alg": "nOnE"}, claims, jose.unsigned),
        "HS256 with the public key": jose.forge({**header, "alg": "HS256"}, claims, jose.hs256(public)),
        "HS256 with no key": jose.forge({**header, "alg": "HS256"}, claims, jose.hs256(b"")),
        "a refresh token": jose.forge({"typ": "rt+jwt", "alg": "HS256"}, claims, jose.hs256(secrets.token_bytes(32))),
        "another key": jose.forge(header, claims, jose.es256(stranger)),
        "its own kid": jose.forge({**header, "kid": jose.thumbprint(own)}, claims, jose.es256(stranger)),
        "its own jwk": jose.forge({**header, "jwk": own}, claims, jose.es256(stranger)),
        "a jku": jose.forge({**header, "jku": url}, claims, jose.es256(stranger)),
        "an x5u": jose.forge({**header, "x5u": url}, claims, jose.es256(stranger)),
        "an x5c": jose.forge({**header, "x5c": ["AAAA"]}, claims, jose.es256(stranger)),
        "kid twice": jose.forge(json.dumps(header)[:-1] + ', "kid": "x"}', claims, jose.es256(stranger)),
        "a header that is no object": jose.forge("[]", claims, jose.es256(stranger)),
        "one segment more": f"{token}.",
        "one segment less": f"{first}.{payload}",
        "no payload": f"{first}..{signature}",
        "no signature": f"{first}.{payload}.",
        "padding": f"{token}==",
        "a space": f"{first}. {payload}.{signature}",
        "a changed signature": f"{token[:-2]}{'A' if token[-2] != 'A' else 'B'}{token[-1]}",
        "a token that is too long": f"{first}.{payload}{'A' * 9 * 1024}.{signature}",
        "nonsense": "nonsense",
        "a byte that is no text": "\x00",
    }
    for change in HEADERS:
        found[f"the header with {change}"] = jose.with_header(token, **change)
    for change in CLAIMS:
        changed = {name: value for name, value in {**claims, **change}.items() if value is not None}
        found[f"the claims with {change}"] = f"{first}.{jose.encode(json.dumps(changed).encode())}.{signature}"
    return found
