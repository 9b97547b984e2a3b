"""What a method demands of its callers, and whether one meets it. gRPC and HTTP decide here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ._waiting import Steps
from .caller import Caller
from .errors import PosternError, Reason, permission_denied, unauthenticated
from .verifier import Verifier


@dataclass(frozen=True)
class Demand:
    """What a method demands. Make one with the class methods."""

    kind: Literal["public", "authenticated", "user", "service"]
    role: str | None = None
    verified_email: bool = False

    @classmethod
    def public(cls) -> "Demand":
        """Everybody may call. A token is ignored, whether it is valid or not."""
        return cls("public")

    @classmethod
    def authenticated(cls, *, role: str | None = None, verified_email: bool = False) -> "Demand":
        """A person or a service with a valid token. With `verified_email`, only a person can meet it."""
        return cls("authenticated", role, verified_email)

    @classmethod
    def user(cls, *, role: str | None = None, verified_email: bool = False) -> "Demand":
        """A person with a valid token."""
        return cls("user", role, verified_email)

    @classmethod
    def service(cls, *, role: str | None = None) -> "Demand":
        """A service with a valid token."""
        return cls("service", role)

    def refusal(self, caller: Caller) -> PosternError | None:
        """Why the caller does not meet it, in this order: the kind, the role, the address."""
        if self.kind in ("user", "service") and caller.subject_type != self.kind:
            return permission_denied(Reason.USER_REQUIRED if self.kind == "user" else Reason.SERVICE_REQUIRED)
        if self.role is not None and not caller.has_role(self.role):
            return permission_denied(Reason.ROLE_REQUIRED)
        if self.verified_email and not caller.email_verified:
            return permission_denied(Reason.EMAIL_NOT_VERIFIED)
        return None


def authorize(verifier: Verifier, demand: Demand | None, authorization: Sequence[str]) -> Steps[Caller | None]:
    """The caller, or `None` if the method is public. Raises :class:`PosternError`.

    `authorization` are all values of that header. A method without a demand is refused to everybody.
    """
    if demand is None:
        raise permission_denied(Reason.ROLE_REQUIRED)
    if demand.kind == "public":
        return None
    caller = yield from verifier.steps(bearer_token(authorization))
    if refusal := demand.refusal(caller):
        raise refusal
    return caller


def bearer_token(authorization: Sequence[str]) -> str:
    """The token of the one `Bearer` value. Raises TOKEN_MISSING or TOKEN_INVALID.

    The scheme is read in any case. Another scheme counts as no token, and two values are invalid.
    """
    if len(authorization) > 1:
        raise unauthenticated(Reason.TOKEN_INVALID)
    scheme, _, token = (authorization[0] if authorization else "").partition(" ")
    if scheme.lower() != "bearer":
        raise unauthenticated(Reason.TOKEN_MISSING)
    return token.lstrip(" ")
