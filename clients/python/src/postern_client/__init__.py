"""The client library of Postern: tokens for outgoing calls, and the check of incoming ones.

`postern_client.fastapi` is imported on its own, because it needs FastAPI. The generated stubs are in `postern.auth.v1`.
"""

from .asgi import AuthMiddleware
from .caller import Caller, current_caller, require_caller
from .credentials import AccessToken, MemoryStore, RefreshTokenStore, TokenSource, open_channel
from .demands import Demand
from .errors import FieldViolation, PosternError, Reason
from .feed import FeedStatus, RevocationFeed
from .incoming import AsyncAuthInterceptor, AuthInterceptor
from .keys import KeySet, discover_jwks_url
from .outgoing import BearerInterceptor, bearer_interceptors
from .revocations import RevocationState, WhenUnknown
from .verifier import RevocationCheck, Verifier

__all__ = [
    "AccessToken",
    "AsyncAuthInterceptor",
    "AuthInterceptor",
    "AuthMiddleware",
    "BearerInterceptor",
    "Caller",
    "Demand",
    "FeedStatus",
    "FieldViolation",
    "KeySet",
    "MemoryStore",
    "PosternError",
    "Reason",
    "RefreshTokenStore",
    "RevocationCheck",
    "RevocationFeed",
    "RevocationState",
    "TokenSource",
    "Verifier",
    "WhenUnknown",
    "bearer_interceptors",
    "current_caller",
    "discover_jwks_url",
    "open_channel",
    "require_caller",
]
