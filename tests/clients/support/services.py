"""Service accounts with their keys and tokens, made through the RPCs of an admin."""

import uuid

from support.admin import Somebody
from support.transports import Transport

INVALID_CLIENT = ("UNAUTHENTICATED", "INVALID_CLIENT")


class ServiceAccount:
    """A service account with these roles and one key."""

    def __init__(self, way: Transport, admin: Somebody, *roles: str):
        self.way, self.admin = way, admin
        name = f"s{uuid.uuid4().hex[:16]}"
        self.account = self.by_admin("CreateServiceAccount", name=name, roles=list(roles))["serviceAccount"]
        self.key, self.secret = self.new_key()

    @property
    def id(self) -> str:
        return self.account["id"]

    @property
    def name(self) -> str:
        return self.account["name"]

    def by_admin(self, rpc: str, **fields) -> dict:
        return self.way.ok(rpc, credential=self.admin.credential, **fields)

    def change(self, rpc: str, **fields) -> dict:
        """A call about this account, by the admin who made it."""
        return self.by_admin(rpc, service_account_id=self.id, **fields)

    def new_key(self, **fields) -> tuple[dict, str]:
        """A further key and its secret."""
        created = self.change("CreateServiceKey", **fields)
        return created["key"], created["clientSecret"]

    def delete_key(self, key: dict | None = None) -> None:
        self.change("DeleteServiceKey", key_id=(key or self.key)["id"])

    def listed_keys(self) -> list[dict]:
        return self.change("ListServiceKeys")["keys"]

    def token(self, secret: str | None = None, way: Transport | None = None) -> str:
        """An access token for a secret of this account."""
        credentials = {"client_id": self.id, "client_secret": secret or self.secret}
        return (way or self.way).ok("IssueServiceToken", **credentials)["accessToken"]


def introspect(way: Transport, token: str) -> dict:
    return way.ok("IntrospectToken", token=token)
