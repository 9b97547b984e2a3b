"""How many wrong passwords are allowed at one account and from one client, and how a client is identified.

It tests that attempts are counted before they are hashed, over all replicas, and for unknown addresses too; that the
pause is the same for every address, grows, ends, and never locks an account; and which proxies are trusted to set
`X-Forwarded-For`.
"""

import asyncio
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from support import metrics, pb
from support.admin import TRANSPORTS, AnyByRest, Somebody, any_way
from support.client import CHANNEL_OPTIONS, Client, Person
from support.expect import expect_invalid, failure_of, judge, reason_of
from support.http import Rest
from support.mail import RESET
from support.outbox import settle
from support.refusal import detail, expect_refusal

EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
MOST = 10
HASHES = "postern_hash_duration_seconds_count"
# Fewer attempts than by default, so that the tests are faster.
FEW = 3
FIRST_PAUSE, LONGEST_PAUSE = 30, 15 * 60
PROXIED = {"trusted_proxies": "127.0.0.0/8, ::1/128"}


def wrong(person: Person) -> Person:
    return replace(person, password=Person().password)


def guess(client: Client, person: Person) -> grpc.RpcError:
    """Makes a login that must fail, and returns its error."""
    return failure_of(lambda: client.login(person))


def guess_until_throttled(client: Client, email: str, most: int = FEW) -> grpc.RpcError:
    """Makes `most` wrong attempts and one more, which must be throttled. Returns its error."""
    for _ in range(most):
        assert reason_of(guess(client, Person(email=email))) == "INVALID_CREDENTIALS"
    error = guess(client, Person(email=email))
    judge(error, EXHAUSTED, "THROTTLED")
    return error


def retry_after(error: grpc.RpcError) -> float:
    """The seconds that a refusal asks to wait."""
    for part in rpc_status.from_call(error).details:
        retry = error_details_pb2.RetryInfo()
        if part.Unpack(retry):
            return retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    raise AssertionError(f"no RetryInfo in {error.details()}")


def but_for_the_wait(error: grpc.RpcError) -> tuple:
    """Everything that a caller can see of an error, except the time to wait."""
    status = rpc_status.from_call(error)
    waits = error_details_pb2.RetryInfo.DESCRIPTOR
    details = [(part.type_url, b"" if part.Is(waits) else part.value) for part in status.details]
    keys = [sorted(key for key, _ in metadata) for metadata in (error.initial_metadata(), error.trailing_metadata())]
    return error.code(), error.details(), status.code, status.message, details, keys


def let_the_pause_pass(engine) -> None:
    """Ends every pause by changing its stored end. Both engines use the clock of this machine."""
    past = engine.as_time(datetime.now(UTC) - timedelta(seconds=1))
    assert engine.execute("UPDATE login_attempts SET blocked_until = ?", past) >= 1


def counted(engine) -> int:
    """The number of addresses with failed attempts that count."""
    return engine.query("SELECT count(*) FROM login_attempts WHERE failures > 0")[0][0]


# -- over three replicas -------------------------------------------------------------------------------------------


def hashes(servers) -> float:
    """How many passwords were hashed, at all replicas together."""
    answers = [Rest(server, "ops_addr").get("/metrics") for server in servers]
    return sum(metrics.read(answer.body.decode()).value(HASHES) for answer in answers)


async def guess_all_at_once(addresses: list[str], email: str, guesses: int) -> list[grpc.RpcError]:
    """Makes wrong logins concurrently, spread over the replicas, and returns their errors."""
    channels = [grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for address in addresses]
    stubs = [pb.stub("AuthService", channel) for channel in channels]

    async def one(number: int) -> grpc.RpcError:
        request = pb.LoginRequest(email=email, password=Person().password)
        try:
            await stubs[number % len(stubs)].Login(request, timeout=30)
        except grpc.RpcError as error:
            return error
        raise AssertionError("a wrong password was accepted")

    try:
        return await asyncio.gather(*(one(number) for number in range(guesses)))
    finally:
        for channel in channels:
            await channel.close()


@pytest.mark.parametrize("engine", ["postgres"], indirect=True)
def test_hundreds_of_parallel_wrong_logins_over_3_replicas_are_10_hashes(engine, start_server, start_mailbox, size):
    mailbox = start_mailbox()
    servers = [start_server(engine, mail_url=mailbox.url) for _ in range(3)]
    addresses, client = [server.address for server in servers], servers[0].client
    person, _ = client.newcomer()
    stranger = Person()

    for email in (person.email, stranger.email):
        before = hashes(servers)
        errors = asyncio.run(guess_all_at_once(addresses, email, size(100, 500)))
        said = Counter((error.code().name, reason_of(error)) for error in errors)
        hashed = hashes(servers) - before

        # A machine that is busy beside it has no room for all of them.
        said.pop(("RESOURCE_EXHAUSTED", "OVERLOADED"), None)
        assert set(said) == {("UNAUTHENTICATED", "INVALID_CREDENTIALS"), ("RESOURCE_EXHAUSTED", "THROTTLED")}, said
        assert said["UNAUTHENTICATED", "INVALID_CREDENTIALS"] == hashed == MOST, (said, hashed)
        for error in errors:
            judge(error, error.code(), reason_of(error))
            assert reason_of(error) != "THROTTLED" or retry_after(error) <= FIRST_PAUSE

    # During the pause the right password gets the same answer as any password for an unknown address.
    before = hashes(servers)
    for server in servers:
        right, unknown = guess(server.client, person), guess(server.client, stranger)
        judge(right, EXHAUSTED, "THROTTLED")
        assert but_for_the_wait(right) == but_for_the_wait(unknown)
        assert 0 < retry_after(right) <= FIRST_PAUSE
        assert 0 < retry_after(unknown) <= FIRST_PAUSE
    assert hashes(servers) == before

    # The owner is not locked out: a reset of the password still works.
    client.request_password_reset(person.email)
    again = replace(person, password=Person().password)
    servers[1].client.reset_password(mailbox.token(person.email, RESET), again.password)
    assert servers[2].client.login(again)

    let_the_pause_pass(engine)
    assert reason_of(guess(client, stranger)) == "INVALID_CREDENTIALS"


# -- one account ---------------------------------------------------------------------------------------------------


@pytest.fixture
def server(engine, start_server):
    return start_server(engine, login_max_failures=FEW)


def test_after_the_pause_the_right_password_works_and_guesses_count_from_one_again(server):
    client, (person, _) = server.client, server.client.newcomer()
    guess_until_throttled(client, person.email)
    judge(guess(client, person), EXHAUSTED, "THROTTLED")

    let_the_pause_pass(server.engine)

    assert client.login(person)
    assert counted(server.engine) == 0
    guess_until_throttled(client, person.email)


def test_a_right_password_before_the_last_guess_forgives_those_before(server):
    client, (person, _) = server.client, server.client.newcomer()
    for _ in range(3):
        for _ in range(FEW - 1):
            assert reason_of(guess(client, wrong(person))) == "INVALID_CREDENTIALS"
        assert client.login(person)


def test_the_last_attempt_before_the_pause_may_be_right(server):
    client, (person, _) = server.client, server.client.newcomer()
    for _ in range(FEW - 1):
        guess(client, wrong(person))
    assert client.login(person)
    guess_until_throttled(client, person.email)


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_the_pause_doubles_up_to_15_minutes_and_is_no_lock(server, known):
    client, person = server.client, Person()
    if known:
        client.sign_up(person)
    asked = [retry_after(guess_until_throttled(client, person.email))]
    for _ in range(7):
        let_the_pause_pass(server.engine)
        # After a pause one attempt is let through, and its failure starts the next pause.
        asked.append(retry_after(guess_until_throttled(client, person.email, most=1)))
    expected = [min(FIRST_PAUSE * 2**number, LONGEST_PAUSE) for number in range(len(asked))]
    for waits, longest in zip(asked, expected, strict=True):
        assert longest - 10 < waits <= longest, (asked, expected)
    if known:
        let_the_pause_pass(server.engine)
        assert client.login(person)


def test_a_throttled_guess_prolongs_nothing(server):
    client, (person, _) = server.client, server.client.newcomer()
    first = retry_after(guess_until_throttled(client, person.email))
    before = server.engine.query("SELECT failures, blocked_until FROM login_attempts")
    for _ in range(20):
        assert retry_after(guess(client, person)) <= first
    assert server.engine.query("SELECT failures, blocked_until FROM login_attempts") == before


def test_guesses_are_forgotten_in_time(server):
    client, (person, _) = server.client, server.client.newcomer()
    guess_until_throttled(client, person.email)
    let_the_pause_pass(server.engine)
    past = server.engine.as_time(datetime.now(UTC) - timedelta(seconds=1))
    assert server.engine.execute("UPDATE login_attempts SET forget_time = ?", past) == 1
    assert retry_after(guess_until_throttled(client, person.email)) <= FIRST_PAUSE


def test_guesses_at_one_address_in_any_spelling_are_counted_together_and_at_no_other(server):
    client, (person, _), (other, _) = server.client, server.client.newcomer(), server.client.newcomer()
    for number in range(FEW):
        email = person.email.upper() if number % 2 else person.email
        assert reason_of(guess(client, Person(email=email))) == "INVALID_CREDENTIALS"
    for email in (person.email, person.email.upper(), person.email.title()):
        judge(guess(client, replace(person, email=email)), EXHAUSTED, "THROTTLED")
    assert client.login(other)


def test_a_pause_ends_no_session_and_hinders_nothing_that_takes_no_password(server):
    client, (person, tokens) = server.client, server.client.newcomer()
    guess_until_throttled(client, person.email)
    assert client.me(tokens.access_token)
    fresh = client.refresh(tokens.refresh_token)
    client.request_password_reset(person.email)
    client.logout(fresh.refresh_token)


@pytest.mark.parametrize("rpc", ["ChangePassword", "RequestEmailChange", "ChangeUsername", "DeleteAccount"])
def test_a_stolen_access_token_gives_no_more_guesses_than_a_login(server, rpc):
    with any_way("gRPC", server) as way:
        somebody = Somebody(way)
        field = "current_password" if rpc == "ChangePassword" else "password"
        new = {
            "ChangePassword": {"new_password": Person().password},
            "RequestEmailChange": {"new_email": "a@example.com"},
            "ChangeUsername": {"new_username": Person().username},
        }
        call = {"credential": somebody.credential, **new.get(rpc, {})}
        for _ in range(FEW):
            fields = {**call, field: Person().password}
            way.refused(rpc, "UNAUTHENTICATED", "INVALID_CREDENTIALS", **fields)
        way.refused(rpc, "RESOURCE_EXHAUSTED", "THROTTLED", **{**call, field: somebody.person.password})
        judge(guess(server.client, somebody.person), EXHAUSTED, "THROTTLED")
        let_the_pause_pass(server.engine)
        assert way.ok(rpc, **{**call, field: somebody.person.password}) is not None
        assert counted(server.engine) == 0


def test_a_reset_ends_the_pause(engine, start_server, start_mailbox):
    mailbox = start_mailbox()
    server = start_server(engine, login_max_failures=FEW, mail_url=mailbox.url)
    client, (person, _) = server.client, server.client.newcomer()
    guess_until_throttled(client, person.email)
    again = replace(person, password=Person().password)
    client.request_password_reset(person.email)
    client.reset_password(mailbox.token(person.email, RESET), again.password)
    assert client.login(again)
    guess_until_throttled(client, person.email)


def test_a_pause_outlives_a_restart_and_its_row_tells_nobody_the_address(server):
    person, _ = server.client.newcomer()
    guess_until_throttled(server.client, person.email)
    stranger = Person()
    guess(server.client, stranger)
    server.restart()
    judge(guess(server.client, person), EXHAUSTED, "THROTTLED")
    rows = repr(server.engine.query("SELECT * FROM login_attempts"))
    assert person.email not in rows
    assert stranger.email not in server.engine.dump(), "the typed address is not stored"


def test_malformed_guesses_count_for_nothing(server):
    client, (person, _) = server.client, server.client.newcomer()
    for password in ("", "x" * 1025):
        for _ in range(FEW):
            expect_invalid(lambda password=password: client.login(replace(person, password=password)), "password")
    assert client.login(person)


def test_rest_says_429_and_when_to_come_back(server):
    person, _ = server.client.newcomer()
    guess_until_throttled(server.client, person.email)
    answer = Rest(server).post("/v1/auth/login", {"email": person.email, "password": person.password})
    error = expect_refusal(answer, 429, "THROTTLED")
    assert detail(error, "RetryInfo")
    assert 0 < int(answer.header("retry-after")) <= FIRST_PAUSE


# -- who the client is ---------------------------------------------------------------------------------------------


def client_ip(way: str, server, forwarded: str | None) -> str:
    """The client address of a session that is opened through a proxy."""
    person, tokens = server.client.newcomer()
    fields = {"email": person.email, "password": person.password}
    if way == "REST":
        headers = {"x-forwarded-for": forwarded} if forwarded is not None else {}
        tokens = Rest(server).post("/v1/auth/login", fields, headers=headers).ok()["tokens"]
    else:
        metadata = [("x-forwarded-for", forwarded)] if forwarded is not None else []
        tokens = {"accessToken": server.client.login(person, metadata=metadata).access_token}
    listed = AnyByRest(Rest(server)).ok("ListSessions", credential=tokens["accessToken"])["sessions"]
    return next(session["clientIp"] for session in listed if session.get("current"))


@pytest.mark.parametrize("way", TRANSPORTS)
def test_a_trusted_proxy_is_believed_as_far_as_it_knows(embedded, start_server, way):
    server = start_server(embedded, **PROXIED)
    for forwarded, believed in {
        None: "127.0.0.1",
        "203.0.113.7": "203.0.113.7",
        "198.51.100.1, 203.0.113.7": "203.0.113.7",
        "198.51.100.1,203.0.113.7,127.0.0.9": "203.0.113.7",
        "203.0.113.7:4711": "203.0.113.7",
        "[2001:db8::7]:4711": "2001:db8::7",
        "2001:DB8:0::7": "2001:db8::7",
        "::ffff:203.0.113.7": "203.0.113.7",
        "unknown": "127.0.0.1",
        "": "127.0.0.1",
        "203.0.113.7, unknown": "127.0.0.1",
        "203.0.113.999": "127.0.0.1",
        "127.0.0.9": "127.0.0.9",
    }.items():
        assert client_ip(way, server, forwarded) == believed, forwarded


@pytest.mark.parametrize("way", TRANSPORTS)
def test_the_forwarded_addresses_of_other_clients_are_ignored(embedded, start_server, way):
    for settings in ({}, {"trusted_proxies": "10.0.0.0/8,192.0.2.1"}):
        server = start_server(embedded, **settings)
        for forwarded in (None, "203.0.113.7", "127.0.0.9, 203.0.113.7"):
            assert client_ip(way, server, forwarded) == "127.0.0.1"
        server.kill()


def test_other_headers_of_proxies_are_ignored(embedded, start_server):
    server = start_server(embedded, **PROXIED)
    person, _ = server.client.newcomer()
    names = ("forwarded", "x-real-ip", "x-client-ip", "cf-connecting-ip", "x-forwarded-host")
    headers = {name: "for=203.0.113.7" if name == "forwarded" else "203.0.113.7" for name in names}
    login = {"email": person.email, "password": person.password}
    tokens = Rest(server).post("/v1/auth/login", login, headers=headers).ok()["tokens"]
    listed = AnyByRest(Rest(server)).ok("ListSessions", credential=tokens["accessToken"])["sessions"]
    assert {session["clientIp"] for session in listed} == {"127.0.0.1"}


def test_an_invalid_trusted_network_stops_the_start_and_is_named(embedded, start_server):
    for bad in ("nonsense", "127.0.0.1/33", "10.0.0.0/8;192.0.2.0/24", "localhost"):
        with pytest.raises(AssertionError, match="POSTERN_TRUSTED_PROXIES"):
            start_server(embedded, trusted_proxies=bad)


# -- one client ----------------------------------------------------------------------------------------------------


def attempt(way: str, server, forwarded: str) -> str | None:
    """Makes a wrong login from a client behind a proxy, and returns the reason of the error."""
    person = Person()
    if way == "REST":
        fields = {"email": person.email, "password": person.password}
        answer = Rest(server).post("/v1/auth/login", fields, headers={"x-forwarded-for": forwarded})
        return detail(json.loads(answer.body)["error"], "ErrorInfo")["reason"]
    return reason_of(failure_of(lambda: server.client.login(person, metadata=[("x-forwarded-for", forwarded)])))


@pytest.mark.parametrize("way", TRANSPORTS)
def test_a_client_has_so_many_passwords_a_minute_whosever_they_are(embedded, start_server, way):
    server = start_server(embedded, login_limit_per_client=3, **PROXIED)
    for forwarded in ("203.0.113.7", "203.0.113.8", "2001:db8:1:2::1"):
        assert [attempt(way, server, forwarded) for _ in range(4)] == ["INVALID_CREDENTIALS"] * 3 + ["THROTTLED"]
    # A /64 network of IPv6 is one client. An IPv4 address mapped to IPv6 is the same client as the IPv4 address.
    assert attempt(way, server, "2001:db8:1:2:ffff::9") == "THROTTLED"
    assert attempt(way, server, "::ffff:203.0.113.7") == "THROTTLED"
    assert attempt(way, server, "2001:db8:1:3::1") == "INVALID_CREDENTIALS"


def test_an_untrusted_client_counts_as_one_client_whatever_it_forwards(embedded, start_server):
    server = start_server(embedded, login_limit_per_client=3)
    said = [attempt("gRPC", server, f"203.0.113.{number}") for number in range(4)]
    assert said == ["INVALID_CREDENTIALS"] * 3 + ["THROTTLED"]


def test_a_client_can_ask_for_so_many_accounts_a_minute(embedded, start_server):
    server = start_server(embedded, sign_up_limit_per_client=3)
    for _ in range(3):
        server.client.sign_up(Person())
    judge(failure_of(lambda: server.client.sign_up(Person())), EXHAUSTED, "THROTTLED")


def test_sign_ups_count_in_the_mails_that_a_client_causes(engine, start_server, tmp_path):
    (tmp_path / "mails").mkdir()
    server = start_server(engine, mail_limit_per_client="5", mail_url=f"file:{tmp_path / 'mails'}")
    strangers = [Person() for _ in range(30)]
    for stranger in strangers:
        server.client.sign_up(stranger)
    settle(engine)
    assert len(list((tmp_path / "mails").glob("*.eml"))) == 5
    assert engine.emails() >= {stranger.email for stranger in strangers}, "they have their accounts all the same"


def test_logins_that_ran_out_of_time_count_against_nobody(engine, start_server):
    server = start_server(engine, argon2_memory_kib=65_536, argon2_iterations=4, hash_threads=1)
    person, _ = server.client.newcomer()
    request = pb.LoginRequest(email=person.email, password=person.password)
    for _ in range(12):
        late = failure_of(lambda: server.client.call("Login", request, timeout=0.15))
        # When the server knows how long a hash takes, it does not begin one that would be too late.
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED or reason_of(late) == "OVERLOADED"
    assert server.client.login(person)


def test_a_throttled_client_is_told_to_come_back_within_a_third_of_a_minute(embedded, start_server):
    server = start_server(embedded, login_limit_per_client=3)
    person, _ = server.client.newcomer()
    for _ in range(2):
        guess(server.client, wrong(person))
    error = guess(server.client, person)
    judge(error, EXHAUSTED, "THROTTLED")
    assert 0 < retry_after(error) <= 20
    # The limit was that of the client, not of the account: without it, the owner of the account can log in.
    server.restart(login_limit_per_client=0)
    for _ in range(6):
        assert server.client.login(person)


def test_a_throttled_client_uses_up_no_password_attempts_of_an_account(engine, start_server):
    server = start_server(engine, login_limit_per_client=3)
    person, _ = server.client.newcomer()
    for _ in range(20):
        guess(server.client, wrong(person))
    [(failures,)] = engine.query("SELECT failures FROM login_attempts")
    assert failures <= 3


def test_a_new_client_of_the_same_address_is_the_same_client(embedded, start_server):
    server = start_server(embedded, login_limit_per_client=3)
    for _ in range(3):
        guess(server.client, Person())
    other = server.new_client()
    try:
        judge(guess(other, Person()), EXHAUSTED, "THROTTLED")
    finally:
        other.close()


def test_sixteen_right_logins_of_one_account_at_once_all_succeed(engine, start_server):
    """Attempts in progress do not count as failures: concurrent right logins wait briefly and start no pause."""
    server = start_server(engine, argon2_memory_kib=19_456, argon2_iterations=2)
    person, _ = server.client.newcomer()
    # Earlier failures leave fewer places for attempts in progress.
    for _ in range(5):
        wrong = replace(person, password=Person().password)
        judge(guess(server.client, wrong), grpc.StatusCode.UNAUTHENTICATED, "INVALID_CREDENTIALS")
    with ThreadPoolExecutor(16) as pool:
        tokens = list(pool.map(lambda _: server.client.login(person), range(16)))
    assert len({token.refresh_token for token in tokens}) == 16
