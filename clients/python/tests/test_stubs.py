"""The generated stubs: whole, typed, and beside Google's own packages in one program."""

import importlib.metadata
import importlib.util
from pathlib import Path

from google.api import annotations_pb2, http_pb2
from google.rpc import error_details_pb2, status_pb2
from postern.auth.v1 import access_pb2, token_service_pb2
from postern.auth.v1.token_service_pb2 import IntrospectTokenRequest
from postern.auth.v1.token_service_pb2_grpc import TokenServiceStub
from support import Stage

from postern_client import open_channel

HERE = Path(__file__).parent


def test_stubs_and_googles_packages_live_in_one_program(stage: Stage) -> None:
    method = token_service_pb2.DESCRIPTOR.services_by_name["TokenService"].methods_by_name["IntrospectToken"]
    rule: http_pb2.HttpRule = method.GetOptions().Extensions[annotations_pb2.http]  # type: ignore[index]
    assert rule.post == "/v1/token/introspect"
    assert method.GetOptions().Extensions[access_pb2.access] == access_pb2.ACCESS_PUBLIC
    assert status_pb2.Status(details=[]).ByteSize() == 0
    assert error_details_pb2.ErrorInfo(reason="x").reason == "x"
    with open_channel(stage.grpc_addr, None) as channel:
        answer = TokenServiceStub(channel).IntrospectToken(IntrospectTokenRequest(token="x"))
    assert answer.active is False


def test_the_package_carries_a_stub_of_each_proto_file_and_its_types() -> None:
    files = {str(file) for file in importlib.metadata.files("postern-client") or ()}
    names = [path.stem for path in (HERE / "../../../proto/postern/auth/v1").glob("*.proto")]
    assert len(names) > 5
    for name in names:
        for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"):
            assert f"postern/auth/v1/{name}{end}" in files
    assert {"postern/auth/v1/py.typed", "postern_client/py.typed"} <= files
    assert not {file for file in files if file.startswith("google")}


def test_postern_is_a_namespace_that_others_can_add_to() -> None:
    for name in ("postern", "postern.auth"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is None
