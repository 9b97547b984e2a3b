"""`postern service`: how a service gets its credentials before any admin exists, and what an operator can do.

It tests the commands on both engines, that the secret alone is on standard output, and that a running server notices a
change. The same steps over the network are in `test_services`.
"""

import re
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from support import jose
from support.admin import any_way, command
from support.operators import Operator
from support.services import INVALID_CLIENT, introspect
from support.wait import wait_until

SECRET = re.compile(r"postern_[\w-]{43}\n", re.ASCII)
IDS = re.compile(r"client id: (?P<client_id>[\w-]{36})\nkey: (?P<key>[\w-]{36})\nexpires: (?P<expires>\S+)\n", re.ASCII)


class ServiceOperator(Operator):
    """An operator of `postern service`."""

    def __init__(self, binary, engine):
        tables = ("service_accounts", "service_keys", "audit_events", "revocations")
        super().__init__(binary, engine, "service", tables)

    def new_key(self, name: str, *arguments: str) -> tuple[str, dict[str, str]]:
        """The secret of a new key, and what is said of the key on standard error."""
        ended = self.run("key", "create", "--name", name, *arguments)
        assert ended.returncode == 0, ended.stderr
        assert SECRET.fullmatch(ended.stdout), "the secret and nothing else"
        said = IDS.search(ended.stderr)
        assert said, ended.stderr
        assert ended.stdout.strip() not in ended.stderr
        return ended.stdout.strip(), said.groupdict()


@pytest.fixture
def operator(binary, engine) -> ServiceOperator:
    return ServiceOperator(binary, engine)


def token_of(way, key: dict, secret: str) -> str:
    return way.ok("IssueServiceToken", client_id=key["client_id"], client_secret=secret)["accessToken"]


def test_a_service_gets_its_credentials_before_any_server_runs(operator, engine, start_server):
    [[client_id, name, roles, state]] = operator.rows("create", "--name", "billing-worker", "--role", "writer")
    assert (name, roles, state) == ("billing-worker", "writer", "enabled")
    secret, key = operator.new_key("billing-worker", "--description", "in the vault")
    assert (key["client_id"], key["expires"]) == (client_id, "never")

    with any_way("REST", start_server(engine)) as way:
        claims = jose.claims_of(token_of(way, key, secret))
        assert (claims["sub"], claims["sid"], claims["roles"]) == (client_id, key["key"], ["writer"])
    everything = engine.dump()
    assert "billing-worker" in everything
    assert secret not in everything


def test_an_operator_does_every_step_while_a_server_runs(operator, engine, start_server):
    [[client_id, *_]] = operator.rows("create", "--name", "worker")
    first, key = operator.new_key("worker")
    with any_way("gRPC", start_server(engine)) as way:
        token = token_of(way, key, first)
        assert operator.rows("set-roles", "--name", "worker", "--role", "b", "--role", "a") == [
            [client_id, "worker", "a,b", "enabled"]
        ]
        wait_until("the roles are known", lambda: introspect(way, token)["roles"] == ["a", "b"])
        assert operator.rows("set-roles", "--name", "worker") == [[client_id, "worker", "", "enabled"]]

        second, other = operator.new_key("worker", "--expires-in", "30d")
        assert other["expires"].endswith("Z")
        later = token_of(way, other, second)
        [[deleted, said]] = operator.rows("key", "delete", "--name", "worker", "--key", key["key"])
        assert (deleted, said) == (key["key"], "deleted")
        wait_until("the token of the deleted key is dead", lambda: not introspect(way, token)["active"])
        way.refused("IssueServiceToken", *INVALID_CLIENT, client_id=client_id, client_secret=first)
        assert introspect(way, later)["active"]

        assert operator.rows("disable", "--name", "worker", "--reason", "a leak")[0][3] == "disabled"
        wait_until("the token is dead", lambda: not introspect(way, later)["active"])
        assert operator.rows("enable", "--name", "worker")[0][3] == "enabled"
        last = token_of(way, other, second)
        wait_until("the service is known again", lambda: introspect(way, last)["active"])
        assert operator.rows("delete", "--name", "worker") == [[client_id, "worker", "", "deleted"]]
        wait_until("the token is dead for good", lambda: not introspect(way, last)["active"])
    assert operator.rows("list") == []
    rows = engine.query("SELECT action, actor_id, detail FROM audit_events ORDER BY create_time, id")
    assert [action for action, _, _ in rows] == [
        "service_created", "service_key_created", "roles_changed", "roles_changed", "service_key_created",
        "service_key_deleted", "service_disabled", "service_enabled", "service_deleted",
    ]  # fmt: skip
    assert {actor for _, actor, _ in rows} == {None}
    assert ("service_disabled", None, "a leak") in rows


def test_accounts_and_keys_are_listed(operator, engine, start_server):
    for name in ("b", "a"):
        operator.rows("create", "--name", name)
    assert [fields[1] for fields in operator.rows("list")] == ["b", "a"], "oldest first"
    assert operator.rows("key", "list", "--name", "a") == []
    secret, first = operator.new_key("a", "--description", "the first one")
    _, second = operator.new_key("a", "--expires-in", "1h")
    with any_way("gRPC", start_server(engine)) as way:
        token_of(way, first, secret)
    [of_first, of_second] = operator.rows("key", "list", "--name", "a")
    now, seconds = datetime.now(UTC), timedelta(seconds=1)
    created = datetime.fromisoformat(of_first[1])
    assert abs(now - created) < 120 * seconds
    used = datetime.fromisoformat(of_first[3])
    assert (used.minute, used.second) == (0, 0)
    assert (of_first[0], of_first[2], of_first[4]) == (first["key"], "never", "the first one")
    assert abs(datetime.fromisoformat(of_second[2]) - datetime.fromisoformat(of_second[1]) - 3600 * seconds) <= seconds
    assert (of_second[0], of_second[3:]) == (second["key"], ["never", ""])


def test_a_command_that_is_refused_changes_nothing(operator):
    operator.rows("create", "--name", "worker")
    _, key = operator.new_key("worker")
    for arguments, said in [
        (["create", "--name", "worker"], "another service account has this name"),
        (["create", "--name", "Worker"], "name must be a name such as billing-worker"),
        (["create", "--name", "other", "--role", "No"], "roles must each be a name"),
        (["create", "other"], "unexpected argument"),
        (["set-roles", "--name", "nobody"], "there is no such service account"),
        (["disable", "--name", "worker", "--reason", "x" * 501], "reason"),
        (["delete", "--name", "nobody"], "there is no such service account"),
        (["key", "create", "--name", "nobody"], "there is no such service account"),
        (["key", "create", "--name", "worker", "--expires-in", "soon"], "write it like 15m"),
        (["key", "create", "--name", "worker", "--expires-in", "0s"], "must be in the future"),
        (["key", "create", "--name", "worker", "--expires-in", "9999999y"], "is too far away"),
        (["key", "delete", "--name", "worker", "--key", str(uuid.uuid4())], "there is no such key"),
        (["key", "delete", "--name", "worker", "--key", "x"], "key must be an id"),
        (["key", "list"], "--name"),
    ]:
        assert said in operator.refused(*arguments), arguments
    assert [fields[0] for fields in operator.rows("key", "list", "--name", "worker")] == [key["key"]]


def test_a_list_reads_the_database_alone_and_creates_none(binary, embedded):
    ended = command(binary, embedded, "service", "list")
    assert ended.returncode != 0
    assert not embedded.data_directory.exists()
