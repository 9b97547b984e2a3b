"""Calls to any RPC over either transport, and SQL that makes a user an admin.

It depends on the templates of the routes and on two tables (`users`, `user_roles`), but not on what an RPC does.
"""

import re
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlencode

from support import contract, jose
from support.client import Person
from support.environment import own_environment
from support.http import Rest
from support.server import CHEAP_HASHES
from support.transports import ByGrpc, ByRest, Transport

TRANSPORTS = ("gRPC", "REST")
PARAMETER = re.compile(r"\{(\w+)\}")


class AnyByRest(ByRest):
    """REST calls that send fields in the path or in the query if the route requires it."""

    def _call(self, rpc: str, credential: str | None, fields: dict):
        [route] = [route for route in contract.routes() if route.rpc.endswith(f".{rpc}")]
        path, body = bind(route, fields)
        return self._rest.call(route.method, path, body, token=credential)


def bind(route: contract.Route, fields: dict) -> tuple[str, dict | None]:
    """The path with its query, and the body, for a call to a route. A missing path parameter becomes `-`."""
    named = {name: quote(str(fields.get(name, "-")), safe="") for name in PARAMETER.findall(route.template)}
    path, rest = route.template.format(**named), {name: value for name, value in fields.items() if name not in named}
    if route.method in ("PUT", "POST", "PATCH"):
        return path, rest
    return f"{path}?{urlencode(rest, doseq=True)}" if rest else path, None


@contextmanager
def any_way(name: str, server) -> Iterator[Transport]:
    """Calls to every service of a server, by gRPC or by REST."""
    if name == "REST":
        yield AnyByRest(Rest(server))
        return
    client = server.new_client()
    try:
        yield ByGrpc(client)
    finally:
        client.close()


class Somebody:
    """An account with a session, and with these roles in addition to `user`."""

    def __init__(self, way: Transport, engine=None, *roles: str):
        self.person = Person()
        self.user = way.sign_up(self.person)
        for role in roles:
            give_role(engine, self.id, role)
        self.tokens = way.login(self.person)

    @property
    def id(self) -> str:
        return self.user["id"]

    @property
    def email(self) -> str:
        return self.person.email

    @property
    def credential(self) -> str:
        return self.tokens["accessToken"]


def give_role(engine, user_id: str, role: str) -> None:
    """Writes to the database directly: running servers do not notice, but the next login has the role."""
    statement = "INSERT INTO user_roles (user_id, role) VALUES (?, ?)"
    assert engine.execute(statement, engine.as_id(uuid.UUID(user_id)), role) == 1


def only_admin(engine, user_id: str) -> None:
    """Takes the role from every other admin, so that this user is the only one left."""
    engine.execute("DELETE FROM user_roles WHERE role = 'admin' AND user_id <> ?", engine.as_id(uuid.UUID(user_id)))


def enabled_admins(engine) -> int:
    statement = (
        "SELECT count(*) FROM user_roles r JOIN users u ON u.id = r.user_id WHERE r.role = 'admin' AND NOT u.disabled"
    )
    return engine.query(statement)[0][0]


def session_id(tokens: dict) -> str:
    return jose.claims_of(tokens["accessToken"])["sid"]


def everything(way: Transport, rpc: str, credential: str, of: str, **fields) -> list[dict]:
    """The entries of all pages of a list."""
    return [entry for page in pages(way, rpc, credential, **fields) for entry in page.get(of, [])]


def pages(way: Transport, rpc: str, credential: str, **fields) -> Iterator[dict]:
    """All pages of a list. Each is fetched when the caller asks for it."""
    page_token = ""
    while True:
        page = way.ok(rpc, credential=credential, page_token=page_token, **fields)
        yield page
        page_token = page.get("nextPageToken", "")
        if not page_token:
            return


def command(binary: Path, engine, *arguments: str, stdin: str = "", **settings) -> subprocess.CompletedProcess:
    """Runs a command of the binary on a database, with this text as its standard input."""
    configured = {"log_format": "json", **CHEAP_HASHES, **engine.settings(), **settings}
    return subprocess.run(
        [binary, *arguments], env=own_environment(**configured), input=stdin, capture_output=True, text=True, timeout=60
    )
