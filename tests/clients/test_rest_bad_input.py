"""Invalid HTTP requests: every request is answered with an error in JSON, and never with a 5xx.

After every test here the server must still serve and must have written nothing. The gateway refuses these requests
before it uses the database, so one engine is enough. The contents of fields are tested in `test_bad_input`, malformed
bytes and connections in `test_rest_wire`.
"""

import json
import shutil

import pytest

from support.client import Person
from support.h2c import H2c
from support.http import Curl, Rest, raw
from support.refusal import detail, expect_refusal

pytestmark = pytest.mark.parametrize("server", ["sqlite"], indirect=True, scope="module")

LOGIN = "/v1/auth/login"
POSTS = (
    "/v1/auth/signup", LOGIN, "/v1/auth/refresh", "/v1/auth/logout", "/v1/email/verify", "/v1/email/resend",
    "/v1/email/change", "/v1/password/forgot", "/v1/password/reset", "/v1/token/introspect", "/v1/token/service",
)  # fmt: skip
# The violated field if the body as a whole is invalid: the empty name.
BODY = {""}
SECRET = "Quiet-918273645546-otter"

NOT_JSON = {
    "half an object": b'{"email": "a@example.com"',
    "a trailing comma": b'{"email": "a@example.com",}',
    "single quotes": b"{'email': 'a@example.com'}",
    "two documents": b"{} {}",
    "NaN": b'{"email": NaN}',
    "a comment": b"{} // nothing",
    "a raw newline in a string": b'{"email": "a\n@example.com"}',
    "two byte order marks": b"\xef\xbb\xbf\xef\xbb\xbf{}",
    "a byte order mark alone": b"\xef\xbb\xbf",
    "a byte order mark inside": b'{"email": \xef\xbb\xbf"a@example.com"}',
    "UTF-16": "{}".encode("utf-16"),
    "invalid UTF-8": b'{"email": "\xc3\x28"}',
    "an overlong NUL": b'{"email": "\xc0\x80"}',
    "a surrogate in UTF-8": b'{"email": "\xed\xa0\x80"}',
    "a lone surrogate, escaped": b'{"email": "\\ud800"}',
    "depth 10,000 of arrays": b'{"email": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "depth 10,000 of objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "depth 10,000 that never ends": b"[" * 10_000,
    "a number beyond any range": b'{"email": 1e999999}',
    "a form": b"email=a%40example.com&password=x",
    "bytes": bytes(range(256)),
}

NO_OBJECT = ["null", "true", "5", '"text"', "[]", '[{"email": "a@example.com"}]']


@pytest.fixture
def rest(server):
    return Rest(server)


@pytest.mark.parametrize(
    "body",
    [{f"{number:x}": 1 for number in range(6_000)}, {f"{name}{'é' * 3_000}": 1 for name in "abcdefghij"}],
    ids=["thousands of fields", "long names"],
)
def test_an_answer_is_not_much_larger_than_its_request(rest, body):
    request = json.dumps(body, ensure_ascii=False).encode()
    answer = rest.post("/v1/auth/signup", request)
    assert answer.status == 400
    violations = detail(answer.json()["error"], "BadRequest")["fieldViolations"]
    assert 1 <= len(violations) <= 20, "an error names the first twenty"
    assert len(answer.body) <= len(request) + 8_192


@pytest.fixture(scope="session")
def curl(left_out) -> str:
    return shutil.which("curl") or left_out("everything with curl: run `scripts/tools curl`")


@pytest.fixture(autouse=True)
def unharmed(server):
    """Checks that the test has changed no table, and that the server still serves."""
    before = server.engine.dump()
    yield
    assert server.running
    assert Rest(server).get("/v1/me").status == 401, "the server still serves"
    assert server.client.health() == "SERVING"
    assert server.engine.dump() == before, "refused input was written"


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_a_body_that_is_not_json_is_refused_as_a_whole(rest, body):
    for path in POSTS:
        expect_refusal(rest.post(path, body), 400, "INVALID_FIELD", fields=BODY)


@pytest.mark.parametrize("body", NO_OBJECT)
def test_a_body_that_is_no_object_is_refused_as_a_whole(rest, body):
    for path in POSTS:
        expect_refusal(rest.post(path, body), 400, "INVALID_FIELD", fields=BODY)


def test_an_empty_body_is_an_empty_message(rest):
    for content in ({}, {"content-type": "text/plain"}, {"content-type": "application/json"}):
        answer = rest.post(LOGIN, b"", headers=content)
        expect_refusal(answer, 400, "INVALID_FIELD", fields={"email", "password"})
    expect_refusal(rest.post("/v1/auth/refresh"), 400, "INVALID_FIELD", fields={"refresh_token"})


@pytest.mark.parametrize(
    "value",
    [918273645546, -918273645546.5, 10**40, True, [SECRET], {"value": SECRET}, [[[SECRET]]]],
    ids=lambda value: type(value).__name__,
)
def test_a_value_of_the_wrong_type_is_named_and_never_repeated(rest, value):
    written = json.dumps(value)
    answers = [
        (rest.post(LOGIN, {"email": "ada@example.com", "password": value}), {"password"}),
        (rest.post("/v1/auth/refresh", {"refreshToken": value}), {"refreshToken"}),
        (rest.post("/v1/auth/refresh", {"refresh_token": value}), {"refresh_token"}),
        (rest.post("/v1/auth/signup", {"username": value, "email": value, "password": value}), None),
    ]
    for answer, fields in answers:
        expect_refusal(answer, 400, "INVALID_FIELD", fields=fields or {"username", "email", "password"})
        if len(written) >= 8:
            assert written not in answer.body.decode()
            assert SECRET not in answer.body.decode()


@pytest.mark.parametrize("value", ['"true"', '"yes"', "1", "0", "{}", "[true]", "1e300", "9" * 400])
def test_a_field_that_is_no_boolean_is_named(rest, value):
    answer = rest.post("/v1/auth/logout", f'{{"refreshToken": "{SECRET}", "everywhere": {value}}}')
    named = detail(answer.json()["error"], "BadRequest")["fieldViolations"][0].get("field", "")
    # If a number is too large to be parsed, the body as a whole is invalid.
    assert named == "everywhere" or (len(value) > 300 and named == "")
    expect_refusal(answer, 400, "INVALID_FIELD", fields={named})


def test_a_secret_is_not_repeated_where_the_rest_of_the_body_is_wrong(rest):
    for body in (
        f'{{"email": "a@example.com", "password": "{SECRET}"',
        f'{{"email": 5, "password": "{SECRET}"}}',
        f'{{"password": "{SECRET}", "password": "{SECRET}"}}',
        f'"{SECRET}"',
        f'["{SECRET}"]',
        f'{{"email": "a@example.com", "password": "{SECRET}", "else": 1}}',
        f'{{"email": "a@example.com", "password": "{SECRET}\\u0000"}}',
        f'{{"email": "{SECRET}", "password": "{SECRET}"}}',
    ):
        answer = rest.post(LOGIN, body)
        assert answer.status == 400
        assert SECRET not in answer.body.decode(), body
        assert SECRET not in str(answer.headers), body


@pytest.mark.parametrize(
    "name",
    ["passwort", "Email", "e_mail", "@type", "", "user.email", "é", "a" * 5000],
    ids=lambda name: ascii(name)[:24],
)
def test_an_unknown_field_is_named(rest, name):
    known = {"email": "a@example.com", "password": SECRET}
    expect_refusal(rest.post(LOGIN, {**known, name: "x"}), 400, "INVALID_FIELD", fields={name})
    nothing_else = rest.post("/v1/auth/logout", {name: {"a": [1]}})
    expect_refusal(nothing_else, 400, "INVALID_FIELD", fields={name})


def test_a_field_that_is_given_twice_is_refused(rest):
    for body in (
        '{"email": "a@example.com", "email": "b@example.com", "password": "x"}',
        '{"email": "a@example.com", "\\u0065mail": "b@example.com", "password": "x"}',
        '{"email": {"a": 1, "a": 1}, "password": "x"}',
    ):
        expect_refusal(rest.post(LOGIN, body), 400, "INVALID_FIELD", fields=BODY)
    for pair in ('"refresh_token": "a", "refreshToken": "b"', '"refreshToken": "a", "refresh_token": "a"'):
        for path in ("/v1/auth/refresh", "/v1/auth/logout"):
            error = expect_twice(rest.post(path, f"{{{pair}}}"))
            assert "twice" in error["message"]


def expect_twice(answer) -> dict:
    """Asserts a refusal that names the field. It may use either spelling of the name."""
    named = detail(answer.json()["error"], "BadRequest")["fieldViolations"][0]["field"]
    assert named in ("refresh_token", "refreshToken")
    return expect_refusal(answer, 400, "INVALID_FIELD", fields={named})


@pytest.mark.parametrize("character", ["\0", "\x1b", "\x7f", "\u202e"], ids=ascii)
def test_a_control_character_in_a_string_is_an_invalid_field(rest, character):
    person = Person()
    message = {
        "username": f"{person.username}{character}",
        "email": f"{character}{person.email}",
        "password": f"{person.password}{character}",
    }
    answer = rest.post("/v1/auth/signup", message)
    named = {violation["field"] for violation in detail(answer.json()["error"], "BadRequest")["fieldViolations"]}
    assert {"username", "email"} <= named
    expect_refusal(answer, 400, "INVALID_FIELD", fields=named)


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "text/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
     "application/grpc", "application/jsonx", "application/json+x", "json", "a" * 3000],
    ids=lambda value: str(value)[:24],
)  # fmt: skip
def test_a_body_of_another_content_type_is_415(rest, content_type):
    address = rest.address
    if content_type is None:
        request = f"POST {LOGIN} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{{}}"
        received = raw(address, request.encode()).received
        assert received.startswith(b"HTTP/1.1 415 ")
        assert received.endswith(b"}")
        return
    body = {"email": "a@example.com", "password": SECRET}
    expect_refusal(rest.post(LOGIN, body, headers={"content-type": content_type}), 415)


@pytest.mark.parametrize("content_type", ["application/json", "APPLICATION/JSON", "application/json; charset=utf-8"])
def test_json_by_any_of_its_names_is_read(rest, content_type):
    answer = rest.post(LOGIN, {"email": "a"}, headers={"content-type": content_type})
    expect_refusal(answer, 400, "INVALID_FIELD", fields={"email", "password"})


@pytest.mark.parametrize(
    "path",
    ["//", "/v1", "/v1/", "/v2/me", "//v1/me", "/v1//me", "/v1/me/", "/V1/ME", "/v1/Me", "/v1/%6de",
     "/v1/../v1/me", "/./v1/me", "/v1/me/..", "/v1/me%00", "/v1/me%2f", "/v1/me;a=b", "/v1%2fme", "/%ff", "/v1/me\\",
     "/.well-known/", "/.well-known/jwks", "/metrics", "/readyz", "/livez", "/" + "a" * 9000],
    ids=lambda path: path[:24],
)  # fmt: skip
def test_a_path_that_is_no_route_is_404_whatever_the_method(rest, path):
    for method in ("GET", "POST", "DELETE"):
        expect_refusal(rest.call(method, path), 404)


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_a_method_that_a_route_does_not_have_is_405_and_says_which_it_has(rest, method):
    for path in POSTS:
        answer = rest.call(method, path)
        expect_refusal(answer, 405)
        assert answer.header("allow") == "POST"
    if method != "GET":
        answer = rest.call(method, "/v1/me")
        expect_refusal(answer, 405)
        assert {name.strip() for name in answer.header("allow").split(",")} == {"GET", "HEAD"}


@pytest.mark.parametrize(
    "query", ["a=b", "password=x", "email=a%40example.com", "refreshToken=x", "%ff=%ff", "=", "&&a"]
)
def test_a_query_parameter_that_a_route_does_not_have_is_refused(rest, query):
    for answer in (rest.get(f"/v1/me?{query}"), rest.post(f"{LOGIN}?{query}", {})):
        expect_refusal(answer, 400, "INVALID_FIELD", fields=_violated(answer))


def _violated(answer) -> set[str]:
    violations = detail(answer.json()["error"], "BadRequest")["fieldViolations"]
    return {violation.get("field", "") for violation in violations}


@pytest.mark.parametrize("size", [65_537, 1024 * 1024], ids=["64 KiB and a byte", "1 MiB"])
def test_a_body_over_64_kib_is_413_with_and_without_its_length(server, curl, size):
    body = b'{"email": "' + b"x" * (size - 13) + b'"}'
    assert len(body) == size
    # The test uses curl, because curl reads the answer while it is still sending the body.
    expect_refusal(Curl(server, "1.1", curl).post(LOGIN, body), 413)
    expect_refusal(Curl(server, "1.1", curl).post(LOGIN, body, headers={"transfer-encoding": "chunked"}), 413)
    # Over HTTP/2 it would lose an answer whose stream is reset before it has sent the body.
    expect_refusal(Curl(server, "2", curl).post(LOGIN, body), 413)
    expect_refusal(H2c(server).post(LOGIN, body, headers={"content-length": str(size)}), 413)
    expect_refusal(H2c(server).post(LOGIN, body), 413)


def test_a_byte_order_mark_before_the_json_is_skipped(rest):
    for path in POSTS:
        plain, marked = (rest.post(path, mark + b"{}") for mark in (b"", b"\xef\xbb\xbf"))
        assert (marked.status, marked.body) == (plain.status, plain.body), path


def test_a_body_of_exactly_64_kib_is_read(rest):
    body = b'{"email": "' + b"x" * (65_536 - 13) + b'"}'
    for framing in ({}, {"transfer-encoding": "chunked"}):
        expect_refusal(rest.post(LOGIN, body, headers=framing), 400, "INVALID_FIELD", fields={"email", "password"})
