"""Forged, changed and truncated tokens: each is refused, and none ends or opens a session.

`support/forgeries.py` makes them. It does not have the signing key, so each forgery also has an invalid signature. The
Rust tests in `tests/api/access_tokens.rs` check each rule on tokens with a valid signature. After every test the valid
tokens that it started from must still work.
"""

import json
import secrets

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from support import forgeries, jose, pb
from support.expect import expect_unauthenticated
from support.keys import key_of

# The server checks tokens with its keys and the data in its memory, without the database. So one engine is enough.
pytestmark = pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")


TOKENS = {
    "without a signature": lambda token, _: forgeries.without_signature(token),
    "signed with the public key": forgeries.by_public_key,
    "signed by another key": lambda token, _: forgeries.by_another_key(token),
    "tampered": lambda token, _: forgeries.tampered(token),
    "truncated": lambda token, _: forgeries.truncated(token),
    "with another signature": lambda token, _: forgeries.with_another_signature(token),
    "spelled otherwise": lambda token, _: forgeries.spelled_otherwise(token),
    "oversize": lambda token, _: forgeries.oversize(token),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_a_forged_access_token_is_invalid(client, session, jwks, kind):
    forged = TOKENS[kind](session.access_token, jwks)
    assert forged
    for token in forged.values():
        expect_unauthenticated(lambda token=token: client.me(token), "TOKEN_INVALID")


@pytest.mark.parametrize("change", forgeries.CHANGED_HEADERS, ids=json.dumps)
def test_our_token_under_a_changed_header_is_invalid(client, session, change):
    changed = jose.with_header(session.access_token, **change)
    expect_unauthenticated(lambda: client.me(changed), "TOKEN_INVALID")


def test_a_refresh_token_signed_with_the_public_key_is_a_forgery(client, session, jwks):
    header, claims = jose.header_of(session.refresh_token), jose.claims_of(session.refresh_token)
    for secret in forgeries.public_secrets(key_of(session.access_token, jwks)).values():
        forged = jose.forge(header, claims, jose.hs256(secret))
        expect_unauthenticated(lambda forged=forged: client.refresh(forged), "REFRESH_TOKEN_INVALID")


def test_an_oversize_refresh_token_is_invalid(client):
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
