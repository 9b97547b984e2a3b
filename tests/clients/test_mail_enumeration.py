"""What answers must not tell about the existence of an account, and how many mails an address or a client can cause.

It tests that RequestPasswordReset and ResendVerificationEmail answer alike for every address, in bytes and in time,
that sign-up and change of address can conceal a taken address, and the limits on mail.
"""

import http.client
import json
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from support import pb
from support.client import TIMEOUT, Client, Person, service_of
from support.expect import expect_error
from support.http import JSON, Rest
from support.mail import CHANGE, RESET, VERIFY
from support.outbox import settle
from support.timing import expect_alike
from support.transports import ByGrpc, ByRest, Transport, comparable

RPCS = ("RequestPasswordReset", "ResendVerificationEmail")
PATHS = {"RequestPasswordReset": "/v1/password/forgot", "ResendVerificationEmail": "/v1/email/resend"}
SEED = 20261123
NEW_IN_EACH_ANSWER = {"x-request-id", "date"}


@pytest.fixture(scope="module")
def settings(mailbox):
    return {"mail_url": mailbox.url, "mail_limit_per_client": "0"}


@pytest.fixture(params=["gRPC", "REST"])
def by(request) -> Callable[[object], Transport]:
    """A way to call a server of the test's own."""
    return lambda server: ByGrpc(server.client) if request.param == "gRPC" else ByRest(Rest(server))


def grpc_answer(client: Client, rpc: str, email: str) -> tuple:
    """Everything that a gRPC client sees of an answer, without the values that are new in each answer."""
    call = client.channel.unary_unary(f"/{service_of(rpc)}/{rpc}", request_serializer=None, response_deserializer=None)
    message = getattr(pb, f"{rpc}Request")(email=email).SerializeToString()
    reply, answered = call.with_call(message, timeout=TIMEOUT)
    metadata = [
        tuple((key, None if key in NEW_IN_EACH_ANSWER else value) for key, value in part or ())
        for part in (answered.initial_metadata(), answered.trailing_metadata())
    ]
    return reply, answered.code(), answered.details(), *metadata


def rest_answer(server, rpc: str, email: str) -> tuple:
    return comparable(Rest(server).post(PATHS[rpc], {"email": email}))


@pytest.fixture
def everybody(server, mailbox) -> dict[str, str]:
    """An address of each kind."""
    client = server.client
    fresh, verified, disabled = (client.newcomer()[0] for _ in range(3))
    client.verify_email(mailbox.token(verified.email, VERIFY))
    server.engine.execute("UPDATE users SET disabled = true WHERE email = ?", disabled.email)
    flooded, _ = client.newcomer()
    for _ in range(11):
        client.request_password_reset(flooded.email)
    return {
        "unknown": Person().email,
        "unverified": fresh.email,
        "in capitals": fresh.email.upper(),
        "verified": verified.email,
        "disabled": disabled.email,
        "mailed too often": flooded.email,
    }


@pytest.mark.parametrize("rpc", RPCS)
def test_the_answer_is_the_same_to_the_byte_whoever_the_address_is(server, everybody, rpc):
    by_grpc = {kind: grpc_answer(server.client, rpc, email) for kind, email in everybody.items()}
    assert len(set(by_grpc.values())) == 1, by_grpc
    assert by_grpc["unknown"][1] is grpc.StatusCode.OK
    by_rest = {kind: rest_answer(server, rpc, email) for kind, email in everybody.items()}
    assert len(set(by_rest.values())) == 1, by_rest
    assert by_rest["unknown"][:2] == (200, b"{}")


def test_only_the_owners_of_usable_accounts_get_mail(server, mailbox, everybody):
    settle(server.engine)
    before = {kind: len(mailbox.mails(email.lower())) for kind, email in everybody.items()}

    for rpc in RPCS:
        for kind in ("unknown", "verified", "disabled", "mailed too often", "unverified"):
            grpc_answer(server.client, rpc, everybody[kind])
    settle(server.engine)

    grown = {kind: len(mailbox.mails(email.lower())) - before[kind] for kind, email in everybody.items()}
    assert grown == {
        "unknown": 0,
        "unverified": 2,
        "in capitals": 2,
        "verified": 1,
        # A reset would not help a disabled user. A verification is allowed, because it gives no access.
        "disabled": 1,
        "mailed too often": 0,
    }


def times_of(
    call: Callable[[str], object], known: list[str], unknown: list[str], pairs: int, dice: random.Random
) -> tuple[list[float], list[float]]:
    """How long calls for known and unknown addresses took, in random order, in milliseconds.

    What a call leaves behind to be done is done while the next one is under way. In random order that falls on both.
    """
    order = [True, False] * pairs
    dice.shuffle(order)
    for email in (known + unknown) * 2:
        call(email)
    taken: dict[bool, list[float]] = {True: [], False: []}
    for is_known in order:
        email = dice.choice(known if is_known else unknown)
        begun = time.perf_counter()
        call(email)
        taken[is_known].append((time.perf_counter() - begun) * 1000)
    return taken[True], taken[False]


@pytest.mark.parametrize("rpc", RPCS)
def test_the_time_of_an_answer_does_not_tell_whether_an_account_exists(engine, start_server, tmp_path, rpc, size):
    # The transport without a server: an SMTP server in this process would take its time from the clock's own.
    (tmp_path / "mails").mkdir()
    server = start_server(
        engine, mail_url=f"file:{tmp_path / 'mails'}", mail_limit_per_client="0", mail_limit_per_address="1000"
    )
    pairs = size(40, 200)
    known = [server.client.newcomer()[0].email for _ in range(size(10, 40))]
    unknown = [Person().email for _ in known]
    settle(engine)
    dice = random.Random(SEED)

    def measure() -> tuple[list[float], list[float]]:
        return times_of(lambda email: grpc_answer(server.client, rpc, email), known, unknown, pairs, dice)

    # Few measurements cannot tell a small difference from chance.
    expect_alike(measure, size(0.1, 0.05))
    assert len(list((tmp_path / "mails").glob("*.eml"))) > len(known), "the known were mailed meanwhile"


# -- sign-up ------------------------------------------------------------------------------------------------------


def shape(user: dict, person: Person) -> dict:
    """A new account. The values that are new in each account are checked, and replaced by the word "new"."""
    assert uuid.UUID(user["id"]).version == 7
    assert user["createTime"] == user["updateTime"]
    assert abs(seconds_of(user["createTime"]) - time.time()) < 60
    assert (user["username"], user["email"]) == (person.username, person.email.lower())
    return {name: "new" if name in ("id", "username", "email", "createTime", "updateTime") else value
            for name, value in user.items()}  # fmt: skip


def seconds_of(text: str) -> int:
    stamp = Timestamp()
    stamp.FromJsonString(text)
    return stamp.seconds


def test_a_taken_address_signs_up_like_a_new_one_where_that_is_concealed(engine, start_server, start_mailbox, by):
    mailbox = start_mailbox()
    server = start_server(engine, mail_url=mailbox.url, conceal_existing_accounts="true")
    way, (owner, tokens) = by(server), server.client.newcomer()
    mailbox.token(owner.email, VERIFY)
    before = engine.query("SELECT * FROM users"), engine.query("SELECT * FROM user_roles")
    [(owner_id,)] = engine.query("SELECT id FROM users")

    thief = replace(Person(), email=owner.email.upper())
    answered = way.sign_up(thief)
    again = way.sign_up(replace(Person(), email=owner.email))

    assert (engine.query("SELECT * FROM users"), engine.query("SELECT * FROM user_roles")) == before
    assert answered["id"] not in (again["id"], str(owner_id))
    notice = mailbox.notice(owner.email)
    assert notice.recipients == (owner.email,)
    assert thief.password not in notice.text + notice.html
    assert server.client.me(tokens.access_token).email == owner.email
    assert way.login(owner)
    way.expect_wrong(replace(thief, email=owner.email))
    settle(engine)
    assert [mail.kind for mail in mailbox.mails(owner.email)] == [VERIFY, None, None], "no token for a thief"

    new = Person()
    assert shape(way.sign_up(new), new) == shape(answered, thief)


def test_a_concealed_sign_up_has_the_headers_of_a_new_one(engine, start_server, start_mailbox):
    server = start_server(engine, mail_url=start_mailbox().url, conceal_existing_accounts="true")
    owner, _ = server.client.newcomer()
    taken, new = replace(Person(), email=owner.email), Person()
    answers = []
    for person in (taken, new):
        body = {"username": person.username, "email": person.email, "password": person.password}
        answer = Rest(server).post("/v1/auth/signup", body)
        # The order of the members is the same too.
        answers.append((answer.status, list(answer.json()["user"]), list(answer.headers)))
    assert answers[0] == answers[1]


def test_a_taken_username_is_told_whether_or_not_the_address_is_taken(engine, start_server, start_mailbox, by):
    server = start_server(engine, mail_url=start_mailbox().url, conceal_existing_accounts="true")
    way, (owner, _) = by(server), server.client.newcomer()
    refusals = set()
    for email in (owner.email, Person().email):
        thief = {"username": owner.username.upper(), "email": email, "password": Person().password}
        refusals.add(way.refused("SignUp", "ALREADY_EXISTS", "USERNAME_TAKEN", **thief).seen)
    assert len(refusals) == 1, refusals


def test_a_weak_password_is_told_whether_or_not_the_address_is_taken(embedded, start_server, start_mailbox, by):
    server = start_server(embedded, mail_url=start_mailbox().url, conceal_existing_accounts="true")
    way, (owner, _) = by(server), server.client.newcomer()
    for email in (owner.email, Person().email):
        weak = {"username": Person().username, "email": email, "password": "password1"}
        way.refused("SignUp", "INVALID_ARGUMENT", "INVALID_FIELD", {"password"}, **weak)


def test_a_change_to_a_taken_address_is_answered_like_one_to_a_free_one_where_that_is_concealed(
    engine, start_server, start_mailbox, by
):
    mailbox = start_mailbox()
    server = start_server(engine, mail_url=mailbox.url, conceal_existing_accounts="true")
    way, (owner, _), (thief, tokens) = by(server), server.client.newcomer(), server.client.newcomer()
    server.client.verify_email(mailbox.token(owner.email, VERIFY))
    settle(engine)
    before = len(mailbox.mails(owner.email)), len(mailbox.mails(thief.email))
    free = Person().email
    call = {"credential": tokens.access_token, "password": thief.password}

    answers = [way.ok("RequestEmailChange", new_email=address, **call) for address in (owner.email.upper(), free)]

    assert answers == [{}, {}]
    settle(engine)
    to_owner = mailbox.mails(owner.email)[before[0] :]
    assert [mail.kind for mail in to_owner] == [None], "the owner gets a notice without a link"
    assert len(mailbox.mails(thief.email)) == before[1] + 2, "the same notice for each"
    assert mailbox.token(free, CHANGE)
    assert server.client.me(tokens.access_token).email == thief.email


def test_a_sign_up_tells_by_default_that_an_address_is_taken(server, mailbox, way):
    owner, _ = server.client.newcomer()
    thief = replace(Person(), email=owner.email)
    fields = {"username": thief.username, "email": thief.email, "password": thief.password}
    way.refused("SignUp", "ALREADY_EXISTS", "EMAIL_TAKEN", **fields)
    settle(server.engine)
    assert len(mailbox.mails(owner.email)) == 1, "and does not bother its owner"


# -- limits -------------------------------------------------------------------------------------------------------


def test_an_address_gets_ten_mails_an_hour_and_the_answer_stays_the_same(server, mailbox):
    person, _ = server.client.newcomer()
    answers = set()
    for _ in range(14):
        answers.add(grpc_answer(server.client, "RequestPasswordReset", person.email))
    settle(server.engine)

    assert len(answers) == 1, answers
    kinds = [mail.kind for mail in mailbox.mails(person.email)]
    # The verification mail of the sign-up is one of the ten.
    assert (kinds.count(VERIFY), kinds.count(RESET)) == (1, 9), kinds
    # Several mails are sent at the same time, so the newest may arrive before the others. Only its token is valid.
    tokens = [mail.token for mail in mailbox.mails(person.email) if mail.kind == RESET]
    assert [resets(server.client, token) for token in tokens].count(True) == 1
    assert mailbox.notice(person.email), "mails that only the owner can cause are not limited"


def resets(client: Client, token: str) -> bool:
    try:
        client.reset_password(token, Person().password)
    except grpc.RpcError:
        return False
    return True


def test_the_limit_of_an_address_holds_over_all_replicas_and_restarts(engine, start_server, start_mailbox):
    mailbox = start_mailbox()
    settings = {"mail_url": mailbox.url, "mail_limit_per_address": "4"}
    servers = [start_server(engine, **settings)]
    if engine.name == "postgres":
        servers.append(start_server(engine, **settings))
    person, _ = servers[0].client.newcomer()
    # Each mail is sent before the next is requested: a newer token of the other replica would drop an older mail.
    for number in range(6):
        servers[number % len(servers)].client.request_password_reset(person.email)
        settle(engine)
    servers[0].restart()
    for number in range(4):
        servers[number % len(servers)].client.resend_verification(person.email.upper())
        settle(engine)
    assert len(mailbox.mails(person.email)) == 4


def test_concealed_sign_ups_do_not_flood_an_owner(engine, start_server, start_mailbox):
    mailbox = start_mailbox()
    server = start_server(engine, mail_url=mailbox.url, conceal_existing_accounts="true", mail_limit_per_address="3")
    owner, _ = server.client.newcomer()
    for _ in range(6):
        assert server.client.sign_up(replace(Person(), email=owner.email)).id
    settle(engine)
    assert len(mailbox.mails(owner.email)) == 3


def test_a_client_causes_only_so_many_mails_a_minute_and_another_client_is_not_concerned(
    embedded, start_server, start_mailbox
):
    mailbox = start_mailbox()
    server = start_server(embedded, mail_url=mailbox.url, mail_limit_per_client="5")
    person, tokens = server.client.newcomer()
    people = [server.client.newcomer()[0] for _ in range(12)]
    settle(embedded)

    answers = {grpc_answer(server.client, "RequestPasswordReset", somebody.email) for somebody in people}
    assert len(answers) == 1, answers
    settle(embedded)
    resets = [mail for mail in mailbox.mails() if mail.kind == RESET]
    # Meanwhile the limit may have allowed one more.
    assert 5 <= len(resets) <= 6, [str(mail) for mail in resets]

    throttled = grpc.StatusCode.RESOURCE_EXHAUSTED
    new_email = Person().email
    expect_error(
        lambda: server.client.request_email_change(tokens.access_token, new_email, person.password),
        throttled,
        "THROTTLED",
    )

    # From another address of this machine.
    wire = http.client.HTTPConnection(Rest(server).address, timeout=TIMEOUT, source_address=("127.0.0.2", 0))
    wire.request("POST", PATHS["RequestPasswordReset"], json.dumps({"email": people[-1].email}), {"content-type": JSON})
    assert wire.getresponse().status == 200
    wire.close()
    assert mailbox.take(people[-1].email, RESET)


def test_too_many_changes_of_address_are_throttled_and_say_when_to_come_back(embedded, start_server, start_mailbox, by):
    mailbox = start_mailbox()
    server = start_server(embedded, mail_url=mailbox.url, mail_limit_per_address="2")
    way, (person, tokens) = by(server), server.client.newcomer()
    victim = Person().email
    call = {"credential": tokens.access_token, "new_email": victim, "password": person.password}
    for _ in range(2):
        way.ok("RequestEmailChange", **call)
    way.refused("RequestEmailChange", "RESOURCE_EXHAUSTED", "THROTTLED", **call)
    settle(embedded)
    assert len(mailbox.mails(victim)) == 2
