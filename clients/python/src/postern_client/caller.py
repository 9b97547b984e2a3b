"""The caller whom a verified access token identifies, and where the code that serves a call finds it."""

from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Literal


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. A service has no `email` and no `email_verified`."""

    subject: str  #: `sub`: the id of the user or of the service account. Never reused.
    subject_type: Literal["user", "service"]
    client_id: str  #: `postern` for a person, else the id of the service account.
    session_id: str  #: `sid`: the id of the session, or of the key of the service account.
    token_id: str  #: `jti`
    username: str  #: As it was when the token was issued, like the address.
    email: str | None
    email_verified: bool | None
    roles: tuple[str, ...]  #: Those of the token, or what the stream of revocations has said since.
    expire_time: datetime  #: UTC, whole seconds.

    def has_role(self, role: str) -> bool:
        """Whether the caller has this role."""
        return role in self.roles


_current: ContextVar[Caller | None] = ContextVar("postern_caller", default=None)
set_current_caller = _current.set


def current_caller() -> Caller | None:
    """The caller of the call that is being served. `None` for a public method, and outside of a call."""
    return _current.get()


def require_caller() -> Caller:
    """The same, where the method demands a caller. Raises LookupError if there is none."""
    caller = _current.get()
    if caller is None:
        raise LookupError("no caller: the method is public, or is not served through the interceptor or the middleware")
    return caller
