"""Errors: what a failed call to Postern says, and what a caller is told whom this service refuses.

Both directions have one type, :class:`PosternError`. It loses nothing that `docs/errors.md` promises; details of other
domains are dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

DOMAIN: Final = "postern.auth.v1"
DETAILS_KEY: Final = "grpc-status-details-bin"


class Reason:
    """The reasons that this version knows. They are strings: a newer server may send others."""

    INVALID_FIELD: Final = "INVALID_FIELD"
    EMAIL_TAKEN: Final = "EMAIL_TAKEN"
    USERNAME_TAKEN: Final = "USERNAME_TAKEN"
    INVALID_CREDENTIALS: Final = "INVALID_CREDENTIALS"
    TOKEN_MISSING: Final = "TOKEN_MISSING"
    TOKEN_INVALID: Final = "TOKEN_INVALID"
    TOKEN_EXPIRED: Final = "TOKEN_EXPIRED"
    SESSION_REVOKED: Final = "SESSION_REVOKED"
    REFRESH_TOKEN_INVALID: Final = "REFRESH_TOKEN_INVALID"
    EMAIL_NOT_VERIFIED: Final = "EMAIL_NOT_VERIFIED"
    ONE_TIME_TOKEN_INVALID: Final = "ONE_TIME_TOKEN_INVALID"
    ROLE_REQUIRED: Final = "ROLE_REQUIRED"
    LAST_ADMIN: Final = "LAST_ADMIN"
    NOT_FOUND: Final = "NOT_FOUND"
    THROTTLED: Final = "THROTTLED"
    OVERLOADED: Final = "OVERLOADED"
    STORE_UNAVAILABLE: Final = "STORE_UNAVAILABLE"
    USER_REQUIRED: Final = "USER_REQUIRED"
    SERVICE_REQUIRED: Final = "SERVICE_REQUIRED"
    INVALID_CLIENT: Final = "INVALID_CLIENT"
    CURSOR_EXPIRED: Final = "CURSOR_EXPIRED"


@dataclass(frozen=True)
class FieldViolation:
    """A refused field: its path in the request, why for programs (`TOO_SHORT`; docs/errors.md), and why for people."""

    field: str
    reason: str
    description: str


class PosternError(Exception):
    """A failed call, or a refused caller.

    `code` is the gRPC code. `reason` is one of :class:`Reason`, or one that this version does not know, or empty: then
    decide by the code. `message` is for people. `retry_delay` says after how many seconds the call can succeed.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        field_violations: Sequence[FieldViolation] = (),
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(code, reason, message)
        self.code, self.reason, self.message = code, reason, message
        self.field_violations, self.retry_delay = tuple(field_violations), retry_delay

    def __str__(self) -> str:
        return f"{self.code.name}{f' ({self.reason})' if self.reason else ''}: {self.message}"

    @classmethod
    def from_rpc(cls, failure: grpc.RpcError) -> "PosternError":
        """Reads a failed call of a sync or an asyncio stub. Details that cannot be read are ignored."""
        call: Any = failure
        code = call.code() if hasattr(call, "code") else grpc.StatusCode.UNKNOWN
        message = (call.details() if hasattr(call, "details") else None) or ""
        trailers = (call.trailing_metadata() if hasattr(call, "trailing_metadata") else None) or ()
        info, request, retry, status = ErrorInfo(), BadRequest(), RetryInfo(), Status()
        try:
            for key, value in trailers:
                if key == DETAILS_KEY:
                    status.ParseFromString(value)
            for detail in status.details:
                for known in (info, request, retry):
                    detail.Unpack(known)
        except DecodeError:
            pass
        return cls(
            code,
            info.reason if info.domain == DOMAIN else "",
            message,
            field_violations=[
                FieldViolation(each.field, each.reason, each.description) for each in request.field_violations
            ],
            retry_delay=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
        )

    def status(self) -> Status:
        """The same as a `google.rpc.Status`, for the answer of a server."""
        status = Status(code=self.code.value[0], message=self.message)
        if self.reason:
            status.details.add().Pack(ErrorInfo(reason=self.reason, domain=DOMAIN))
        if self.retry_delay is not None:
            retry = RetryInfo()
            retry.retry_delay.FromNanoseconds(int(self.retry_delay * 1e9))
            status.details.add().Pack(retry)
        return status


def unauthenticated(reason: str) -> PosternError:
    """The refusal of a caller whose token is missing or not accepted."""
    return PosternError(grpc.StatusCode.UNAUTHENTICATED, reason, _MESSAGES[reason])


def permission_denied(reason: str) -> PosternError:
    """The refusal of a caller who is known and may not do this."""
    return PosternError(grpc.StatusCode.PERMISSION_DENIED, reason, _MESSAGES[reason])


def unavailable(message: str) -> PosternError:
    """The refusal of a caller about whom nobody can decide now."""
    return PosternError(grpc.StatusCode.UNAVAILABLE, Reason.STORE_UNAVAILABLE, message, retry_delay=1.0)


_MESSAGES = {
    Reason.TOKEN_MISSING: "this call needs an access token",
    Reason.TOKEN_INVALID: "the access token is invalid",
    Reason.TOKEN_EXPIRED: "the access token has expired",
    Reason.SESSION_REVOKED: "the session has ended",
    Reason.REFRESH_TOKEN_INVALID: "there is no refresh token: log in",
    Reason.ROLE_REQUIRED: "the caller lacks the role that this call needs",
    Reason.USER_REQUIRED: "this call is for people, and the token is that of a service",
    Reason.SERVICE_REQUIRED: "this call is for services, and the token is that of a person",
    Reason.EMAIL_NOT_VERIFIED: "the email address is not verified",
}
