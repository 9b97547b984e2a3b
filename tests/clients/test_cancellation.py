"""Clients that cancel calls, and deadlines that pass.

It tests that thousands of calls, cancelled at random moments, leave no open transaction, no lost write and no lost
place in the hash queue. It also tests the code that the server itself sends for a passed deadline, with a client that
does not enforce its own deadline.
"""

import asyncio
import random
from collections import Counter

import grpc

from support import http2, pb
from support.client import CHANNEL_OPTIONS, SERVICE, Person
from support.expect import reason_of
from support.wait import wait_until

AT_ONCE = 32
SEED = 20261123
DEADLINE_EXCEEDED = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]

# The codes with which a call may end. UNAVAILABLE is not allowed: the cancellations of one caller must not close a
# connection that other callers share. HTTP/2 servers close it by default if many streams are reset before they are
# accepted.
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class Storm:
    """Many calls of every kind, each cancelled after a random time.

    The duration of a call depends on the machine. So the longest of these times grows with every cancelled call and
    shrinks with every answered one. About a third of the calls are answered; the others are cancelled at all stages.
    """

    def __init__(self, address: str, sessions, calls: int):
        self.outcomes: Counter = Counter()
        self.acknowledged: list[str] = []
        self.unexpected: list[tuple] = []
        self._address = address
        self._calls = calls
        self._random = random.Random(SEED)
        self._span = 0.02
        self._people = [person for person, _ in sessions]
        self._tokens = [tokens for _, tokens in sessions]

    async def blow(self) -> None:
        channels = [grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) for _ in range(4)]
        stubs = [pb.stub("AuthService", channel) for channel in channels]
        remaining = iter(range(self._calls))

        async def worker(stub):
            for _ in remaining:
                await self._call_and_cancel(stub)

        await asyncio.gather(*(worker(stubs[number % len(stubs)]) for number in range(AT_ONCE)))
        for channel in channels:
            await channel.close()

    async def _call_and_cancel(self, stub) -> None:
        method = self._random.choice(("SignUp", "Login", "Refresh", "Logout", "GetMe"))
        request, metadata, email = self._prepare(method)
        call = getattr(stub, method)(request, metadata=metadata, timeout=30)
        cancelling = asyncio.get_running_loop().call_later(self._random.uniform(0, self._span), call.cancel)
        code = await call.code()
        cancelling.cancel()
        self.outcomes[code] += 1
        if code not in EXPECTED:
            self.unexpected.append((method, code.name, await call.details()))
        # With these factors it adapts within a few dozen calls when the machine becomes busy.
        self._span *= 1.02 if code is grpc.StatusCode.CANCELLED else 0.96
        self._span = min(max(self._span, 0.001), 10)
        if code is grpc.StatusCode.OK and method == "SignUp":
            self.acknowledged.append(email)
        if code is grpc.StatusCode.OK and method in ("Login", "Refresh"):
            self._tokens[self._random.randrange(len(self._tokens))] = (await call).tokens

    def _prepare(self, method: str):
        tokens = self._random.choice(self._tokens)
        match method:
            case "SignUp":
                person = Person()
                request = pb.SignUpRequest(username=person.username, email=person.email, password=person.password)
                return request, (), person.email
            case "Login":
                person = self._random.choice(self._people)
                return pb.LoginRequest(email=person.email, password=person.password), (), None
            case "Refresh":
                return pb.RefreshRequest(refresh_token=tokens.refresh_token), (), None
            case "Logout":
                return pb.LogoutRequest(refresh_token=tokens.refresh_token), (), None
            case _:
                return pb.GetMeRequest(), (("authorization", f"Bearer {tokens.access_token}"),), None


async def sign_up_many(address: str, count: int) -> list[str]:
    """Signs up `count` people, eight at a time, and asserts an OK for each."""
    people = [Person() for _ in range(count)]
    remaining = iter(people)
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = pb.stub("AuthService", channel)

        async def worker():
            for person in remaining:
                request = pb.SignUpRequest(username=person.username, email=person.email, password=person.password)
                reply = await stub.SignUp(request, timeout=30)
                assert reply.user.email == person.email

        await asyncio.gather(*(worker() for _ in range(8)))
    return [person.email for person in people]


def no_connection_in_a_transaction(engine) -> bool:
    count = engine.connections_in_transaction()
    assert count == 0, f"{count} connections idle in a transaction"
    return True


def test_thousands_of_cancelled_calls_leave_nothing_open_and_nothing_lost(engine, start_server, size):
    server = start_server(engine)
    calls, sign_ups = size(400, 10_000), size(60, 500)
    storm = Storm(server.address, [server.client.newcomer() for _ in range(20)], calls)

    asyncio.run(storm.blow())

    print(dict(storm.outcomes))
    assert storm.outcomes.total() == calls
    assert not storm.unexpected, storm.unexpected[:5]
    # The test is only useful if many calls were cancelled and some were answered.
    assert storm.outcomes[grpc.StatusCode.CANCELLED] >= calls // 10, storm.outcomes
    assert storm.outcomes[grpc.StatusCode.OK] >= calls // 100, storm.outcomes
    assert set(storm.acknowledged) <= engine.emails()
    if engine.name == "postgres":
        wait_until("no transaction is open", lambda: no_connection_in_a_transaction(engine))

    acknowledged = asyncio.run(sign_up_many(server.address, sign_ups))

    assert len(set(acknowledged)) == sign_ups
    assert set(acknowledged) <= engine.emails(), "an acknowledged sign-up is lost"
    if engine.name == "postgres":
        wait_until("no transaction is open", lambda: no_connection_in_a_transaction(engine))
    # The sign-ups must be durable, not only visible.
    server.kill()
    server.restart()
    assert set(acknowledged) | set(storm.acknowledged) <= engine.emails()
    assert server.client.newcomer()


def test_a_passed_deadline_is_deadline_exceeded_from_the_server_itself(embedded, start_server):
    server = start_server(embedded, argon2_memory_kib=131072, argon2_iterations=4, hash_threads=1)
    person = Person()
    message = pb.LoginRequest(email=person.email, password=person.password).SerializeToString()

    for timeout in ("1m", "50m", "1000u", "1000000n"):
        answer = http2.post(server.address, f"/{SERVICE}/Login", message, {"grpc-timeout": timeout})
        assert answer.grpc_status == DEADLINE_EXCEEDED, (timeout, answer)

    assert server.client.newcomer(), "the server still serves"


def test_a_deadline_far_away_changes_nothing(embedded, start_server):
    server = start_server(embedded)
    person, _ = server.client.newcomer()
    message = pb.LoginRequest(email=person.email, password=person.password).SerializeToString()
    for timeout in ("30S", "99999999H"):
        answer = http2.post(server.address, f"/{SERVICE}/Login", message, {"grpc-timeout": timeout})
        assert answer.grpc_status == 0, answer


def test_a_sign_up_whose_deadline_passed_is_made_whole_or_not_at_all(engine, start_server):
    server = start_server(engine)
    people = [Person() for _ in range(40)]
    for number, person in enumerate(people):
        request = pb.SignUpRequest(username=person.username, email=person.email, password=person.password)
        # The timeouts range from almost zero to about the duration of the call.
        timeout = {"grpc-timeout": f"{number * 500 + 1}u"}
        http2.post(server.address, f"/{SERVICE}/SignUp", request.SerializeToString(), timeout)

    for person in people:
        # The write may have completed after its caller gave up, and may even still be running.
        try:
            server.client.sign_up(person)
        except grpc.RpcError as error:
            assert reason_of(error) in {"EMAIL_TAKEN", "USERNAME_TAKEN"}, error.details()
        assert server.client.login(person), "the account is complete"
