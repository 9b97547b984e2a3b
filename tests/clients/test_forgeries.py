"""Forged, changed and truncated tokens: each is refused, and none ends or opens a session.

Like an attacker, the tests do not have the signing key, so each forgery also has an invalid signature. The Rust tests
in `tests/api/access_tokens.rs` check each rule on tokens with a valid signature. After every test the valid tokens that
it started from must still work.
"""

import json
import secrets
import time
import uuid

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from support import jose, pb
from support.expect import expect_unauthenticated
from support.keys import key_of

# The server checks tokens with its keys and the data in its memory, without the database. So one engine is enough.
pytestmark = pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "nOnE", ""])
def test_alg_none_is_no_signature(client, session, alg):
    header = {**jose.header_of(session.access_token), "alg": alg}
    claims = jose.claims_of(session.access_token)
    unsigned = jose.forge(header, claims, jose.unsigned)
    expect_unauthenticated(lambda: client.me(unsigned), "TOKEN_INVALID")
    expect_unauthenticated(lambda: client.me(unsigned.rstrip(".")), "TOKEN_INVALID")
    expect_unauthenticated(lambda: client.me(jose.with_header(session.access_token, alg=alg)), "TOKEN_INVALID")


def test_hs256_signed_with_the_public_key_is_a_forgery(client, session, jwks):
    jwk = key_of(session.access_token, jwks)
    public = jwt.PyJWK(jwk).key
    encoding, form = serialization.Encoding, serialization.PublicFormat
    point = public.public_bytes(encoding.X962, form.UncompressedPoint)
    pem = public.public_bytes(encoding.PEM, form.SubjectPublicKeyInfo)
    known_to_everybody = {
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
    claims = jose.claims_of(session.access_token)
    for name, secret in known_to_everybody.items():
        forged = jose.forge({"typ": "at+jwt", "alg": "HS256", "kid": jwk["kid"]}, claims, jose.hs256(secret))
        expect_unauthenticated(lambda forged=forged: client.me(forged), "TOKEN_INVALID")
        refresh_claims = jose.claims_of(session.refresh_token)
        header = jose.header_of(session.refresh_token)
        forged = jose.forge(header, refresh_claims, jose.hs256(secret))
        expect_unauthenticated(lambda forged=forged: client.refresh(forged), "REFRESH_TOKEN_INVALID"), name


def test_a_token_signed_by_another_key_is_a_forgery_under_any_header(client, session):
    stranger = ec.generate_private_key(ec.SECP256R1())
    own_jwk = jose.jwk_of(stranger.public_key())
    header, claims = jose.header_of(session.access_token), jose.claims_of(session.access_token)
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
        "a jku": {**header, "jku": "http://127.0.0.1:9/jwks.json"},
        "an x5u": {**header, "x5u": "http://127.0.0.1:9/x"},
        "an x5c": {**header, "x5c": ["AAAA"]},
        "not even an object": "[]",
        "not even JSON": "{",
    }
    for forged_header in headers.values():
        forged = jose.forge(forged_header, claims, jose.es256(stranger))
        expect_unauthenticated(lambda forged=forged: client.me(forged), "TOKEN_INVALID")


@pytest.mark.parametrize(
    "change",
    [
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
    ],
    ids=json.dumps,
)
def test_our_token_under_a_changed_header_is_invalid(client, session, change):
    changed = jose.with_header(session.access_token, **change)
    expect_unauthenticated(lambda: client.me(changed), "TOKEN_INVALID")


def test_an_id_token_is_no_access_token(client, session):
    claims = {**jose.claims_of(session.access_token), "aud": "some-client", "nonce": "n"}
    stranger = ec.generate_private_key(ec.SECP256R1())
    kid = jose.header_of(session.access_token)["kid"]
    forged = jose.forge({"typ": "JWT", "alg": "ES256", "kid": kid}, claims, jose.es256(stranger))
    expect_unauthenticated(lambda: client.me(forged), "TOKEN_INVALID")


def test_a_tampered_payload_is_invalid_whatever_it_claims(client, session):
    header, _, signature = session.access_token.split(".")
    claims = jose.claims_of(session.access_token)
    changes = [
        {"roles": ["admin", "user"]},
        {"sub": str(uuid.uuid4())},
        {"exp": int(time.time()) + 10**6},
        {"exp": 1},
        {"aud": "other"},
        {"iss": "http://elsewhere"},
        {},
    ]
    for change in changes:
        # Encoding the claims again, with other spaces, already makes a text other than the signed one.
        payload = jose.encode(json.dumps({**claims, **change}, indent=1).encode())
        forged = f"{header}.{payload}.{signature}"
        expect_unauthenticated(lambda forged=forged: client.me(forged), "TOKEN_INVALID")


def test_a_truncated_token_is_invalid_wherever_it_ends(client, session):
    token = session.access_token
    for length in {*range(1, len(token), 7), len(token) - 1}:
        expect_unauthenticated(lambda length=length: client.me(token[:length]), "TOKEN_INVALID")


def test_every_changed_character_of_the_signature_is_noticed(client, session):
    token = session.access_token
    start = token.rindex(".") + 1
    for position in range(start, len(token), 5):
        other = "A" if token[position] != "A" else "B"
        forged = token[:position] + other + token[position + 1 :]
        expect_unauthenticated(lambda forged=forged: client.me(forged), "TOKEN_INVALID")


def test_another_spelling_of_the_same_token_is_invalid(client, session):
    token = session.access_token
    header, payload, signature = token.split(".")
    spellings = {
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
    for forged in spellings.values():
        expect_unauthenticated(lambda forged=forged: client.me(forged), "TOKEN_INVALID")


def test_an_oversize_token_is_invalid(client, session):
    header, payload, signature = session.access_token.split(".")
    for forged in (f"{header}.{payload}{'A' * 9 * 1024}.{signature}", "A" * 9 * 1024):
        expect_unauthenticated(lambda forged=forged: client.me(forged), "TOKEN_INVALID")
    expect_unauthenticated(lambda: client.refresh("A" * 9 * 1024), "REFRESH_TOKEN_INVALID")


def test_the_scheme_is_bearer_in_any_case_and_nothing_after_it_is_invalid(client, session):
    def me(value: str):
        return client.call("GetMe", pb.GetMeRequest(), metadata=[("authorization", value)])

    for scheme in ("Bearer", "bearer", "BEARER", "bEaReR"):
        assert me(f"{scheme} {session.access_token}").user.id
    expect_unauthenticated(lambda: me("Bearer"), "TOKEN_INVALID")


def test_two_authorization_headers_are_invalid(client, session):
    bearer = ("authorization", f"Bearer {session.access_token}")
    for pair in ([bearer, bearer], [bearer, ("authorization", "Bearer x")], [("authorization", "Bearer x"), bearer]):
        expect_unauthenticated(
            lambda pair=pair: client.call("GetMe", pb.GetMeRequest(), metadata=pair), "TOKEN_INVALID"
        )


def test_a_forged_refresh_token_neither_refreshes_nor_ends_a_session(client, session):
    header, claims = jose.header_of(session.refresh_token), jose.claims_of(session.refresh_token)
    stranger = ec.generate_private_key(ec.SECP256R1())
    text = session.refresh_token
    forgeries = [
        jose.forge({**header, "alg": "none"}, claims, jose.unsigned),
        jose.forge(header, claims, jose.hs256(secrets.token_bytes(32))),
        jose.forge(header, claims, jose.hs256(bytes(32))),
        jose.forge({**header, "alg": "ES256"}, claims, jose.es256(stranger)),
        jose.with_header(text, typ="at+jwt"),
        jose.with_header(text, typ="JWT"),
        jose.with_header(text, crit=["exp"]),
        text[:-1] + ("A" if text[-1] != "A" else "E"),
        f"{text}=",
        f" {text}",
        f"{text}\n",
        *(text[:length] for length in range(1, len(text), 41)),
    ]
    for forged in forgeries:
        expect_unauthenticated(lambda forged=forged: client.refresh(forged), "REFRESH_TOKEN_INVALID")
        expect_unauthenticated(lambda forged=forged: client.logout(forged, everywhere=True), "REFRESH_TOKEN_INVALID")


def _with_trailing_bits(token: str) -> str:
    """A token that a lenient decoder reads as the same bytes: its last character has four unused bits."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    position = alphabet.index(token[-1])
    assert position % 16 == 0, "the last four bits of a valid signature are zero"
    changed = token[:-1] + alphabet[position + 1]
    assert jose.decode(changed.split(".")[2]) == jose.decode(token.split(".")[2])
    return changed
