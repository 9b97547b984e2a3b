"""The REST API against its own description, by schemathesis: no 5xx, and no answer that `/openapi.json` does not
describe.

It covers cases that the other tests do not list. The seed is fixed and the number of examples is bounded, so that every
run makes the same requests. The generator is given valid values, because random ones would only get 400s.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import contract, jose
from support.admin import AnyByRest, give_role, only_admin
from support.client import Person
from support.http import Rest
from support.mail import CHANGE, RESET, VERIFY
from support.services import ServiceAccount

pytestmark = [
    pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module"),
    # These tests take half a minute on an idle machine, and several minutes on a busy one.
    pytest.mark.timeout(900),
]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "ignored_auth",
)
# These operations may end the session of their caller, so each is called with its own session. The first one needs the
# sessions that the other two end.
ENDING = ("/v1/me/sessions/{session_id}", "/v1/me/password", "/v1/admin/users/{user_id}/revoke-sessions")
# These operations never answer 200. The caller is the last admin, who cannot be deleted, and no generated pair of a
# service account and a key fits.
NEVER_DONE = ("/v1/me/delete", "/v1/admin/service-accounts/{service_account_id}/keys/{key_id}")
SEED = 20261123


@pytest.fixture(scope="module")
def settings(mailbox):
    return {"mail_url": mailbox.url, "mail_limit_per_client": "0", "mail_limit_per_address": "1000"}


@pytest.fixture
def known(server):
    """The only admin and their tokens. No generated call can remove the last admin."""
    person, tokens = server.client.newcomer()
    user_id = jose.claims_of(tokens.access_token)["sub"]
    give_role(server.engine, user_id, "admin")
    only_admin(server.engine, user_id)
    return person, server.client.login(person)


@pytest.fixture
def service(server, known) -> ServiceAccount:
    """A service account that no generated call changes."""
    admin = SimpleNamespace(credential=known[1].access_token)
    return ServiceAccount(AnyByRest(Rest(server)), admin)


@pytest.fixture
def words(server, mailbox, known, service, size) -> dict[str, list[str]]:
    """Valid values for the fields of bodies: of an existing user, of live sessions, and of new users."""
    person, _ = known
    new = [Person() for _ in range(size(10, 40))]
    return {
        "username": [somebody.username for somebody in new],
        "email": [person.email] * 20 + [somebody.email for somebody in new],
        "password": [person.password],
        "currentPassword": [person.password],
        # A change of the password sets the same password.
        "newPassword": [person.password],
        "newEmail": [Person().email for _ in range(size(10, 40))],
        "newUsername": [Person().username for _ in range(size(10, 40))],
        "refreshToken": [server.client.newcomer()[1].refresh_token for _ in range(size(15, 60))],
        "token": mailed_tokens(server.client, mailbox, size(6, 20)),
        "roles": ["billing"],
        "name": [f"service-{number}" for number in range(size(10, 40))],
        "clientId": [service.id],
        "clientSecret": [service.secret],
        "expireTime": ["2999-12-31T23:59:59Z"],
    }


@pytest.fixture
def places(server, known, size) -> dict[str, list[str]]:
    """Valid values for path parameters: accounts that may be deleted, and sessions of the caller."""
    person, tokens = known
    way, admin = AnyByRest(Rest(server)), SimpleNamespace(credential=tokens.access_token)
    accounts = [ServiceAccount(way, admin).id for _ in range(size(20, 80))]
    return {
        "user_id": [jose.claims_of(server.client.newcomer()[1].access_token)["sub"] for _ in range(size(20, 80))],
        "service_account_id": accounts,
        "key_id": [ServiceAccount(way, admin).key["id"]],
        "session_id": [jose.claims_of(server.client.login(person).access_token)["sid"] for _ in range(size(15, 60))],
    }


def mailed_tokens(client, mailbox, count: int) -> list[str]:
    """This number of tokens of each kind, each of a new user."""
    mailed = []
    for _ in range(count):
        (verified, _), (reset, _), (moved, tokens) = (client.newcomer() for _ in range(3))
        new_email = Person().email
        client.request_password_reset(reset.email)
        client.request_email_change(tokens.access_token, new_email, moved.password)
        mailed += [(verified.email, VERIFY), (reset.email, RESET), (new_email, CHANGE)]
    # All mails are requested before the first is awaited.
    return [mailbox.token(email, kind) for email, kind in mailed]


@pytest.fixture
def explore(server, tmp_path, words, places, size, pytestconfig):
    """Runs schemathesis against the server and returns its report; it must have tested every operation."""

    def run(mode: str, *options: str, operations: int = len(contract.routes()), **headers: str) -> dict:
        (tmp_path / "schemathesis.toml").write_text(configuration(words, places))
        report = tmp_path / "report.json"
        command = [Path(sys.executable).with_name("schemathesis"), "run", f"http://{Rest(server).address}/openapi.json"]
        command += ["--checks", ",".join(CHECKS), "--max-examples", str(size(6, 25)), "--seed", str(SEED)]
        command += ["--mode", mode, *options]
        if not pytestconfig.getoption("nightly"):
            # This leaves out the phase that covers every keyword of the description. It takes most of the time.
            command += ["--phases", "examples,fuzzing"]
        command += ["--generation-database", "none", "--report-json-path", str(report), "--no-color"]
        command += [part for name, value in headers.items() for part in ("--header", f"{name}: {value}")]
        # By default schemathesis gives up an operation if generating its values is slow, as on a busy machine.
        command += ["--suppress-health-check", "too_slow"]
        # The files of schemathesis (.hypothesis, .schemathesis) stay in the directory of the test.
        done = subprocess.run(
            command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        found = json.loads(report.read_text())
        assert found["complete"], done.stdout
        assert found["operations"]["tested"] == operations, done.stdout
        assert not found["errors"], done.stdout
        return found

    return run


def configuration(words: dict[str, list[str]], places: dict[str, list[str]]) -> str:
    # Without this schemathesis would sign up and log in by itself, and no call would be anonymous.
    lines = ["[auth]", "auto-signup = false"]
    for name, values in {**words, **places}.items():
        lines += [f"[dictionaries.{name}]", f"values = {json.dumps(values)}"]
    lines += ["[parameters]"]
    lines += [f'"body.{name}" = {{ dictionary = "{name}", probability = 0.95 }}' for name in words if name != "roles"]
    lines += [f'"path.{name}" = {{ dictionary = "{name}", probability = 0.95 }}' for name in places]
    return "\n".join(lines)


def accepted(report: dict, operation: str) -> int:
    """How many generated calls of an operation succeeded."""
    return sum(phase["accepted"] for phase in report["valid_rates"].get(operation, {}).values())


def test_a_generator_of_right_and_wrong_requests_finds_no_5xx_and_no_undocumented_answer(explore, server):
    report = explore("all")
    assert not accepted(report, "GET /v1/me"), "the generator has no token"
    assert server.client.health() == "SERVING"


def test_a_generator_of_right_requests_gets_every_operation_to_answer_as_it_is_described(
    explore, server, known, pytestconfig
):
    person, _ = known
    operations = [(f"{route.method} {route.template}", route.template) for route in contract.routes()]
    ending = [place for path in ENDING for place in operations if place[1] == path]

    def called_by_a_fresh_session(places, *options: str):
        bearer = f"Bearer {server.client.login(person).access_token}"
        report = explore("positive", *options, operations=len(places), Authorization=bearer)
        never = {operation for operation, _ in places if not accepted(report, operation)}
        # A small number of examples may contain no successful call of some operations.
        most = 0 if pytestconfig.getoption("nightly") else len(places) // 2
        assert len(never) <= most, f"{never} were never answered 200: {report['valid_rates']}"

    apart = (*ENDING, *NEVER_DONE)
    others = [place for place in operations if place[1] not in apart]
    called_by_a_fresh_session(others, *(part for path in apart for part in ("--exclude-path", path)))
    for place in ending:
        called_by_a_fresh_session([place], "--include-path", place[1])
    assert server.client.login(person)
