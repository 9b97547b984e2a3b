"""The published keys, as the command line prints them."""

import json

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
