"""Checks of gRPC errors: the code, the `google.rpc` details, and that they contain no secret."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from support import pb

DETAILS_KEY = "grpc-status-details-bin"
MACHINE_READABLE = re.compile("[A-Z]+(_[A-Z]+)*")
WAITING_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)


@dataclass(frozen=True)
class Refusal:
    """A failed call. Two are equal if a client could tell them apart only by their timing."""

    code: grpc.StatusCode
    message: str
    details: bytes
    initial_metadata_keys: tuple[str, ...]
    trailing_metadata_keys: tuple[str, ...]


def expect_error(
    call: Callable[[], object],
    code: grpc.StatusCode,
    reason: str | None = None,
    *,
    fields: set[str] | frozenset[str] = frozenset(),
) -> Refusal:
    """Asserts that `call` fails with exactly this code, reason and set of violated fields.

    Without a reason, it checks only the code and what holds for all errors.
    """
    return judge(failure_of(call), code, reason, fields=fields)


def judge(
    error: grpc.RpcError,
    code: grpc.StatusCode,
    reason: str | None = None,
    *,
    fields: set[str] | frozenset[str] = frozenset(),
) -> Refusal:
    """The same as `expect_error`, for an error that was already caught."""
    shown = f"{error.code()}: {error.details()!r}"
    assert error.code() is code, f"wanted {code.name} {reason or ''}, got {shown}"
    refusal, parts = _read(error)
    _contains_no_secret(error, refusal)
    if reason is None:
        return refusal

    assert reason in pb.error_reasons(), f"{reason} is not in the contract's ErrorReason"
    info = parts.get("ErrorInfo")
    assert info is not None, f"{shown} carries no google.rpc.ErrorInfo"
    assert (info.domain, info.reason) == (pb.PACKAGE, reason), shown
    assert error.details(), "an error has a message for people"

    violations = parts["BadRequest"].field_violations if "BadRequest" in parts else []
    assert {violation.field for violation in violations} == set(fields), f"{shown}: {violations}"
    assert all(MACHINE_READABLE.fullmatch(violation.reason) for violation in violations), f"a reason each: {violations}"
    assert all(violation.description for violation in violations), f"every violation has a description: {violations}"

    if code in WAITING_CODES:
        assert "RetryInfo" in parts, f"{shown} does not say when to come back"
        delay = parts["RetryInfo"].retry_delay
        assert delay.seconds + delay.nanos > 0, f"{shown} says to come back at once"
    return refusal


def expect_invalid(call: Callable[[], object], *fields: str) -> Refusal:
    """Asserts INVALID_ARGUMENT with INVALID_FIELD and exactly these fields."""
    return expect_error(call, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", fields=set(fields))


def expect_unauthenticated(call: Callable[[], object], reason: str) -> Refusal:
    """Asserts UNAUTHENTICATED with this reason."""
    return expect_error(call, grpc.StatusCode.UNAUTHENTICATED, reason)


def failure_of(call: Callable[[], object]) -> grpc.RpcError:
    """Makes a call that must fail, and returns its error."""
    try:
        reply = call()
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"the call was answered OK: {type(reply).__name__}")


def reason_of(error: grpc.RpcError) -> str | None:
    """The machine-readable reason of a failure, if it carries one."""
    info = _read(error)[1].get("ErrorInfo")
    return info.reason if info else None


def _read(error: grpc.RpcError) -> tuple[Refusal, dict]:
    trailing = error.trailing_metadata() or ()
    raw = b"".join(value for key, value in trailing if key == DETAILS_KEY)
    refusal = Refusal(
        code=error.code(),
        message=error.details() or "",
        details=raw,
        initial_metadata_keys=tuple(sorted(key for key, _ in error.initial_metadata() or ())),
        trailing_metadata_keys=tuple(sorted(key for key, _ in trailing)),
    )
    # from_call also checks that the details repeat the same code and message.
    status = rpc_status.from_call(error)
    parts = {}
    for detail in status.details if status else ():
        name = detail.TypeName().rpartition(".")[2]
        parts[name] = getattr(error_details_pb2, name)()
        assert detail.Unpack(parts[name]), f"a broken {name} in the details"
    return refusal, parts


def _contains_no_secret(error: grpc.RpcError, refusal: Refusal) -> None:
    for secret in getattr(error, "secrets", ()):
        if len(secret) < 8:
            continue
        assert secret not in refusal.message, "the message repeats a secret"
        assert secret.encode() not in refusal.details, "the details repeat a secret"
