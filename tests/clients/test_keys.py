"""Verifying access tokens by URL: the published keys, the discovery document, and the libraries that read them.

It tests what a verifier fetches and caches. The claims are in `test_tokens`, forgeries are in `test_forgeries`. Each
library here is given only the address of the keys.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jwt
import pytest

from support import jose, pb
from support.http import Rest
from support.keys import published_keys

ISSUER, AUDIENCE = "http://localhost:8080", "postern"
JWKS = "/.well-known/jwks.json"
DISCOVERY, METADATA = "/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"
# A new key will be published for an hour before it signs, so a cache must not keep the keys longer than that.
LONGEST_CACHE = 3600

SQLITE_ALONE = pytest.mark.parametrize("server", ["sqlite"], indirect=True)


@pytest.fixture
def rest(server):
    return Rest(server)


@pytest.fixture(scope="session")
def jose_directory(left_out) -> Path:
    """The directory into which `scripts/tools jose` installs jose."""
    directory = pb.REPOSITORY / "target/tools/jose"
    if shutil.which("node") is None or not (directory / "node_modules/jose").exists():
        left_out("verifying with jose: run `scripts/tools jose`")
    return directory


@pytest.fixture
def verify_with_jose(jose_directory):
    """Verifies a token with jose and only the URL of the keys. Returns what jose read, or its error."""

    def verify(token: str, url: str, issuer: str = ISSUER, audience: str = AUDIENCE) -> dict:
        script = Path(__file__).parent / "node/verify.mjs"
        command = ["node", script, jose_directory, url, issuer, audience]
        done = subprocess.run(command, input=token, capture_output=True, text=True, timeout=30)
        assert done.returncode in (0, 1), done.stderr
        return json.loads(done.stdout)

    return verify


def verified_by_pyjwt(token: str, url: str, issuer: str = ISSUER, audience: str = AUDIENCE) -> dict:
    """Verifies a token with PyJWT and only the URL of the keys. Returns the claims."""
    key = jwt.PyJWKClient(url).get_signing_key_from_jwt(token)
    return jwt.decode(token, key, algorithms=["ES256"], audience=audience, issuer=issuer)


def url_of(server, path: str = JWKS) -> str:
    return f"http://{Rest(server).address}{path}"


def test_pyjwt_verifies_a_fresh_token_from_the_url_of_the_keys_alone(server, rest):
    person, tokens = rest.newcomer()
    claims = verified_by_pyjwt(tokens["accessToken"], url_of(server))
    assert (claims["username"], claims["email"]) == (person.username, person.email)


def test_jose_verifies_a_fresh_token_from_the_url_of_the_keys_alone(server, rest, verify_with_jose):
    _, tokens = rest.newcomer()
    me = rest.get("/v1/me", token=tokens["accessToken"]).ok()["user"]

    read = verify_with_jose(tokens["accessToken"], url_of(server))

    assert read["claims"]["sub"] == me["id"]
    assert read["header"]["typ"] == "at+jwt"


@SQLITE_ALONE
def test_neither_library_takes_what_is_no_access_token_for_this_audience(server, rest, verify_with_jose):
    _, tokens = rest.newcomer()
    access, url = tokens["accessToken"], url_of(server)
    head, _, signature = access.rpartition(".")
    changed = f"{head}.{jose.encode(bytes(byte ^ 1 for byte in jose.decode(signature)))}"

    for token in (changed, tokens["refreshToken"]):
        with pytest.raises(jwt.PyJWTError):
            verified_by_pyjwt(token, url)
    with pytest.raises(jwt.InvalidAudienceError):
        verified_by_pyjwt(access, url, audience="another")
    with pytest.raises(jwt.InvalidIssuerError):
        verified_by_pyjwt(access, url, issuer="http://localhost:8080/")

    claim_failed, no_signature = "ERR_JWT_CLAIM_VALIDATION_FAILED", "ERR_JWS_SIGNATURE_VERIFICATION_FAILED"
    assert verify_with_jose(changed, url) == {"error": no_signature}
    assert verify_with_jose(access, url, audience="another") == {"error": claim_failed}
    assert "error" in verify_with_jose(tokens["refreshToken"], url)


def test_the_keys_are_public_named_by_their_thumbprint_and_those_of_the_command_line(server, rest):
    answer = rest.get(JWKS)
    document = answer.ok()
    assert set(document) == {"keys"}
    assert document["keys"]
    for key in document["keys"]:
        assert set(key) == {"kty", "crv", "x", "y", "kid", "use", "alg"}, "public members only"
        assert (key["kty"], key["crv"], key["use"], key["alg"]) == ("EC", "P-256", "sig", "ES256")
        assert key["kid"] == jose.thumbprint(key), "RFC 7638"
    assert document["keys"] == published_keys(server)


@SQLITE_ALONE
@pytest.mark.parametrize("document", [JWKS, DISCOVERY, METADATA])
def test_a_public_document_may_be_kept_for_a_while_and_asked_for_again_by_its_tag(rest, document):
    first = rest.get(document)
    assert seconds_to_keep(first) <= LONGEST_CACHE
    tag = first.header("etag")
    assert re.fullmatch(r'"[!-~]+"', tag), "a strong validator"

    for known in (tag, f"W/{tag}", f'"another", {tag}', "*"):
        again = rest.get(document, headers={"if-none-match": known})
        assert (again.status, again.body) == (304, b""), known
        assert again.header("etag") == tag, "RFC 9110 §15.4.5"
        assert again.header("cache-control") == first.header("cache-control")
    for unknown in ('"another"', tag.strip('"'), tag[:-2] + '"'):
        assert rest.get(document, headers={"if-none-match": unknown}).ok() == first.json(), unknown


@SQLITE_ALONE
def test_head_tells_what_get_would(rest):
    full = rest.get(JWKS)
    head = rest.call("HEAD", JWKS)
    assert (head.status, head.body) == (200, b"")
    for name in ("content-type", "etag", "cache-control", "content-length"):
        assert head.header(name) == full.header(name), name


def seconds_to_keep(answer) -> int:
    """The `max-age` of a public answer. Asserts that it is at least a minute."""
    directives = [part.strip() for part in answer.header("cache-control").split(",")]
    assert "public" in directives
    [age] = [int(part.removeprefix("max-age=")) for part in directives if part.startswith("max-age=")]
    assert age >= 60
    return age


@SQLITE_ALONE
def test_discovery_names_the_issuer_and_where_the_keys_are(rest):
    answer = rest.get(DISCOVERY)
    document = answer.ok()
    assert document["issuer"] == ISSUER
    assert document["jwks_uri"] == f"{ISSUER}{JWKS}"
    assert document["id_token_signing_alg_values_supported"] == ["ES256"]
    # OpenID Connect Discovery 1.0 §3 requires this member. Some readers, such as Istio, look at no others.
    assert document["subject_types_supported"] == ["public"]
    # §4.2: what would be an empty list is left out, although §3 requires it of a provider.
    assert "response_types_supported" not in document
    assert all(document.values()), document
    assert seconds_to_keep(answer) <= LONGEST_CACHE


@pytest.mark.parametrize("slash", ["", "/"])
def test_discovery_leads_to_keys_that_verify_where_the_public_url_is_not_the_issuer(
    embedded, start_server, verify_with_jose, slash
):
    issuer = "https://id.example.com/tenant"
    server = start_server(embedded, issuer=issuer, audience="mesh", public_url="http://127.0.0.1:1")
    # The address is known only after the start, and a restart keeps it.
    server.restart(public_url=f"http://{Rest(server).address}{slash}")
    rest = Rest(server)

    document = rest.get(DISCOVERY).ok()

    assert document["issuer"] == issuer
    assert document["jwks_uri"] == url_of(server)
    _, tokens = rest.newcomer()
    claims = verified_by_pyjwt(tokens["accessToken"], document["jwks_uri"], document["issuer"], "mesh")
    assert claims["iss"] == issuer
    assert verify_with_jose(tokens["accessToken"], document["jwks_uri"], issuer, "mesh")["claims"]["iss"] == issuer


@SQLITE_ALONE
def test_the_address_that_a_client_claims_to_have_asked_changes_no_document(rest):
    plain = rest.get(DISCOVERY).ok()
    lies = {"host": "evil.example", "x-forwarded-host": "evil.example", "forwarded": "host=evil.example;proto=https"}
    assert rest.get(DISCOVERY, headers=lies).ok() == plain
