"""The published keys, as the command line prints them."""

import json
from dataclasses import dataclass

from support import jose


def published_keys(server) -> list[dict]:
    """The JWK Set of a server's database."""
    listed = server.run("keys", "list")
    assert listed.returncode == 0, listed.stderr
    return json.loads(listed.stdout)["keys"]


def key_of(token: str, keys: list[dict]) -> dict:
    """The key that a token says it is signed with."""
    kid = jose.header_of(token)["kid"]
    [found] = [key for key in keys if key["kid"] == kid]
    return found


@dataclass(frozen=True)
class Key:
    """A signing key, as `postern keys list --states` prints it."""

    kid: str
    algorithm: str
    state: str
    # When it signs: RFC 3339, or `-` if that is not decided.
    time: str


def states(server) -> list[Key]:
    """The signing keys of a server's database, in the order in which they sign."""
    listed = server.run("keys", "list", "--states")
    assert listed.returncode == 0, listed.stderr
    return [Key(*line.split("\t")) for line in listed.stdout.splitlines()]
