"""Parts of the contract's descriptor that the stubs do not offer: the REST routes, and which fields are secret.

It reads every file of the contract, so that new services are included automatically.
"""

from dataclasses import dataclass
from functools import cache

from google.api import annotations_pb2
from google.protobuf import descriptor_pool

from support import pb

METHODS = ("get", "put", "post", "delete", "patch")


@dataclass(frozen=True)
class Route:
    """An RPC and its `google.api.http` rule, such as `AuthService.GetMe`, `GET`, `/v1/me`."""

    rpc: str
    method: str
    template: str


def source_files() -> list[str]:
    """The contract's files, as imports name them."""
    root = pb.REPOSITORY / "proto"
    return sorted(str(path.relative_to(root)) for path in (root / "postern").rglob("*.proto"))


@cache
def services() -> tuple[str, ...]:
    """The full name of every service."""
    return tuple(service.full_name for file in _files() for service in file.services_by_name.values())


@cache
def rpcs() -> tuple[str, ...]:
    """Every RPC, such as `postern.auth.v1.AuthService/GetMe`."""
    pool = descriptor_pool.Default()
    return tuple(f"{name}/{rpc.name}" for name in services() for rpc in pool.FindServiceByName(name).methods)


@cache
def routes() -> tuple[Route, ...]:
    """The REST route of every RPC that has one."""
    found = []
    for file in _files():
        for service in file.services_by_name.values():
            for rpc in service.methods:
                rule = rpc.GetOptions().Extensions[annotations_pb2.http]
                if method := rule.WhichOneof("pattern"):
                    found.append(Route(f"{service.name}.{rpc.name}", method.upper(), getattr(rule, method)))
    return tuple(found)


@cache
def _json_names() -> dict[str, str]:
    messages = (message for file in _files() for message in file.message_types_by_name.values())
    return {field.name: field.json_name for message in messages for field in message.fields}


def json_name(field: str) -> str:
    """A field as JSON spells it; a name that no message has stays as it is."""
    return _json_names().get(field, field)


@cache
def secret_names() -> frozenset[str]:
    """Both spellings of every field that is marked `debug_redact`."""
    fields = [field for file in _files() for message in file.message_types_by_name.values() for field in message.fields]
    return frozenset(
        name for field in fields if field.GetOptions().debug_redact for name in (field.name, field.json_name)
    )


def secrets_in(value, is_secret: bool = False) -> list[str]:
    """The secrets in a JSON value: every string and number in a secret field, at any depth."""
    match value:
        case dict():
            members = [(name in secret_names(), member) for name, member in value.items()]
            return [found for secret, member in members for found in secrets_in(member, is_secret or secret)]
        case list():
            return [found for member in value for found in secrets_in(member, is_secret)]
        case str() | int() | float() if is_secret and not isinstance(value, bool):
            return [str(value)]
        case _:
            return []


def _files():
    pb.generate()
    return [descriptor_pool.Default().FindFileByName(name) for name in source_files()]
