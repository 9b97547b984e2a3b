"""Requests whose headers are too large: they are refused alone, and nobody else on their connection notices.

A proxy sends the calls of many clients on one connection of HTTP/2. Envoy passes 60 KiB of headers on by default, and
more where it is told to.
"""

import grpc
import pytest

from support import pb
from support.expect import failure_of
from support.h2c import H2c
from support.http import Rest
from support.http2 import Shared
from support.process import resident

pytestmark = pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")

CHECK = "/grpc.health.v1.Health/Check"
GET_ME = f"/{pb.PACKAGE}.AuthService/GetMe"
KIB = 1024
CLIENTS, CALLS = 12, 1_000
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


def one(size: int) -> dict[str, str]:
    return {"authorization": "Bearer " + "a" * (size - 512)}


def many(size: int) -> dict[str, str]:
    return {f"x-part-{number}": "b" * 4_000 for number in range(size // 4_100)}


def halves(size: int) -> dict[str, str]:
    return {f"x-half-{number}": "c" * (size // 2 - 200) for number in range(2)}


def tiny(size: int) -> dict[str, str]:
    """Headers that are 32 bytes more in the list than in a frame, and much more in memory."""
    return {f"x{number}": "" for number in range(size // 38)}


def make_calls(server, oversized) -> list[str]:
    """Makes the calls of all clients on one connection, and one oversized list in every 50. Returns what went wrong."""
    faults, large = [], {}
    with Shared(server.address) as connection:
        begun = 0
        for _ in range(CLIENTS):
            connection.begin(CHECK)
        while ended := connection.finished():
            for stream, answer in ended:
                size = large.pop(stream, None)
                expected = 0 if size is None else EXHAUSTED
                if answer.closed or answer.grpc_status != expected:
                    faults.append(f"{size or 'a neighbour'}: {answer}")
                if begun < CALLS and not answer.closed:
                    begun += 1
                    if oversized and begun % 50 == 0:
                        headers = oversized[begun // 50 % len(oversized)]
                        large[connection.begin(GET_ME, headers=headers)] = sum(map(len, (*headers, *headers.values())))
                        begun += 1
                    connection.begin(CHECK)
    assert begun >= CALLS or faults
    return faults


def test_no_neighbour_notices_headers_of_up_to_128_kib(server):
    shapes = [shape(size * KIB) for size in (17, 60, 64, 70, 96, 128) for shape in (one, many, halves, tiny)]
    assert make_calls(server, []) == []
    before = resident(server)
    assert make_calls(server, shapes) == []
    assert resident(server) - before < 10, "the memory comes back"


def test_longer_lists_still_cost_only_their_call(server):
    with Shared(server.address) as connection:
        connection.begin(GET_ME, headers=one(150 * KIB))
        ((_, answer),) = connection.finished()
        assert answer.headers[":status"] == "431", answer
        connection.begin(CHECK)
        ((_, answer),) = connection.finished()
        assert answer.grpc_status == 0


@pytest.mark.parametrize("size", [17, 40, 64])
def test_a_grpc_client_is_told_that_its_metadata_is_too_large(server, size):
    client = server.client
    error = failure_of(lambda: client.call("GetMe", pb.GetMeRequest(), metadata=[("x-long", "a" * size * KIB)]))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "16384 bytes" in error.details()
    assert client.health() == "SERVING"


@pytest.mark.parametrize("size", [17, 40, 64, 100])
@pytest.mark.parametrize("transport", [Rest, H2c])
def test_rest_says_so_in_its_own_form(server, transport, size):
    for address in ("http_addr", "ops_addr"):
        answer = transport(server, address).get("/v1/me", headers={"x-long": "a" * size * KIB})
        assert (answer.status, answer.header("content-type")) == (431, "application/json")
        error = answer.json()["error"]
        assert (error["code"], error["status"], error["details"]) == (431, "RESOURCE_EXHAUSTED", [])
        assert "16384 bytes" in error["message"]


def test_the_refusal_carries_the_id_of_the_request(server):
    headers = {"x-long": "a" * 20 * KIB, "x-request-id": "found-by-this"}
    assert Rest(server).get("/v1/me", headers=headers).header("x-request-id") == "found-by-this"


def test_a_long_path_is_refused_as_long_headers_are(server):
    for transport in (Rest, H2c):
        assert transport(server).get("/v1/me?x=" + "a" * 60 * KIB).status == 431
