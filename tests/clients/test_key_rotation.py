"""The signing keys rotate by themselves, and no service that verifies tokens notices.

It tests the schedule against two verifiers that keep the keys exactly as long as `Cache-Control` allows (PyJWT and a
real Envoy), the algorithms, replicas that were away, and `postern keys`. The rules of the schedule are tested
exhaustively in `src/domain/key_schedule.rs`.
"""

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import grpc
import pytest

from support import jose, metrics
from support.client import Person
from support.engine import Postgres, new_master_key
from support.expect import reason_of
from support.http import Rest
from support.keys import published_keys, states
from support.verifiers import ALGORITHMS, WithPyJwt, fetch_keys, start_envoy
from support.wait import wait_until

# The shortest times that there are: every key signs for five seconds, and is published for as long before.
FAST = {"signing_key_rotation": "5s", "signing_key_publish_ahead": "5s"}
ROTATIONS = 5


def kid_of(token: str) -> str:
    return jose.header_of(token)["kid"]


def fresh(server, refresh_token: str):
    """The next pair of tokens of a session, and the key of the access token."""
    tokens = server.client.refresh(refresh_token)
    return tokens, kid_of(tokens.access_token)


def is_accepted(server, token: str) -> bool:
    try:
        server.client.me(token)
    except grpc.RpcError as error:
        assert reason_of(error) == "TOKEN_INVALID", error
        return False
    return True


def audited(engine, action: str) -> list[str]:
    rows = engine.query("SELECT detail FROM audit_events WHERE action = ? ORDER BY id", action)
    return [row[0] for row in rows]


def keys_command(server, *arguments: str) -> list[str]:
    done = server.run("keys", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def move_schedule(engine, by: timedelta) -> None:
    """Makes the keys older, as if nobody had been there for so long."""
    for kid, created, signs in engine.query("SELECT kid, create_time, sign_time FROM signing_keys"):
        created, signs = (engine.as_time(engine.to_time(stored) - by) for stored in (created, signs))
        statement = "UPDATE signing_keys SET create_time = ?, sign_time = ? WHERE kid = ?"
        assert engine.execute(statement, created, signs, kid) == 1


# -- two verifiers -------------------------------------------------------------------------------------------------


class Checks:
    """Tokens under load, and the verifiers that are shown them."""

    def __init__(self, servers: list, tmp_path):
        self.servers = servers
        addresses = [Rest(server).address for server in servers]
        self.by_pyjwt = WithPyJwt(addresses)
        self.by_envoy = start_envoy(addresses[-1], tmp_path / "envoy")
        _, self.tokens = servers[0].client.newcomer()
        self.alive: dict[str, str] = {}
        self.checks = 0
        self.refusals: list[tuple[str, str]] = []

    def run_round(self, checks: int) -> None:
        """One new token, minted by a random replica, and so many checks of it and of one of every key before."""
        server = random.choice(self.servers)
        self.tokens, kid = fresh(server, self.tokens.refresh_token)
        self.alive[kid] = self.tokens.access_token
        for number in range(checks):
            token = self.tokens.access_token if number % 2 else random.choice([*self.alive.values()])
            for verifier in (self.by_pyjwt, self.by_envoy):
                self.checks += 1
                refusal = verifier.refusal(token)
                if refusal is not None:
                    self.refusals.append((type(verifier).__name__, refusal))
        for server in self.servers:
            if not is_accepted(server, random.choice([*self.alive.values()])):
                self.refusals.append(("Postern", "TOKEN_INVALID"))

    def close(self) -> None:
        self.by_envoy.close()


def test_keys_rotate_under_load_and_no_verifier_refuses_a_token(start_server, cluster, tmp_path, size, capsys):
    engine = Postgres(cluster)
    servers = [start_server(engine, **FAST) for _ in range(2)]
    checks = Checks(servers, tmp_path)
    wanted, started = size(2_000, 100_000), time.monotonic()
    try:
        while len(checks.alive) <= ROTATIONS or checks.checks < wanted:
            checks.run_round(size(10, 200))
            assert not checks.refusals, checks.refusals
            assert time.monotonic() - started < 400, f"{len(checks.alive)} keys after {checks.checks} checks"
    finally:
        checks.close()
        for server in servers:
            server.close()
    assert checks.by_pyjwt.fetches > ROTATIONS
    assert len(audited(engine, "signing_key_scheduled")) >= ROTATIONS
    engine.close()
    with capsys.disabled():
        seconds = time.monotonic() - started
        print(f"\n{checks.checks} checks with {len(checks.alive)} keys in {seconds:.0f} s: no refusal", flush=True)


def test_with_the_publishing_ahead_taken_out_both_verifiers_refuse(start_server, embedded, tmp_path):
    server = start_server(embedded, lame_duck="0s")
    checks = Checks([server], tmp_path)
    try:
        checks.run_round(2)
        assert not checks.refusals
        [line] = keys_command(server, "rotate")
        kid = line.split("\t")[0]
        # The key signs now, and verifiers may keep the keys from before for five minutes.
        now = embedded.query("SELECT min(sign_time) FROM signing_keys")[0][0] + 1
        assert embedded.execute("UPDATE signing_keys SET sign_time = ? WHERE kid = ?", now, kid) == 1
        server.restart()
        _, signs = fresh(server, checks.tokens.refresh_token)
        assert signs == kid
        checks.tokens = server.client.newcomer()[1]
        checks.run_round(2)
        assert {who for who, _ in checks.refusals} == {"WithPyJwt", "WithEnvoy"}
    finally:
        checks.close()


# -- the settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_another_algorithm_takes_effect_with_the_next_key(start_server, embedded, algorithm):
    before = "EdDSA" if algorithm == "ES256" else "ES256"
    server = start_server(embedded, signing_algorithm=before, signing_key_publish_ahead="5s", lame_duck="0s")
    _, tokens = server.client.newcomer()
    server.restart(signing_algorithm=algorithm)
    tokens, first = fresh(server, tokens.refresh_token)
    assert jose.header_of(tokens.access_token)["alg"] == before

    keys_command(server, "rotate")
    # Its time has come.
    move_schedule(embedded, timedelta(minutes=1))

    def signed_with_another():
        nonlocal tokens
        tokens, kid = fresh(server, tokens.refresh_token)
        return kid != first

    wait_until("the next key signs", signed_with_another, pause=0.1)
    assert jose.header_of(tokens.access_token)["alg"] == algorithm
    assert WithPyJwt([Rest(server).address]).refusal(tokens.access_token) is None
    assert is_accepted(server, tokens.access_token)
    seen = metrics.read(Rest(server, "ops_addr").get("/metrics").body.decode())
    assert seen.value("postern_signing_key_reads_total", outcome="read") > 0
    assert seen.value("postern_signing_key_reads_total", outcome="failed") == 0
    [new] = [key for key in published_keys(server) if key["kid"] != first]
    private = {"d", "p", "q", "dp", "dq", "qi"}
    assert (new["alg"], new["use"], private & set(new)) == (algorithm, "sig", set())
    discovery = Rest(server).get("/.well-known/openid-configuration").ok()
    assert discovery["id_token_signing_alg_values_supported"] == sorted([before, algorithm])


def test_the_keys_may_be_kept_for_a_part_of_the_time_for_which_the_next_one_is_published(start_server, embedded):
    server = start_server(embedded)
    _, age = fetch_keys(Rest(server).address)
    assert age == 300
    server.restart(signing_key_publish_ahead="40s")
    _, age = fetch_keys(Rest(server).address)
    assert age == 10, "the shorter time counts while the settings change"


def test_tokens_with_unknown_keys_make_the_server_read_the_keys_once_in_a_few_seconds(start_server, embedded):
    server = start_server(embedded)
    operations = Rest(server, "ops_addr")
    forged = jose.with_header(server.client.newcomer()[1].access_token, kid="unknown")
    server.secrets.add(forged)

    def reads() -> float:
        seen = metrics.read(operations.get("/metrics").body.decode())
        return seen.value("postern_signing_key_reads_total", outcome="read")

    before, started = reads(), time.monotonic()
    for _ in range(300):
        assert not is_accepted(server, forged)
    wait_until("the keys are read", lambda: reads() > before)
    seconds = time.monotonic() - started
    # Every five seconds, and every twenty without any token.
    assert reads() - before <= 1 + seconds / 5 + seconds / 20, seconds


# -- replicas ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(start_server, cluster):
    """Two replicas."""
    engine = Postgres(cluster)
    servers = [start_server(engine, signing_key_publish_ahead="5s", lame_duck="0s") for _ in range(2)]
    yield engine, *servers
    for server in servers:
        server.close()
    engine.close()


def test_a_replica_that_stood_still_never_signs_with_a_key_that_was_forgotten(pair):
    engine, first, second = pair
    _, tokens = second.client.newcomer()
    old = kid_of(tokens.access_token)
    other = first.client.newcomer()[1]
    second._process.send_signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    try:
        [line] = keys_command(first, "rotate")
        new = line.split("\t")[0]
        # A week passes, for the database and the first replica.
        wait_until("it is published", lambda: len(states(first)) == 2)
        move_schedule(engine, timedelta(days=7))
        wait_until("the old key is forgotten", lambda: [key.kid for key in states(first)] == [new])
        time.sleep(max(0.0, 14 - (time.monotonic() - stopped_at)))
    finally:
        second._process.send_signal(signal.SIGCONT)

    def continued():
        try:
            return fresh(second, tokens.refresh_token)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE, error
            return None

    continued_tokens, kid = wait_until("the second replica signs", continued, pause=0.01)
    assert kid == new != old
    assert is_accepted(first, continued_tokens.access_token)
    _, kid = fresh(first, other.refresh_token)
    assert kid == new


def test_a_replica_that_was_down_for_a_week_starts_with_the_keys_of_the_others(pair):
    engine, first, second = pair
    _, tokens = first.client.newcomer()
    second.stop()
    move_schedule(engine, timedelta(days=97))
    wait_until("the next key is made", lambda: [key.state for key in states(first)] == ["signing", "next"])
    second.start()

    def both_sign_with_the_next():
        nonlocal tokens
        kids = set()
        for server in (first, second):
            tokens, kid = fresh(server, tokens.refresh_token)
            kids.add(kid)
            assert all(is_accepted(other, tokens.access_token) for other in (first, second))
        return (
            kids == {key.kid for key in states(first) if key.state == "signing"}
            and len(audited(engine, "signing_key_scheduled")) == 1
            and [key.state for key in states(first)] == ["retired", "signing"]
        )

    wait_until("both sign with the next key", both_sign_with_the_next, pause=0.1)


def test_of_rotations_at_the_same_time_one_makes_a_key(pair):
    engine, first, second = pair
    with ThreadPoolExecutor(4) as pool:
        lines = list(pool.map(lambda server: keys_command(server, "rotate"), [first, second] * 2))
    assert len({line[0].split("\t")[0] for line in lines}) == 1, lines
    assert len(states(first)) == 2
    assert len(audited(engine, "signing_key_scheduled")) == 1


# -- a key is revoked ----------------------------------------------------------------------------------------------


def test_a_revoked_key_is_refused_everywhere_within_a_second_and_another_one_signs(pair, capsys):
    engine, first, second = pair
    (_, tokens), (_, other) = first.client.newcomer(), second.client.newcomer()
    revoked = kid_of(tokens.access_token)
    for server in (first, second):
        assert is_accepted(server, tokens.access_token), "it is remembered from now on"

    keys_command(first, "revoke", revoked)
    since = time.monotonic()
    for server in (first, second):
        wait_until("it is refused", lambda server=server: not is_accepted(server, tokens.access_token), pause=0.01)
    took = time.monotonic() - since
    with capsys.disabled():
        print(f"\na revoked key is refused by both replicas {1000 * took:.0f} ms after the command", flush=True)
    assert took < 1, took
    assert not is_accepted(second, other.access_token)
    assert revoked not in {key["kid"] for key in fetch_keys(Rest(second).address)[0]["keys"]}

    def signs_anew(server, tokens):
        try:
            return fresh(server, tokens.refresh_token)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE, error
            return None

    for server, pair_of_tokens in ((first, tokens), (second, other)):
        renewed, kid = wait_until("another key signs", lambda s=server, t=pair_of_tokens: signs_anew(s, t))
        assert kid != revoked
        wait_until(
            "all know it",
            lambda token=renewed.access_token: all(is_accepted(server, token) for server in (first, second)),
        )
    assert audited(engine, "signing_key_revoked") == [revoked]


def test_a_revoked_key_gives_way_to_the_one_that_is_published_already(start_server, embedded):
    server = start_server(embedded)
    [line] = keys_command(server, "rotate")
    after = line.split("\t")[0]
    [signing, following] = states(server)
    assert (signing.state, following.state, following.kid) == ("signing", "next", after)
    keys_command(server, "revoke", signing.kid)
    assert [(key.kid, key.state) for key in states(server)] == [(after, "signing")]
    person = Person()
    server.client.sign_up(person)

    def signs():
        try:
            return kid_of(server.client.login(person).access_token)
        except grpc.RpcError as error:
            # The revoked key is gone, and the other one is about to be read.
            assert error.code() == grpc.StatusCode.UNAVAILABLE, error
            return None

    wait_until("it signs", lambda: signs() == after)


# -- the master key is changed -------------------------------------------------------------------------------------


def test_the_master_key_is_changed_online_and_nobody_is_logged_out(start_server, engine):
    old, new = new_master_key(), new_master_key()
    server = start_server(engine, master_key=old, lame_duck="0s")
    server.secrets |= {old, new}
    keys_command(server, "rotate")
    _, tokens = server.client.newcomer()
    tokens, _ = fresh(server, tokens.refresh_token)

    # Replicas with both keys and replicas with the old one alone understand each other.
    server.restart(master_key=new, previous_master_key=old)
    tokens, _ = fresh(server, tokens.refresh_token)
    server.restart(master_key=old, previous_master_key=None)
    used = tokens.refresh_token
    tokens, _ = fresh(server, used)
    assert server.client.refresh(used).refresh_token == tokens.refresh_token, "the answer may have been lost"

    server.restart(master_key=new, previous_master_key=old)
    assert len(keys_command(server, "rewrap")) == 2
    assert keys_command(server, "rewrap") == [], "it is done"
    # The running server goes on, and what was made with the old key before is still good, byte for byte.
    server.restart()
    assert server.client.refresh(used).refresh_token == tokens.refresh_token
    tokens, _ = fresh(server, tokens.refresh_token)

    # Everything that is in use was made with the new key by now.
    server.restart(previous_master_key=None)
    assert is_accepted(server, tokens.access_token)
    fresh(server, tokens.refresh_token)
    assert len(audited(engine, "signing_key_rewrapped")) == 2


SLOW = {
    "postgres": [
        "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF EXISTS (SELECT FROM audit_events "
        "WHERE action = 'signing_key_rewrapped') THEN PERFORM pg_sleep(4); END IF; RETURN NEW; END $$",
        "CREATE TRIGGER slow BEFORE UPDATE OF sealed_private_key ON signing_keys FOR EACH ROW EXECUTE FUNCTION wait()",
    ],
    "sqlite": [
        "CREATE TRIGGER slow BEFORE UPDATE OF sealed_private_key ON signing_keys WHEN EXISTS (SELECT 1 FROM "
        "audit_events WHERE action = 'signing_key_rewrapped') BEGIN SELECT (WITH RECURSIVE c(x) AS (SELECT 1 "
        "UNION ALL SELECT x + 1 FROM c LIMIT 1000000000) SELECT count(*) FROM c); END"
    ],
}


def test_a_change_of_the_master_key_that_is_killed_goes_on_where_it_was(start_server, engine):
    old, new = new_master_key(), new_master_key()
    server = start_server(engine, master_key=old, lame_duck="0s")
    server.secrets |= {old, new}
    keys_command(server, "rotate")
    _, tokens = server.client.newcomer()
    server.restart(master_key=new, previous_master_key=old)
    for statement in SLOW[engine.name]:
        engine.execute(statement)

    command = server.begin("keys", "rewrap")
    try:
        wait_until("one key is done", lambda: len(audited(engine, "signing_key_rewrapped")) == 1)
        assert command.poll() is None, "it is at the second key"
    finally:
        command.kill()
        command.wait()
    engine.execute("DROP TRIGGER slow" + (" ON signing_keys" if engine.name == "postgres" else ""))

    # One key is encrypted with the new key, and one with the old. Servers that have both go on.
    server.restart()
    tokens, _ = fresh(server, tokens.refresh_token)
    assert server.run("keys", "list", "--states").stdout.count("\n") == 2
    assert len(keys_command(server, "rewrap")) == 1
    server.restart(previous_master_key=None)
    assert is_accepted(server, tokens.access_token)
    assert len(states(server)) == 2
