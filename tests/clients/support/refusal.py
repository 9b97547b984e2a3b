"""Checks of HTTP answers: the headers of all answers, the AIP-193 form of errors, and that they contain no secret.

`expect` checks the same rules for gRPC.
"""

from google.protobuf import duration_pb2, json_format

from support import contract, pb
from support.expect import MACHINE_READABLE
from support.http import JSON, Answer

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}

# The codes that google.rpc.Code maps to each HTTP status, and those that HTTP itself adds.
CODES = {
    400: {"INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE"},
    401: {"UNAUTHENTICATED"},
    403: {"PERMISSION_DENIED"},
    404: {"NOT_FOUND"},
    405: {"UNIMPLEMENTED"},
    408: {"DEADLINE_EXCEEDED"},
    409: {"ALREADY_EXISTS", "ABORTED"},
    413: {"INVALID_ARGUMENT", "OUT_OF_RANGE"},
    415: {"INVALID_ARGUMENT"},
    429: {"RESOURCE_EXHAUSTED"},
    503: {"UNAVAILABLE"},
    504: {"DEADLINE_EXCEEDED"},
}


def expect_own_headers(answer: Answer) -> None:
    """Asserts the headers of every response: the request id, and the security headers for browsers."""
    assert answer.header("x-request-id"), answer
    for name, value in SECURITY_HEADERS.items():
        assert answer.header(name) == value, f"{name} of {answer}"


def expect_refusal(answer: Answer, status: int, reason: str | None = None, *, fields=()) -> dict:
    """Asserts an error with exactly this HTTP status, reason and set of violated fields, and returns its `error`.

    Without a reason it is an error of HTTP itself, such as an unknown route, a wrong method or a wrong content type.
    """
    shown = f"{answer.status}: {answer.body[:600]!r}"
    assert answer.status == status, f"wanted {status} {reason or ''}, got {shown}"
    expect_own_headers(answer)
    assert answer.header("content-type") == JSON
    assert answer.header("cache-control") == "no-store"

    body = answer.json()
    assert set(body) == {"error"}, shown
    error = body["error"]
    assert set(error) == {"code", "status", "message", "details"}, shown
    assert error["code"] == status, shown
    assert error["status"] in CODES[status], shown
    assert error["message"], "an error has a message for people"

    info = detail(error, "ErrorInfo")
    if reason is None:
        assert not info, shown
    else:
        assert reason in pb.error_reasons(), f"{reason} is not in the contract's ErrorReason"
        assert (info.get("domain"), info.get("reason")) == (pb.PACKAGE, reason), shown
    violations = detail(error, "BadRequest").get("fieldViolations", [])
    # A violation of the body as a whole has an empty field, which proto3 JSON leaves out.
    assert {violation.get("field", "") for violation in violations} == set(map(contract.json_name, fields)), shown
    assert all(MACHINE_READABLE.fullmatch(violation["reason"]) for violation in violations), shown
    assert all(violation.get("description") for violation in violations), f"every violation has a description: {shown}"

    assert (answer.header("www-authenticate") == "Bearer") == (status == 401), answer.headers
    _expect_when_to_come_back(answer, error)
    said = str(answer.headers) + answer.body.decode()
    leaked = [secret for secret in answer.secrets if len(secret) >= 8 and secret in said]
    assert not leaked, f"{shown} repeats {leaked}"
    return error


def detail(error: dict, name: str) -> dict:
    """A `google.rpc` detail by its message's name; empty if there is none."""
    found = [part for part in error["details"] if part["@type"] == f"type.googleapis.com/google.rpc.{name}"]
    assert len(found) <= 1, f"{name} is there twice: {error}"
    return found[0] if found else {}


def _expect_when_to_come_back(answer: Answer, error: dict) -> None:
    retry = detail(error, "RetryInfo")
    assert bool(retry) == (answer.status in (429, 503)), f"{answer.status} with {error}"
    if not retry:
        assert answer.header("retry-after") is None
        return
    delay = duration_pb2.Duration()
    json_format.Parse(f'"{retry["retryDelay"]}"', delay)
    seconds = int(answer.header("retry-after"))
    assert seconds >= 1, "RFC 9110 §10.2.3: whole seconds, and never at once"
    assert seconds - 1 <= delay.seconds + delay.nanos / 1e9 <= seconds, f"{retry} and {seconds}"
