"""A client of Postern as another team would write it, on grpcio and the generated stubs.

It sets deadlines, so that no call can hang a test. It remembers every secret that it has sent or received, so that
tests can search errors and logs for them. It checks nothing.
"""

import secrets
import uuid
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support import pb

SERVICE = f"{pb.PACKAGE}.AuthService"
ACCOUNT_SERVICE = f"{pb.PACKAGE}.AccountService"
ADMIN_SERVICE = f"{pb.PACKAGE}.AdminService"
TOKEN_SERVICE = f"{pb.PACKAGE}.TokenService"
# Longer than the server's deadline of ten seconds, so that a test sees the server's error and not the client's.
TIMEOUT = 15

CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
]


@dataclass(frozen=True)
class Person:
    """The name, address and password of a person who has not signed up yet."""

    username: str = field(default_factory=lambda: f"u{uuid.uuid4().hex[:16]}")
    email: str = field(default_factory=lambda: f"{uuid.uuid4().hex[:16]}@example.com")
    password: str = field(default_factory=lambda: f"Quiet-{secrets.token_hex(8)}-otter")


def service_of(method: str) -> str:
    """The full name of the service that has this method."""
    for service in (TOKEN_SERVICE, ADMIN_SERVICE, ACCOUNT_SERVICE, SERVICE):
        if method in pb.service(service.rpartition(".")[2]).methods_by_name:
            return service
    return SERVICE


class Client:
    """One connection to one replica."""

    def __init__(
        self,
        address: str,
        remembered: set[str] | None = None,
        channel_options=CHANNEL_OPTIONS,
        credentials: grpc.ChannelCredentials | None = None,
        **options,
    ):
        self.address = address
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options=channel_options, **options)
        else:
            self.channel = grpc.secure_channel(address, credentials, options=channel_options, **options)
        names = ("AuthService", "AccountService", "AdminService", "TokenService")
        self._stubs = [pb.stub(name, self.channel) for name in names]
        self._health = health_pb2_grpc.HealthStub(self.channel)
        self._remembered = remembered if remembered is not None else set()

    def close(self) -> None:
        self.channel.close()

    def call(self, method: str, request, token: str | None = None, metadata=(), timeout: float = TIMEOUT):
        """Calls an RPC by name; a failure carries the secrets that were sent, as `secrets`."""
        metadata = list(metadata)
        sent = pb.secrets_of(request)
        if token is not None:
            metadata.append(("authorization", f"Bearer {token}"))
            sent.append(token)
        self._remember(sent)
        try:
            reply = self._method(method)(request, metadata=metadata, timeout=timeout)
        except grpc.RpcError as error:
            error.secrets = sent
            raise
        received = pb.secrets_of(reply)
        self._remember(received)
        return reply

    def send_bytes(self, method: str, body: bytes, metadata=(), timeout: float = TIMEOUT) -> bytes:
        """Sends bytes unchanged to a path (with a leading slash) or a method. The default service is AuthService."""
        path = method if method.startswith("/") else f"/{service_of(method)}/{method}"
        call = self.channel.unary_unary(path, request_serializer=None, response_deserializer=None)
        return call(body, metadata=list(metadata), timeout=timeout)

    def sign_up(self, person: Person):
        request = pb.SignUpRequest(username=person.username, email=person.email, password=person.password)
        return self.call("SignUp", request).user

    def login(self, person: Person, metadata=()):
        """Logs in and returns the token pair."""
        request = pb.LoginRequest(email=person.email, password=person.password)
        return self.call("Login", request, metadata=metadata).tokens

    def newcomer(self):
        """Signs a new person up and logs them in. Returns the person and their tokens."""
        person = Person()
        self.sign_up(person)
        return person, self.login(person)

    def refresh(self, refresh_token: str):
        return self.call("Refresh", pb.RefreshRequest(refresh_token=refresh_token)).tokens

    def logout(self, refresh_token: str, everywhere: bool = False) -> None:
        self.call("Logout", pb.LogoutRequest(refresh_token=refresh_token, everywhere=everywhere))

    def me(self, access_token: str):
        return self.call("GetMe", pb.GetMeRequest(), token=access_token).user

    def verify_email(self, token: str, access_token: str | None = None):
        """Verifies an address. Without the access token of a session of the account, its sessions end."""
        return self.call("VerifyEmail", pb.VerifyEmailRequest(token=token), token=access_token).user

    def resend_verification(self, email: str) -> None:
        self.call("ResendVerificationEmail", pb.ResendVerificationEmailRequest(email=email))

    def request_password_reset(self, email: str) -> None:
        self.call("RequestPasswordReset", pb.RequestPasswordResetRequest(email=email))

    def reset_password(self, token: str, new_password: str) -> None:
        self.call("ResetPassword", pb.ResetPasswordRequest(token=token, new_password=new_password))

    def change_password(self, access_token: str, current_password: str, new_password: str):
        """Changes the password and returns the tokens of the new session."""
        request = pb.ChangePasswordRequest(current_password=current_password, new_password=new_password)
        return self.call("ChangePassword", request, token=access_token).tokens

    def request_email_change(self, access_token: str, new_email: str, password: str) -> None:
        request = pb.RequestEmailChangeRequest(new_email=new_email, password=password)
        self.call("RequestEmailChange", request, token=access_token)

    def confirm_email_change(self, token: str):
        return self.call("ConfirmEmailChange", pb.ConfirmEmailChangeRequest(token=token)).user

    def health(self, service: str = "") -> str:
        """The health of a service by name, such as `SERVING`."""
        reply = self._health.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)

    def watch_health(self, service: str = ""):
        """The stream of a service's health; the caller cancels it."""
        return self._health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=100)

    def _method(self, name: str):
        return next(getattr(stub, name) for stub in self._stubs if hasattr(stub, name))

    def _remember(self, values) -> None:
        # Shorter strings may be in a log line by chance.
        self._remembered.update(value for value in values if 20 <= len(value) <= 4096)
