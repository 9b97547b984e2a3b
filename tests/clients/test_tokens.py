"""Access and refresh tokens as other services see them.

It tests what an access token holds, how another service verifies it with PyJWT and the published keys, and that neither
kind of token is accepted as the other. Forgeries are in `test_forgeries`.
"""

import uuid

import jwt
import pytest

from support import jose
from support.engine import Sqlite
from support.expect import expect_unauthenticated
from support.keys import key_of, published_keys

ISSUER, AUDIENCE = "http://localhost:8080", "postern"


def verified(token: str, keys: list[dict]) -> dict:
    """The claims, checked by PyJWT as another service would."""
    key = jwt.PyJWK(key_of(token, keys)).key
    required = ["iss", "aud", "sub", "exp", "iat", "jti", "sid"]
    return jwt.decode(token, key, algorithms=["ES256"], audience=AUDIENCE, issuer=ISSUER, options={"require": required})


def test_an_access_token_verifies_with_pyjwt_and_carries_the_promised_claims(client, jwks):
    person, tokens = client.newcomer()
    user = client.me(tokens.access_token)

    claims = verified(tokens.access_token, jwks)

    assert claims["sub"] == user.id
    assert claims["username"] == person.username
    assert claims["email"] == person.email
    assert claims["email_verified"] is False
    assert claims["roles"] == ["user"]
    assert type(claims["iat"]) is int
    assert type(claims["exp"]) is int
    assert claims["exp"] - claims["iat"] == 900
    assert claims["exp"] == tokens.access_token_expire_time.seconds
    assert uuid.UUID(claims["sid"])
    assert isinstance(claims["jti"], str)
    assert claims["jti"]
    assert set(claims) <= {
        "iss", "aud", "sub", "exp", "iat", "nbf", "jti", "sid", "username", "email", "email_verified", "roles",
        "client_id", "auth_time", "gen", "subject_type",
    }, "a token holds no other data about a person"  # fmt: skip


def test_an_access_token_names_its_type_algorithm_and_key_and_nothing_else(client, jwks):
    _, tokens = client.newcomer()
    header = jose.header_of(tokens.access_token)
    assert header == {"typ": "at+jwt", "alg": "ES256", "kid": header["kid"]}
    assert header["kid"] in {key["kid"] for key in jwks}


def test_every_published_key_is_public_and_named_by_its_thumbprint(jwks):
    assert jwks
    for key in jwks:
        assert set(key) == {"kty", "crv", "x", "y", "kid", "use", "alg"}, "public members only"
        assert (key["kty"], key["crv"], key["use"], key["alg"]) == ("EC", "P-256", "sig", "ES256")
        assert key["kid"] == jose.thumbprint(key), "RFC 7638"


def test_tokens_of_one_session_share_its_sid_and_differ_in_jti(client, jwks):
    person, tokens = client.newcomer()
    first = verified(tokens.access_token, jwks)
    second = verified(client.refresh(tokens.refresh_token).access_token, jwks)
    other = verified(client.login(person).access_token, jwks)
    assert first["sid"] == second["sid"] != other["sid"]
    assert len({first["jti"], second["jti"], other["jti"]}) == 3
    assert first["sub"] == second["sub"] == other["sub"]


def test_a_refreshed_access_token_says_what_the_account_is_now(server, jwks):
    person, tokens = server.client.newcomer()
    server.engine.execute("UPDATE users SET email_verified = true WHERE email = ?", person.email)
    fresh = server.client.refresh(tokens.refresh_token)
    assert verified(fresh.access_token, jwks)["email_verified"] is True


def test_a_refresh_token_is_no_access_token_and_verifies_under_no_published_key(client, session, jwks):
    expect_unauthenticated(lambda: client.me(session.refresh_token), "TOKEN_INVALID")
    header = jose.header_of(session.refresh_token)
    assert (header["typ"], header["alg"]) == ("rt+jwt", "HS256")
    assert jose.claims_of(session.refresh_token)["aud"] != AUDIENCE
    for key in jwks:
        with pytest.raises(jwt.InvalidTokenError):
            jwt.decode(session.refresh_token, jwt.PyJWK(key).key, algorithms=["ES256"])


def test_an_access_token_is_no_refresh_token(client, session):
    expect_unauthenticated(lambda: client.refresh(session.access_token), "REFRESH_TOKEN_INVALID")
    expect_unauthenticated(lambda: client.logout(session.access_token), "REFRESH_TOKEN_INVALID")


def test_tokens_of_a_deleted_database_are_invalid(embedded, start_server, tmp_path):
    old = start_server(embedded)
    person, tokens = old.client.newcomer()
    new = start_server(Sqlite(tmp_path / "another"))
    new.client.sign_up(person)

    expect_unauthenticated(lambda: new.client.me(tokens.access_token), "TOKEN_INVALID")
    expect_unauthenticated(lambda: new.client.refresh(tokens.refresh_token), "REFRESH_TOKEN_INVALID")
    expect_unauthenticated(lambda: new.client.logout(tokens.refresh_token), "REFRESH_TOKEN_INVALID")
    assert not {key["kid"] for key in published_keys(new)} & {key["kid"] for key in published_keys(old)}
