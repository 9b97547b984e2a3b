"""Access rules: every kind of caller calls every RPC of the descriptor, by gRPC and by REST.

It tests that the server enforces the `(access)` option of each RPC, that an RPC without one is found, and that no
variant of an RPC's path leads to it. What the RPCs do is tested in their own modules.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from support import contract, http2, pb
from support.admin import TRANSPORTS, AnyByRest, Somebody, bind
from support.client import Client, Person
from support.expect import reason_of
from support.http import Rest
from support.refusal import detail, expect_refusal
from support.services import ServiceAccount
from support.wait import wait_until

UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED.value[0]

NO_TOKEN = ("UNAUTHENTICATED", "TOKEN_MISSING")
NO_SENSE = ("UNAUTHENTICATED", "TOKEN_INVALID")
EXPIRED = ("UNAUTHENTICATED", "TOKEN_EXPIRED")
REVOKED = ("UNAUTHENTICATED", "SESSION_REVOKED")
NO_ROLE = ("PERMISSION_DENIED", "ROLE_REQUIRED")
NO_PERSON = ("PERMISSION_DENIED", "USER_REQUIRED")
NO_SERVICE = ("PERMISSION_DENIED", "SERVICE_REQUIRED")
ACCESS_REASONS = {reason for _, reason in (NO_TOKEN, NO_SENSE, EXPIRED, REVOKED, NO_ROLE, NO_PERSON, NO_SERVICE)}

# The callers that an RPC refuses if it requires a valid access token, each with its error. Other callers are let in.
WITHOUT_A_GOOD_TOKEN = {
    "anonymous": NO_TOKEN,
    "nonsense for a token": NO_SENSE,
    "a refresh token": NO_SENSE,
    "expired": EXPIRED,
    "revoked": REVOKED,
    "disabled": REVOKED,
    "deleted": REVOKED,
    "expired service": EXPIRED,
    "disabled service": REVOKED,
    "deleted service": REVOKED,
    "service with a deleted key": REVOKED,
}
# The first of these has a role that is named `service`, which makes no service of a person.
PEOPLE = ("user in the role service", "user", "demoted", "promoted", "admin")
SERVICES = ("service", "demoted service", "promoted service", "service with admin")
CALLERS = (*WITHOUT_A_GOOD_TOKEN, *PEOPLE, *SERVICES)
ADMINS = ("promoted", "admin", "promoted service", "service with admin")


def wanted(access: str, caller: str) -> tuple[str, str] | None:
    """The error that the contract requires for a caller, or `None` if the caller may call."""
    match access:
        case "ACCESS_PUBLIC":
            return None
        case "ACCESS_AUTHENTICATED":
            return WITHOUT_A_GOOD_TOKEN.get(caller, NO_PERSON if caller in SERVICES else None)
        case "ACCESS_SERVICE":
            return WITHOUT_A_GOOD_TOKEN.get(caller, None if caller in SERVICES else NO_SERVICE)
        case "ACCESS_ADMIN":
            return WITHOUT_A_GOOD_TOKEN.get(caller, None if caller in ADMINS else NO_ROLE)
        case _:
            return NO_ROLE


def access_of(method) -> str:
    """The name of the rule that an RPC declares."""
    declared = {option.name: (option, value) for option, value in method.GetOptions().ListFields()}
    if "access" not in declared:
        return "ACCESS_UNSPECIFIED"
    option, value = declared["access"]
    return option.enum_type.values_by_number[value].name


def method_of(rpc: str):
    service, _, name = rpc.partition("/")
    return descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]


def undeclared(rpcs) -> list[str]:
    return [rpc for rpc in rpcs if access_of(method_of(rpc)) == "ACCESS_UNSPECIFIED"]


# -- the table ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def credentials(server) -> dict[str, str | None]:
    """The access token of each caller, on the server as it is configured by default."""
    server.restart(service_token_ttl="1s")
    way = AnyByRest(Rest(server))
    stale_service = ServiceAccount(way, Somebody(way, server.engine, "admin")).token()
    server.restart(access_token_ttl="1s", service_token_ttl=None)
    stale = Somebody(AnyByRest(Rest(server)))
    server.restart(access_token_ttl=None)
    way = AnyByRest(Rest(server))
    admin = Somebody(way, server.engine, "admin")
    people = {name: Somebody(way, server.engine) for name in ("revoked", "disabled", "deleted", "user", "promoted")}
    people["user in the role service"] = Somebody(way, server.engine, "service")
    people["demoted"] = Somebody(way, server.engine, "admin")
    way.ok("Logout", refresh_token=people["revoked"].tokens["refreshToken"])
    way.ok("DisableUser", credential=admin.credential, user_id=people["disabled"].id)
    way.ok("DeleteUser", credential=admin.credential, user_id=people["deleted"].id)
    way.ok("SetUserRoles", credential=admin.credential, user_id=people["demoted"].id, roles=[])
    way.ok("SetUserRoles", credential=admin.credential, user_id=people["promoted"].id, roles=["admin"])
    tokens = {name: somebody.credential for name, somebody in people.items()}
    # The tokens are valid for one second, plus at most five seconds of leeway.
    for token in (stale_service, stale.credential):
        wait_until("the token expires", lambda token=token: is_expired(way, token), pause=0.2)
    return {
        **tokens,
        **service_tokens(way, admin),
        "expired service": stale_service,
        "anonymous": None,
        "nonsense for a token": "nonsense",
        "a refresh token": admin.tokens["refreshToken"],
        "expired": stale.credential,
        "admin": admin.credential,
    }


def service_tokens(way, admin: Somebody) -> dict[str, str]:
    """The access token of each service."""
    first_roles = {"demoted service": ["admin"], "service with admin": ["admin"]}
    names = ("disabled service", "deleted service", "service with a deleted key", *SERVICES)
    accounts = {name: ServiceAccount(way, admin, *first_roles.get(name, ())) for name in names}
    tokens = {name: account.token() for name, account in accounts.items()}
    accounts["disabled service"].change("DisableServiceAccount")
    accounts["deleted service"].change("DeleteServiceAccount")
    accounts["service with a deleted key"].delete_key()
    accounts["demoted service"].change("SetServiceAccountRoles", roles=[])
    accounts["promoted service"].change("SetServiceAccountRoles", roles=["admin"])
    return tokens


def is_expired(way, credential: str) -> bool:
    way.refused("GetMe", *EXPIRED, credential=credential)
    return True


@pytest.fixture
def own_client(server) -> Iterator[Client]:
    client = server.new_client()
    yield client
    client.close()


@dataclass(frozen=True)
class Outcome:
    """The result of a call as the caller sees it: the code, and the reason of an error."""

    code: str
    reason: str | None = None

    def refused_for_access(self) -> bool:
        return self.reason in ACCESS_REASONS or self.code in ("PERMISSION_DENIED", "UNIMPLEMENTED", "INTERNAL")


def by_grpc(client: Client, rpc: str, credential: str | None, fields: dict) -> Outcome:
    method = method_of(rpc)
    try:
        reply = client.call(method.name, getattr(pb, method.input_type.name)(**fields), token=credential)
        if method.server_streaming:
            next(iter(reply), None)
    except grpc.RpcError as error:
        return Outcome(error.code().name, reason_of(error))
    return Outcome("OK")


def by_rest(rest: Rest, rpc: str, credential: str | None, fields: dict) -> Outcome | None:
    """Returns `None` if the contract has no route for the RPC."""
    route = route_of(rpc)
    if route is None:
        return None
    path, body = bind(route, fields)
    answer = rest.call(route.method, path, body, token=credential)
    if answer.status == 200:
        return Outcome("OK")
    error = answer.json()["error"]
    return Outcome(error["status"], detail(error, "ErrorInfo").get("reason"))


def route_of(rpc: str) -> contract.Route | None:
    name = rpc.rpartition(".")[2].replace("/", ".")
    return next((route for route in contract.routes() if route.rpc == name), None)


@pytest.fixture
def call(request, server, own_client) -> Callable[[str, str | None, dict], Outcome | None]:
    if request.param == "REST":
        rest = Rest(server)
        return lambda rpc, credential, fields: by_rest(rest, rpc, credential, fields)
    return lambda rpc, credential, fields: by_grpc(own_client, rpc, credential, fields)


@pytest.mark.parametrize("call", TRANSPORTS, indirect=True)
@pytest.mark.parametrize("caller", CALLERS)
def test_every_rpc_treats_everybody_as_the_contract_says(call, credentials, caller):
    wrong = {}
    for rpc in contract.rpcs():
        refusal = wanted(access_of(method_of(rpc)), caller)
        # The request is empty, so that a call that is let in changes nothing.
        outcome = call(rpc, credentials[caller], {})
        if outcome is None:
            continue
        as_wanted = not outcome.refused_for_access() if refusal is None else outcome == Outcome(*refusal)
        if not as_wanted:
            wrong[rpc] = f"{outcome} and not {refusal or 'to be let in'}"
    assert not wrong, f"{caller}: {wrong}"


@pytest.mark.parametrize("call", TRANSPORTS, indirect=True)
@pytest.mark.parametrize("caller", CALLERS)
def test_who_is_refused_changes_nothing(server, call, credentials, caller):
    way = AnyByRest(Rest(server))
    victim, admin = Somebody(way, server.engine), Somebody(way, server.engine, "admin")
    calls = well_formed(victim, ServiceAccount(way, admin))
    before = state_of(server.engine)
    for rpc, fields in calls.items():
        refusal = wanted(access_of(method_of(rpc)), caller)
        if refusal is not None:
            assert call(rpc, credentials[caller], fields) == Outcome(*refusal), rpc
    assert state_of(server.engine) == before


def well_formed(victim: Somebody, service: ServiceAccount) -> dict[str, dict]:
    """Calls that would change something if an admin or the victim made them."""
    account, admin = f"{pb.PACKAGE}.AccountService", f"{pb.PACKAGE}.AdminService"
    password = {"password": victim.person.password}
    of_service = {"service_account_id": service.id}
    return {
        f"{account}/ChangePassword": {"current_password": password["password"], "new_password": Person().password},
        f"{account}/RequestEmailChange": {"new_email": Person().email, **password},
        f"{account}/ChangeUsername": {"new_username": Person().username, **password},
        f"{account}/DeleteAccount": password,
        f"{admin}/SetUserRoles": {"user_id": victim.id, "roles": ["admin"]},
        f"{admin}/DisableUser": {"user_id": victim.id, "reason": "none"},
        f"{admin}/EnableUser": {"user_id": victim.id},
        f"{admin}/RevokeUserSessions": {"user_id": victim.id},
        f"{admin}/DeleteUser": {"user_id": victim.id},
        f"{admin}/CreateServiceAccount": {"name": f"{service.name}-2", "roles": ["admin"]},
        f"{admin}/SetServiceAccountRoles": {**of_service, "roles": ["admin"]},
        f"{admin}/DisableServiceAccount": {**of_service, "reason": "none"},
        f"{admin}/EnableServiceAccount": of_service,
        f"{admin}/CreateServiceKey": {**of_service, "description": "none"},
        f"{admin}/DeleteServiceKey": {**of_service, "key_id": service.key["id"]},
        f"{admin}/DeleteServiceAccount": of_service,
    }


def state_of(engine) -> list[list[str]]:
    """Everything that an RPC could change, except the tables that sending mail also changes."""
    tables = (
        "users", "user_roles", "sessions", "audit_events", "revocations", "login_attempts", "service_accounts",
        "service_keys",
    )  # fmt: skip
    return [sorted(map(repr, engine.query(f"SELECT * FROM {table}"))) for table in tables]


# -- RPCs without a rule -------------------------------------------------------------------------------------------


def test_every_rpc_declares_who_may_call_it():
    assert not undeclared(contract.rpcs()), f"RPCs without option (access): {undeclared(contract.rpcs())}"


def test_an_rpc_without_a_rule_would_be_named():
    # Adds an RPC without a rule, to check that the test above would find it.
    file = descriptor_pb2.FileDescriptorProto(name="undeclared.proto", package="undeclared", syntax="proto3")
    file.message_type.add(name="Empty")
    empty = ".undeclared.Empty"
    file.service.add(name="Service").method.add(name="Call", input_type=empty, output_type=empty)
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    assert undeclared([*contract.rpcs(), "undeclared.Service/Call"]) == ["undeclared.Service/Call"]


def test_the_administration_is_for_admins_and_the_own_account_for_its_owner():
    rules = {rpc.rpartition(".")[2]: access_of(method_of(rpc)) for rpc in contract.rpcs()}
    assert {rule for rpc, rule in rules.items() if rpc.startswith("AdminService/")} == {"ACCESS_ADMIN"}
    authenticated = {rpc.rpartition("/")[2] for rpc, rule in rules.items() if rule == "ACCESS_AUTHENTICATED"}
    assert authenticated == {
        "GetMe", "ChangePassword", "RequestEmailChange", "ChangeUsername", "ListSessions", "RevokeSession",
        "DeleteAccount",
    }  # fmt: skip


# -- paths that are almost right -----------------------------------------------------------------------------------


def variants(path: str) -> list[str]:
    """Paths that a lenient server could treat as this one."""
    first, _, rest = path[1:].partition("/")
    parent, _, last = path.rpartition("/")
    return [
        path[1:],
        f"/{path}",
        f"{parent}//{last}",
        f"{path}/",
        f"{path}//",
        path.lower() if path != path.lower() else path.upper(),
        f"{parent}/{last.swapcase()}",
        f"/%{ord(first[0]):02x}{first[1:]}/{rest}",
        f"/{first}%2f{rest}",
        f"/{first}%2F{rest}",
        f"/./{first}/{rest}",
        f"/{first}/./{rest}",
        f"/nothing/../{first}/{rest}",
        f"{path}%00",
        f"{path}%20",
        f"{path};a=b",
        f"/{first}\\{rest}",
    ]


def test_no_variant_of_a_path_reaches_an_rpc(server, credentials):
    bearer = {"authorization": f"Bearer {credentials['admin']}"}
    reached = {}
    for rpc in contract.rpcs():
        for path in (*variants(f"/{rpc}"), f"/{rpc}/."):
            answer = http2.post(server.address, path, b"", bearer)
            # An RPC or its access check would answer with another code, about the token or a field.
            if answer.grpc_status not in (None, UNIMPLEMENTED) or answer.body:
                reached[path] = answer
    assert not reached, reached


def test_no_variant_of_a_path_has_an_effect(server, credentials):
    victim = Somebody(AnyByRest(Rest(server)))
    bearer = {"authorization": f"Bearer {credentials['admin']}"}
    message = pb.DeleteUserRequest(user_id=victim.id).SerializeToString()
    before = state_of(server.engine)
    for path in variants(f"/{pb.PACKAGE}.AdminService/DeleteUser"):
        for headers in ({}, bearer):
            assert http2.post(server.address, path, message, headers).grpc_status != 0, path
    assert state_of(server.engine) == before


def test_no_variant_of_a_route_reaches_an_rpc(server, credentials):
    rest, reached = Rest(server), {}
    before = state_of(server.engine)
    for route in contract.routes():
        path, body = bind(route, {})
        # A variant of an id is an id too, although an invalid one. So it does reach the RPC, and is skipped.
        beside = path.rpartition("/")[0] if route.template.endswith("}") else None
        for variant in variants(path)[1:]:
            if variant.rpartition("/")[0] == beside:
                continue
            answer = rest.call(route.method, variant, {} if body is not None else None, token=credentials["admin"])
            if answer.status not in (400, 404, 405) or reason_in(answer):
                reached[f"{route.method} {variant}"] = answer
    assert not reached, reached
    assert state_of(server.engine) == before


def reason_in(answer) -> str | None:
    """The reason of an error. Only RPCs give a reason; an unknown route does not."""
    return detail(answer.json()["error"], "ErrorInfo").get("reason") if answer.body else None


def test_who_is_anonymous_learns_no_more_of_a_route_by_another_method(server):
    for route in contract.routes():
        expect_refusal(Rest(server).call("PATCH", bind(route, {})[0]), 405)
