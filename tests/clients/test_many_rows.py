"""Housekeeping with very many expired rows: it deletes them in small steps, and the calls beside it go on.

A database is filled by SQL while its server is stopped. The next start deletes what has expired. Revocations are
deleted only after a server has held them in memory for the lifetime of an access token, so no test waits for that.
"""

import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import grpc
import pytest

from support import load, metrics
from support.client import Person
from support.engine import Engine
from support.expect import expect_unauthenticated
from support.faketime import wait_for_housekeeping
from support.http import Rest
from support.wait import PATIENCE, wait_until

# How many rows one statement may delete. With more, the other writes to SQLite wait for too long.
MOST_AT_ONCE = 1_000
# How long a call may take in seconds on a machine that runs other tests too.
LONGEST_CALL = 2.0
# The accounts of the expired sessions and tokens, and how many tokens they can have.
OWNERS = 20_000
MOST_TOKENS = 3 * OWNERS

# The time by which housekeeping decides whether to delete a row.
DECISIVE = {
    "sessions": "end_time",
    "login_attempts": "forget_time",
    "mail_limits": "spent_until",
    "reset_limits": "spent_until",
    "notice_limits": "spent_until",
    "one_time_tokens": "expire_time",
    "mail_outbox": "dead_time",
    "audit_events": "create_time",
}
LIMITS = ("mail_limits", "reset_limits", "notice_limits")
NEW_ID = {"postgres": "gen_random_uuid()", "sqlite": "randomblob(16)"}
# A key with the 32 bytes of a hash.
SUBJECT = {
    "postgres": "convert_to(lpad(n::text, 32, '0'), 'UTF8')",
    "sqlite": "CAST(printf('%032d', n) AS BLOB)",
}


# -- the rows ------------------------------------------------------------------------------------------------------


def insert(engine: Engine, table: str, rows: int, **columns: str) -> None:
    """Inserts this many rows in one statement. The values are SQL, in which `n` is the number of the row."""
    source = load.NUMBERS[engine.name].format(first=0, last=rows - 1, step=1)
    if "user_id" in columns:
        source += f" JOIN users u ON u.email = 'crowd-' || (n - n / {OWNERS} * {OWNERS} + 1) || '@crowd.example'"
    statement = f"INSERT INTO {table} ({', '.join(columns)}) SELECT {', '.join(columns.values())} FROM {source}"
    assert engine.execute(statement) == rows


def fill(engine: Engine, sessions: int, attempts: int, others: int) -> None:
    """Inserts this many sessions and login attempts that have expired, and such rows into each of the other tables."""
    # This is longer ago than audit events and mails that were given up are kept.
    then, id = load.LONG_AGO[engine.name], NEW_ID[engine.name]
    load.insert(engine, 1, OWNERS)
    times = dict.fromkeys(
        ("create_time", "end_time", "refresh_issue_time", "refresh_expire_time", "last_refresh_time"), then
    )
    session = {"id": id, "user_id": "u.id", "generation": "0", "refresh_hash": SUBJECT[engine.name]}
    insert(engine, "sessions", sessions, **session, **times)
    times = dict.fromkeys(("blocked_until", "forget_time"), then)
    insert(engine, "login_attempts", attempts, subject=SUBJECT[engine.name], failures="1", **times)
    for table in LIMITS:
        insert(engine, table, others, email="'a' || n || '@expired.example'", spent_until=then)
    purpose = f"CASE n / {OWNERS} WHEN 0 THEN 'verify_email' WHEN 1 THEN 'reset_password' ELSE 'change_email' END"
    times = dict.fromkeys(("create_time", "expire_time"), then)
    tokens = {"id": id, "user_id": "u.id", "purpose": purpose, "email": "u.email", **times}
    insert(engine, "one_time_tokens", min(others, MOST_TOKENS), **tokens)
    mail = {"id": id, "kind": "'verify_email'", "recipient": "'a' || n || '@expired.example'"}
    times = dict.fromkeys(("create_time", "next_attempt_time", "dead_time"), then)
    insert(engine, "mail_outbox", others, **mail, **times)
    insert(engine, "audit_events", others, id=id, create_time=then, action="'login'", user_id="u.id")
    insert(engine, "revocations", others, session_id=id, revoke_time=then, forget_time=then)
    load.settle_statistics(engine)


def expired(engine: Engine) -> dict[str, int]:
    """How many of these rows each table still holds."""
    then = load.LONG_AGO[engine.name]
    counts = (f"SELECT '{table}', count(*) FROM {table} WHERE {column} <= {then}" for table, column in DECISIVE.items())
    return {table: count for table, count in engine.query(" UNION ALL ".join(counts)) if count}


def wait_until_deleted(engine: Engine, deadline: float = PATIENCE) -> None:
    def is_empty() -> bool:
        left = expired(engine)
        assert not left, left
        return True

    wait_until("the expired rows are deleted", is_empty, deadline=deadline, pause=0.2)


# -- how many rows a statement deletes -----------------------------------------------------------------------------


def record_deletions(engine: Engine) -> None:
    """Adds triggers that write down how many rows each statement deletes, into the table `deletions`."""
    engine.execute("CREATE TABLE deletions (place text, moment text, rows bigint, PRIMARY KEY (place, moment))")
    if engine.name == "postgres":
        engine.execute(
            "CREATE FUNCTION record_deletion() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "INSERT INTO deletions SELECT TG_TABLE_NAME, clock_timestamp()::text, count(*) FROM gone; "
            "RETURN NULL; END $$"
        )
    for table in DECISIVE:
        if engine.name == "postgres":
            trigger = "REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION record_deletion()"
        else:
            # The time is the same for all rows of a statement.
            trigger = (
                f"BEGIN INSERT INTO deletions VALUES ('{table}', strftime('%Y-%m-%dT%H:%M:%f', 'now'), 1) "
                "ON CONFLICT (place, moment) DO UPDATE SET rows = rows + 1; END"
            )
        engine.execute(f"CREATE TRIGGER deletions_of_{table} AFTER DELETE ON {table} {trigger}")


def test_no_statement_deletes_more_than_a_thousand_rows(engine, start_server):
    server = start_server(engine)
    server.stop()
    rows = 5 * MOST_AT_ONCE
    fill(engine, rows, rows, rows)
    record_deletions(engine)

    server.start()
    wait_until_deleted(engine)

    deleted = dict(engine.query("SELECT place, CAST(sum(rows) AS bigint) FROM deletions GROUP BY place"))
    assert {table: deleted.get(table, 0) for table in DECISIVE} == dict.fromkeys(DECISIVE, rows)
    most = dict(engine.query("SELECT place, max(rows) FROM deletions GROUP BY place"))
    assert {table: count for table, count in most.items() if count > MOST_AT_ONCE} == {}


# -- the calls beside it -------------------------------------------------------------------------------------------


class Refreshes:
    """Refreshes one session without a pause until the `with` block ends."""

    def __init__(self, server, tokens):
        self.tokens = tokens
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Refreshes":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._over.is_set():
            begun = time.monotonic()
            try:
                self.tokens = self._server.client.refresh(self.tokens.refresh_token)
            except grpc.RpcError as error:
                self.failures.append(f"{error.code().name}: {error.details()}")
            self.seconds.append(time.monotonic() - begun)


def make_live_rows(engine: Engine, client) -> None:
    """Makes rows in each table that have not expired. They belong to another person than the one who refreshes."""
    person, _ = client.newcomer()
    wrong = replace(person, password=Person().password)
    for _ in range(3):
        expect_unauthenticated(lambda: client.login(wrong), "INVALID_CREDENTIALS")
    soon = engine.as_time(datetime.now(UTC) + timedelta(hours=2))
    for table in LIMITS:
        assert engine.execute(f"INSERT INTO {table} VALUES (?, ?)", Person().email, soon) == 1
    token = (
        "INSERT INTO one_time_tokens (id, user_id, purpose, email, create_time, expire_time) "
        f"SELECT {NEW_ID[engine.name]}, id, 'reset_password', email, create_time, ? FROM users WHERE email = ?"
    )
    assert engine.execute(token, soon, person.email) == 1


def live_rows(engine: Engine) -> dict[str, list[tuple]]:
    """The rows that have not expired, except for the sessions and their attempts, which the calls change."""
    then = load.LONG_AGO[engine.name]
    tables = (*LIMITS, "one_time_tokens", "audit_events")
    statements = {table: f"SELECT * FROM {table} WHERE {DECISIVE[table]} > {then} ORDER BY 1" for table in tables}
    rows = {table: engine.query(statement) for table, statement in statements.items()}
    rows["login_attempts"] = engine.query("SELECT * FROM login_attempts WHERE failures = 3")
    assert all(rows.values()), f"a table has no such row: {rows}"
    return rows


@pytest.mark.timeout(1800)
def test_no_call_fails_while_very_many_rows_are_deleted(engine, start_server, size, capsys):
    server = start_server(engine)
    _, tokens = server.client.newcomer()
    make_live_rows(engine, server.client)
    server.stop()
    begun = time.monotonic()
    fill(engine, size(12_000, 4_000_000), size(60_000, 1_500_000), size(60_000, 100_000))
    filled = time.monotonic() - begun
    before = live_rows(engine)
    [newest] = engine.query("SELECT max(number) FROM revocations")

    server.start()
    begun = time.monotonic()
    with Refreshes(server, tokens) as refreshes:
        wait_until_deleted(engine, deadline=size(2 * PATIENCE, 20 * PATIENCE))
    seconds = time.monotonic() - begun

    taken = sorted(refreshes.seconds)
    with capsys.disabled():
        print(
            f"\n{engine.name}: filled in {filled:.1f} s, deleted in {seconds:.1f} s; {len(taken)} calls, "
            f"p50 {1000 * taken[len(taken) // 2]:.1f} ms, p99 {1000 * taken[len(taken) * 99 // 100]:.1f} ms, "
            f"longest {1000 * taken[-1]:.1f} ms"
        )
    assert refreshes.failures == []
    assert taken[-1] < LONGEST_CALL
    # What has not expired is still there.
    assert live_rows(engine) == before
    assert engine.query("SELECT max(number) FROM revocations") == [newest]
    tokens = server.client.refresh(refreshes.tokens.refresh_token)
    assert server.client.me(tokens.access_token)
    wait_for_housekeeping(server)
    text = Rest(server, "ops_addr").get("/metrics").body.decode()
    assert metrics.read(text).value("postern_housekeeping_total", outcome="failed") == 0
