"""The functions of docs/errors.md are tested: the one in Python here, the others by the tests of each library."""

import re
import textwrap

import grpc
import pytest
from staging import ROOT
from support import pb
from support.client import Person

TESTED_IN = {
    "go": "clients/go/snippet_test.go",
    "java": "clients/java/src/test/java/dev/postern/client/ReasonTest.java",
    "rust": "clients/rust/tests/it/calls.rs",
    "typescript": "clients/typescript/tests/reason.test.ts",
}


def snippet(language: str) -> str:
    [found] = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs/errors.md").read_text(), re.MULTILINE | re.DOTALL)
    return found


@pytest.mark.parametrize("name", TESTED_IN)
def test_the_function_is_in_a_file_that_a_test_compiles(name):
    function = "".join(line for line in snippet(name).splitlines(True) if not line.startswith("import ")).strip()
    tested = (ROOT / TESTED_IN[name]).read_text()
    # In a class it is indented further.
    assert function in tested or textwrap.indent(function, "  ") in tested


def test_the_function_in_python_reads_the_reason_of_the_server(stage):
    names = {}
    exec(snippet("python"), names)
    login = pb.LoginRequest(email=Person().email, password="wrong")
    with pytest.raises(grpc.RpcError) as refused:
        stage.server.client.call("Login", login)
    assert names["reason_of"](refused.value) == "INVALID_CREDENTIALS"
    with grpc.insecure_channel("127.0.0.1:9") as channel, pytest.raises(grpc.RpcError) as unreachable:
        pb.stub("AuthService", channel).Login(login, timeout=5)
    assert names["reason_of"](unreachable.value) == ""
