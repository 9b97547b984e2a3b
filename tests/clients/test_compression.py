"""Requests that are compressed with gzip, as clients on grpc-go, grpc-java and grpc-core send them if told to."""

import gzip
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from support import pb
from support.client import Client, Person
from support.expect import expect_error, failure_of
from support.http2 import post
from support.process import cpu_seconds

pytestmark = pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")

LOGIN = f"/{pb.PACKAGE}.AuthService/Login"
MAX_MESSAGE = 64 * 1024
EXHAUSTED, INVALID, UNAUTHENTICATED, UNIMPLEMENTED = (
    getattr(grpc.StatusCode, name).value[0]
    for name in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNAUTHENTICATED", "UNIMPLEMENTED")
)


def compressed(server, message: bytes, encoding: str | None = "gzip", path: str = LOGIN):
    headers = {"grpc-encoding": encoding} if encoding else {}
    return post(server.address, path, message, headers, flag=1)


def login_of(length: int) -> bytes:
    """A message of Login of so many bytes, with a password that is too long for anything but this test."""
    empty = len(pb.LoginRequest(email="a@example.com", password="a" * 20_000).SerializeToString()) - 20_000
    return pb.LoginRequest(email="a@example.com", password="a" * (length - empty)).SerializeToString()


@pytest.fixture
def zipping(server):
    """A client that compresses everything."""
    client = Client(server.address, server.secrets, compression=grpc.Compression.Gzip)
    yield client
    client.close()


def test_a_client_that_compresses_makes_the_same_calls(zipping):
    person, tokens = zipping.newcomer()
    assert zipping.me(tokens.access_token).username == person.username
    assert zipping.refresh(tokens.refresh_token).access_token
    assert zipping.health() == "SERVING"
    expect_error(lambda: zipping.login(Person()), grpc.StatusCode.UNAUTHENTICATED, "INVALID_CREDENTIALS")


def test_streams_take_compressed_messages_too(zipping):
    watch = health_pb2_grpc.HealthStub(zipping.channel).Watch(health_pb2.HealthCheckRequest(), timeout=15)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    stub = reflection_pb2_grpc.ServerReflectionStub(zipping.channel)
    (answer,) = stub.ServerReflectionInfo(iter([question]), timeout=15)
    assert f"{pb.PACKAGE}.AuthService" in {service.name for service in answer.list_services_response.service}


def test_a_message_may_be_as_large_as_one_that_is_not_compressed(server):
    for length, code in ((MAX_MESSAGE, INVALID), (MAX_MESSAGE + 1, EXHAUSTED), (20 * MAX_MESSAGE, EXHAUSTED)):
        answer = compressed(server, gzip.compress(login_of(length)))
        assert answer.grpc_status == code, f"{length}: {answer}"


def test_a_bomb_costs_as_much_as_any_other_message(server):
    bomb = gzip.compress(bytes(60 * 2**20))
    assert len(bomb) < MAX_MESSAGE
    before = cpu_seconds(server)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(compressed(server, bomb))) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.grpc_status for answer in answers} == {EXHAUSTED}
    assert all("65536" in answer.headers["grpc-message"] for answer in answers)
    # 3 GB of zeros would take ten seconds and more.
    assert cpu_seconds(server) - before < 5


@pytest.mark.parametrize("encoding", ["deflate", "snappy", "br", "zstd", "GZIP", "gzip, gzip", "nonsense"])
def test_an_unknown_encoding_is_unimplemented_and_says_what_is_accepted(server, encoding):
    answer = compressed(server, b"x", encoding)
    assert answer.grpc_status == UNIMPLEMENTED
    assert set(answer.headers["grpc-accept-encoding"].split(",")) == {"gzip", "identity"}


@pytest.mark.parametrize(
    ("message", "encoding"),
    [
        (b"this is not gzip", "gzip"),
        (gzip.compress(login_of(200))[:-30], "gzip"),
        (gzip.compress(b"\xff\xff\xff"), "gzip"),
        (gzip.compress(login_of(200)), "identity"),
        (gzip.compress(login_of(200)), None),
        (b"", "gzip"),
    ],
    ids=["no gzip", "cut off", "no message", "identity", "no encoding", "empty"],
)
def test_what_cannot_be_decompressed_is_bad_input(server, message, encoding):
    answer = compressed(server, message, encoding)
    assert answer.grpc_status == INVALID, answer


def test_a_plain_message_of_a_client_that_could_compress_is_read(server):
    answer = post(server.address, LOGIN, login_of(200), {"grpc-encoding": "gzip"})
    assert answer.grpc_status == UNAUTHENTICATED, answer


def test_nothing_is_decompressed_for_a_caller_who_may_not_call(server, zipping):
    error = failure_of(lambda: zipping.me("nonsense"))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    path = f"/{pb.PACKAGE}.AdminService/ListUsers"
    assert compressed(server, gzip.compress(bytes(MAX_MESSAGE * 2)), path=path).grpc_status == UNAUTHENTICATED
