from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, Help, RetryInfo
from google.rpc.status_pb2 import Status
from postern.auth.v1.auth_service_pb2 import LoginRequest, SignUpRequest
from postern.auth.v1.auth_service_pb2_grpc import AuthServiceStub
from postern.auth.v1.errors_pb2 import ErrorReason
from support import Stage

from postern_client import FieldViolation, PosternError, Reason, open_channel
from postern_client.errors import DETAILS_KEY


class Failure(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, trailers: Any = ()) -> None:
        super().__init__()
        self._code, self._trailers = code, trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "for people"

    def trailing_metadata(self) -> Any:
        return self._trailers


def failure(*details: Any) -> Failure:
    status = Status(code=3)
    for detail in details:
        status.details.add().Pack(detail)
    trailers = (("x-request-id", "1"), (DETAILS_KEY, status.SerializeToString()))
    return Failure(grpc.StatusCode.INVALID_ARGUMENT, trailers)


def test_every_detail_is_read() -> None:
    request = BadRequest(field_violations=[{"field": "email", "reason": "MALFORMED", "description": "is no address"}])
    retry = RetryInfo(retry_delay={"seconds": 2, "nanos": 500_000_000})
    info = ErrorInfo(reason="INVALID_FIELD", domain="postern.auth.v1")
    error = PosternError.from_rpc(failure(Help(), info, request, retry))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD)
    assert (error.message, error.retry_delay) == ("for people", 2.5)
    assert error.field_violations == (FieldViolation("email", "MALFORMED", "is no address"),)
    assert str(error) == "INVALID_ARGUMENT (INVALID_FIELD): for people"


def test_a_reason_of_the_future_is_kept_as_it_is() -> None:
    error = PosternError.from_rpc(failure(ErrorInfo(reason="PASSKEY_REQUIRED", domain="postern.auth.v1")))
    assert (error.reason, error.code, error.retry_delay) == ("PASSKEY_REQUIRED", grpc.StatusCode.INVALID_ARGUMENT, None)


@pytest.mark.parametrize(
    "trailers",
    [
        None,
        (),
        ((DETAILS_KEY, b"\xff\xff\xff"),),
        ((DETAILS_KEY, b""),),
        (
            (
                DETAILS_KEY,
                Status(details=[AnyMessage(type_url="x/google.rpc.ErrorInfo", value=b"\xff")]).SerializeToString(),
            ),
        ),
    ],
)
def test_without_details_that_can_be_read_the_code_remains(trailers: Any) -> None:
    error = PosternError.from_rpc(Failure(grpc.StatusCode.UNAVAILABLE, trailers))
    assert (error.code, error.reason, error.message) == (grpc.StatusCode.UNAVAILABLE, "", "for people")
    assert str(error) == "UNAVAILABLE: for people"


def test_a_reason_of_another_domain_and_an_error_without_anything_have_none() -> None:
    assert PosternError.from_rpc(failure(ErrorInfo(reason="TOKEN_INVALID", domain="example.com"))).reason == ""
    assert PosternError.from_rpc(grpc.RpcError()).code is grpc.StatusCode.UNKNOWN


def test_what_a_server_sends_is_what_a_client_reads() -> None:
    sent = PosternError(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", "for people", retry_delay=1.5)
    trailers = ((DETAILS_KEY, sent.status().SerializeToString()),)
    read = PosternError.from_rpc(Failure(grpc.StatusCode.UNAVAILABLE, trailers))
    assert (read.reason, read.retry_delay, read.message) == (sent.reason, sent.retry_delay, sent.message)


def test_the_constants_are_those_of_the_contract() -> None:
    contract = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118
    assert {value for name, value in vars(Reason).items() if name.isupper()} == contract


def test_errors_of_the_real_server_are_read(stage: Stage) -> None:
    with open_channel(stage.grpc_addr, None) as channel:
        stub = AuthServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.SignUp(SignUpRequest(username="-", email="ada", password="short"))
        error = PosternError.from_rpc(refused.value)
        assert error.reason == Reason.INVALID_FIELD
        assert {violation.field for violation in error.field_violations} == {"username", "email", "password"}
        with pytest.raises(grpc.RpcError) as refused:
            stub.Login(LoginRequest(email="nobody@example.com", password="not this one"))
        assert PosternError.from_rpc(refused.value).reason == Reason.INVALID_CREDENTIALS
