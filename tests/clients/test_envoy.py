"""The REST gateway gives the same answers as a real Envoy with `grpc_json_transcoder` on the same descriptor.

It tests that the gateway reads `google.api.http` and proto3 JSON as other implementations do. Every RPC with a route
has rows of valid and invalid calls, and each call is sent to both servers. `DIFFERENT` lists the known differences with
Envoy's status and the reason; these calls are sent to both as well. Some rows run only in nightly runs.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from urllib.parse import urlencode

import pytest

from support import admin as administration
from support import contract, jose
from support.admin import AnyByRest, give_role
from support.client import Person
from support.envoy import Envoy, ThroughEnvoy
from support.http import Rest
from support.mail import CHANGE, RESET, VERIFY
from support.services import ServiceAccount

pytestmark = pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3}|\.\d{6}|\.\d{9})?Z")
UUID_V7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
JWT = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+")
CLIENT_SECRET = re.compile(r"postern_[\w-]{43}")


@pytest.fixture(scope="module")
def settings(mailbox):
    return {"mail_url": mailbox.url, "mail_limit_per_client": "0"}


class Somebody:
    """A user with a session, and a person without an account. A call that has effects gets new ones."""

    def __init__(self, server, mailbox):
        self.person, self.tokens = server.client.newcomer()
        self.stranger = Person()
        self.server = server
        self.mailbox = mailbox

    def mailed(self, kind: str) -> str:
        """A live token from a mail of this kind. A change of address is to that of `stranger`."""
        client = self.server.client
        if kind == RESET:
            client.request_password_reset(self.person.email)
        if kind == CHANGE:
            client.request_email_change(self.tokens.access_token, self.stranger.email, self.person.password)
        return self.mailbox.token(self.stranger.email if kind == CHANGE else self.person.email, kind)

    @property
    def id(self) -> str:
        return jose.claims_of(self.tokens.access_token)["sub"]

    @property
    def session_id(self) -> str:
        return jose.claims_of(self.tokens.access_token)["sid"]

    def as_admin(self) -> str:
        """The access token of an admin."""
        admin = Somebody(self.server, self.mailbox)
        give_role(self.server.engine, admin.id, "admin")
        return self.server.client.login(admin.person).access_token

    @cached_property
    def service(self) -> ServiceAccount:
        """A service account with a key."""
        way = AnyByRest(Rest(self.server))
        return ServiceAccount(way, administration.Somebody(way, self.server.engine, "admin"))

    def known_strings(self) -> dict[str, str]:
        people = {"person": self.person, "stranger": self.stranger}
        known = {getattr(who, name): f"<{name} of the {label}>" for label, who in people.items() for name in NAMES}
        return {**known, self.service.name: "<the name of the service>"}


NAMES = ("username", "email", "password")


@dataclass(frozen=True)
class Call:
    """A request to a route."""

    body: object = None
    token: str | None = None
    # The values of the path parameters.
    path: dict[str, str] = field(default_factory=dict)
    query: str = ""
    headers: dict = field(default_factory=dict)
    method: str | None = None
    suffix: str = ""


def text_of(body: dict) -> str:
    return json.dumps(body)


@dataclass(frozen=True)
class Row:
    rpc: str
    name: str
    status: int
    call: Callable[[Somebody], Call]

    def __str__(self) -> str:
        return f"{self.rpc}: {self.name}"

    def send(self, rest: Rest, somebody: Somebody):
        [route] = [route for route in contract.routes() if route.rpc == self.rpc]
        call = self.call(somebody)
        path = f"{route.template.format(**call.path)}{call.suffix}{call.query}"
        return rest.call(call.method or route.method, path, call.body, token=call.token, headers=call.headers)


SIGN_UP, LOGIN, REFRESH, LOGOUT, ME = (
    f"AuthService.{name}" for name in ("SignUp", "Login", "Refresh", "Logout", "GetMe")
)

VERIFY_EMAIL, RESEND, FORGOT, RESET_PASSWORD, CHANGE_PASSWORD, NEW_EMAIL, CONFIRM, NEW_NAME = (
    f"AccountService.{name}"
    for name in (
        "VerifyEmail",
        "ResendVerificationEmail",
        "RequestPasswordReset",
        "ResetPassword",
        "ChangePassword",
        "RequestEmailChange",
        "ConfirmEmailChange",
        "ChangeUsername",
    )
)
LIST_SESSIONS, REVOKE_SESSION, DELETE_ACCOUNT = (
    f"AccountService.{name}" for name in ("ListSessions", "RevokeSession", "DeleteAccount")
)
LIST_USERS, GET_USER, SET_ROLES, DISABLE, ENABLE, REVOKE_SESSIONS, DELETE_USER, AUDIT = (
    f"AdminService.{name}"
    for name in (
        "ListUsers",
        "GetUser",
        "SetUserRoles",
        "DisableUser",
        "EnableUser",
        "RevokeUserSessions",
        "DeleteUser",
        "ListAuditEvents",
    )
)
CREATE_SERVICE, LIST_SERVICES, GET_SERVICE, SERVICE_ROLES, DISABLE_SERVICE, ENABLE_SERVICE, DELETE_SERVICE = (
    f"AdminService.{name}"
    for name in (
        "CreateServiceAccount",
        "ListServiceAccounts",
        "GetServiceAccount",
        "SetServiceAccountRoles",
        "DisableServiceAccount",
        "EnableServiceAccount",
        "DeleteServiceAccount",
    )
)
CREATE_KEY, LIST_KEYS, DELETE_KEY = (
    f"AdminService.{name}" for name in ("CreateServiceKey", "ListServiceKeys", "DeleteServiceKey")
)
INTROSPECT, ISSUE, REVOKE_TOKEN = (
    f"TokenService.{name}" for name in ("IntrospectToken", "IssueServiceToken", "RevokeToken")
)
# These RPCs need an access token, and this one that of an admin.
AUTHENTICATED = (CHANGE_PASSWORD, NEW_EMAIL, NEW_NAME, DELETE_ACCOUNT, CREATE_SERVICE)
OF_ADMINS = (CREATE_SERVICE,)

# A valid body for each RPC that has one. The malformed rows below are made from it.
GOOD: dict[str, Callable[[Somebody], dict]] = {
    SIGN_UP: lambda s: {name: getattr(s.stranger, name) for name in NAMES},
    LOGIN: lambda s: {"email": s.person.email, "password": s.person.password},
    REFRESH: lambda s: {"refreshToken": s.tokens.refresh_token},
    LOGOUT: lambda s: {"refreshToken": s.tokens.refresh_token},
    VERIFY_EMAIL: lambda s: {"token": s.mailed(VERIFY)},
    RESEND: lambda s: {"email": s.person.email},
    FORGOT: lambda s: {"email": s.person.email},
    RESET_PASSWORD: lambda s: {"token": s.mailed(RESET), "newPassword": s.stranger.password},
    CHANGE_PASSWORD: lambda s: {"currentPassword": s.person.password, "newPassword": s.stranger.password},
    NEW_EMAIL: lambda s: {"newEmail": s.stranger.email, "password": s.person.password},
    CONFIRM: lambda s: {"token": s.mailed(CHANGE)},
    NEW_NAME: lambda s: {"newUsername": s.stranger.username, "password": s.person.password},
    DELETE_ACCOUNT: lambda s: {"password": s.person.password},
    CREATE_SERVICE: lambda s: {"name": s.stranger.username},
    INTROSPECT: lambda s: {"token": s.tokens.access_token},
    REVOKE_TOKEN: lambda s: {"token": s.tokens.access_token},
    ISSUE: lambda s: {"clientId": s.service.id, "clientSecret": s.service.secret},
}


def authorized(value: str) -> dict:
    return {"authorization": value}


def newcomer(somebody: Somebody) -> Person:
    return somebody.server.client.newcomer()[0]


def verified_email(somebody: Somebody) -> str:
    """The address of another account, which has verified it."""
    email = newcomer(somebody).email
    somebody.server.engine.execute("UPDATE users SET email_verified = true WHERE email = ?", email)
    return email


def ended(somebody: Somebody) -> str:
    """The access token of a session that was ended."""
    somebody.server.client.logout(somebody.tokens.refresh_token)
    return somebody.tokens.access_token


def used_up(somebody: Somebody) -> str:
    """A refresh token two rotations old."""
    client = somebody.server.client
    client.refresh(client.refresh(somebody.tokens.refresh_token).refresh_token)
    return somebody.tokens.refresh_token


UTF_8 = {"content-type": "application/json; charset=utf-8"}
PLAIN = {"content-type": "text/plain"}

# Each of these is made from the good call of every RPC with a body, and differs from it in one respect only.
WITH_A_BODY: dict[str, tuple[int, Callable[[dict], Call]]] = {
    "a good call": (200, Call),
    "a good call with a stale token": (200, lambda good: Call(good, token="stale")),
    "JSON with a charset": (200, lambda good: Call(good, headers=UTF_8)),
    "no body": (400, lambda good: Call()),
    "an empty body": (400, lambda good: Call(b"")),
    "an empty object": (400, lambda good: Call({})),
    "null": (400, lambda good: Call("null")),
    "an array": (400, lambda good: Call(f"[{text_of(good)}]")),
    "a string": (400, lambda good: Call('"text"')),
    "a number": (400, lambda good: Call("5")),
    "half an object": (400, lambda good: Call(text_of(good)[:-1])),
    "two documents": (400, lambda good: Call(f"{text_of(good)} {text_of(good)}")),
    "a byte order mark": (200, lambda good: Call(b"\xef\xbb\xbf" + text_of(good).encode())),
    "a comment": (400, lambda good: Call(f"{text_of(good)} // nothing")),
    "NaN": (400, lambda good: Call(text_of(good)[:-1] + ', "more": NaN}')),
    "invalid UTF-8": (400, lambda good: Call(text_of(good).encode()[:-2] + b'\xc3\x28"}')),
    "a lone surrogate": (400, lambda good: Call(text_of(good)[:-2] + '\\ud800"}')),
    "a number for a string": (400, lambda good: Call(dict.fromkeys(good, 5))),
    "a boolean for a string": (400, lambda good: Call(dict.fromkeys(good, True))),
    "an object for a string": (400, lambda good: Call(dict.fromkeys(good, {"a": "b"}))),
    "an array for a string": (400, lambda good: Call({name: [value] for name, value in good.items()})),
    "null for a string": (400, lambda good: Call(dict.fromkeys(good))),
    "depth 10,000": (400, lambda good: Call('{"a":' * 10_000 + "1" + "}" * 10_000)),
    "a body over 64 KiB": (413, lambda good: Call({**good, "padding": "x" * 65536})),
    "an unknown parameter": (400, lambda good: Call(good, query="?verbose=true")),
    "the fields in the query": (400, lambda good: Call({}, query=f"?{urlencode(good)}")),
    "another method": (405, lambda good: Call(good, method="PUT")),
    "an unknown field": (400, lambda good: Call({**good, "more": 1})),
    "a field given twice": (400, lambda good: Call(f"{text_of(good)[:-1]}, {text_of(good)[1:]}")),
    "a trailing comma": (400, lambda good: Call(text_of(good)[:-1] + ",}")),
    "single quotes": (400, lambda good: Call(text_of(good).replace('"', "'"))),
    "another content type": (415, lambda good: Call(good, headers=PLAIN)),
}


def made_by(somebody: Somebody, rpc: str, call: Call) -> Call:
    """The same call with the token that it needs, if it needs one."""
    if rpc not in AUTHENTICATED or call.token is not None:
        return call
    return replace(call, token=somebody.as_admin() if rpc in OF_ADMINS else somebody.tokens.access_token)


def good(rpc: str, **changes) -> Callable[[Somebody], Call]:
    """The good call of an RPC with these fields changed."""
    return lambda s: made_by(s, rpc, Call({**GOOD[rpc](s), **changes}))


def used(somebody: Somebody, rpc: str) -> dict:
    """Makes the good call of an RPC once, and returns its body to make it again."""
    call = GOOD[rpc](somebody)
    [route] = [route for route in contract.routes() if route.rpc == rpc]
    Rest(somebody.server).post(route.template, call).ok()
    return call


NOBODY = "01890000-0000-7000-8000-000000000000"
# The RPCs with which admins act on one account, each with the body of a good call.
ON_A_USER = {
    GET_USER: None,
    SET_ROLES: {"roles": ["billing"]},
    DISABLE: {},
    ENABLE: {},
    REVOKE_SESSIONS: {},
    DELETE_USER: None,
}


def on_user(somebody: Somebody, user_id: str, body: object) -> Call:
    return Call(body, somebody.as_admin(), {"user_id": user_id})


# The RPCs with which admins act on one service account, each with the body of a good call.
ON_A_SERVICE = {
    GET_SERVICE: None,
    SERVICE_ROLES: {"roles": ["billing"]},
    DISABLE_SERVICE: {},
    ENABLE_SERVICE: {},
    CREATE_KEY: {},
    LIST_KEYS: None,
    DELETE_KEY: None,
    DELETE_SERVICE: None,
}


def on_service(somebody: Somebody, service_id: str, body: object, **path: str) -> Call:
    of_key = {"key_id": somebody.service.key["id"], **path}
    return Call(body, somebody.as_admin(), {"service_account_id": service_id, **of_key})


def own_session(somebody: Somebody, session_id: str) -> Call:
    return Call(token=somebody.tokens.access_token, path={"session_id": session_id})


PAST, LATER = "2020-01-01T00:00:00Z", "2999-12-31T23:59:59.123456Z"

ROWS = [
    *(
        Row(rpc, name, status, lambda s, rpc=rpc, call=call: made_by(s, rpc, call(GOOD[rpc](s))))
        for rpc in GOOD
        for name, (status, call) in WITH_A_BODY.items()
        if not (rpc in AUTHENTICATED and name == "a good call with a stale token")
    ),
    Row(SIGN_UP, "a taken username", 409, lambda s: Call({**GOOD[SIGN_UP](s), "username": s.person.username})),
    Row(SIGN_UP, "a taken email", 409, lambda s: Call({**GOOD[SIGN_UP](s), "email": s.person.email})),
    Row(SIGN_UP, "a weak password", 400, lambda s: Call({**GOOD[SIGN_UP](s), "password": "password1"})),
    Row(SIGN_UP, "all fields wrong", 400, lambda s: Call({"username": "a b", "email": "a", "password": "x"})),
    Row(SIGN_UP, "text in any script", 400, lambda s: Call({**GOOD[SIGN_UP](s), "username": "grüß \U0001f9a6"})),
    Row(LOGIN, "a wrong password", 401, lambda s: Call({**GOOD[LOGIN](s), "password": s.stranger.password})),
    Row(LOGIN, "an unknown email", 401, lambda s: Call({**GOOD[LOGIN](s), "email": s.stranger.email})),
    Row(REFRESH, "the proto's spelling", 200, lambda s: Call({"refresh_token": s.tokens.refresh_token})),
    Row(REFRESH, "a token of another kind", 401, lambda s: Call({"refreshToken": s.tokens.access_token})),
    Row(REFRESH, "a used token", 401, lambda s: Call({"refreshToken": used_up(s)})),
    Row(LOGOUT, "everywhere", 200, lambda s: Call({**GOOD[LOGOUT](s), "everywhere": True})),
    Row(LOGOUT, "not everywhere, said so", 200, lambda s: Call({**GOOD[LOGOUT](s), "everywhere": False})),
    Row(LOGOUT, "everywhere as null", 200, lambda s: Call({**GOOD[LOGOUT](s), "everywhere": None})),
    Row(LOGOUT, "everywhere as a number", 400, lambda s: Call({**GOOD[LOGOUT](s), "everywhere": 1})),
    Row(LOGOUT, "everywhere as another word", 400, lambda s: Call({**GOOD[LOGOUT](s), "everywhere": "perhaps"})),
    Row(LOGOUT, "a boolean as text", 400, lambda s: Call({**GOOD[LOGOUT](s), "everywhere": "true"})),
    Row(LOGOUT, "nonsense", 401, lambda s: Call({"refreshToken": "nonsense"})),
    *(Row(rpc, "nonsense", 400, good(rpc, token="nonsense")) for rpc in (VERIFY_EMAIL, RESET_PASSWORD, CONFIRM)),
    *(
        Row(rpc, "a used token", 400, lambda s, rpc=rpc: Call(used(s, rpc)))
        for rpc in (VERIFY_EMAIL, RESET_PASSWORD, CONFIRM)
    ),
    *(Row(rpc, "an unknown email", 200, good(rpc, email="nobody@example.com")) for rpc in (RESEND, FORGOT)),
    *(Row(rpc, "no email", 400, good(rpc, email="nobody")) for rpc in (RESEND, FORGOT)),
    Row(RESET_PASSWORD, "a weak password", 400, good(RESET_PASSWORD, newPassword="password1")),
    Row(RESET_PASSWORD, "all fields empty", 400, good(RESET_PASSWORD, token="", newPassword="")),
    *(Row(rpc, "no token", 401, lambda s, rpc=rpc: Call(GOOD[rpc](s))) for rpc in AUTHENTICATED),
    *(Row(rpc, "an old token", 401, lambda s, rpc=rpc: Call(GOOD[rpc](s), token=ended(s))) for rpc in AUTHENTICATED),
    Row(CHANGE_PASSWORD, "a wrong password", 401, good(CHANGE_PASSWORD, currentPassword="Quiet-918273645-otter")),
    Row(CHANGE_PASSWORD, "a weak password", 400, good(CHANGE_PASSWORD, newPassword="password1")),
    Row(NEW_EMAIL, "a wrong password", 401, good(NEW_EMAIL, password="Quiet-918273645-otter")),
    Row(NEW_EMAIL, "no email", 400, good(NEW_EMAIL, newEmail="nobody")),
    Row(NEW_EMAIL, "a taken email", 409, lambda s: good(NEW_EMAIL, newEmail=verified_email(s))(s)),
    Row(NEW_NAME, "a wrong password", 401, good(NEW_NAME, password="Quiet-918273645-otter")),
    Row(NEW_NAME, "a reserved username", 400, good(NEW_NAME, newUsername="Admin")),
    Row(NEW_NAME, "a taken username", 409, lambda s: good(NEW_NAME, newUsername=newcomer(s).username)(s)),
    Row(NEW_EMAIL, "one's own email", 400, lambda s: good(NEW_EMAIL, newEmail=s.person.email)(s)),
    Row(DELETE_ACCOUNT, "a wrong password", 401, good(DELETE_ACCOUNT, password="Quiet-918273645-otter")),
    Row(LIST_SESSIONS, "a good call", 200, lambda s: Call(token=s.tokens.access_token)),
    Row(LIST_SESSIONS, "no token", 401, lambda s: Call()),
    Row(REVOKE_SESSION, "a good call", 200, lambda s: own_session(s, s.session_id)),
    Row(REVOKE_SESSION, "somebody else's", 404, lambda s: own_session(s, Somebody(s.server, s.mailbox).session_id)),
    Row(REVOKE_SESSION, "no id", 400, lambda s: own_session(s, "nonsense")),
    Row(LIST_USERS, "a good call", 200, lambda s: Call(token=s.as_admin(), query=f"?query={s.person.email}")),
    Row(LIST_USERS, "both spellings", 200, lambda s: Call(token=s.as_admin(), query=f"?page_size=1&query={s.id}")),
    Row(LIST_USERS, "a page size below 0", 400, lambda s: Call(token=s.as_admin(), query="?pageSize=-1")),
    Row(LIST_USERS, "a page size that is none", 400, lambda s: Call(token=s.as_admin(), query="?pageSize=many")),
    Row(LIST_USERS, "a page token that is none", 400, lambda s: Call(token=s.as_admin(), query="?pageToken=x")),
    Row(LIST_USERS, "no admin", 403, lambda s: Call(token=s.tokens.access_token)),
    Row(AUDIT, "a good call", 200, lambda s: Call(token=s.as_admin(), query=f"?userId={s.id}&action=sign_up")),
    Row(AUDIT, "an unknown action", 400, lambda s: Call(token=s.as_admin(), query="?action=nothing")),
    Row(AUDIT, "no admin", 403, lambda s: Call(token=s.tokens.access_token)),
    *(
        row
        for rpc, body in ON_A_USER.items()
        for row in (
            Row(rpc, "a good call", 200, lambda s, body=body: on_user(s, s.id, body)),
            Row(rpc, "an unknown id", 404, lambda s, body=body: on_user(s, NOBODY, body)),
            Row(rpc, "no id", 400, lambda s, body=body: on_user(s, "nonsense", body)),
            Row(rpc, "an id with a slash", 404, lambda s, body=body: on_user(s, "a/b", body)),
            Row(rpc, "no admin", 403, lambda s, body=body: Call(body, s.tokens.access_token, {"user_id": s.id})),
            Row(rpc, "no token", 401, lambda s, body=body: Call(body, None, {"user_id": s.id})),
        )
    ),
    Row(CREATE_SERVICE, "roles", 200, lambda s: good(CREATE_SERVICE, roles=["reader", "admin"])(s)),
    Row(CREATE_SERVICE, "a taken name", 409, lambda s: good(CREATE_SERVICE, name=s.service.name)(s)),
    Row(CREATE_SERVICE, "no name and no role", 400, good(CREATE_SERVICE, name="No Name", roles=["No Role"])),
    Row(LIST_SERVICES, "a good call", 200, lambda s: Call(token=s.as_admin(), query="?pageSize=1")),
    Row(LIST_SERVICES, "a page size below 0", 400, lambda s: Call(token=s.as_admin(), query="?pageSize=-1")),
    *(
        row
        for rpc, body in ON_A_SERVICE.items()
        for row in (
            Row(rpc, "a good call", 200, lambda s, body=body: on_service(s, s.service.id, body)),
            Row(rpc, "an unknown id", 404, lambda s, body=body: on_service(s, NOBODY, body)),
            Row(rpc, "no id", 400, lambda s, body=body: on_service(s, "nonsense", body)),
        )
    ),
    Row(CREATE_KEY, "a key that expires", 200, lambda s: on_service(s, s.service.id, {"expireTime": LATER})),
    Row(CREATE_KEY, "a time that is past", 400, lambda s: on_service(s, s.service.id, {"expireTime": PAST})),
    Row(CREATE_KEY, "a time that is none", 400, lambda s: on_service(s, s.service.id, {"expireTime": "later"})),
    Row(DELETE_KEY, "an unknown key", 404, lambda s: on_service(s, s.service.id, None, key_id=NOBODY)),
    Row(INTROSPECT, "a service's token", 200, lambda s: Call({"token": s.service.token()})),
    Row(INTROSPECT, "an old token", 200, lambda s: Call({"token": ended(s)})),
    Row(INTROSPECT, "nonsense", 200, lambda s: Call({"token": "nonsense"})),
    Row(REVOKE_TOKEN, "a service's token", 200, lambda s: Call({"token": s.service.token()})),
    Row(
        ISSUE,
        "the proto's spelling",
        200,
        lambda s: Call({"client_id": s.service.id, "client_secret": s.service.secret}),
    ),
    Row(ISSUE, "an unknown id", 401, good(ISSUE, clientId=NOBODY)),
    Row(ISSUE, "no id", 401, good(ISSUE, clientId="nonsense")),
    Row(ISSUE, "a wrong secret", 401, good(ISSUE, clientSecret="nonsense")),
    Row(SET_ROLES, "no role", 400, lambda s: on_user(s, s.id, {"roles": ["No Role"]})),
    Row(SET_ROLES, "a text for a list", 400, lambda s: on_user(s, s.id, {"roles": "admin"})),
    Row(DISABLE, "a reason", 200, lambda s: on_user(s, s.id, {"reason": "left"})),
    Row(ME, "a good call", 200, lambda s: Call(token=s.tokens.access_token)),
    Row(ME, "the scheme in capitals", 200, lambda s: Call(headers=authorized(f"BEARER {s.tokens.access_token}"))),
    Row(ME, "an empty query", 200, lambda s: Call(token=s.tokens.access_token, query="?")),
    Row(ME, "no token", 401, lambda s: Call()),
    Row(ME, "nonsense for a token", 401, lambda s: Call(token="nonsense")),
    Row(ME, "a refresh token", 401, lambda s: Call(token=s.tokens.refresh_token)),
    Row(ME, "another scheme", 401, lambda s: Call(headers=authorized("Basic YTpi"))),
    Row(ME, "an ended session", 401, lambda s: Call(token=ended(s))),
    Row(ME, "an unknown parameter", 400, lambda s: Call(token=s.tokens.access_token, query="?verbose=true")),
    Row(ME, "an unknown parameter and no token", 400, lambda s: Call(query="?verbose=true")),
    Row(ME, "an empty object for a body", 200, lambda s: Call({}, token=s.tokens.access_token)),
    Row(ME, "a body that is no JSON", 400, lambda s: Call(b"nonsense", token=s.tokens.access_token)),
    Row(ME, "a slash behind", 404, lambda s: Call(token=s.tokens.access_token, suffix="/")),
    Row(ME, "a path below", 404, lambda s: Call(token=s.tokens.access_token, suffix="/too")),
    Row(ME, "another method", 405, lambda s: Call({}, token=s.tokens.access_token, method="POST")),
]

# The rows that Envoy answers differently, by name, with Envoy's status and the reason why the gateway differs.
DIFFERENT: dict[str, tuple[int, str]] = {
    "an unknown field": (200, "Envoy always drops it, so a misspelt field would be lost without an error"),
    "a byte order mark": (400, "Envoy takes it for text before the JSON; a parser may skip it (RFC 8259 §8.1)"),
    "a field given twice": (200, "Envoy takes the last one, although another proxy may have checked the first"),
    "a trailing comma": (200, "Envoy's parser is lenient: this is not JSON (RFC 8259 §4)"),
    "single quotes": (200, "Envoy's parser is lenient: this is not JSON (RFC 8259 §7)"),
    "another content type": (200, "Envoy reads any body as JSON, so a form of another origin needs no preflight"),
    "a boolean as text": (200, 'Envoy reads "true"; in proto3 JSON a bool is true or false'),
    "a text for a list": (200, "Envoy reads one value as a list of one; in proto3 JSON a list is an array"),
    "the fields in the query": (
        200,
        'Envoy reads them; with `body: "*"` no field may be in the query (google/api/http.proto)',
    ),
    "another method": (404, "Envoy matches method and path together, so it never answers 405 (RFC 9110 §15.5.6)"),
    "a slash behind": (
        200,
        "Envoy ignores it; in Postern a variant of a path reaches no RPC (security.md, Authority)",
    ),
}


@pytest.fixture(scope="module")
def proxy(server, tmp_path_factory):
    """An Envoy in front of the shared server."""
    proxy = Envoy(server.address, tmp_path_factory.mktemp("envoy"))
    try:
        yield proxy.start()
    finally:
        proxy.close()


# One RPC has a row for every body in every run, the others only for these: the same code reads all bodies.
OF_EVERY_BODY = ("a good call", "an empty object", "an unknown field")
# `test_access_matrix` tests who may call each RPC, also through the gateway.
OF_AUTHORITY = ("no admin", "no token", "an old token")


def in_every_run(row: Row) -> bool:
    if row.name in WITH_A_BODY:
        return row.rpc == LOGIN or row.name in OF_EVERY_BODY
    if row.name in OF_AUTHORITY:
        return row.rpc in (ME, GET_USER, CHANGE_PASSWORD)
    return True


def as_parameter(row: Row):
    return pytest.param(row, id=str(row), marks=() if in_every_run(row) else pytest.mark.nightly)


@pytest.mark.parametrize("row", [as_parameter(row) for row in ROWS])
def test_the_gateway_and_envoy_answer_alike(server, mailbox, proxy, row):
    # Calls with effects cannot be made twice by the same person.
    somebody, somebody_else = Somebody(server, mailbox), Somebody(server, mailbox)
    ours = row.send(Rest(server), somebody)
    theirs = row.send(ThroughEnvoy(server, proxy), somebody_else)

    assert ours.status == row.status, ours.body[:500]
    if row.name in DIFFERENT:
        assert theirs.status == DIFFERENT[row.name][0], f"remove it from DIFFERENT, or correct it: {theirs.body[:500]}"
        return
    assert theirs.status == ours.status, f"Envoy: {theirs.body[:500]}, the gateway: {ours.body[:500]}"
    if ours.status == 200:
        assert shape(theirs.json(), somebody_else) == shape(ours.json(), somebody)
    elif theirs.header("content-type") == "application/json":
        # The error comes from the server and not from Envoy, so message and details must be the same.
        error, status = ours.json()["error"], in_json_names(theirs.json())
        assert (error["message"], error["details"]) == (status["message"], status.get("details", []))


def in_json_names(status: dict) -> dict:
    """A status whose violations have the JSON names of their fields. Envoy passes on the names of the message."""
    for violation in (violation for part in status.get("details", []) for violation in part.get("fieldViolations", [])):
        old, new = violation["field"], contract.json_name(violation["field"])
        described = f"{{}} {violation['description']}".format
        status["message"] = status["message"].replace(described(old), described(new), 1)
        violation["field"] = new
    return status


def test_who_am_i_is_the_same_to_the_letter_whatever_the_account_holds(server, mailbox, proxy):
    somebody = Somebody(server, mailbox)
    token = somebody.tokens.access_token
    second = 1_700_000_000 * 1_000_000
    # Whole seconds, milliseconds, microseconds; the epoch; the last second of the year 9999.
    for created, updated, verified in [
        (second, second + 500_000, False),
        (second + 120_000, second + 123_456, True),
        (0, 253_402_300_799_999_999, True),
    ]:
        server.engine.execute(
            "UPDATE users SET create_time = ?, update_time = ?, email_verified = ? WHERE email = ?",
            created, updated, verified, somebody.person.email,
        )  # fmt: skip
        ours = Rest(server).get("/v1/me", token=token).ok()
        theirs = ThroughEnvoy(server, proxy).get("/v1/me", token=token).ok()
        assert theirs == ours
        assert ours["user"]["emailVerified"] is verified
        assert TIME.fullmatch(ours["user"]["createTime"])


def test_every_rpc_with_a_route_has_rows_of_good_and_of_bad_calls(server):
    for route in contract.routes():
        statuses = {row.status for row in ROWS if row.rpc == route.rpc}
        assert 200 in statuses, f"{route} has no good call"
        assert statuses - {200}, f"{route} has no bad call"
    assert {row.rpc for row in ROWS} == {route.rpc for route in contract.routes()}


def test_every_known_difference_is_of_a_row_that_there_is(server):
    assert set(DIFFERENT) <= {row.name for row in ROWS}


def shape(value, somebody: Somebody):
    """A JSON value in which every value that differs between calls is replaced by its expected form."""
    match value:
        case dict():
            return {name: shape(member, somebody) for name, member in value.items()} | {
                name: "<a page token>" for name in ("nextPageToken",) if value.get(name)
            }
        case list():
            return [shape(member, somebody) for member in value]
        case str() if value in somebody.known_strings():
            return somebody.known_strings()[value]
        case str() if TIME.fullmatch(value):
            return "<a time>"
        case str() if UUID_V7.fullmatch(value):
            return "<an id>"
        case str() if CLIENT_SECRET.fullmatch(value):
            return "<a secret>"
        case str() if JWT.fullmatch(value) and value.startswith("ey"):
            return {"header": jose.header_of(value), "claims": sorted(jose.claims_of(value))}
        case _:
            return value
