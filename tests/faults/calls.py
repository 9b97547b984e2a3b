"""The RPCs that the clients of the cluster make, on one channel to one replica or to all of them."""

import json
from enum import Enum

import grpc

from support import pb
from support.expect import reason_of

# Shorter than Postern's own deadline of 10 s, so that some calls are given up while Postern still works on them.
TIMEOUT = 5
PATIENT_TIMEOUT = 40

_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    # The default waits for up to two minutes before it tries a replica again that was away.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
# What gRPC itself offers to a client that wants to survive a restart: every replica in turn, those alone that report
# SERVING, and up to five attempts.
_PATIENCE = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": ""},
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


class Answer(Enum):
    """What a client knows after a call."""

    DONE = "done"
    # It was refused for want of room or time, and nothing was done.
    REFUSED = "refused"
    # It failed, and may have been done.
    DOUBT = "doubt"
    # Nothing came back, so that Postern may still be at it.
    SILENCE = "silence"
    # Any other error.
    ERROR = "error"


_ANSWERS = {
    grpc.StatusCode.UNAVAILABLE: Answer.DOUBT,
    grpc.StatusCode.DEADLINE_EXCEEDED: Answer.SILENCE,
    grpc.StatusCode.CANCELLED: Answer.SILENCE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Answer.REFUSED,
}


class Caller:
    """Calls to one replica, each tried once; or with `patient`, to several replicas as gRPC's retries do it."""

    def __init__(self, *addresses: str, patient: bool = False):
        options = list(_OPTIONS)
        if patient:
            # gRPC would make an `:authority` of the whole list, which HTTP does not allow.
            options += [("grpc.service_config", json.dumps(_PATIENCE)), ("grpc.default_authority", "postern")]
        else:
            options += [("grpc.enable_retries", 0)]
        self.patient = patient
        self._channel = grpc.insecure_channel(f"ipv4:{','.join(addresses)}", options=options)
        stubs = [pb.stub(name, self._channel) for name in ("AuthService", "AdminService", "TokenService")]
        self._methods = {}
        for name in ("SignUp", "Login", "Refresh", "Logout", "GetMe", "SetUserRoles", "GetUser", "IntrospectToken"):
            self._methods[name] = next(getattr(stub, name) for stub in stubs if hasattr(stub, name))

    def call(self, rpc: str, request, token: str | None = None, timeout: float | None = None):
        """Calls and returns the answer, what it says, and the reason of an error."""
        timeout = timeout or (PATIENT_TIMEOUT if self.patient else TIMEOUT)
        try:
            return Answer.DONE, self._methods[rpc](request, timeout=timeout, metadata=_metadata(token)), ""
        except grpc.RpcError as error:
            return judged(error)

    def begin(self, rpc: str, request, token: str | None = None) -> grpc.Future:
        """A call that the caller may cancel."""
        return self._methods[rpc].future(request, timeout=TIMEOUT, metadata=_metadata(token))

    def close(self) -> None:
        self._channel.close()


def judged(error: grpc.RpcError) -> tuple[Answer, None, str]:
    reason = reason_of(error) or error.code().name
    return _ANSWERS.get(error.code(), Answer.ERROR), None, reason


def _metadata(token: str | None) -> tuple:
    return () if token is None else (("authorization", f"Bearer {token}"),)
