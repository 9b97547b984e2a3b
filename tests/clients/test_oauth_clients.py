"""The OAuth endpoints as clients use them that were not written here, each given nothing but the URL of the issuer.

Also what depends on the settings of the server: where the metadata is, and the limit on wrong secrets. Each endpoint by
plain HTTP is in `test_oauth`.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import requests
from authlib.integrations.requests_client import OAuth2Session, OAuthError
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata, get_well_known_url

from support import pb
from support.admin import Somebody
from support.http import Rest
from support.oauth import INTROSPECT, REVOKE, TOKEN, OAuth, Service, basic

METADATA = "/.well-known/oauth-authorization-server"
HERE = Path(__file__).parent


@pytest.fixture
def server(embedded, start_server):
    """A server whose issuer is its own address, which is known only after the start and kept by a restart."""
    server = start_server(embedded)
    return server.restart(issuer=f"http://{Rest(server).address}")


@pytest.fixture
def service(server):
    return Service(server, "reader")


@pytest.fixture
def person(service):
    return Somebody(service.way)


@pytest.fixture
def check(server, service, person):
    """Lets a client take its steps, and checks what it saw of each."""

    def check(steps_of) -> None:
        token = person.tokens["refreshToken"]
        given = {"client_id": service.id, "client_secret": service.secret, "refresh_token": token}
        steps = steps_of(f"http://{Rest(server).address}", given)
        assert steps["token_type"].lower() == "bearer"
        assert 890 <= steps["expires_in"] <= 900
        of_service = {name: steps["service"][name] for name in ("active", "sub", "username", "roles", "subject_type")}
        assert of_service == {
            "active": True,
            "sub": service.id,
            "username": service.name,
            "roles": ["reader"],
            "subject_type": "service",
        }
        of_person = {name: steps["person"][name] for name in ("active", "sub", "email", "client_id")}
        assert of_person == {"active": True, "sub": person.id, "email": person.email, "client_id": "postern"}
        assert steps["next_refresh"] not in ("", token)
        assert steps["revoked"] is None
        assert steps["after"] == {"active": False}
        assert steps["revoked_service"] is None
        assert steps["after_service"] == {"active": False}
        assert steps["wrong_token"] == "invalid_client"
        assert steps["wrong_secret"] == "invalid_client"
        assert steps["wrong_scope"] == "invalid_scope"
        assert steps["wrong_refresh"] == "invalid_grant"

    return check


def steps_of_a_program(*command):
    """The steps of a client in another language, which reads the credentials and prints what it saw."""

    def steps(issuer: str, given: dict) -> dict:
        done = subprocess.run(
            [*command, issuer], input=json.dumps(given), capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return steps


def test_go_x_oauth2_gets_introspects_and_revokes_and_go_oidc_verifies(check, person, left_out):
    program = pb.REPOSITORY / "target/tools/bin/oauth-client"
    if not program.exists():
        left_out("OAuth with golang.org/x/oauth2: run `scripts/tools oauth-client`")
    steps_of = steps_of_a_program(program)
    subjects = []

    def steps(issuer: str, given: dict) -> dict:
        steps = steps_of(issuer, given)
        subjects.append(steps["verified"])
        return steps

    check(steps)
    # go-oidc was given the issuer alone.
    assert subjects == [person.id]


def test_node_oauth4webapi_gets_introspects_and_revokes(check, left_out):
    directory = pb.REPOSITORY / "target/tools/jose"
    if shutil.which("node") is None or not (directory / "node_modules/oauth4webapi").exists():
        left_out("OAuth with oauth4webapi: run `scripts/tools jose`")
    check(steps_of_a_program("node", HERE / "node/oauth.mjs", directory))


def test_python_authlib_gets_introspects_and_revokes(check):
    check(steps_of_authlib)


def steps_of_authlib(issuer: str, given: dict) -> dict:
    """The same steps with authlib, which authenticates by the body of the request."""
    metadata = AuthorizationServerMetadata(requests.get(get_well_known_url(issuer, external=True), timeout=15).json())
    metadata.validate_issuer()
    metadata.validate_token_endpoint()
    metadata.validate_introspection_endpoint()
    metadata.validate_revocation_endpoint()

    def session(secret: str, **options) -> OAuth2Session:
        method = "client_secret_post"
        assert method in metadata["token_endpoint_auth_methods_supported"]
        return OAuth2Session(given["client_id"], secret, token_endpoint_auth_method=method, **options)

    def own(session: OAuth2Session) -> dict:
        return session.fetch_token(metadata["token_endpoint"], grant_type="client_credentials")

    service = session(given["client_secret"])
    people = OAuth2Session("postern", token_endpoint_auth_method="none")

    def introspect(token: str) -> dict:
        return service.introspect_token(metadata["introspection_endpoint"], token=token).json()

    def revoke(client: OAuth2Session, token: str) -> str | None:
        answer = client.revoke_token(metadata["revocation_endpoint"], token=token)
        return answer.json()["error"] if answer.content else None

    token = own(service)
    renewed = people.refresh_token(metadata["token_endpoint"], refresh_token=given["refresh_token"])
    return {
        "token_type": token["token_type"],
        "expires_in": token["expires_in"],
        "service": introspect(token["access_token"]),
        "person": introspect(renewed["access_token"]),
        "next_refresh": renewed["refresh_token"],
        "revoked": revoke(people, renewed["refresh_token"]),
        "after": introspect(renewed["access_token"]),
        "revoked_service": revoke(service, token["access_token"]),
        "after_service": introspect(token["access_token"]),
        "wrong_token": people.introspect_token(metadata["introspection_endpoint"], token="x").json()["error"],
        "wrong_secret": failure(lambda: own(session("wrong"))),
        "wrong_scope": failure(lambda: own(session(given["client_secret"], scope="read"))),
        "wrong_refresh": failure(
            lambda: people.refresh_token(metadata["token_endpoint"], refresh_token=renewed["refresh_token"])
        ),
    }


def failure(attempt) -> str:
    """The code of the error that the library has read."""
    with pytest.raises(OAuthError) as refused:
        attempt()
    return refused.value.error


def test_the_metadata_of_an_issuer_with_a_path_is_where_rfc_8414_has_it(embedded, start_server):
    issuer = "https://id.example.com/tenant/1"
    server = start_server(embedded, issuer=issuer, public_url="https://auth.example.com/")
    rest = Rest(server)
    document = rest.get(get_well_known_url(issuer)).ok()
    assert document["issuer"] == issuer
    assert document["token_endpoint"] == f"https://auth.example.com{TOKEN}"
    assert rest.get(METADATA).ok() == document
    for path in ("/tenant", "/tenant/2", "/tenant/1/", "/tenant/1/x", "/"):
        assert rest.get(f"{METADATA}{path}").status == 404, path


def test_too_many_wrong_secrets_of_a_client_are_answered_with_a_pause(embedded, start_server):
    server = start_server(embedded, login_limit_per_client="3")
    service, oauth = Service(server), OAuth(server)
    wrong = basic(service.id, "wrong")
    for path, fields in (
        (TOKEN, {"grant_type": "client_credentials"}),
        (INTROSPECT, {"token": "x"}),
        (REVOKE, {"token": "x"}),
    ):
        statuses = {oauth.post(path, fields, authorization=wrong).status for _ in range(4)}
        assert statuses <= {401, 429}
        answer = oauth.refused(429, "temporarily_unavailable", path, fields, authorization=wrong)
        assert int(answer.header("retry-after")) >= 1
    granted = oauth.ok(TOKEN, {"grant_type": "client_credentials"}, authorization=service.basic())
    assert granted["access_token"], "only failures count"
