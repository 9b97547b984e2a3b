"""`WatchRevocations`: each service that follows the stream learns of each revocation, in order, wherever it resumes.

The clients are written as those of another team would be: see `support/watch.py`. What the streams promise while
entries of the log are committed out of order is tested exhaustively in `src/domain/watch.rs`, and here with three real
replicas.
"""

import random
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime

import grpc
import pytest

from support import load
from support.admin import Somebody, session_id
from support.engine import Postgres, Sqlite
from support.expect import failure_of, judge, reason_of
from support.postgres import Cluster
from support.process import resident
from support.server import Server
from support.transports import ByGrpc
from support.wait import wait_until
from support.watch import Follower, Service, connect, heartbeats, subject, until_caught_up, watch

HEARTBEAT = 5.0
PROMISE = 1.0
# How many entries the buffer of a replica has room for.
BUFFERED = 65_536


class Watched:
    """A server with an admin and a service that follows the revocations."""

    def __init__(self, server: Server):
        self.server, self.engine = server, server.engine
        self.way = ByGrpc(server.client)
        self.admin = Somebody(self.way, server.engine, "admin")
        self.service = Service(self.admin, server)
        self.token = self.service.token()

    @contextmanager
    def stream(self, cursor: str = "", token: str | None = None):
        with connect(self.server) as channel:
            stream = watch(channel, token or self.token, cursor)
            yield stream
            stream.cancel()

    def refusal(self, cursor: str = "", token: str | None = None) -> grpc.RpcError:
        """The error that ends a stream before its first message."""
        with self.stream(cursor, token) as stream:
            return failure_of(lambda: next(stream))

    def log_out(self, somebody: Somebody | None = None) -> str:
        """Ends a session and returns its id."""
        tokens = self.way.login((somebody or self.admin).person)
        self.way.ok("Logout", refresh_token=tokens["refreshToken"])
        return session_id(tokens)

    def by_admin(self, rpc: str, **fields) -> dict:
        return self.way.ok(rpc, credential=self.admin.credential, **fields)


@pytest.fixture
def watched(start_server, embedded) -> Watched:
    return Watched(start_server(embedded))


def time_of(timestamp) -> datetime:
    return timestamp.ToDatetime(tzinfo=UTC)


def expect_resume(error: grpc.RpcError, why: str) -> None:
    """The status that says: resume with the last cursor."""
    judge(error, grpc.StatusCode.UNAVAILABLE)
    assert why in error.details(), error.details()
    assert "resume" in error.details(), error.details()
    assert reason_of(error) is None
    assert any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata()), "it has RetryInfo"


def end_of(stream) -> grpc.RpcError:
    """Reads a stream to its end."""
    return failure_of(lambda: [None for _ in stream])


# -- what is sent --------------------------------------------------------------------------------------------------


def test_each_kind_of_revocation_is_a_message_with_its_times(watched):
    somebody = Somebody(watched.way)
    other = Service(watched.admin, watched.server, "billing")
    with watched.stream() as stream:
        _, cursor = until_caught_up(stream)
        begun = datetime.now(UTC)

        def told(count: int) -> list:
            return [next(stream) for _ in range(count)]

        ended = watched.log_out(somebody)
        [message] = told(1)
        assert message.session_ended.session_id == ended
        assert begun <= time_of(message.revoke_time) <= datetime.now(UTC)
        # An access token lives for 15 minutes, and clocks may differ.
        assert 900 <= (time_of(message.forget_time) - time_of(message.revoke_time)).total_seconds() <= 1_000

        watched.by_admin("SetUserRoles", user_id=somebody.id, roles=["support"])
        [message] = told(1)
        changed = message.roles_changed
        assert (changed.user_id, set(changed.roles), changed.disabled) == (somebody.id, {"support", "user"}, False)

        watched.by_admin("DisableUser", user_id=somebody.id)
        messages = {message.WhichOneof("event"): message for message in told(2)}
        assert messages["session_ended"].session_ended.session_id == session_id(somebody.tokens)
        changed = messages["roles_changed"].roles_changed
        assert (changed.user_id, list(changed.roles), changed.disabled) == (somebody.id, [], True)

        watched.by_admin("EnableUser", user_id=somebody.id)
        [message] = told(1)
        changed = message.roles_changed
        assert (set(changed.roles), changed.disabled) == ({"support", "user"}, False)

        watched.by_admin("DeleteUser", user_id=somebody.id)
        [message] = told(1)
        assert (message.roles_changed.user_id, message.roles_changed.disabled) == (somebody.id, True)

        other.change("SetServiceAccountRoles", roles=[])
        [message] = told(1)
        changed = message.roles_changed
        assert (changed.user_id, list(changed.roles), changed.disabled) == (other.id, [], False)

        other.change("DeleteServiceKey", key_id=other.key_id)
        [message] = told(1)
        assert message.session_ended.session_id == other.key_id
        last = message

    with watched.stream(cursor) as stream:
        again, _ = until_caught_up(stream)
    assert len(again) == 8, "after the cursor, all of it"
    assert again[-1].session_ended.session_id == other.key_id
    with watched.stream(last.cursor) as stream:
        nothing, _ = until_caught_up(stream)
    assert nothing == [], "after the last cursor, nothing"
    with watched.stream() as stream:
        everything, _ = until_caught_up(stream)
    assert [subject(message) for message in everything[-8:]] == [subject(message) for message in again]
    # A message that comes again tells the roles of now, so that nothing is taken back that was told since.
    roles = [message.roles_changed for message in everything if subject(message) == somebody.id]
    assert [told.disabled for told in roles] == [True] * 4


def test_a_stream_without_news_sends_heartbeats_that_tell_how_current_it_is(watched):
    with watched.stream() as stream:
        beats = heartbeats(stream)
        first, came = next(beats), time.monotonic()
        second = next(beats)
        assert HEARTBEAT - 1 < time.monotonic() - came < HEARTBEAT + 5
        known = [time_of(beat.heartbeat.complete_time) for beat in (first, second)]
        assert known[0] < known[1] <= datetime.now(UTC)
        assert (datetime.now(UTC) - known[1]).total_seconds() < HEARTBEAT
        for beat in (first, second):
            assert not any(beat.HasField(time) for time in ("revoke_time", "forget_time"))


# -- who may follow ------------------------------------------------------------------------------------------------


def test_only_a_service_may_follow(watched):
    with connect(watched.server) as channel:
        judge(failure_of(lambda: next(watch(channel, None))), grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
    person = Somebody(watched.way, watched.engine, "admin")
    judge(watched.refusal(token=person.credential), grpc.StatusCode.PERMISSION_DENIED, "SERVICE_REQUIRED")


@pytest.mark.parametrize("change", ["DeleteServiceKey", "DisableServiceAccount", "DeleteServiceAccount"])
def test_a_service_that_loses_its_tokens_loses_its_stream(watched, change):
    with watched.stream() as stream:
        until_caught_up(stream)
        fields = {"key_id": watched.service.key_id} if change == "DeleteServiceKey" else {}
        watched.service.change(change, **fields)
        begun = time.monotonic()
        judge(end_of(stream), grpc.StatusCode.UNAUTHENTICATED, "SESSION_REVOKED")
        assert time.monotonic() - begun < HEARTBEAT


def test_a_stream_ends_with_its_token_and_goes_on_with_the_next_one(start_server, embedded):
    watched = Watched(start_server(embedded, service_token_ttl="1s"))
    token = watched.service.token()
    with watched.stream(token=token) as stream:
        _, cursor = until_caught_up(stream)
        ended = watched.log_out()
        # The token is valid for one second, plus five seconds of leeway.
        messages = []
        error = failure_of(lambda: messages.extend(stream))
        judge(error, grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED")
    with watched.stream(cursor, watched.service.token()) as stream:
        found, _ = until_caught_up(stream)
    assert [subject(message) for message in found] == [ended]


def test_the_streams_of_one_service_are_bounded_and_others_keep_theirs(watched):
    with connect(watched.server) as one, connect(watched.server) as two:
        streams = [watch(channel, watched.token) for channel in (one, two) for _ in range(128)]
        for stream in streams:
            stream.initial_metadata()
        with connect(watched.server) as three:
            error = failure_of(lambda: next(watch(three, watched.token)))
            judge(error, grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
            other = Service(watched.admin, watched.server)
            assert until_caught_up(watch(three, other.token()))
        streams[0].cancel()

        def has_place() -> bool:
            with connect(watched.server) as four:
                try:
                    return bool(next(watch(four, watched.token)))
                except grpc.RpcError as error:
                    assert reason_of(error) == "OVERLOADED"
                    return False

        wait_until("the place is free again", has_place)
        for stream in streams:
            stream.cancel()


# -- cursors -------------------------------------------------------------------------------------------------------


def test_a_cursor_that_cannot_be_served_says_so(watched, start_server, tmp_path):
    watched.log_out()
    with watched.stream() as stream:
        found, cursor = until_caught_up(stream)
    for text in ("nonsense", cursor[:-4], cursor + "AAAA", "A" * len(cursor), "é"):
        error = watched.refusal(text)
        judge(error, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", fields={"resume_cursor"})
    expired = grpc.StatusCode.OUT_OF_RANGE, "CURSOR_EXPIRED"
    changed = cursor[:20] + ("A" if cursor[20] != "A" else "B") + cursor[21:]
    judge(watched.refusal(changed), *expired)

    # Another database has another master key.
    foreign = Watched(start_server(Sqlite(tmp_path / "other")))
    judge(foreign.refusal(cursor), *expired)

    # The entry of the cursor was deleted: everything from before it has expired.
    watched.log_out()
    assert watched.engine.execute("DELETE FROM revocations WHERE number = (SELECT min(number) FROM revocations)") == 1
    judge(watched.refusal(found[0].cursor), *expired)
    with watched.stream() as stream:
        assert until_caught_up(stream)[0]


def test_streams_end_and_cursors_expire_when_the_database_was_restored(watched):
    watched.log_out()
    with watched.stream() as stream:
        _, cursor = until_caught_up(stream)
        # A restored database does not have the last entry, or has another one with its number.
        assert watched.engine.execute("UPDATE revocations SET forget_time = forget_time + 1") >= 1
        judge(end_of(stream), grpc.StatusCode.OUT_OF_RANGE, "CURSOR_EXPIRED")
    judge(watched.refusal(cursor), grpc.StatusCode.OUT_OF_RANGE, "CURSOR_EXPIRED")
    with watched.stream() as stream:
        assert until_caught_up(stream)[0]


# -- slow readers, and the end of connections ----------------------------------------------------------------------


def insert_revocations(engine, count: int) -> None:
    """Entries of sessions that nobody has."""
    new_id = {"postgres": "gen_random_uuid()", "sqlite": "randomblob(16)"}[engine.name]
    numbers = load.NUMBERS[engine.name].format(first=1, last=count, step=1)
    now = engine.as_time(datetime.now(UTC))
    later = engine.as_time(datetime.fromtimestamp(time.time() + 1_000, UTC))
    statement = f"INSERT INTO revocations (session_id, revoke_time, forget_time) SELECT {new_id}, ?, ? FROM {numbers}"
    assert engine.execute(statement, now, later) == count


def test_slow_readers_are_told_to_resume_and_take_no_memory(watched, capsys, size):
    """Streams whose clients do not read, while more is revoked than the buffer has room for. Then they read again."""
    readers, more = size(8, 100), BUFFERED + 5_000
    # Otherwise the client takes megabytes that nobody has asked it for.
    with connect(watched.server, ("grpc.http2.bdp_probe", 0)) as channel:
        streams = [watch(channel, watched.token) for _ in range(readers)]
        for stream in streams:
            until_caught_up(stream)
        before = resident(watched.server)
        insert_revocations(watched.engine, more)
        # A logout is answered after its server has read the log.
        last = watched.log_out()
        grown = resident(watched.server) - before
        messages = []
        expect_resume(failure_of(lambda: messages.extend(streams[0])), "too slowly")
        assert 0 < len(messages) < more
        for stream in streams[1:]:
            expect_resume(end_of(stream), "too slowly")
    with watched.stream(messages[-1].cursor) as stream:
        rest, _ = until_caught_up(stream)
    told = [subject(message) for message in messages + rest if subject(message)]
    assert len(told) == len(set(told)) == more + 1
    assert told[-1] == last
    with capsys.disabled():
        print(f"\n{readers} slow readers of {more} revocations: {grown:.1f} MiB", flush=True)
    # 85 bytes for each revocation in the set, 72 in the buffer, and a window for each reader.
    assert grown < size(60, 100)


def test_a_stream_goes_on_across_the_ends_of_its_connections(start_server, embedded):
    watched = Watched(start_server(embedded, max_connection_age="500ms"))
    with watched.stream() as stream:
        expect_resume(end_of(stream), "its connection ends")
    follower = Follower([watched.server], lambda: watched.token).start()
    try:
        ended = [watched.log_out() for _ in range(20)]
        wait_until("all are seen", lambda: set(ended) <= set(follower.seen))
        wait_until("the stream was resumed", lambda: follower.ends["UNAVAILABLE"] > 2)
    finally:
        follower.close()
    assert [what for what in follower.seen if what in set(ended)] == ended
    assert not follower.faults


def test_a_server_with_streams_stops_at_once_and_tells_them_to_resume(watched):
    with connect(watched.server) as channel:
        streams = [watch(channel, watched.token) for _ in range(50)]
        for stream in streams:
            until_caught_up(stream)
        begun = time.monotonic()
        watched.server.stop()
        assert time.monotonic() - begun < 10, "calls may take 30 s to finish, but these are none"
        for stream in streams:
            expect_resume(end_of(stream), "its connection ends")


# -- the database is away ------------------------------------------------------------------------------------------


def test_while_the_database_is_away_heartbeats_tell_that_nothing_new_is_known(postgres_binaries, start_server):
    cluster = Cluster(postgres_binaries)
    try:
        cluster.start()
        watched = Watched(start_server(Postgres(cluster)))
        with watched.stream() as stream:
            _, cursor = until_caught_up(stream)
            cluster.stop()
            stopped = datetime.now(UTC)
            beats = heartbeats(stream)
            known = [time_of(next(beats).heartbeat.complete_time) for _ in range(2)]
            assert known[0] == known[1] <= stopped
            judge(watched.refusal(cursor), grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
            cluster.start()
            wait_until("the server is healed", lambda: watched.server.client.health() == "SERVING")
            ended = watched.log_out()
            assert any(subject(message) == ended for message in stream)
            assert time_of(next(beats).heartbeat.complete_time) > stopped
    finally:
        cluster.remove()


def test_streams_that_have_caught_up_cost_the_database_nothing(cluster, start_server):
    engine = Postgres(cluster)
    engine.execute(f"ALTER DATABASE \"{engine.database}\" SET log_statement = 'all'")
    cluster.disconnect(engine.database)
    watched = Watched(start_server(engine))

    def reads(streams: int) -> int:
        """How often the log was read during some logouts, each of which every stream has seen."""
        with connect(watched.server) as channel:
            open_streams = [watch(channel, watched.token) for _ in range(streams)]
            for stream in open_streams:
                until_caught_up(stream)
            position, begun = cluster.log_position(), time.monotonic()
            for _ in range(10):
                ended = watched.log_out()
                for stream in open_streams:
                    assert any(subject(message) == ended for message in stream)
            sent = cluster.statements_since(position, engine.database)
            assert not any("number <= " in statement for statement in sent), "no older entries are read"
            # A replica reads the log at an interval, at each logout of its own, and when it is notified of that.
            return len([s for s in sent if "FROM revocations" in s]) - int((time.monotonic() - begun) / 0.7)

    assert max(reads(0), reads(50)) <= 21
    engine.close()


# -- three replicas ------------------------------------------------------------------------------------------------


class Replicas:
    """Three servers on one database, an admin, and a service."""

    def __init__(self, servers: list[Server], engine: Postgres):
        self.servers, self.engine = servers, engine
        self.clients = [server.new_client() for server in servers]
        self.ways = [ByGrpc(client) for client in self.clients]
        self.admin = Somebody(self.ways[0], engine, "admin")
        self.service = Service(self.admin, servers[0])


@contextmanager
def three_replicas(binary, engine, tmp_path_factory, **settings) -> Iterator[Replicas]:
    servers = []
    try:
        for _ in range(3):
            servers.append(Server(binary, engine, tmp_path_factory.mktemp("replica"), **settings))
            servers[-1].start()
        replicas = Replicas(servers, engine)
        yield replicas
        for client in replicas.clients:
            client.close()
    finally:
        for server in servers:
            server.close()
        engine.close()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def in_milliseconds(values: list[float]) -> str:
    p50, p99 = (1_000 * percentile(values, share) for share in (0.5, 0.99))
    return f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, longest {1_000 * max(values):.0f} ms"


@pytest.mark.parametrize("notifications", ["true", "false"], ids=["NOTIFY", "polling"])
def test_a_revocation_is_seen_at_every_replica_within_a_second(
    notifications, binary, cluster, tmp_path_factory, size, capsys
):
    engine, settings = Postgres(cluster), {"database_notifications": notifications}
    with three_replicas(binary, engine, tmp_path_factory, **settings) as replicas:
        followers = [Follower([server], replicas.service.token).start() for server in replicas.servers]
        took: list[list[float]] = [[], [], []]
        try:
            person = Somebody(replicas.ways[0]).person
            for _ in range(size(15, 200)):
                tokens = replicas.ways[0].login(person)
                ended = session_id(tokens)
                replicas.ways[0].ok("Logout", refresh_token=tokens["refreshToken"])
                answered = time.monotonic()
                for follower, times in zip(followers, took, strict=True):
                    wait_until("it is seen", lambda f=follower, e=ended: e in f.seen, pause=0.001)
                    times.append(max(0.0, follower.seen[ended] - answered))
        finally:
            for follower in followers:
                follower.close()
        assert not any(follower.faults for follower in followers)
    others = took[1] + took[2]
    with capsys.disabled():
        print(
            f"\nNOTIFY {notifications}: at the others {in_milliseconds(others)}; at the same {in_milliseconds(took[0])}"
        )
    assert percentile(others, size(50, 99) / 100) < PROMISE


class LateCommits:
    """Transactions that take a number of the log and commit later, or never."""

    def __init__(self, cluster, database: str, seed: int):
        self._cluster, self._database, self._random = cluster, database, random.Random(seed)
        self.committed, self.rolled_back = [], []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(longest,)) for longest in (0.05, 0.5, 4.0)]
        self._fault = None

    def __enter__(self) -> "LateCommits":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self._fault is None, self._fault

    def _run(self, longest: float) -> None:
        columns, values = "session_id, revoke_time, forget_time", "%s, now(), now() + interval '17 min'"
        statement = f"INSERT INTO revocations ({columns}) VALUES ({values})"
        try:
            with self._cluster.connect(self._database) as connection:
                while not self._stop.is_set():
                    ids = [uuid.uuid4() for _ in range(self._random.randrange(1, 4))]
                    connection.execute("BEGIN")
                    for id in ids:
                        connection.execute(statement, (id,))
                    self._stop.wait(self._random.uniform(0, longest))
                    commits = self._random.random() < 0.8
                    connection.execute("COMMIT" if commits else "ROLLBACK")
                    (self.committed if commits else self.rolled_back).extend(map(str, ids))
        except Exception as fault:
            self._fault = fault


class Crowd:
    """Sessions of one person, which threads end at all replicas. Each thread ends its own, one after the other."""

    def __init__(self, replicas: Replicas, threads: int, count: int):
        self._replicas = replicas
        self.owner = Somebody(replicas.ways[0])
        ids = [uuid.uuid4() for _ in range(count)]
        copied = (
            "user_id, create_time, end_time, generation, refresh_hash, refresh_issue_time, refresh_expire_time, "
            "last_refresh_time"
        )
        statement = f"INSERT INTO sessions (id, {copied}) SELECT unnest(?::uuid[]), {copied} FROM sessions WHERE id = ?"
        own = uuid.UUID(session_id(self.owner.tokens))
        assert replicas.engine.execute(statement, ids, own) == count
        self.lists = [[str(id) for id in ids[number::threads]] for number in range(threads)]
        # The sessions whose end was acknowledged, of each thread, with the time of the answer.
        self.ended: list[dict[str, float]] = [{} for _ in self.lists]

    def end(self, number: int) -> None:
        for session in self.lists[number]:
            # A replica may be killed in the middle of a call: then the session may have ended or not.
            for attempt in range(1_000):
                way = self._replicas.ways[(number + attempt) % 3]
                try:
                    way.ok("RevokeSession", credential=self.owner.credential, session_id=session)
                    break
                except grpc.RpcError as error:
                    if reason_of(error) == "NOT_FOUND":
                        break
                    assert error.code() is grpc.StatusCode.UNAVAILABLE, error
                    time.sleep(0.01)
            self.ended[number][session] = time.monotonic()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("notifications", ["true", pytest.param("false", marks=pytest.mark.nightly)])
def test_each_follower_sees_each_revocation_in_order(notifications, binary, cluster, tmp_path_factory, size, capsys):
    """Each sees each, and those that were ended one after the other in that order.

    The followers leave, stall, crash and resume at any replica. Entries commit late or never. A replica is killed.
    """
    count, crowd_threads = size(600, 10_000), 6
    seed = random.SystemRandom().randrange(2**32)
    engine = Postgres(cluster)
    often = size(4, 1) / 1_000
    chances = {"leave": often, "stall": often / 2, "forget": often / 2}
    with three_replicas(binary, engine, tmp_path_factory, database_notifications=notifications) as replicas:
        crowd = Crowd(replicas, crowd_threads, count)

        def disturbance(number: int):
            chosen = random.Random(seed + number)
            kinds, weights = [*chances, "go on"], [*chances.values(), 1 - sum(chances.values())]
            return lambda: chosen.choices(kinds, weights)[0]

        followers = [
            Follower(replicas.servers, replicas.service.token, disturbance(number), seed + number).start()
            for number in range(size(4, 8))
        ]
        steady = [Follower([server], replicas.service.token).start() for server in replicas.servers[:2]]
        begun = time.monotonic()
        try:
            with LateCommits(cluster, engine.database, seed) as late, ThreadPoolExecutor(crowd_threads) as pool:
                ending = [pool.submit(crowd.end, number) for number in range(crowd_threads)]
                wait_until("half of them have ended", lambda: sum(map(len, crowd.ended)) > count / 2, deadline=300)
                replicas.servers[2].kill()
                replicas.servers[2].start()
                for thread in ending:
                    thread.result()
            took = time.monotonic() - begun
            wanted = {session for ended in crowd.ended for session in ended} | set(late.committed)

            def lacking() -> list:
                return [(len(wanted - set(f.seen)), f.ends) for f in followers + steady if not wanted <= set(f.seen)]

            def seen_by_all() -> bool:
                assert not lacking(), lacking()
                return True

            wait_until(f"the followers see all of {len(wanted)} (seed {seed})", seen_by_all, deadline=200)
        finally:
            for follower in followers + steady:
                follower.close()
        for follower in followers + steady:
            assert not follower.faults, follower.faults
            assert not set(late.rolled_back) & set(follower.seen), "what was rolled back was never revoked"
            for ended in crowd.ended:
                assert [what for what in follower.seen if what in ended] == list(ended), f"seed {seed}"
        ends = sum((follower.ends for follower in followers), start=followers[0].ends.__class__())
        repeats = sum(follower.messages - len(follower.seen) for follower in followers)
        delays = [
            max(0.0, follower.seen[what] - answered)
            for follower in steady
            for ended in crowd.ended
            for what, answered in ended.items()
        ]
        with capsys.disabled():
            print(
                f"\n{len(wanted)} revocations in {took:.1f} s, {len(late.committed)} of them committed late and "
                f"{len(late.rolled_back)} more rolled back; {len(followers)} followers: {dict(ends)}, {repeats} "
                f"repeats and heartbeats; steady followers saw them after {in_milliseconds(delays)}",
                flush=True,
            )
