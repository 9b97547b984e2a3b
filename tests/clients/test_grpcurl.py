"""Calls with grpcurl: reflection, health and the main use of Postern, without the proto files.

It tests what a person at a terminal sees first, with the real tool from `target/tools/bin` or the PATH. Both versions
of reflection are also called directly, because grpcurl uses whichever it finds.
"""

import json
import shutil
import subprocess

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from support import pb
from support.client import ACCOUNT_SERVICE, ADMIN_SERVICE, SERVICE, TIMEOUT, TOKEN_SERVICE, Person
from support.environment import own_environment
from support.expect import failure_of
from support.mail import RESET

CHECKS = "envoy.service.auth.v3.Authorization"
SERVICES = {SERVICE, ACCOUNT_SERVICE, ADMIN_SERVICE, TOKEN_SERVICE, "grpc.health.v1.Health", CHECKS}
RPCS = {
    SERVICE: {"SignUp", "Login", "Refresh", "Logout", "GetMe"},
    ACCOUNT_SERVICE: {
        "VerifyEmail",
        "ResendVerificationEmail",
        "RequestPasswordReset",
        "ResetPassword",
        "ChangePassword",
        "RequestEmailChange",
        "ConfirmEmailChange",
        "ChangeUsername",
        "ListSessions",
        "RevokeSession",
        "DeleteAccount",
    },
    ADMIN_SERVICE: {
        "ListUsers",
        "GetUser",
        "SetUserRoles",
        "DisableUser",
        "EnableUser",
        "RevokeUserSessions",
        "DeleteUser",
        "ListAuditEvents",
        "CreateServiceAccount",
        "ListServiceAccounts",
        "GetServiceAccount",
        "SetServiceAccountRoles",
        "DisableServiceAccount",
        "EnableServiceAccount",
        "DeleteServiceAccount",
        "CreateServiceKey",
        "ListServiceKeys",
        "DeleteServiceKey",
    },
    TOKEN_SERVICE: {"IntrospectToken", "IssueServiceToken", "RevokeToken", "WatchRevocations"},
}
STREAMED = {"WatchRevocations"}
SQLITE_ALONE = pytest.mark.parametrize("server", ["sqlite"], indirect=True)
ASK = reflection_pb2.ServerReflectionRequest
# grpcurl exits with 64 + the gRPC code.
UNAUTHENTICATED = 64 + 16
INVALID_ARGUMENT = 64 + 3


@pytest.fixture(scope="session")
def grpcurl_path(left_out) -> str:
    own = pb.REPOSITORY / "target/tools/bin/grpcurl"
    found = str(own) if own.exists() else shutil.which("grpcurl")
    return found or left_out("everything with grpcurl: install it with Go, see the README")


@pytest.fixture
def grpcurl(grpcurl_path, server):
    """Runs grpcurl against the shared server and checks its exit code."""

    def run(*arguments: str, data: dict | None = None, token: str | None = None, exit_code: int = 0) -> str:
        command = [grpcurl_path, "-plaintext", "-max-time", "15"]
        if token is not None:
            command += ["-H", f"authorization: Bearer {token}"]
        if data is not None:
            command += ["-d", json.dumps(data)]
        verb = [argument for argument in arguments if argument in ("list", "describe")]
        rest = [argument for argument in arguments if argument not in ("list", "describe")]
        if rest[:1] == ["-protoset"]:
            command += [rest.pop(0), rest.pop(0)]
        command += [server.address, *verb, *rest]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
        assert done.returncode == exit_code, f"exit code {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout if exit_code == 0 else done.stderr

    return run


def test_list_names_the_services(grpcurl):
    assert set(grpcurl("list").split()) >= SERVICES


@pytest.mark.parametrize("service", RPCS)
def test_list_of_a_service_names_its_rpcs(grpcurl, service):
    assert set(grpcurl("list", service).split()) == {f"{service}.{name}" for name in RPCS[service]}


@pytest.mark.parametrize("service", RPCS)
def test_describe_shows_the_contract(grpcurl, service):
    described = grpcurl("describe", service)
    for name in RPCS[service]:
        # grpcurl writes types with a leading dot.
        reply = f"{'stream ' if name in STREAMED else ''}.{pb.PACKAGE}.{name}Response"
        assert f"rpc {name} ( .{pb.PACKAGE}.{name}Request ) returns ( {reply} )" in described
    assert "string refresh_token" in grpcurl("describe", f"{pb.PACKAGE}.RefreshRequest")


@pytest.fixture
def descriptor_set(binary, tmp_path):
    """The file that `postern descriptor` prints."""
    printed = subprocess.run([binary, "descriptor"], env=own_environment(), capture_output=True, check=True)
    assert not printed.stderr
    file = tmp_path / "postern.binpb"
    file.write_bytes(printed.stdout)
    return file


@SQLITE_ALONE
def test_a_call_with_the_descriptor_set_that_the_binary_prints(grpcurl, descriptor_set):
    login = {"email": "nobody@example.com", "password": "wrong"}
    refused = grpcurl("-protoset", str(descriptor_set), f"{SERVICE}/Login", data=login, exit_code=UNAUTHENTICATED)
    assert "INVALID_CREDENTIALS" in refused
    described = grpcurl("-protoset", str(descriptor_set), "describe", f"{SERVICE}.GetMe")
    assert f"option (.{EXTENSION}) = ACCESS_AUTHENTICATED;" in described


def test_protoc_of_the_machine_generates_from_the_descriptor_set(descriptor_set, tmp_path, left_out):
    # Debian 12 has 3.21, which cannot read the option `debug_redact` in the files themselves.
    protoc = shutil.which("protoc") or left_out("protoc of the machine: run `scripts/tools protoc`")
    file = "postern/auth/v1/auth_service.proto"
    command = [protoc, f"--descriptor_set_in={descriptor_set}", f"--java_out={tmp_path}", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dev/postern/auth/v1/LoginRequest.java").exists()


EXTENSION = f"{pb.PACKAGE}.access"


@SQLITE_ALONE
def test_describe_shows_an_extension_and_the_options_that_it_makes(grpcurl):
    assert f"{EXTENSION} is an extension" in grpcurl("describe", EXTENSION)
    assert f"option (.{EXTENSION}) = ACCESS_AUTHENTICATED;" in grpcurl("describe", f"{SERVICE}.GetMe")


@pytest.fixture(params=["v1", "v1alpha"])
def reflect(request, client):
    """Asks the questions of one stream in one version of reflection, and returns the answers."""
    ask = client.channel.stream_stream(
        f"/grpc.reflection.{request.param}.ServerReflection/ServerReflectionInfo",
        request_serializer=ASK.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    return lambda *questions: list(ask(iter(questions), timeout=TIMEOUT))


@SQLITE_ALONE
def test_reflection_answers_in_both_versions(reflect):
    listed, file = reflect(ASK(list_services=""), ASK(file_containing_symbol=SERVICE, host="some.host"))
    versions = {f"grpc.reflection.{version}.ServerReflection" for version in ("v1", "v1alpha")}
    assert {service.name for service in listed.list_services_response.service} == SERVICES | versions
    assert file.file_descriptor_response.file_descriptor_proto
    assert file.valid_host == "some.host"
    assert file.original_request.file_containing_symbol == SERVICE


@SQLITE_ALONE
def test_what_reflection_does_not_find_is_an_error_response_and_the_stream_goes_on(reflect):
    unknown = {
        "file_by_filename": "nothing.proto",
        "file_containing_symbol": f"{pb.PACKAGE}.Nothing",
        "all_extension_numbers_of_type": f"{pb.PACKAGE}.Nothing",
        "file_containing_extension": reflection_pb2.ExtensionRequest(
            containing_type="google.protobuf.MethodOptions", extension_number=1
        ),
    }
    questions = [ASK(**{kind: name}) for kind, name in unknown.items()]
    *errors, empty, last = reflect(*questions, ASK(), ASK(file_containing_symbol=SERVICE))
    for error, question in zip(errors, questions, strict=True):
        assert error.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0], question
        assert error.error_response.error_message
        assert error.original_request == question
    assert empty.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert last.file_descriptor_response.file_descriptor_proto


@SQLITE_ALONE
def test_reflection_knows_extensions_and_every_kind_of_symbol(reflect):
    options = "google.protobuf.MethodOptions"
    (numbers,) = reflect(ASK(all_extension_numbers_of_type=options))
    found = numbers.all_extension_numbers_response
    assert found.base_type_name == options
    number = 458514432
    assert number in found.extension_number
    wanted = reflection_pb2.ExtensionRequest(containing_type=options, extension_number=number)
    names = [
        EXTENSION,
        f"{SERVICE}.GetMe",
        f"{pb.PACKAGE}.User",
        f"{pb.PACKAGE}.User.email_verified",
        f"{pb.PACKAGE}.ErrorReason",
        f"{pb.PACKAGE}.ERROR_REASON_INVALID_FIELD",
        "google.rpc.ErrorInfo",
        "google.protobuf.Timestamp.seconds",
    ]
    answers = reflect(ASK(file_containing_extension=wanted), *(ASK(file_containing_symbol=name) for name in names))
    for answer, name in zip(answers, ["the extension", *names], strict=True):
        assert answer.file_descriptor_response.file_descriptor_proto, name


@SQLITE_ALONE
def test_more_questions_than_a_stream_may_have_end_it(reflect):
    with pytest.raises(grpc.RpcError) as ended:
        reflect(*[ASK(file_containing_symbol="x" * 1_000)] * 5)
    assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_reflection_can_be_switched_off(embedded, start_server):
    server = start_server(embedded, reflection="false")
    for version in ("v1", "v1alpha"):
        path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
        error = failure_of(lambda path=path: server.client.send_bytes(path, b""))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert server.client.health() == "SERVING"


@pytest.mark.parametrize("service", ["", SERVICE, ACCOUNT_SERVICE, ADMIN_SERVICE, TOKEN_SERVICE, CHECKS])
def test_health_is_serving(grpcurl, service):
    answer = json.loads(grpcurl("grpc.health.v1.Health/Check", data={"service": service}))
    assert answer == {"status": "SERVING"}


@SQLITE_ALONE
def test_watching_an_unknown_service_says_so_and_stays_open(client):
    stub = health_pb2_grpc.HealthStub(client.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody.knows.Me"), timeout=1)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    with pytest.raises(grpc.RpcError) as ended:
        next(watch)
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED, "the stream was still open"
    error = failure_of(lambda: stub.Check(health_pb2.HealthCheckRequest(service="nobody.knows.Me"), timeout=TIMEOUT))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_a_whole_journey(grpcurl):
    person = Person()

    def call(method: str, data: dict | None = None, **options) -> dict:
        return json.loads(grpcurl(f"{SERVICE}/{method}", data=data or {}, **options))

    made = call("SignUp", {"username": person.username, "email": person.email, "password": person.password})["user"]
    assert made["username"] == person.username
    login = call("Login", {"email": person.email, "password": person.password})
    assert login["user"] == made
    assert call("GetMe", token=login["tokens"]["accessToken"])["user"] == made
    fresh = call("Refresh", {"refreshToken": login["tokens"]["refreshToken"]})["tokens"]
    assert call("GetMe", token=fresh["accessToken"])["user"] == made
    assert call("Logout", {"refreshToken": fresh["refreshToken"]}) == {}

    refused = grpcurl(f"{SERVICE}/GetMe", data={}, token=fresh["accessToken"], exit_code=UNAUTHENTICATED)
    assert "SESSION_REVOKED" in refused


def test_a_password_is_reset(embedded, start_server, start_mailbox, grpcurl_path):
    mailbox = start_mailbox()
    server = start_server(embedded, mail_url=mailbox.url)
    person, again = server.client.newcomer()[0], Person()

    def call(rpc: str, **data: str) -> str:
        command = [grpcurl_path, "-plaintext", "-max-time", "15", "-d", json.dumps(data), server.address]
        done = subprocess.run([*command, rpc], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert json.loads(call(f"{ACCOUNT_SERVICE}/RequestPasswordReset", email=person.email)) == {}
    token = mailbox.token(person.email, RESET)
    assert json.loads(call(f"{ACCOUNT_SERVICE}/ResetPassword", token=token, newPassword=again.password)) == {}
    assert json.loads(call(f"{SERVICE}/Login", email=person.email, password=again.password))["tokens"]


def test_an_error_shows_its_reason_and_fields_to_a_person(grpcurl):
    shown = grpcurl(f"{SERVICE}/SignUp", data={"username": "ada"}, exit_code=INVALID_ARGUMENT)
    assert "Code: InvalidArgument" in shown
    assert "INVALID_FIELD" in shown
    for name in ("email", "password"):
        assert f'"field": "{name}"' in shown
