"""The OAuth endpoints by plain HTTP: what RFC 6749, 7009, 7662 and 8414 say about requests, and each of their errors.

Clients that were not written here, and what depends on settings, are in `test_oauth_clients`. Which statements the
endpoints cost is in `test_statements`.
"""

import json
import uuid

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from support import jose
from support.admin import Somebody, session_id
from support.http import Rest
from support.oauth import BASIC, FORM, INTROSPECT, REVOKE, TOKEN, OAuth, Service, basic, every_byte, expect_error
from support.rows import check_all

# The endpoints are adapters over RPCs, which the other tests call on both engines.
pytestmark = pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")

CLIENT_CREDENTIALS = {"grant_type": "client_credentials"}
ISSUER = "http://localhost:8080"
METADATA = "/.well-known/oauth-authorization-server"


@pytest.fixture
def oauth(server):
    return OAuth(server)


@pytest.fixture(scope="module")
def service(server):
    """A service that nobody changes."""
    return Service(server, "reader")


@pytest.fixture
def own_service(server):
    """A service of one test."""
    return Service(server, "reader")


@pytest.fixture
def person(service):
    return Somebody(service.way)


def introspected(oauth, service, token: str) -> dict:
    return oauth.ok(INTROSPECT, {"token": token}, authorization=service.basic())


def refresh(token: str, **fields) -> dict:
    return {"grant_type": "refresh_token", "refresh_token": token, **fields}


def expect_alive(service, somebody) -> None:
    assert service.way.me(somebody.tokens)
    assert service.way.refresh(somebody.tokens)


# The token endpoint: client_credentials.


def test_a_service_gets_a_token_by_basic_and_by_body(oauth, service):
    ways = {
        "basic": {"authorization": service.basic()},
        "basic, every byte encoded": {"authorization": service.basic(every_byte)},
        "basic, nothing encoded": {"authorization": service.basic(lambda text: text)},
        "basic, the scheme in upper case": {"authorization": service.basic().replace("Basic", "BASIC")},
        "basic, client_id again": {"authorization": service.basic(), "client_id": service.id},
        "body": service.in_body,
        "body, an empty scope and an unknown parameter": {**service.in_body, "scope": "", "tenant": "x"},
        "body, a charset": {**service.in_body, "content-type": f"{FORM}; charset=UTF-8"},
    }

    def check(way) -> None:
        fields = dict(way[1])
        headers = {"content-type": fields.pop("content-type", FORM)}
        authorization = fields.pop("authorization", None)
        given = oauth.ok(TOKEN, {**CLIENT_CREDENTIALS, **fields}, authorization=authorization, headers=headers)
        assert set(given) == {"access_token", "token_type", "expires_in"}, "no refresh token (§4.4.3)"
        assert given["token_type"] == "Bearer"
        assert 890 <= given["expires_in"] <= 900
        claims = jose.claims_of(given["access_token"])
        assert (claims["sub"], claims["client_id"], claims["sid"]) == (service.id, service.id, service.key["id"])

    check_all(ways.items(), check)


def test_wrong_client_credentials_are_one_answer_whatever_is_wrong(oauth, service, own_service, server):
    disabled, deleted = Service(server), Service(server)
    disabled.change("DisableServiceAccount")
    deleted.delete_key()
    wrong = {
        "the secret of another": (service.id, own_service.secret),
        "another secret": (service.id, service.secret[:-1] + ("A" if service.secret[-1] != "A" else "B")),
        "a longer secret": (service.id, service.secret + "A" * 200),
        "an unknown id": (str(uuid.uuid4()), service.secret),
        "an id that is none": ("billing", service.secret),
        "the name": (service.name, service.secret),
        "a disabled account": (disabled.id, disabled.secret),
        "a deleted key": (deleted.id, deleted.secret),
        "no secret": (service.id, ""),
    }
    answers = set()

    def check(row) -> None:
        _, (client_id, secret) = row
        by_basic = oauth.refused(
            401, "invalid_client", TOKEN, CLIENT_CREDENTIALS, authorization=basic(client_id, secret)
        )
        in_body = {**CLIENT_CREDENTIALS, "client_id": client_id, "client_secret": secret}
        by_body = oauth.refused(401, "invalid_client", TOKEN, in_body)
        for answer in (by_basic, by_body):
            assert answer.header("www-authenticate") == BASIC, "RFC 6749 §5.2"
            answers.add(answer.body)

    check_all(wrong.items(), check)
    assert len(answers) == 1


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "Basic",
        "Basic ***",
        "Basic bm9jb2xvbg==",
        "Basic aWQ6JUZG",
        "Bearer x",
        'Digest username="x"',
        "\u00e9",
    ],
)
def test_no_usable_credentials_are_invalid_client(oauth, authorization):
    options = {} if authorization is None else {"authorization": authorization.encode().decode("latin-1")}
    answer = oauth.refused(401, "invalid_client", TOKEN, CLIENT_CREDENTIALS, **options)
    assert answer.header("www-authenticate") == BASIC


def test_two_ways_to_authenticate_at_once_are_an_invalid_request(oauth, service):
    fields = {**CLIENT_CREDENTIALS, **service.in_body}
    oauth.refused(400, "invalid_request", TOKEN, fields, authorization=service.basic())
    other = {**CLIENT_CREDENTIALS, "client_id": str(uuid.uuid4())}
    oauth.refused(400, "invalid_request", TOKEN, other, authorization=service.basic())
    without_id = {**CLIENT_CREDENTIALS, "client_secret": service.secret}
    oauth.refused(400, "invalid_request", TOKEN, without_id)
    assertion = {**CLIENT_CREDENTIALS, "client_assertion": "x.y.z", "client_assertion_type": "urn:x"}
    oauth.refused(401, "invalid_client", TOKEN, assertion)


# Every endpoint: what is no request of OAuth.


ENDPOINTS = pytest.mark.parametrize("endpoint", [TOKEN, INTROSPECT, REVOKE])


@ENDPOINTS
def test_what_is_no_form_of_single_parameters_is_an_invalid_request(oauth, service, endpoint):
    good = [*{TOKEN: CLIENT_CREDENTIALS}.get(endpoint, {"token": "x"}).items(), *service.in_body.items()]
    assert oauth.post(endpoint, good).status == 200
    rows = {
        "a parameter twice": [*good, good[0]],
        "a parameter twice, once empty": [*good, (good[0][0], "")],
        "client_secret twice": [*good, ("client_secret", service.secret)],
        "an unknown parameter twice": [*good, ("tenant", "x"), ("tenant", "x")],
        "nothing": [],
        "no parameter that is needed": [*service.in_body.items()],
        "it without a value": [(good[0][0], ""), *service.in_body.items()],
        "text that is not UTF-8": "grant_type=client_credentials&token=x&client_id=%FF&client_secret=x",
    }

    def check(row) -> None:
        named, fields = row
        answer = oauth.post(endpoint, fields)
        # Who calls comes first: without anything there is no client either.
        wanted = (401, "invalid_client") if (named, endpoint) == ("nothing", INTROSPECT) else (400, "invalid_request")
        expect_error(answer, *wanted)

    check_all(rows.items(), check)
    for content_type in ("application/json", "text/plain", "multipart/form-data; boundary=x", ""):
        oauth.refused(400, "invalid_request", endpoint, good, headers={"content-type": content_type})
    oauth.refused(400, "invalid_request", f"{endpoint}?grant_type=client_credentials", good)
    oauth.refused(413, "invalid_request", endpoint, [*good, ("padding", "x" * 65536)])


@ENDPOINTS
def test_a_method_other_than_post_is_refused_in_the_same_form(server, endpoint):
    rest = Rest(server)
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        answer = rest.call(method, endpoint)
        assert answer.header("allow") == "POST"
        expect_error(answer, 405, "invalid_request")
    assert rest.call("HEAD", endpoint).status == 405
    too_much = rest.call("POST", endpoint, "a=b", headers={"content-type": FORM, "x-padding": "x" * 20_000})
    expect_error(too_much, 431, "invalid_request")
    assert rest.post("/oauth2/authorize", {}).status == 404


def test_the_grant_types_are_two_and_there_is_no_scope(oauth, service, person):
    for grant_type in ("password", "authorization_code", "implicit", "CLIENT_CREDENTIALS", "client_credentials "):
        oauth.refused(400, "unsupported_grant_type", TOKEN, {"grant_type": grant_type, **service.in_body})
    token = person.tokens["refreshToken"]
    for fields in ({**CLIENT_CREDENTIALS, **service.in_body}, refresh(token)):
        for scope in ("read", "openid profile", "\u00e9", " "):
            oauth.refused(400, "invalid_scope", TOKEN, {**fields, "scope": scope})
    expect_alive(service, person)


# The token endpoint: refresh_token.


def test_a_refresh_token_is_exchanged_with_and_without_a_client(oauth, service, person):
    def pair() -> str:
        return service.way.login(person.person)["refreshToken"]

    ways = {
        "nobody": {},
        "the client of all people": {"client_id": "postern"},
        "the client of all people, by basic": {"authorization": basic("postern", "")},
        "a service, by basic": {"authorization": service.basic()},
        "a service, by body": service.in_body,
    }

    def check(row) -> None:
        fields = dict(row[1])
        authorization = fields.pop("authorization", None)
        given = oauth.ok(TOKEN, refresh(pair(), **fields), authorization=authorization)
        assert set(given) == {"access_token", "token_type", "expires_in", "refresh_token"}
        assert given["token_type"] == "Bearer"
        assert 890 <= given["expires_in"] <= 900
        assert service.way.me({"accessToken": given["access_token"]})["id"] == person.id
        assert service.way.refresh({"refreshToken": given["refresh_token"]})

    check_all(ways.items(), check)


def test_a_client_that_authenticates_wrongly_does_not_use_the_refresh_token_up(oauth, service, person):
    token = person.tokens["refreshToken"]
    for client in (
        {"client_id": "web-app"},
        {"client_id": service.id},
        {"client_id": service.id, "client_secret": "wrong"},
        {"client_id": "postern", "client_secret": "wrong"},
    ):
        oauth.refused(401, "invalid_client", TOKEN, refresh(token, **client))
        oauth.refused(401, "invalid_client", REVOKE, {"token": token, **client})
    for authorization in (basic(service.id, "wrong"), basic("web-app", ""), "Bearer x"):
        oauth.refused(401, "invalid_client", TOKEN, refresh(token), authorization=authorization)
        oauth.refused(401, "invalid_client", REVOKE, {"token": token}, authorization=authorization)
    expect_alive(service, person)


def test_what_is_no_live_refresh_token_is_an_invalid_grant(oauth, service, person):
    tokens = person.tokens
    stolen = tokens["refreshToken"]
    for _ in range(2):
        tokens = service.way.refresh(tokens)
    service_token = service.token()
    for token in ("x", tokens["accessToken"], service_token, tokens["refreshToken"][:-8]):
        oauth.refused(400, "invalid_grant", TOKEN, refresh(token))
    assert service.way.me(tokens)
    oauth.refused(400, "invalid_grant", TOKEN, refresh(stolen))
    service.way.expect_dead(tokens)
    oauth.refused(400, "invalid_grant", TOKEN, refresh(tokens["refreshToken"]))


# The introspection endpoint.


def test_each_way_of_a_service_to_authenticate_learns_the_same_of_a_person(oauth, service, person):
    token = person.tokens["accessToken"]
    claims = jose.claims_of(token)
    expected = {
        "active": True,
        "token_type": "Bearer",
        "subject_type": "user",
        **{name: claims[name] for name in ("iss", "aud", "sub", "client_id", "username", "iat", "exp", "sid", "roles")},
        **{name: claims[name] for name in ("email", "email_verified")},
    }
    assert oauth.ok(INTROSPECT, {"token": token}, authorization=service.basic()) == expected
    assert oauth.ok(INTROSPECT, {"token": token}, authorization=service.basic(every_byte)) == expected
    assert oauth.ok(INTROSPECT, {"token": token}, authorization=service.bearer()) == expected
    assert oauth.ok(INTROSPECT, {"token": token, **service.in_body}) == expected
    hinted = {"token": token, "token_type_hint": "refresh_token"}
    assert oauth.ok(INTROSPECT, hinted, authorization=service.basic()) == expected


def test_a_token_of_a_service_is_introspected_without_an_address(oauth, service):
    token = service.token()
    claims = jose.claims_of(token)
    assert introspected(oauth, service, token) == {
        "active": True,
        "token_type": "Bearer",
        "subject_type": "service",
        "username": service.name,
        "roles": ["reader"],
        **{name: claims[name] for name in ("iss", "aud", "sub", "client_id", "iat", "exp", "sid")},
    }


def test_only_a_service_may_introspect(oauth, service, person):
    fields = {"token": person.tokens["accessToken"]}
    for options in ({}, {"authorization": basic("postern", "")}):
        answer = oauth.refused(401, "invalid_client", INTROSPECT, fields, **options)
        assert answer.header("www-authenticate") == f"{BASIC}, Bearer"
    oauth.refused(401, "invalid_client", INTROSPECT, {**fields, "client_id": service.id})
    oauth.refused(401, "invalid_client", INTROSPECT, fields, authorization=basic(service.id, "wrong"))
    oauth.refused(401, "invalid_client", INTROSPECT, {**fields, "client_id": service.id, "client_secret": "wrong"})

    both = {**fields, "client_secret": service.secret, "client_id": service.id}
    oauth.refused(400, "invalid_request", INTROSPECT, both, authorization=service.bearer())

    by_person = f"Bearer {person.tokens['accessToken']}"
    answer = oauth.refused(403, "insufficient_scope", INTROSPECT, fields, authorization=by_person)
    assert answer.header("www-authenticate") == 'Bearer error="insufficient_scope"'
    for dead in ("Bearer", "Bearer x", f"Bearer {person.tokens['refreshToken']}", f"{service.bearer()[:-4]}AAAA"):
        answer = oauth.refused(401, "invalid_token", INTROSPECT, fields, authorization=dead)
        assert answer.header("www-authenticate") == 'Bearer error="invalid_token"', "RFC 6750 §3"


def test_what_is_not_active_has_no_other_member(oauth, service, person, server):
    """The attacks of docs/security.md, each with a valid token beside it that stays valid."""
    token, jwk = person.tokens["accessToken"], jose.jwk_of(ec.generate_private_key(ec.SECP256R1()).public_key())
    header, claims = jose.header_of(token), jose.claims_of(token)
    stranger = ec.generate_private_key(ec.SECP256R1())
    head, _, signature = token.rpartition(".")
    ended = Somebody(service.way)
    service.way.ok("Logout", refresh_token=ended.tokens["refreshToken"])
    deleted = Service(server)
    of_deleted = deleted.token()
    deleted.delete_key()
    dead = {
        "alg none": jose.forge({**header, "alg": "none"}, claims, jose.unsigned),
        "HS256 with what is public": jose.forge(
            {**header, "alg": "HS256"}, claims, jose.hs256(json.dumps(jwk).encode())
        ),
        "a stranger's key": jose.forge(header, claims, jose.es256(stranger)),
        "a stranger's key in jwk": jose.forge({**header, "jwk": jwk}, claims, jose.es256(stranger)),
        "jku": jose.with_header(token, jku="http://127.0.0.1:9/jwks.json"),
        "x5u": jose.with_header(token, x5u="http://127.0.0.1:9/x"),
        "an unknown kid": jose.with_header(token, kid="unknown"),
        "crit": jose.with_header(token, crit=["exp"]),
        "b64": jose.with_header(token, b64=False, crit=["b64"]),
        "typ JWT": jose.with_header(token, typ="JWT"),
        "other claims": jose.forge(header, {**claims, "roles": ["admin"]}, lambda _: jose.decode(signature)),
        "a service by its claims": jose.forge(
            header, {**claims, "subject_type": "service"}, lambda _: jose.decode(signature)
        ),
        "no signature": f"{head}.",
        "padding": f"{token}=",
        "another segment": f"{token}.{signature}",
        "9 KiB": f"{head}{'A' * 9216}.{signature}",
        "no token": "x",
        "a refresh token": person.tokens["refreshToken"],
        "an ended session": ended.tokens["accessToken"],
        "a deleted key": of_deleted,
        "NUL": f"{token}\0",
    }
    answers = set()

    def check(row) -> None:
        answer = oauth.post(INTROSPECT, {"token": row[1]}, authorization=service.basic())
        assert answer.ok() == {"active": False}
        answers.add(answer.body)

    check_all(dead.items(), check)
    assert len(answers) == 1
    assert introspected(oauth, service, token)["active"]


def test_introspection_tells_the_roles_of_now(oauth, own_service):
    token = own_service.token()
    own_service.change("SetServiceAccountRoles", roles=["reader", "writer"])
    assert introspected(oauth, own_service, token)["roles"] == ["reader", "writer"]


def test_a_secret_that_was_just_used_ends_with_its_key_and_with_its_account(oauth, own_service, person):
    """What is remembered of a verified secret outlives neither."""
    fields = {"token": person.tokens["accessToken"]}
    of_first = own_service.basic()
    assert oauth.ok(INTROSPECT, fields, authorization=of_first)["active"]
    first = own_service.key
    own_service.key, own_service.secret = own_service.new_key()
    of_second = own_service.basic()
    assert oauth.ok(INTROSPECT, fields, authorization=of_second)["active"]

    own_service.delete_key(first)
    oauth.refused(401, "invalid_client", INTROSPECT, fields, authorization=of_first)
    assert oauth.ok(INTROSPECT, fields, authorization=of_second)["active"], "the other key is still good"
    own_service.change("DisableServiceAccount")
    oauth.refused(401, "invalid_client", INTROSPECT, fields, authorization=of_second)
    own_service.change("EnableServiceAccount")
    assert oauth.ok(INTROSPECT, fields, authorization=of_second)["active"]
    own_service.change("DeleteServiceAccount")
    oauth.refused(401, "invalid_client", INTROSPECT, fields, authorization=of_second)


# The revocation endpoint.


@pytest.mark.parametrize("hint", [{}, {"token_type_hint": "refresh_token"}, {"token_type_hint": "unknown"}], ids=str)
@pytest.mark.parametrize("kind", ["refreshToken", "accessToken"])
def test_either_token_of_a_person_ends_its_session(oauth, service, person, kind, hint):
    other = service.way.login(person.person)
    token = person.tokens[kind]
    for _ in range(2):
        oauth.revoke(token=token, **hint)
    service.way.expect_dead(person.tokens)
    assert introspected(oauth, service, person.tokens["accessToken"]) == {"active": False}
    assert service.way.me(other), "another session of the same person"
    [event] = [
        event
        for event in service.way.ok("ListAuditEvents", credential=service.admin.credential, user_id=person.id)["events"]
        if event["sessionId"] == session_id(person.tokens) and event["action"] != "login"
    ]
    assert event["actorId"] == person.id


def test_a_client_that_authenticates_revokes_like_one_that_does_not(oauth, service):
    for client in ({"client_id": "postern"}, service.in_body):
        somebody = Somebody(service.way)
        oauth.revoke(token=somebody.tokens["refreshToken"], **client)
        service.way.expect_dead(somebody.tokens)


def test_what_is_not_valid_is_as_good_as_revoked(oauth, service, person):
    for token in ("x", "a.b.c", person.tokens["refreshToken"][:-4], f"{person.tokens['accessToken']}A", "\u00e9"):
        oauth.revoke(token=token)
    expect_alive(service, person)


def test_one_token_of_a_service_is_revoked_and_the_others_are_not(oauth, own_service):
    other = own_service.token()
    for client in ({}, own_service.in_body):
        token = own_service.token()
        oauth.revoke(token=token, **client)
        assert introspected(oauth, own_service, token) == {"active": False}
        oauth.revoke(token=token, **client)
    assert introspected(oauth, own_service, other)["active"]


# Metadata.


def test_the_metadata_leads_to_the_endpoints(server):
    answer = Rest(server).get(METADATA)
    clients = ["client_secret_basic", "client_secret_post", "none"]
    assert answer.ok() == {
        "issuer": ISSUER,
        "token_endpoint": f"{ISSUER}{TOKEN}",
        "token_endpoint_auth_methods_supported": clients,
        "grant_types_supported": ["client_credentials", "refresh_token"],
        "introspection_endpoint": f"{ISSUER}{INTROSPECT}",
        "introspection_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post", "Bearer"],
        "revocation_endpoint": f"{ISSUER}{REVOKE}",
        "revocation_endpoint_auth_methods_supported": clients,
        "jwks_uri": f"{ISSUER}/.well-known/jwks.json",
        "response_types_supported": [],
    }
    assert answer.header("cache-control").startswith("public, max-age=")
    discovery = Rest(server).get("/.well-known/openid-configuration").ok()
    shared = {name: value for name, value in answer.json().items() if name != "response_types_supported"}
    assert discovery.items() >= shared.items()
    lies = {"host": "evil.example", "x-forwarded-host": "evil.example", "forwarded": "host=evil.example;proto=https"}
    assert Rest(server).get(METADATA, headers=lies).body == answer.body
    assert Rest(server).get(f"{METADATA}/tenant").status == 404
