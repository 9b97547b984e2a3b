"""The contract as a client sees it: stubs that are generated from `proto/` when the test session starts.

One process generates them (`generate`), and the workers of a parallel run load the result (`load`). Every message is an
attribute of this module (`pb.LoginRequest(email=…)`), in whichever file it is declared. `google/api` and
`google/protobuf` come from the published packages, which a client would have installed. One process cannot register
two files of the same name.
"""

import importlib
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from google.protobuf import descriptor_pool, message_factory
from grpc_tools import protoc

PACKAGE = "postern.auth.v1"
REPOSITORY = Path(__file__).resolve().parents[3]

_directory: tempfile.TemporaryDirectory | None = None
_grpc_modules = []


def generate() -> Path:
    """Generates the stubs into a directory of this session and returns that directory."""
    global _directory
    if _directory is not None:
        return Path(_directory.name)
    _directory = tempfile.TemporaryDirectory(prefix="postern-stubs-")
    out = Path(_directory.name)
    root = REPOSITORY / "proto"
    sources = _sources()
    if not sources:
        raise RuntimeError(f"no .proto files under {root / 'postern'}")
    well_known = files("grpc_tools") / "_proto"
    includes = [f"-I{root}", f"-I{REPOSITORY / 'third_party'}", f"-I{well_known}"]
    arguments = ["protoc", *includes, f"--python_out={out}", f"--grpc_python_out={out}", *sources]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc refused the contract; its message is above")
    return out


def load(directory: Path) -> None:
    """Imports all stubs from a directory that `generate` made."""
    if _grpc_modules:
        return
    sys.path.insert(0, str(directory))
    for source in _sources():
        name = source.removesuffix(".proto").replace("/", ".")
        importlib.import_module(f"{name}_pb2")
        _grpc_modules.append(importlib.import_module(f"{name}_pb2_grpc"))


def stub(service: str, channel):
    """The generated stub of a service, such as `AuthService`."""
    for module in _grpc_modules:
        if hasattr(module, f"{service}Stub"):
            return getattr(module, f"{service}Stub")(channel)
    raise LookupError(f"the contract has no service {service}")


def service(name: str):
    """The descriptor of a service: its methods, their messages and options."""
    return descriptor_pool.Default().FindServiceByName(f"{PACKAGE}.{name}")


def error_reasons() -> set[str]:
    """Every value of `ErrorReason`, as it is sent."""
    values = descriptor_pool.Default().FindEnumTypeByName(f"{PACKAGE}.ErrorReason").values_by_name
    return {name.removeprefix("ERROR_REASON_") for name in values} - {"UNSPECIFIED"}


def secrets_of(message) -> list[str]:
    """The values of every field that the contract marks `debug_redact`, at any depth. A stream is no message."""
    if not hasattr(message, "ListFields"):
        return []
    found = []
    for field, value in message.ListFields():
        if field.GetOptions().debug_redact:
            found.append(value)
        elif field.message_type and not field.is_repeated:
            found.extend(secrets_of(value))
    return found


def _sources() -> list[str]:
    """The files of the contract, as protoc names them."""
    root = REPOSITORY / "proto"
    return sorted(str(path.relative_to(root)) for path in (root / "postern").rglob("*.proto"))


def __getattr__(name: str):
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        found = descriptor_pool.Default().FindMessageTypeByName(f"{PACKAGE}.{name}")
    except KeyError:
        raise AttributeError(f"the contract has no message {name}") from None
    return message_factory.GetMessageClass(found)
