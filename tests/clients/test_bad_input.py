"""Invalid input: every call is answered with the documented error code, and never with INTERNAL.

It tests malformed fields and malformed bytes. Each test checks all rows of one kind. Afterwards the server must still
serve, and must have stored nothing that the test did not create. Fields are tested on both engines, because the engines
accept different values: PostgreSQL rejects a NUL in a text, and SQLite does not. Which passwords and addresses count as
equal is tested in `test_identity`.
"""

import secrets

import grpc
import pytest

from support import http2, pb
from support.client import SERVICE, Person
from support.expect import expect_error, expect_invalid, expect_unauthenticated, failure_of
from support.outbox import settle
from support.rows import check_all

# Decoding and routing do not use the database, so one engine is enough for them.
one_engine = pytest.mark.parametrize("server", ["sqlite"], indirect=True)

AUTHENTICATED = ("GetMe", "ChangePassword", "RequestEmailChange", "ChangeUsername")
METHODS = (
    "SignUp", "Login", "Refresh", "Logout", "VerifyEmail", "ResendVerificationEmail", "RequestPasswordReset",
    "ResetPassword", "ConfirmEmailChange", "IntrospectToken", "IssueServiceToken", "RevokeToken", *AUTHENTICATED,
)  # fmt: skip

CONTROL_CHARACTERS = {
    "NUL": "\0",
    "CR": "\r",
    "LF": "\n",
    "tab": "\t",
    "DEL": "\x7f",
    "U+0085": "\x85",
    "right-to-left override": "\u202e",
    "left-to-right isolate": "\u2066",
}

# Bytes that are not a valid protobuf message of any type.
NOT_PROTOBUF = {
    "an endless tag": b"\xff" * 11,
    "a length beyond the end": b"\x0a\x7fab",
    "wire type 7": b"\x0f",
    "the end of a group that never began": b"\x0c",
    "field number zero": b"\x02\x00",
}

# Bytes that are wrong for a message whose first field is a string.
NOT_A_STRING = {
    "invalid UTF-8": b"\x0a\x02\xc3\x28",
    "a lone surrogate": b"\x0a\x03\xed\xa0\x80",
    "a number for the string": b"\x08\x01",
}


@pytest.fixture
def nothing_written(server):
    """Checks that no table has more rows after the test, and that no account or session was deleted."""
    # Waits until the mails of earlier sign-ups are sent.
    settle(server.engine)
    before = server.engine.counts()
    yield
    assert server.client.health() == "SERVING", "the server still serves"
    after = server.engine.counts()
    grown = {table: (before.get(table, 0), count) for table, count in after.items() if count > before.get(table, 0)}
    assert not grown, f"refused input was written: {grown}"
    for table in ("users", "sessions"):
        assert after[table] == before[table], table


@pytest.fixture
def newcomer(client):
    """A user with a session, created before the rows are counted."""
    return client.newcomer()


def test_a_control_character_is_an_invalid_field(client, nothing_written):
    def check(row) -> None:
        _, character = row
        person = Person()
        name, _, domain = person.email.partition("@")
        expect_invalid(lambda: client.sign_up(Person(username=f"{person.username}{character}x")), "username")
        expect_invalid(lambda: client.sign_up(Person(username=f"{person.username}{character}")), "username")
        emails = [f"{name}{character}x@{domain}", f"{name}@a{character}b.{domain}"]
        if not character.isspace():
            # White space at the end is dropped.
            emails.append(f"{person.email}{character}")
        for email in emails:
            expect_invalid(lambda email=email: client.sign_up(Person(email=email)), "email")
            expect_invalid(lambda email=email: client.login(Person(email=email)), "email")

    check_all(CONTROL_CHARACTERS.items(), check)


def test_a_control_character_in_a_password_is_answered_and_never_internal(client):
    def check(character) -> None:
        # Each check uses a new user, because wrong passwords are counted.
        person, _ = client.newcomer()
        error = failure_of(lambda: client.login(Person(email=person.email, password=f"{person.password}{character}")))
        assert error.code() in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAUTHENTICATED}

    check_all(("\0", "\r\n", "\x7f", "\u202e"), check)


def test_a_malformed_email_is_an_invalid_field(client, nothing_written):
    emails = [
        " ",
        "alice",
        "alice@",
        "@example.com",
        "alice@@example.com",
        "alice@bob@example.com",
        "alice smith@example.com",
        "alice@exam ple.com",
        "alice@example..com",
        "alice@.example.com",
        "a" * 255,
        f"alice@{'d' * 64}.example.com",
        f"alice@{'.'.join(['d' * 60] * 5)}.com",
        "аlice@example.com",
        "ａlice@example.com",
        "josé@example.com",
    ]
    check_all(emails, lambda email: expect_invalid(lambda: client.sign_up(Person(email=email)), "email"))


def test_a_malformed_username_is_an_invalid_field(client, nothing_written):
    usernames = [
        " ", "a b", "-alice", "alice-", ".alice", "alice.", "_alice", "a@b", "a/b", "a" * 65, "аlice", "ﬁona",
        "a\u0301b",
    ]  # fmt: skip
    check_all(usernames, lambda name: expect_invalid(lambda: client.sign_up(Person(username=name)), "username"))


def test_a_username_of_64_characters_and_of_one_are_accepted(client):
    longest = Person(username=secrets.token_hex(32))
    assert client.sign_up(longest).username == longest.username
    assert client.sign_up(Person(username="q")).username == "q"


def test_a_weak_or_short_password_is_an_invalid_field(client, nothing_written):
    passwords = ["password1", "12345678", "qwertyuiop", "aaaaaaaaaaaa", "Aq7$kx!", "\U0001f9a6" * 7, " " * 12]
    check_all(passwords, lambda text: expect_invalid(lambda: client.sign_up(Person(password=text)), "password"))


def test_a_password_made_of_the_accounts_own_words_is_weak(client, nothing_written):
    person = Person(username="maximilianvanderberg", email="rosalindhawthorne@example.com")
    for password in (
        "maximilianvanderberg1",
        "Maximilianvanderberg",
        "rosalindhawthorne1",
        "rosalindhawthorne@example.com",
    ):
        attempt = Person(username=person.username, email=person.email, password=password)
        expect_invalid(lambda attempt=attempt: client.sign_up(attempt), "password")


def test_all_bad_fields_are_named_at_once(client, nothing_written):
    bad = Person(username="a b", email="alice", password="12345678")
    expect_invalid(lambda: client.sign_up(bad), "username", "email", "password")


def test_a_password_over_1024_bytes_is_an_invalid_field_on_every_rpc_that_takes_one(client, newcomer, nothing_written):
    person, tokens = newcomer
    bearer, good = tokens.access_token, Person().password
    too_long = secrets.token_hex(512) + "x"
    # 1024 code points, but more bytes.
    too_wide = secrets.token_hex(511) + "éé"
    for password in (too_long, too_wide):
        expect_invalid(lambda password=password: client.sign_up(Person(password=password)), "password")
        expect_invalid(
            lambda password=password: client.login(Person(email=person.email, password=password)), "password"
        )
        expect_invalid(lambda password=password: client.reset_password("token", password), "new_password")
        expect_invalid(lambda password=password: client.change_password(bearer, password, good), "current_password")
        expect_invalid(
            lambda password=password: client.change_password(bearer, person.password, password), "new_password"
        )
        expect_invalid(
            lambda password=password: client.request_email_change(bearer, Person().email, password), "password"
        )


@pytest.mark.parametrize("size", [65 * 1024, 1024 * 1024], ids=["65 KiB", "1 MiB"])
def test_an_oversize_message_is_an_invalid_argument(client, newcomer, nothing_written, size):
    person, tokens = newcomer
    huge = "x" * size
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    expect_error(lambda: client.sign_up(Person(password=huge)), invalid)
    expect_error(lambda: client.sign_up(Person(username=huge)), invalid)
    expect_error(lambda: client.login(Person(email=person.email, password=huge)), invalid)
    expect_error(lambda: client.refresh(huge), invalid)
    expect_error(lambda: client.logout(huge), invalid)
    expect_error(lambda: client.verify_email(huge), invalid)
    expect_error(lambda: client.call("IntrospectToken", pb.IntrospectTokenRequest(token=huge)), invalid)
    for fields in ({"client_id": huge, "client_secret": "x"}, {"client_id": "x", "client_secret": huge}):
        request = pb.IssueServiceTokenRequest(**fields)
        expect_error(lambda request=request: client.call("IssueServiceToken", request), invalid)
    expect_error(lambda: client.confirm_email_change(huge), invalid)
    expect_error(lambda: client.resend_verification(huge), invalid)
    expect_error(lambda: client.request_password_reset(huge), invalid)
    expect_error(lambda: client.reset_password("token", huge), invalid)
    expect_error(lambda: client.change_password(tokens.access_token, person.password, huge), invalid)
    expect_error(lambda: client.request_email_change(tokens.access_token, huge, person.password), invalid)
    bearer = [("authorization", f"Bearer {tokens.access_token}")]
    # GetMe has no fields, so this is an unknown field of that size.
    padding = b"\xba\x3e" + _varint(size) + b"x" * size
    expect_error(lambda: client.send_bytes("GetMe", padding, metadata=bearer), invalid)


@one_engine
@pytest.mark.parametrize("body", NOT_PROTOBUF.values(), ids=NOT_PROTOBUF.keys())
def test_bytes_that_are_no_message_are_an_invalid_argument(client, newcomer, nothing_written, body):
    _, tokens = newcomer
    check_all(METHODS, lambda method: expect_undecodable(client, tokens, method, body))


@one_engine
@pytest.mark.parametrize("body", NOT_A_STRING.values(), ids=NOT_A_STRING.keys())
def test_bytes_that_are_no_string_are_an_invalid_argument(client, newcomer, nothing_written, body):
    _, tokens = newcomer
    # GetMe has no fields.
    methods = [method for method in METHODS if method != "GetMe"]
    check_all(methods, lambda method: expect_undecodable(client, tokens, method, body))


def expect_undecodable(client, tokens, method: str, body: bytes) -> None:
    bearer = [("authorization", f"Bearer {tokens.access_token}")] if method in AUTHENTICATED else []
    expect_error(lambda: client.send_bytes(method, body, metadata=bearer), grpc.StatusCode.INVALID_ARGUMENT)


@one_engine
def test_bytes_without_a_token_tell_nothing_about_the_message(client, nothing_written):
    for method in AUTHENTICATED:
        expect_unauthenticated(lambda method=method: client.send_bytes(method, b"\xff\xff"), "TOKEN_MISSING")


@one_engine
def test_a_garbage_authorization_header_does_not_block_a_public_rpc(client):
    headers = [
        "Bearer",
        "Bearer not.a.token",
        "Bearer eyJhbGciOiJub25lIn0.e30.",
        "Basic YTpi",
        "nonsense",
        f"Bearer {'x' * 9000}",
    ]

    def check(header) -> None:
        metadata = [("authorization", header)]
        person = Person()
        sign_up = pb.SignUpRequest(username=person.username, email=person.email, password=person.password)
        assert client.call("SignUp", sign_up, metadata=metadata).user.email == person.email
        tokens = client.login(person, metadata=metadata)
        fresh = client.call("Refresh", pb.RefreshRequest(refresh_token=tokens.refresh_token), metadata=metadata).tokens
        client.call("Logout", pb.LogoutRequest(refresh_token=fresh.refresh_token), metadata=metadata)

    check_all(headers, check)


def test_the_stale_token_of_an_ended_session_does_not_block_a_login(client):
    person, tokens = client.newcomer()
    client.logout(tokens.refresh_token)
    stale = [("authorization", f"Bearer {tokens.access_token}")]
    assert client.me(client.login(person, metadata=stale).access_token)


@one_engine
def test_a_path_that_is_almost_right_never_reaches_an_rpc(server, nothing_written):
    paths = [
        f"{SERVICE}/SignUp",
        f"//{SERVICE}/SignUp",
        f"/{SERVICE}//SignUp",
        f"/{SERVICE}/SignUp/",
        f"/{SERVICE.lower()}/SignUp",
        f"/{SERVICE}/signup",
        f"/{SERVICE.replace('.', '%2E')}/SignUp",
        "/SignUp",
        "*",
        "",
    ]

    def check(path) -> None:
        person = Person()
        message = pb.SignUpRequest(username=person.username, email=person.email, password=person.password)
        answer = http2.post(server.address, path, message.SerializeToString())
        assert answer.grpc_status != 0, answer
        assert answer.body == b"", "no reply message"

    check_all(paths, check)


@one_engine
def test_headers_over_16_kib_are_refused(server, nothing_written):
    person = Person()
    message = pb.SignUpRequest(username=person.username, email=person.email, password=person.password)
    headers = {"x-padding": "x" * 20 * 1024}

    answer = http2.post(server.address, f"/{SERVICE}/SignUp", message.SerializeToString(), headers)

    assert answer.grpc_status != 0, answer


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
